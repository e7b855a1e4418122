"""One team publishes, another pulls: two processes, two caches, and the Hub between them alone."""

import json
import os
import shutil
import subprocess
import sys

import polars as pl
import pytest

from steerrec.data import simulate, write_csv

from .conftest import TOKEN

RUN = """
import sys
from steerrec.cli.app import app

def steerrec(line):
    app(line.split(), standalone_mode=False)
"""

PUBLISH = """
steerrec("train data -o model --hidden-size {width} --layers 1 --max-length 20 --epochs 2")
steerrec("attach model --data data -o artifact --latents {latents} --k 8 --epochs {epochs}")
steerrec("score artifact --model model --data data --users 256")
steerrec("steer artifact --model model --data data -o v1.parquet")
steerrec("push model acme/sasrec --tag v1")
steerrec("push artifact acme/popsteer --tag v1 --model model")
steerrec("score artifact --model model --data data --users 32 --seed 7")
steerrec("steer artifact --model model --data data -o v2.parquet")
steerrec("push artifact acme/popsteer --tag v2 --model model")
"""

USE = """
steerrec("steer acme/popsteer --revision v2 --data data -o v2.parquet")
steerrec("steer acme/popsteer --revision v1 --data data -o v1.parquet")
steerrec("steer acme/popsteer --data data -o main.parquet")
"""

AGAIN = """
steerrec("steer acme/popsteer --revision {sha} --data data -o again.parquet")
"""

TRANSFORMERS = """
import torch
from transformers import AutoConfig, AutoModel
import steerrec.adapters.sasrec as sasrec

model = AutoModel.from_pretrained("acme/sasrec", revision="v1")
assert type(model) is sasrec.SASRecModel, type(model)
assert AutoConfig.from_pretrained("acme/sasrec").num_items == model.config.num_items
own = sasrec.load("acme/sasrec", revision="v1").model
for (name, one), (other_name, other) in zip(
    model.state_dict().items(), own.state_dict().items(), strict=True
):
    assert name == other_name and torch.equal(one, other), name
ids = torch.tensor([[3, 1, 4], [1, 5, 0]])
with torch.no_grad():
    assert torch.equal(model.score(ids), own.score(ids))
"""


@pytest.fixture
def run(hub, tmp_path):
    """Run a script in a process of its own, in the folder and with the cache of one team."""

    def run(team, script, **environment):
        folder = tmp_path / team
        own = {
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": hub.url,
            "OMP_NUM_THREADS": "1",
            "PYTHONSAFEPATH": "1",
            **environment,
        }
        kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        done = subprocess.run(
            [sys.executable, "-c", RUN + script],
            cwd=folder,
            env={**kept, **own},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    return run


def lists(folder, name):
    frame = pl.read_parquet(folder / f"{name}.parquet")
    assert frame["rank"].max() == 10
    return frame


def check(hub, run, tmp_path, more="", **sizes):
    for team in ("publisher", "user"):
        (tmp_path / team).mkdir()
        write_csv(simulate(120, 60, seed=1, min_length=5, max_length=15), tmp_path / team / "data")
    run("publisher", PUBLISH.format(**sizes), HF_TOKEN=TOKEN)
    published = {name: lists(tmp_path / "publisher", name) for name in ("v1", "v2")}
    assert not published["v1"].equals(published["v2"])
    repo = hub.repository("acme/popsteer")
    assert len(repo.commits) == 3  # made, v1, v2
    assert hub.asked("PUT /storage")
    shutil.move(tmp_path / "publisher", tmp_path / "elsewhere")

    hub.seen.clear()
    run("user", USE + more)
    assert {seen.token for seen in hub.seen} == {None}
    for name in ("v1", "v2"):
        assert lists(tmp_path / "user", name).equals(published[name])
    assert lists(tmp_path / "user", "main").equals(published["v2"])

    hub.seen.clear()
    run("user", AGAIN.format(sha=repo.tags["v1"]))
    assert hub.seen == []
    assert lists(tmp_path / "user", "again").equals(published["v1"])


def test_one_team_publishes_and_another_steers(hub, run, tmp_path):
    check(hub, run, tmp_path, TRANSFORMERS, width=16, latents=64, epochs=2)
    record = json.loads((tmp_path / "elsewhere" / "artifact" / "steerrec.json").read_text())
    assert "repo_id" not in record["base_model"]  # what was recorded is what was pushed
    tree = hub.repository("acme/popsteer").commit_at("v2").files
    base = json.loads(hub.store.content(tree["steerrec.json"]))["base_model"]
    assert base["revision"] == hub.repository("acme/sasrec").tags["v1"]


@pytest.mark.slow
def test_files_over_ten_megabytes(hub, run, tmp_path):
    check(hub, run, tmp_path, width=64, latents=21_000, epochs=1)
    tree = hub.repository("acme/popsteer").commit_at("v1").files
    large = [file for file in tree.values() if file.size > 10_000_000]
    assert [bool(file.sha256) for file in large] == [True]
