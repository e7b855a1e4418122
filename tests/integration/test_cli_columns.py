"""Commands on a model of one's own that reads times and ratings: the data give it both."""

import json
import re
import sys

import numpy as np
import polars as pl
import pytest

from steerrec.data import simulate

MODULE = """
import torch
from torch import nn

import steerrec


class Model(nn.Module):
    def __init__(self, items, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(items + 1, width, padding_idx=0)
        self.ratings = nn.Embedding(6, width)
        self.gru = nn.GRU(width + 1, width, batch_first=True)
        self.out = nn.Linear(width, width)

    def forward(self, ids, hours, ratings):
        x = torch.cat([self.items(ids) + self.ratings(ratings), (hours + 1).log()[..., None]], -1)
        states = self.out(self.gru(x)[0])
        last = (ids != 0).sum(dim=1) - 1
        return states[torch.arange(len(ids)), last] @ self.items.weight[1:].T


def since_last(ids, time):
    gaps = time.diff(dim=1, prepend=time[:, :1]) * (ids != 0)
    return gaps.clamp(min=0).float() / 3600


def load():
    data = steerrec.read_interactions("log.csv", keep=["rating"])
    catalogue = steerrec.Catalogue.from_interactions(data)
    model = Model(len(catalogue))
    return steerrec.wrap(
        model,
        catalogue,
        score=lambda batch: model(*batch),
        make_batch=lambda ids, time, rating: (ids, since_last(ids, time), rating),
        reads=["time", "rating"],
        max_length=20,
        example=steerrec.build_histories(data, catalogue, columns=["time", "rating"]),
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    data = simulate(60, 30, seed=1)
    rng = np.random.default_rng(0)
    rows = {
        "user_id": data.user_ids.gather(data.user),
        "item_id": data.item_ids.gather(data.item),
        "timestamp": data.time,
        "rating": rng.integers(1, 6, len(data)),
    }
    log = pl.DataFrame(rows)
    log.write_csv(tmp_path / "log.csv")
    log.drop("timestamp").write_csv(tmp_path / "untimed.csv")
    log.drop("rating").write_csv(tmp_path / "unrated.csv")
    log.with_columns(pl.col("timestamp") ** 2 // 10**9).write_csv(tmp_path / "slower.csv")
    (tmp_path / "timed.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("timed", None)


def test_every_command_gives_the_model_what_it_reads(cli, folder):
    small = ("--latents", 32, "--k", 4, "--epochs", 2, "--batch-size", 128)
    attached = cli("attach", "timed:load", "--data", "log.csv", "-o", "artifact", *small, "--json")
    assert attached.code == 0, attached.err
    both = ("--model", "timed:load", "--data", "log.csv")
    scored = cli("score", "artifact", *both, "--users", 64)
    assert scored.code == 0, scored.err
    steered = cli("steer", "artifact", *both, "--alpha", 1, "--split", "test", "--json")
    assert steered.code == 0, steered.err
    record = json.loads((folder / "artifact" / "steerrec.json").read_text())
    assert record["data"]["time_col"] == "timestamp"
    steer = ("steer", "artifact", "--model", "timed:load", "-o", "lists.csv", "--force")
    lists = []
    for data in ("log.csv", "log.csv", "slower.csv"):
        assert cli(*steer, "--data", data).code == 0
        lists.append(pl.read_csv("lists.csv"))
    assert lists[0].equals(lists[1])
    assert not lists[0].equals(lists[2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "untimed.csv",
            "the interactions have no column 'time', which the model reads: .*time_col",
        ),
        ("unrated.csv", "unrated.csv has no feature column 'rating'; its columns are user_id,"),
    ],
)
def test_data_without_it_is_one_line(cli, folder, data, message):
    found = cli("evaluate", "timed:load", "--data", data)

    assert found.code == 1
    assert found.out == ""
    assert re.fullmatch(rf"steerrec: error: {message}[^\n]*\n", found.err)


def test_layers_needs_no_data(cli, folder):
    found = cli("layers", "timed:load")

    assert found.code == 0, found.err
    assert "out" in found.out
