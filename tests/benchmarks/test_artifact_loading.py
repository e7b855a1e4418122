"""Loading an artifact of 100 MB: how long beside merely reading its files, and its peak of memory.

`make benchmark` prints the two times side by side: what loading adds to reading is the checks.
"""

import subprocess
import sys

import pytest
import torch

from steerrec.artifacts import Artifact, load_artifact
from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder

from ..unit.test_artifact_memory import MEASURE, pytestmark  # noqa: F401
from ..unit.tiny import random_recommender

WIDTH, LATENTS = 512, 24_000  # 2 x 49 MB of weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One SAE with a table, and beside it an artifact of nothing much."""
    folder = tmp_path_factory.mktemp("loading")
    rec = random_recommender(width=WIDTH)
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(WIDTH, LATENTS, 32, generator=generator)
    made = Artifact.create(rec, sae)
    columns = {f"column_{n}": torch.randn(LATENTS, generator=generator) for n in range(6)}
    columns |= {name: torch.ones(LATENTS) for name in ("cohens_d", "std_a", "std_b")}
    made.at().tables["popularity"] = AttributionTable(columns, {"name": "popularity"})
    made.save(folder / "large")
    Artifact.create(rec, SparseAutoencoder(WIDTH, 8, 2)).save(folder / "small")
    return folder


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.benchmark(group="load an artifact of 100 MB")
def test_reading_the_files_of_an_artifact(benchmark, folder):
    def read():
        return sum(len(f.read_bytes()) for f in (folder / "large").rglob("*") if f.is_file())

    assert benchmark(read) == size(folder / "large") > 99e6


@pytest.mark.benchmark(group="load an artifact of 100 MB")
def test_loading_an_artifact(benchmark, folder):
    assert benchmark(load_artifact, folder / "large").at().sae.d_sae == LATENTS


def test_the_peak_of_memory_is_little_more_than_the_artifact(folder):
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, folder / "small", folder / "large"],
        capture_output=True,
        text=True,
        check=True,
    )
    outcome, taken = run.stdout.split()
    ratio = int(taken) / size(folder / "large")
    print(f"peak: {ratio:.3f} of the artifact's size")  # noqa: T201
    assert outcome == "read"
    assert 0.95 < ratio < 1.2
