"""What a hostile artifact may cost: measured in a process of its own, torch's memory included."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from steerrec.artifacts import Artifact
from steerrec.autoencoder import SparseAutoencoder

from .tiny import random_recommender

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process"
)

MEASURE = """
import sys
from steerrec.artifacts import load_artifact
from steerrec.errors import SteerrecError
def memory(line):  # of this process alone: ru_maxrss is inherited from the parent
    with open("/proc/self/status") as status:
        return next(int(row.split()[1]) for row in status if row.startswith(line)) * 1024
load_artifact(sys.argv[1])  # whatever is imported late
for folder in sys.argv[2:]:
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # the peak begins anew
    before = memory("VmRSS")
    try:
        load_artifact(folder)
        outcome = "read"
    except SteerrecError:
        outcome = "refused"
    print(outcome, memory("VmHWM") - before)
"""
SLACK = 48 << 20  # bytes; JSON of 4 MiB at most may take this, whatever the size of the file


def header(text, body=b"", length=None):
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def entry(shape, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}


def many_tensors(count):
    """As many empty tensors as there is room for."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({str(n): empty for n in range(count)}).encode()


HOSTILE_WEIGHTS = {
    "a length of 2^63": header(b"{}", length=2**63),
    "a header of 80 MB": header(many_tensors(1_000_000)),
    "a header of 4 MB": header(many_tensors(45_000)),
    "a shape of 4 TB": header(json.dumps({"W_enc": entry([10**6, 10**6], 8)}).encode(), bytes(8)),
    "a zero shape": header(json.dumps({"W_enc": entry([0, 10**15], 0)}).encode()),
    "offsets of 4 TB": header(
        json.dumps({"W_enc": entry([10**6, 10**6], 4 * 10**12)}).encode(), bytes(8)
    ),
}
HOSTILE_JSON = {
    "deep": "[" * 2_000_000,
    "flat": "[" + "0," * 1_500_000 + "0]",
    "objects": "[" + "{}," * 1_000_000 + "{}]",
    "long": json.dumps({"format_version": "1.0", "x": "é" * 10_000_000}, ensure_ascii=False),
    "digits": '{"x": ' + "9" * 4_000_000 + "}",
    "fraction": '{"x": 0.' + "9" * 4_000_000 + "}",
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By name: what came of each, how much memory it took, and the size of its largest file."""
    root = tmp_path_factory.mktemp("hostile")
    rec = random_recommender()
    honest = Artifact.create(rec, SparseAutoencoder(4, 12, 3))
    honest.save(root / "honest")
    cases = {}
    for number, (name, content) in enumerate({**HOSTILE_WEIGHTS, **HOSTILE_JSON}.items()):
        folder = root / str(number)
        honest.save(folder)
        if isinstance(content, bytes):
            file = folder / rec.site.folder / "sae_weights.safetensors"
            file.write_bytes(content)
        else:
            file = folder / ("steerrec.json" if number % 2 else f"{rec.site.folder}/cfg.json")
            file.write_text(content, encoding="utf-8")
        cases[name] = folder, file.stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, root / "honest", *(folder for folder, _ in cases.values())],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in run.stdout.splitlines()]
    sizes = [size for _, size in cases.values()]
    return {
        name: (outcome, int(taken), size)
        for name, (outcome, taken), size in zip(cases, lines, sizes, strict=True)
    }


@pytest.mark.parametrize("name", [*HOSTILE_WEIGHTS, *HOSTILE_JSON])
def test_what_is_hostile_is_refused_and_takes_no_more_than_twice_its_size(outcomes, name):
    outcome, taken, size = outcomes[name]
    assert outcome == "refused"
    assert taken <= 2 * size + SLACK


def test_the_measure_sees_torchs_memory(tmp_path):
    """Else the numbers above would prove nothing."""
    rec = random_recommender(width=1000)
    Artifact.create(rec, SparseAutoencoder(4, 12, 3)).save(tmp_path / "small")
    large = SparseAutoencoder.from_weights(
        {
            "W_enc": torch.zeros(1000, 20_000),
            "b_enc": torch.zeros(20_000),
            "W_dec": torch.zeros(20_000, 1000),
            "b_dec": torch.zeros(1000),
        },
        3,
    )
    Artifact.create(rec, large).save(tmp_path / "large")
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "large"],
        capture_output=True,
        text=True,
        check=True,
    )
    outcome, taken = run.stdout.split()
    assert outcome == "read"
    assert 160e6 * 0.9 < int(taken) < 160e6 * 1.2
