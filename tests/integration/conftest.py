"""The command line in this process, and a small world for it: data, a MODEL and an ARTIFACT.

Ids are text, columns have names that nothing recognises, and a 3-core is needed: later commands
can only do without these options if MODEL and ARTIFACT remember them.
"""

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from steerrec.cli.app import run
from steerrec.data import Interactions, simulate

from ..hub.server import LoopbackHub

COLUMNS = ("--user-col", "who", "--item-col", "what", "--time-col", "when")
SMALL_MODEL = ("--hidden-size", "32", "--layers", "1", "--max-length", "20", "--batch-size", "64")
SMALL_SAE = ("--latents", "64", "--k", "8", "--batch-size", "256", "--epochs", "8")


@dataclass(frozen=True)
class Result:
    """Exit status, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout, which holds nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def steerrec(*arguments: object) -> Result:
    """Run a command line in this process, as the installed entry point would."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),  # the command line sets showwarning
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        warnings.simplefilter("default")
        patch.setattr(sys, "argv", ["steerrec", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run()
    return Result(int(exit.value.code or 0), out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class World:
    """Made once; tests leave it as it is."""

    folder: Path
    trained: Result
    attached: Result
    scored: Result

    @property
    def data(self) -> Path:
        return self.folder / "visits.csv"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    @property
    def steer(self) -> tuple[object, ...]:
        """A `steer` command to add options to."""
        return ("steer", self.artifact, "--model", self.model, "--data", self.data)


@pytest.fixture(scope="session", autouse=True)
def plain_process() -> Iterator[None]:
    """One thread, here and in child processes, and no tracebacks that a developer asked for.

    Models this small are slower on several threads, and very slow where the cores are busy.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("STEERREC_DEBUG", raising=False)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def cli() -> Callable[..., Result]:
    return steerrec


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    data, model, artifact = (folder / name for name in ("visits.csv", "model", "artifact"))
    write_visits(simulate(240, 80, seed=3, min_length=8, max_length=30), folder)
    options = (*SMALL_MODEL, "--epochs", "10", "--learning-rate", "0.005", "--k-core", "3")
    trained = steerrec("train", data, "-o", model, *COLUMNS, *options, "--json")
    assert trained.code == 0, trained.err
    attached = steerrec("attach", model, "--data", data, "-o", artifact, *SMALL_SAE, "--json")
    assert attached.code == 0, attached.err
    score = ("score", artifact, "--model", model, "--data", data, "--users", "512")
    scored = steerrec(*score, "--json")
    assert scored.code == 0, scored.err
    return World(folder, trained, attached, scored)


TOKEN = "hf_acmeacmeacmeacmeacmeacmeacme"
OTHER = "hf_otherotherotherotherother"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub of this test's own, with an empty cache, and the login of `acme`; no pauses."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    no_pauses = SimpleNamespace(sleep=lambda seconds: None)
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", no_pauses)
    monkeypatch.setattr("steerrec.hub_client.time", no_pauses)
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add_user("acme", TOKEN)
        hub.add_user("other", OTHER)
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache that `hub` sets up."""
    return tmp_path / "cache"


def write_visits(interactions: Interactions, folder: Path) -> None:
    """`items.csv`, and `visits.csv` with text ids.

    Two users and two of the items are too rare for a 3-core, and twelve users take their last item
    twice.
    """
    assert interactions.time is not None
    assert min(np.bincount(interactions.item)) >= 3
    rows = pl.DataFrame(
        {
            "who": "u" + interactions.user_ids.cast(pl.String).gather(interactions.user),
            "what": "i" + interactions.item_ids.cast(pl.String).gather(interactions.item),
            "when": interactions.time,
        }
    )
    again = rows.group_by("who", maintain_order=True).last().head(12)
    again = again.with_columns(pl.col("when") + 1)
    rare = {"who": ["new1", "new2", "new2"], "what": ["rare1", "rare2", rows["what"][0]]}
    rows = pl.concat([rows, again, pl.DataFrame({**rare, "when": rows["when"][:3]})])
    rows.write_csv(folder / "visits.csv")
    items = interactions.item_attributes.select(
        ("i" + interactions.item_ids.cast(pl.String)).alias("item_id"), "title", "category"
    )
    items.write_csv(folder / "items.csv")
