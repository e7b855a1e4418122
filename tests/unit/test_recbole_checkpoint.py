"""A RecBole SASRec checkpoint as the reference SASRec: the same scores, without RecBole."""

import json

import pytest
import torch

from steerrec.adapters.recbole_checkpoint import load
from steerrec.conformance import check_conformance
from steerrec.data import Catalogue, Histories, simulate
from steerrec.errors import DataError, ModelError
from steerrec.loading import load_recommender

from .clones import CLONES, HEADS, L, N
from .toy_models import tiny_catalogue

(CLONE,) = (clone for clone in CLONES if clone.name == "RecBole SASRec")
HISTORIES = [[0, 5, 3, 1], [7], [2, 2, 9, 4, 11, 6], [8, 0, 10]]


class Config:
    """Stands for RecBole's; a checkpoint holds a pickle of it."""

    def __init__(self, **settings):
        self.final_config_dict = {
            "n_heads": HEADS,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "model": "SASRec",
        } | settings


def weights():
    """The weights of the clone, as RecBole names them."""
    return CLONE.build().state_dict()


def write(path, state_dict=None, config=None, **more):
    content = {"config": config or Config(), "epoch": 3, "state_dict": state_dict or weights()}
    torch.save(content | more, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "SASRec.pth")


def test_scores_are_those_of_the_library(checkpoint):
    rec = load(checkpoint, items=tiny_catalogue(N))
    scores = rec.score(rec.make_batch(Histories.from_lists(HISTORIES)))
    torch.testing.assert_close(scores, CLONE.score(CLONE.build(), HISTORIES), atol=1e-5, rtol=1e-5)
    check_conformance(rec)
    assert rec.max_length == L
    assert rec.describe()["source"] == f"recbole:{checkpoint}"


def test_without_a_catalogue_items_have_their_numbers(checkpoint):
    rec = load_recommender(f"recbole:{checkpoint}")
    assert rec.catalogue.item_ids.to_list() == list(range(1, N + 1))
    assert not rec.catalogue.counts.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "query" not in k}, "not a RecBole SASRec check"),
        (lambda w: w | {"output_ln.weight": torch.ones(3)}, "has output_ln besides what"),
        (
            lambda w: {k: v for k, v in w.items() if "dense_2.bias" not in k},
            "does not fit RecBole's SASRec",
        ),
        (
            lambda w: w | {"LayerNorm.weight": torch.ones(3)},
            "does not fit RecBole's SASRec",
        ),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, message):
    path = write(tmp_path / "other.pth", change(weights()))
    with pytest.raises(ModelError, match=message):
        load(path)


def test_a_catalogue_of_another_size_is_refused(checkpoint):
    with pytest.raises(ModelError, match=rf"has {N} items, the catalogue has 5; .*--k-core"):
        load(checkpoint, items=tiny_catalogue(5))


def test_settings_that_weights_do_not_show_have_to_be_there(tmp_path):
    path = write(tmp_path / "bare.pth", config={"hidden_act": "gelu"})
    with pytest.raises(ModelError, match="does not say n_heads"):
        load(path)
    assert load(path, heads=HEADS).model.config.num_attention_heads == HEADS


def test_a_model_with_items_of_its_own_takes_no_others(tmp_path):
    with pytest.raises(ModelError, match="holds its own items"):
        load_recommender(tmp_path, items=tiny_catalogue(3))


# --- item maps ----------------------------------------------------------------------------------


def item_map(path, rows, header="index,item_id,title,genres"):
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_an_item_map_gives_ids_titles_and_attributes_in_its_own_order(tmp_path):
    rows = ["2,b,Second,Horror", "1,a,First,", "3,c,Third,Drama"]
    catalogue = Catalogue.from_item_map(item_map(tmp_path / "map.csv", rows))
    assert catalogue.item_ids.to_list() == ["a", "b", "c"]
    assert catalogue.titles == ["First", "Second", "Third"]
    assert catalogue.frame["genres"].to_list() == [None, "Horror", "Drama"]


def test_an_item_map_counts_the_training_part_of_the_data(tmp_path):
    interactions = simulate(users=40, items=30, seed=0)
    own = Catalogue.from_interactions(interactions)
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [own.item_ids[row] for row in order]
    rows = [f"{number},{item},," for number, item in enumerate(ids)]
    catalogue = Catalogue.from_item_map(item_map(tmp_path / "map.csv", rows), interactions)
    assert catalogue.item_ids.to_list() == ids
    assert catalogue.counts.tolist() == [own.counts[row] for row in order]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["1,a", "3,b"], "index,item_id", r"index is not 1..2 or 0..1"),
        (["a,1"], "item_id,number", "expected a column of whole numbers"),
        (["1"], "index", "expected a column of whole numbers"),
        (["1,a", "2,a"], "index,item_id", "item ids are not unique"),
    ],
)
def test_a_table_that_is_no_item_map_is_refused(tmp_path, rows, header, message):
    with pytest.raises(DataError, match=message):
        Catalogue.from_item_map(item_map(tmp_path / "map.csv", rows, header))


def test_an_item_map_of_other_data_is_refused(tmp_path):
    table = item_map(tmp_path / "map.csv", ["1,never,,", "2,seen,,"])
    with pytest.raises(DataError, match="none of the 30 items of the data is in"):
        Catalogue.from_item_map(table, simulate(users=40, items=30, seed=0))


# --- the command line ---------------------------------------------------------------------------


def test_convert_writes_the_model_folder(checkpoint, tmp_path, capsys):
    from steerrec.cli.convert import convert

    out = tmp_path / "model"
    convert(f"recbole:{checkpoint}", out, json_output=True)
    assert json.loads(capsys.readouterr().out) == {"model": str(out), "items": N, "data": {}}
    rec = load_recommender(out)
    batch = rec.make_batch(Histories.from_lists(HISTORIES))
    assert torch.equal(rec.score(batch), load(checkpoint).score(batch))
    with pytest.raises(ModelError, match="is no checkpoint of another library"):
        convert(str(out), tmp_path / "again")


def test_another_model_with_the_names_of_a_sasrec_is_refused(tmp_path):
    """RecBole's first BERT4Rec names its weights so; it is bidirectional, with a mask token."""
    path = write(tmp_path / "model.pth", config=Config(model="BERT4Rec"))
    with pytest.raises(ModelError, match="is a RecBole 'BERT4Rec', which names its weights"):
        load(path)


@pytest.mark.parametrize("value", ["small", None, 0.0, -1e-5, [1e-5]])
def test_an_epsilon_that_is_none_is_refused(tmp_path, value):
    path = write(tmp_path / "model.pth", config=Config(layer_norm_eps=value))
    with pytest.raises(ModelError, match="layer_norm_eps"):
        load(path)


def test_an_epsilon_may_be_text(tmp_path):
    path = write(tmp_path / "model.pth", config=Config(layer_norm_eps="1e-5"))
    assert load(path).model.config.layer_norm_eps == 1e-5


def test_nothing_is_allocated_for_shapes_that_do_not_fit(tmp_path, monkeypatch):
    wide = weights()
    wide["item_embedding.weight"] = torch.ones(3, 50_000)
    made = []
    real = torch.nn.Linear.__init__

    def counted(self, *args, **kwargs):
        real(self, *args, **kwargs)
        made.append(self.weight.device.type)

    monkeypatch.setattr(torch.nn.Linear, "__init__", counted)
    with pytest.raises(ModelError, match="size mismatch for"):
        load(write(tmp_path / "model.pth", wide, Config(n_heads=1)))
    assert set(made) == {"meta"}
