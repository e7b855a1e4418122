"""An in-house model on the command line: a function in a module of the working directory."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import steerrec
from steerrec.data import build_histories, leave_one_out, read_interactions

from .conftest import COLUMNS, SMALL_SAE

MODULE = '''
import torch
from safetensors.torch import load_file
from torch import nn

import steerrec


class GRU(nn.Module):
    """Ids 1..N, right-padded with 0; knows nothing of steerrec."""

    def __init__(self, items, width=16):
        super().__init__()
        self.embedding = nn.Embedding(items + 1, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True)

    def predict(self, ids):
        states, _ = self.gru(self.embedding(ids))
        last = (ids != 0).sum(dim=1) - 1
        return states[torch.arange(len(ids)), last] @ self.embedding.weight[1:].T


def catalogue():
    columns = {"user_col": "who", "item_col": "what", "time_col": "when"}
    data = steerrec.read_interactions("visits.csv", **columns, k_core=3)
    return steerrec.Catalogue.from_interactions(data)


def trained(weights="gru.safetensors"):
    weights = load_file(weights)
    model = GRU(len(weights["embedding.weight"]) - 1)
    model.load_state_dict(weights)
    return model


def load():
    model = trained()
    return steerrec.wrap(model, catalogue(), score=model.predict, max_length=20)


class ByHand:
    max_length = 20
    side = "right"

    def __init__(self):
        self.model = trained().eval().requires_grad_(False)
        self.catalogue = catalogue()
        ids = steerrec.TokenIds("embedding", pad_id=0)
        self.site = steerrec.Site("gru", select=(0,), positions_from=ids)

    @property
    def item_head(self):
        return steerrec.ItemHead(self.model.embedding.weight[1:])

    def make_batch(self, histories):
        length = min(int(histories.lengths.max(initial=1)), self.max_length)
        return {"ids": torch.from_numpy(histories.padded(length, pad=-1, side=self.side) + 1)}

    def score(self, batch):
        return self.model.predict(batch["ids"])

    def describe(self):
        return {}


class WrongSide(ByHand):
    side = "left"


def bare():
    return trained()


def lost():
    return trained("lost.safetensors")


def other():
    rec = ByHand()
    rec.model.embedding.weight[1] += 1
    return rec


def opened(path, *, items=None, device="cpu"):
    """What a package publishes."""
    model = trained(path)
    return steerrec.wrap(model, items, score=model.predict, max_length=20)
'''


@pytest.fixture(scope="module")
def trained_shop(world, tmp_path_factory):
    """A folder with data, a module and its trained weights; nothing there is installed."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copy(world.data, folder)
    (folder / "own_shop.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        from own_shop import GRU, catalogue

        split = split_of(folder, catalogue())
        torch.manual_seed(0)
        model = GRU(len(catalogue()))
        train(model, torch.from_numpy(split.train.padded(21, pad=-1) + 1))
        save_file(model.state_dict(), "gru.safetensors")
        sys.modules.pop("own_shop")
    return folder


def split_of(folder, catalogue):
    columns = {"user_col": "who", "item_col": "what", "time_col": "when"}
    data = read_interactions(folder / "visits.csv", **columns, k_core=3)
    return leave_one_out(build_histories(data, catalogue), len(catalogue))


def train(model, ids):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(8):
        for rows in torch.randperm(len(ids)).split(64):
            inputs, targets = ids[rows, :-1], ids[rows, 1:]
            real = targets > 0
            states, _ = model.gru(model.embedding(inputs))
            scores = states[real] @ model.embedding.weight[1:].T
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores, targets[real] - 1).backward()
            optimizer.step()


@pytest.fixture
def shop(trained_shop, tmp_path, monkeypatch):
    """A copy of it as the working directory, on the path whatever PYTHONSAFEPATH says."""
    folder = Path(shutil.copytree(trained_shop, tmp_path / "shop"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("own_shop", None)


DATA = ("--data", "visits.csv", *COLUMNS, "--k-core", "3")
ATTACH = ("attach", "own_shop:load", *DATA, "-o", "artifact", *SMALL_SAE)


def test_layers(cli, shop):
    found = cli("layers", "own_shop:load", "--json").json
    assert found["recommended"]["path"] == "gru"
    assert found["recommended"]["select"] == [0]
    assert "gru *" in cli("layers", "own_shop:load").out


def test_evaluate_finds_what_python_finds(cli, shop):
    found = cli("evaluate", "own_shop:load", *DATA, "--json")
    assert found.err == ""
    from own_shop import load

    rec = load()
    expected = steerrec.evaluate(rec, split_of(shop, rec.catalogue)).to_dict()
    assert found.json == {"model": "own_shop:load", **expected}
    assert expected["metrics"]["ndcg@10"] > 0.1  # lists at random: .057
    by_hand = cli("evaluate", "own_shop:ByHand", *DATA, "--json").json
    assert by_hand["metrics"] == pytest.approx(expected["metrics"])


def test_from_attach_to_steered_recommendations(cli, shop):
    """How the data are read is said once; the artifact knows the function and does not call it."""
    attached = cli(*ATTACH, "--json")
    assert (attached.code, attached.err) == (0, "")
    record = json.loads((shop / "artifact" / "steerrec.json").read_text())
    assert record["base_model"]["source"] == "own_shop:load"
    card = (shop / "artifact" / "README.md").read_text()
    assert "opened from `own_shop:load`, which is not on the Hub" in card

    given = ("--data", "visits.csv", "--model", "own_shop:load")
    scored = cli("score", "artifact", *given, "--users", "512", "--json").json
    assert len(scored["top"]) == 10
    unsaid = cli("steer", "artifact", "--data", "visits.csv")
    assert unsaid.code == 1
    assert unsaid.err.endswith(
        "not opened on the artifact's word; give it with --model own_shop:load\n"
    )

    steered = cli("steer", "artifact", *given, "--alpha", "2", "-o", "recs.csv", "--json").json
    before, after = steered["unsteered"]["metrics"], steered["steered"]["metrics"]
    assert after["gini@10"] < before["gini@10"]
    assert after["arp@10"] < before["arp@10"]
    visits, recs = pl.read_csv("visits.csv"), pl.read_csv("recs.csv")
    assert set(recs["item_id"]) <= set(visits["what"])
    assert recs["user_id"].n_unique() == 240

    from own_shop import load

    rec = load()
    split = split_of(shop, rec.catalogue)
    here = steerrec.load_artifact("artifact", rec=rec).at()
    recipe = steerrec.Steering.popsteer(here.table("popularity"), alpha=2.0)
    with steerrec.attach(rec, here.sae, steering=recipe):
        lists = steerrec.recommend(rec, split.histories)
    ids = rec.catalogue.item_ids.gather(lists.ids.flatten().numpy())
    assert recs["item_id"].to_list() == ids.to_list()

    other = cli("steer", "artifact", "--data", "visits.csv", "--model", "own_shop:other")
    assert other.code == 1
    assert "other weights; use the model that it was made for" in other.err


def test_a_class_that_describes_nothing_makes_an_artifact_too(cli, shop):
    assert cli(*ATTACH[:1], "own_shop:ByHand", *ATTACH[2:], "--json").err == ""
    record = json.loads((shop / "artifact" / "steerrec.json").read_text())["base_model"]
    assert (record["adapter"], record["source"]) == ("ByHand", "own_shop:ByHand")


@pytest.mark.parametrize("command", ["evaluate", "attach"])
def test_a_wrapper_that_pads_on_the_wrong_side_is_told(cli, shop, command):
    out = ("-o", "artifact", *SMALL_SAE) if command == "attach" else ()
    found = cli(command, "own_shop:WrongSide", *DATA, *out)
    assert found.code == 0
    assert "steerrec: warning: GRU is not wrapped right, so that the numbers are not its own" in (
        found.err
    )
    assert "is the padding on the right side" in found.err


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("own_shop:laod", "own_shop:laod cannot be imported: module 'own_shop' has no attribute"),
        ("own_shup:load", "No module named 'own_shup'; it has to be installed, or in a folder"),
        ("own_shop.py:load", "names a file; expected a module as Python imports it, such as own_s"),
        (
            "own_shop:bare",
            "own_shop:bare returned a GRU, a bare torch module; expected a steerrec.",
        ),
        ("own_shop:lost", "FileNotFoundError: .*lost.safetensors.*, raised by own_shop:lost"),
        ("own_shop:opened", "TypeError: .*'path', raised by own_shop:opened"),
    ],
)
def test_a_function_that_does_not_do(cli, shop, spec, complaint):
    found = cli("evaluate", spec, *DATA)
    assert (found.code, found.out) == (1, "")
    (line,) = found.err.splitlines()
    assert line.startswith("steerrec: error: ")
    assert re.search(complaint, line), line


def test_the_installed_command_finds_the_module_where_it_is_run(shop):
    """A process of its own, with the path that it really has."""
    command = [Path(sys.executable).with_name("steerrec"), "layers", "own_shop:load"]
    found = subprocess.run(
        command,
        cwd=shop,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")},
        capture_output=True,
        text=True,
    )
    assert "gru *" in found.stdout, found.stderr


def test_a_published_adapter_is_a_model_as_any_other(cli, shop, tmp_path, monkeypatch):
    """Items are numbered in the order of the data, which is that of the function's catalogue."""
    info = tmp_path / "site" / "own_shop-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-shop\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[steerrec.adapters]\nownshop = own_shop:opened\n")
    shutil.copy(shop / "own_shop.py", info.parent)
    monkeypatch.syspath_prepend(info.parent)
    found = cli("evaluate", "ownshop:gru.safetensors", *DATA, "--json").json
    by_function = cli("evaluate", "own_shop:load", *DATA, "--json").json
    assert found == {**by_function, "model": "ownshop:gru.safetensors"}

    attach = ("attach", "ownshop:gru.safetensors", *DATA, "-o", "artifact", *SMALL_SAE)
    assert cli(*attach).code == 0
    given = ("--model", "ownshop:gru.safetensors", "--data", "visits.csv")
    assert cli("score", "artifact", *given, "--users", "128").code == 0
    assert cli("steer", "artifact", *given, "--json").json["alpha"] == 1.0
    found = cli("evaluate", "ownshop:lost.safetensors", *DATA)
    assert "lost.safetensors" in found.err
    assert "raised by the adapter 'ownshop' of own-shop" in found.err
