"""gSASRec-pytorch checkpoints as the reference SASRec: the same scores, without the library."""

import json

import pytest
import torch

from steerrec.adapters.gsasrec_checkpoint import load
from steerrec.conformance import check_conformance, conformance
from steerrec.data import Histories
from steerrec.errors import ModelError
from steerrec.loading import load_recommender

from .clones import GSASREC, HEADS, H, L, N
from .toy_models import tiny_catalogue

LISTS = [[0, 5, 3, 1], [7], [], [2, 2, 9, 4, 11, 6], [8, 0], [*range(7)], [*range(11, 0, -1), 3, 3]]
HISTORIES = Histories.from_lists(LISTS)
NAME = "gsasrec-ml1m-step:86064-t:0.75-negs:256-emb:128-dropout:0.5-metric:0.1974453226738962.pt"


def library(*, tied=False):
    """The model; `reuse_item_embeddings` is to have no output embedding."""
    model = GSASREC.build()
    if tied:
        model.output_embedding = model.item_embedding
    return model


def weights(*, tied=False):
    found = dict(library().state_dict())
    if tied:
        del found["output_embedding.weight"]
    return found


def scores(model, lists=LISTS):
    """What the library's own scoring gives, as its data loader pads histories."""
    rows = [[N + 1] * (L - len(one)) + [item + 1 for item in one[-L:]] for one in lists]
    indices, values = model.get_predictions(torch.tensor(rows), limit=N)
    return values.new_empty(len(lists), N).scatter_(1, indices - 1, values)


def write(folder, state_dict):
    torch.save(state_dict, folder / NAME)
    return folder / NAME


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path, weights())


def found(rec, histories=HISTORIES):
    return rec.score(rec.make_batch(histories))


def refusal(path, **settings):
    with pytest.raises(ModelError) as error:
        load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- equal scores -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["output embedding", "tied"])
def test_scores_are_those_of_the_library(tmp_path, tied):
    path, model = write(tmp_path, weights(tied=tied)), library(tied=tied)
    rec = load(path, items=tiny_catalogue(N), heads=HEADS)
    torch.testing.assert_close(found(rec), scores(model), atol=1e-5, rtol=1e-5)
    rec.model.double()
    torch.testing.assert_close(found(rec), scores(model.double()), atol=1e-10, rtol=0)
    check_conformance(rec)
    assert rec.max_length == L


def test_scores_of_a_history_do_not_depend_on_what_is_beside_it(checkpoint):
    rec = load(checkpoint, heads=HEADS)
    for one in LISTS:
        alone = Histories.from_lists([one])
        torch.testing.assert_close(found(rec, alone), scores(library(), [one]))


def test_an_activation_of_other_code(checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "relu", lambda x: x)
        expected = scores(library())
    linear = load(checkpoint, heads=HEADS, hidden_act="linear")
    torch.testing.assert_close(found(linear), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found(load(checkpoint, heads=HEADS)), expected, atol=1e-2)


def test_padding_and_ids_that_are_off_do_not_conform(checkpoint):
    rec = load(checkpoint, heads=HEADS)
    right = rec.make_batch

    def shifted(step):
        return lambda histories: {
            "input_ids": right(histories)["input_ids"] + step * (right(histories)["input_ids"] > 0)
        }

    def other_side(histories):
        return {"input_ids": torch.from_numpy(histories.padded(L, -1, side="left") + 1)}

    for wrong, reason in (
        (other_side, "gives other scores than the model"),
        (shifted(-1), "the id of the padding: the ids are off"),
        (shifted(1), "are the ids in its range"),
    ):
        rec.make_batch = wrong
        assert reason in "; ".join(conformance(rec).problems)


# --- what is refused ----------------------------------------------------------------------------


def test_heads_are_asked_for(checkpoint):
    message = refusal(checkpoint)
    assert "does not say its number of attention heads" in message
    assert f"open it as gsasrec:{checkpoint},heads=… with num_heads" in message
    assert "is not a multiple of num_attention_heads 3" in refusal(checkpoint, heads=3)


def without(part):
    return lambda w: {name: tensor for name, tensor in w.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("query_proj.weight"), "is not a gSASRec-pytorch SASRec checkpoint: it has"),
        (lambda w: w | {"user_embedding.weight": torch.ones(3, H)}, "has user_embedding besides"),
        (without("blocks.1.dense2.bias"), "transformer_blocks.1.dense2.bias is missing"),
        (without("seq_norm"), "seq_norm.weight is missing"),
        (without("position_embedding"), "position_embedding.weight is missing"),
        (
            lambda w: w | {"transformer_blocks.0.gate": torch.ones(1)},
            "transformer_blocks.0.gate is none of its weights",
        ),
        (without("transformer_blocks.0.dense1"), "transformer_blocks.0.dense1.weight is missing"),
        (
            lambda w: w | {"transformer_blocks.2.dense1.weight": torch.ones(H, H)},
            "transformer_blocks.2.multihead_attention.query_proj.weight is missing",
        ),
        (
            lambda w: w | {"output_embedding.weight": torch.ones(N, H)},
            "does not fit gSASRec-pytorch's SASRec: size mismatch for output_embedding.weight",
        ),
        (lambda w: w | {"item_embedding.weight": torch.ones(2, H)}, "has 2 ids, two of which"),
        (
            lambda w: w | {"seq_norm.bias": torch.full((H,), -torch.inf)},
            "seq_norm.bias is not all finite numbers",
        ),
    ],
)
def test_what_is_no_such_model_is_refused_in_one_line(tmp_path, change, message):
    assert message in refusal(write(tmp_path, change(weights())), heads=HEADS)


def test_a_catalogue_of_another_size_is_refused(checkpoint):
    message = refusal(checkpoint, heads=HEADS, items=tiny_catalogue(N + 1))
    assert f"has {N} items, the catalogue has {N + 1}" in message


# --- where a model is given ---------------------------------------------------------------------


def test_a_path_with_colons_and_its_heads(checkpoint):
    rec = load_recommender(f"gsasrec:{checkpoint},heads={HEADS}")
    torch.testing.assert_close(found(rec), scores(library()))
    assert rec.describe()["source"] == f"gsasrec:{checkpoint},heads={HEADS}"
    assert rec.catalogue.item_ids.to_list() == list(range(1, N + 1))


@pytest.mark.parametrize("tied", [False, True], ids=["output embedding", "tied"])
def test_convert_writes_the_model_folder(tmp_path, capsys, tied):
    from steerrec.cli.convert import convert

    path = write(tmp_path, weights(tied=tied))
    convert(f"gsasrec:{path},heads={HEADS}", tmp_path / "model", json_output=True)
    assert json.loads(capsys.readouterr().out)["items"] == N
    rec, rebuilt = load_recommender(tmp_path / "model"), load(path, heads=HEADS)
    assert torch.equal(found(rec), found(rebuilt))
    assert rec.describe()["config"] == rebuilt.describe()["config"]
    check_conformance(rec)
