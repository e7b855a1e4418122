"""Checkpoints of other libraries on the command line, from evaluation to steered lists.

The data need a 3-core and have text ids, the checkpoints know numbers: whatever forgets how the two
belong together recommends other items.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from steerrec import evaluation
from steerrec.data import Catalogue, build_histories, leave_one_out, read_interactions
from steerrec.loading import load_recommender

WIDTH, WINDOW, ITEMS = 16, 12, 80
COLUMNS = ("--user-col", "who", "--item-col", "what", "--time-col", "when")
TINY_SAE = ("--latents", "48", "--k", "6", "--epochs", "2", "--batch-size", "256", "--rows", "600")


class Config:
    """Stands for RecBole's, of which a checkpoint holds a pickle."""

    def __init__(self):
        self.final_config_dict = {"n_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}


def random(*shapes):
    """Weights by name, all of them large enough to matter."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator) * 0.5 for name, *shape in shapes}


def recbole(path):
    """What RecBole's trainer saves of a SASRec of one layer."""
    layer = "trm_encoder.layer.0"
    squares = [f"multi_head_attention.{part}" for part in ("query", "key", "value", "dense")]
    norms = [f"{layer}.{part}.LayerNorm" for part in ("multi_head_attention", "feed_forward")]
    weights = random(
        ("item_embedding.weight", ITEMS + 1, WIDTH),
        ("position_embedding.weight", WINDOW, WIDTH),
        *((f"{layer}.{name}.weight", WIDTH, WIDTH) for name in squares),
        *((f"{layer}.{name}.bias", WIDTH) for name in squares),
        (f"{layer}.feed_forward.dense_1.weight", 32, WIDTH),
        (f"{layer}.feed_forward.dense_1.bias", 32),
        (f"{layer}.feed_forward.dense_2.weight", WIDTH, 32),
        (f"{layer}.feed_forward.dense_2.bias", WIDTH),
        *((f"{name}.{kind}", WIDTH) for name in (*norms, "LayerNorm") for kind in KINDS),
    )
    torch.save({"config": Config(), "epoch": 3, "state_dict": weights}, path)
    return f"recbole:{path}"


def pmixer(path):
    """What the training script of SASRec.pytorch saves, with neither name nor args.txt."""
    convs = [f"forward_layers.0.conv{number}" for number in (1, 2)]
    norms = ("attention_layernorms.0", "forward_layernorms.0", "last_layernorm")
    weights = random(
        ("item_emb.weight", ITEMS + 1, WIDTH),
        ("pos_emb.weight", WINDOW + 1, WIDTH),
        ("attention_layers.0.in_proj_weight", 3 * WIDTH, WIDTH),
        ("attention_layers.0.in_proj_bias", 3 * WIDTH),
        ("attention_layers.0.out_proj.weight", WIDTH, WIDTH),
        ("attention_layers.0.out_proj.bias", WIDTH),
        *((f"{name}.weight", WIDTH, WIDTH, 1) for name in convs),
        *((f"{name}.bias", WIDTH) for name in convs),
        *((f"{name}.{kind}", WIDTH) for name in norms for kind in KINDS),
    )
    torch.save(weights, path)
    return f"pmixer:{path},heads=2,norm_first=true"


KINDS = ("weight", "bias")
MAKERS = {"recbole": recbole, "pmixer": pmixer}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint, the order of its items, and an artifact that was made with it."""

    model: str
    item_map: Path
    ids: list[str]
    artifact: Path

    def recommender(self, interactions, ids=None):
        """Through the SDK, with the items in the order that is expected."""
        ids = self.ids if ids is None else ids
        frame = pl.DataFrame({"row": range(len(ids)), "item_id": ids, "title": ids})
        frame = frame.with_columns(count=pl.lit(0, dtype=pl.Int64))
        catalogue = Catalogue(frame)
        split = leave_one_out(build_histories(interactions, catalogue), len(ids))
        counts = np.bincount(split.train.items, minlength=len(ids))
        return load_recommender(self.model, items=catalogue.with_counts(counts)), split


@pytest.fixture(scope="module")
def interactions(world):
    columns = {"user_col": "who", "item_col": "what", "time_col": "when"}
    return read_interactions(world.data, **columns, k_core=3)


@pytest.fixture(scope="module")
def appeared(world):
    """The ids in the order in which the data name them, without those that the 3-core drops."""
    rows = pl.read_csv(world.data).filter(~pl.col("who").is_in(["new1", "new2"]))
    return rows["what"].unique(maintain_order=True).to_list()


@pytest.fixture(scope="module", params=MAKERS)
def checkpoint(request, cli, world, appeared, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = MAKERS[request.param](folder / "model.pth")
    ids = [appeared[row] for row in np.random.default_rng(1).permutation(ITEMS)]
    lines = ["index,item_id", *(f"{number},{item}" for number, item in enumerate(ids, 1))]
    (folder / "map.csv").write_text("\n".join(lines) + "\n")
    made = Checkpoint(model, folder / "map.csv", ids, folder / "artifact")
    options = ("--k-core", "3", *COLUMNS, "--item-map", made.item_map, "-o", made.artifact)
    attached = cli("attach", model, "--data", world.data, *options, *TINY_SAE, "--json")
    assert attached.code == 0, attached.err
    assert attached.json["site"]["path"] == "final_norm"
    return made


def evaluated(recommender, split):
    return evaluation.evaluate(recommender, split, which="test", k=10, mask_seen=False).to_dict()


# --- the model alone ----------------------------------------------------------------------------


def test_without_an_item_map_the_data_number_the_items_as_the_library_does(
    cli, world, checkpoint, interactions, appeared, tmp_path
):
    evaluate = ("evaluate", checkpoint.model, *COLUMNS, "--json", "--data")
    found = cli(*evaluate, world.data, "--k-core", "3")
    if checkpoint.model.startswith("recbole"):  # in the order of their first appearance
        expected = evaluated(*checkpoint.recommender(interactions, appeared))
        assert found.json == {"model": checkpoint.model, **expected}
        refused = cli(*evaluate, world.data)
        assert f"has {ITEMS} items, the catalogue has 82" in refused.err
        assert "--k-core" in refused.err
    else:  # they are numbers already
        refused = found
        assert "expected the numbers 1 to N" in refused.err
        assert "--item-map" in refused.err
        number = {item: place for place, item in enumerate(checkpoint.ids, 1)}
        rows = pl.read_csv(world.data).filter(pl.col("what").is_in(checkpoint.ids))
        rows = rows.with_columns(pl.col("what").replace_strict(number))
        rows.write_csv(tmp_path / "numbered.csv")
        found = cli(*evaluate, tmp_path / "numbered.csv", "--k-core", "3").json
        assert found["metrics"] == evaluated(*checkpoint.recommender(interactions))["metrics"]
    assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1)


def test_an_item_map_goes_before_the_order_of_the_data(
    cli, world, checkpoint, interactions, appeared
):
    options = (*COLUMNS, "--k-core", "3", "--item-map", checkpoint.item_map, "--json")
    found = cli("evaluate", checkpoint.model, "--data", world.data, *options).json
    assert found["metrics"] == evaluated(*checkpoint.recommender(interactions))["metrics"]
    other = evaluated(*checkpoint.recommender(interactions, appeared))
    assert found["metrics"] != other["metrics"]


def test_layers_needs_no_items(cli, checkpoint):
    assert cli("layers", checkpoint.model, "--json").json["recommended"]["path"] == "final_norm"


def test_a_setting_that_there_is_not_is_wrong_in_one_line(cli, world, checkpoint):
    model, data = f"{checkpoint.model},depth=2", ("--data", world.data, *COLUMNS)
    for command in (("evaluate", model), ("convert", model, "-o", world.folder / "none")):
        found = cli(*command, *data)  # before the data are read, of which there would be warnings
        assert (found.code, found.out) == (1, "")
        assert "has no setting 'depth'; expected heads, " in found.err
        assert found.err.count("\n") == 1


# --- an artifact made with it -------------------------------------------------------------------


def later(checkpoint, world, *command):
    """A command on the artifact that says neither columns, nor k-core, nor item map again."""
    name, artifact, *options = command
    return (name, artifact, "--model", checkpoint.model, "--data", world.data, *options)


@pytest.fixture
def artifact(checkpoint, tmp_path):
    return shutil.copytree(checkpoint.artifact, tmp_path / "artifact")


def recommended(file):
    """External ids of the items, one list a user."""
    frame = pl.read_csv(file, schema_overrides={"user_id": pl.String, "item_id": pl.String})
    return frame.group_by("user_id", maintain_order=True).agg("item_id")


def test_score_and_steer_know_the_items_it_was_made_with(
    cli, world, checkpoint, interactions, artifact, tmp_path
):
    scored = cli(*later(checkpoint, world, "score", artifact, "--users", "256", "--json"))
    assert scored.code == 0, scored.err
    rec, _ = checkpoint.recommender(interactions)
    head, _, tail = rec.catalogue.groups.sizes
    assert [scored.json["contrast"][f"group_{g}"]["items"] for g in "ab"] == [head, tail]

    lists = {}
    for alpha in ("0", "2"):
        out = tmp_path / f"{alpha}.csv"
        options = ("--alpha", alpha, "-k", "5", "-o", out)
        steered = cli(*later(checkpoint, world, "steer", artifact, *options))
        assert steered.code == 0, steered.err
        lists[alpha] = recommended(out)
    histories = build_histories(interactions, rec.catalogue)
    expected = evaluation.recommend(rec, histories, k=5).ids.tolist()
    ids = rec.catalogue.item_ids.to_list()
    assert lists["0"]["user_id"].to_list() == histories.user_ids.to_list()
    assert lists["0"]["item_id"].to_list() == [[ids[row] for row in top] for top in expected]
    assert not lists["2"].equals(lists["0"])


def test_metrics_of_the_held_out_part_are_those_of_evaluate(cli, world, checkpoint, artifact):
    cli(*later(checkpoint, world, "score", artifact, "--users", "256"))
    steer = later(checkpoint, world, "steer", artifact, "--split", "test", "--json")
    found = cli(*steer).json["unsteered"]["metrics"]
    options = (*COLUMNS, "--k-core", "3", "--item-map", checkpoint.item_map, "--json")
    alone = cli("evaluate", checkpoint.model, "--data", world.data, *options).json["metrics"]
    assert found == pytest.approx(alone, abs=1e-9)


def test_the_same_item_map_may_be_given_and_another_may_not(
    cli, world, checkpoint, artifact, tmp_path
):
    score = ("score", artifact, "--users", "64", "--item-map")
    assert cli(*later(checkpoint, world, *score, checkpoint.item_map)).code == 0
    rows = pl.read_csv(checkpoint.item_map)
    rows.with_columns(pl.col("item_id").reverse()).write_csv(tmp_path / "other.csv")
    refused = cli(*later(checkpoint, world, *score, tmp_path / "other.csv"))
    assert refused.code == 1
    assert "items have other ids, or are in another order; leave out --item-map" in refused.err


def test_other_data_does_not_number_the_items_anew(cli, world, checkpoint, artifact, tmp_path):
    """The same visits, the last ones first: items appear in another order, users take the same."""
    pl.read_csv(world.data).reverse().write_csv(tmp_path / "visits.csv")
    assert cli(*later(checkpoint, world, "score", artifact, "--users", "64")).code == 0
    lists = []
    for number, data in enumerate((world.data, tmp_path / "visits.csv")):
        out = tmp_path / f"{number}.csv"
        options = ("--model", checkpoint.model, "--data", data, "--alpha", "0", "-o", out)
        assert cli("steer", artifact, *options).code == 0
        lists.append(recommended(out).sort("user_id"))
    assert lists[0].equals(lists[1])


def test_the_model_that_an_artifact_names_opens_as_it_is_written(cli, world, artifact):
    refused = cli("score", artifact, "--data", world.data, "--users", "64")
    assert refused.code == 1
    model = refused.err.rpartition("--model ")[2].strip()
    found = cli("score", artifact, "--model", model, "--data", world.data, "--users", "64")
    assert found.code == 0, found.err


def test_the_same_weights_with_other_heads_are_another_model(cli, world, checkpoint, artifact):
    path = checkpoint.model.partition(",")[0]
    model = f"{path},heads=4" + (",norm_first=true" if path.startswith("pmixer") else "")
    refused = cli("score", artifact, "--model", model, "--data", world.data)
    assert refused.code == 1
    assert "other configuration" in refused.err


def test_the_converted_model_takes_the_place_of_the_checkpoint(
    cli, world, checkpoint, interactions, artifact, tmp_path
):
    model = tmp_path / "model"
    options = ("--data", world.data, *COLUMNS, "--k-core", "3", "--item-map", checkpoint.item_map)
    assert cli("convert", checkpoint.model, "-o", model, *options).code == 0
    found = cli("evaluate", model, "--data", world.data, "--json").json
    assert found["metrics"] == evaluated(*checkpoint.recommender(interactions))["metrics"]
    assert cli("score", artifact, "--model", model, "--data", world.data, "--users", "64").code == 0


def test_only_an_artifact_of_a_checkpoint_holds_items(world, checkpoint):
    assert (checkpoint.artifact / "catalogue.parquet").is_file()
    assert not (world.artifact / "catalogue.parquet").exists()
    record = json.loads((checkpoint.artifact / "steerrec.json").read_text())
    assert record["data"]["k_core"] == 3


def test_damaged_items_of_an_artifact_are_told_in_one_line(cli, world, checkpoint, artifact):
    (artifact / "catalogue.parquet").write_bytes(b"PAR1 and nothing else")
    refused = cli(*later(checkpoint, world, "score", artifact))
    assert refused.code == 1
    assert "catalogue.parquet" in refused.err
    assert refused.err.count("\n") == 1
