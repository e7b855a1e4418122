"""SASRec.pytorch checkpoints as the reference SASRec: all three codes that share their names."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from steerrec.adapters.pmixer_checkpoint import load
from steerrec.conformance import check_conformance, conformance
from steerrec.data import Histories
from steerrec.errors import CheckpointError, ModelError
from steerrec.loading import load_recommender
from steerrec.unpickling import find_state_dict, read_checkpoint

from .clones import HEADS, PMIXER, H, L, N, Parts, PointWise, attention, causal, conv, seeded, twice
from .toy_models import tiny_catalogue

LISTS = [[0, 5, 3, 1], [7], [], [2, 2, 9, 4, 11, 6], [8, 0], [*range(7)], [*range(11, 0, -1), 3, 3]]
HISTORIES = Histories.from_lists(LISTS)
NAME = f"SASRec.epoch=20.lr=0.001.layer=2.head={HEADS}.hidden={H}.maxlen={L}.pth"
CODES = ("2020", "2024", "pre", "post")
NORM_FIRST = {"2020": "queries", "2024": "queries", "pre": True, "post": False}
each = pytest.mark.parametrize("code", CODES)
norm = partial(nn.LayerNorm, H, eps=1e-8)


class SASRec(Parts):
    """The library's model as its code was in 2020, in 2024, and since 2025 in two ways."""

    code = "2020"

    def log2feats(self, log_seqs):
        ids = torch.from_numpy(log_seqs)
        real = (ids != 0).unsqueeze(-1)
        places = torch.arange(L) if self.code == "2020" else torch.arange(1, L + 1) * (ids != 0)
        seqs = self.item_emb(ids) * H**0.5 + self.pos_emb(places)
        if self.code == "2020":
            seqs = seqs * real
        for i in range(2):
            first, second = self.attention_layernorms[i], self.forward_layernorms[i]
            mix = partial(self.mixed, self.attention_layers[i])
            if self.code == "pre":
                normed = first(seqs)
                seqs = seqs + mix(normed, normed)
                seqs = seqs + self.forward_layers[i](second(seqs))
            elif self.code == "post":
                seqs = first(seqs + mix(seqs, seqs))
                seqs = second(seqs + self.forward_layers[i](seqs))
            else:
                queries = first(seqs)
                seqs = second(queries + mix(queries, seqs))
                seqs = self.forward_layers[i](seqs) + seqs
                if self.code == "2020":
                    seqs = seqs * real
        return self.last_layernorm(seqs)

    def mixed(self, layer, queries, keys):
        q, k = (x.transpose(0, 1) for x in (queries, keys))
        return layer(q, k, k, attn_mask=causal())[0].transpose(0, 1)

    @torch.no_grad()
    def predict(self, users, log_seqs, items):
        user_vectors = self.log2feats(log_seqs)[:, -1]
        return user_vectors @ self.item_emb(torch.from_numpy(items)).T


def library(code, *, padding_is_zero=True):
    """A model of that code whose every weight is random and matters."""

    def make():
        model = SASRec(
            item_emb=nn.Embedding(N + 1, H, padding_idx=0),
            pos_emb=nn.Embedding(L + (code != "2020"), H),
            attention_layernorms=twice(norm),
            attention_layers=twice(attention),
            forward_layernorms=twice(norm),
            forward_layers=twice(
                lambda: PointWise(conv1=conv(), conv2=conv(), dropout2=nn.Dropout(0.2))
            ),
            last_layernorm=norm(),
        )
        model.code = code
        return model

    model = seeded(make)()
    if padding_is_zero:  # as the training script sets them, from 2024 on
        model.item_emb.weight.data[0] = 0
        if code != "2020":
            model.pos_emb.weight.data[0] = 0
    return model


def scores(model, lists=LISTS):
    """What the library's own scoring gives for histories, as its evaluation pads them."""
    log_seqs = np.zeros((len(lists), L), dtype=np.int64)
    for row, history in zip(log_seqs, lists, strict=True):
        for place, item in enumerate(reversed(history[-L:])):
            row[L - 1 - place] = item + 1
    return model.predict(np.arange(len(lists)), log_seqs, np.arange(1, N + 1))


def write(folder, weights, *, name=NAME, **args):
    """A checkpoint; with `args` also what the training script writes beside it."""
    folder.mkdir(exist_ok=True)
    torch.save(weights, folder / name)
    if args:
        own = {"dataset": "ml-1m", "hidden_units": H, "maxlen": L, "num_blocks": 2}
        found = own | {"num_heads": HEADS, "state_dict_path": "a,b.pth"} | args
        lines = [f"{key},{value}" for key, value in sorted(found.items())]
        (folder / "args.txt").write_text("\n".join(lines))
    return folder / name


def trained(folder, code, **settings):
    """A checkpoint as the code of that time leaves it."""
    flag = {"pre": {"norm_first": True}, "post": {"norm_first": False}}.get(code, {"lr": 0.001})
    return write(folder, library(code, **settings).state_dict(), **flag)


def found(rec, lists=HISTORIES):
    return rec.score(rec.make_batch(lists))


def refusal(path, **settings):
    with pytest.raises(ModelError) as error:
        load(path, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- equal scores -------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("padding_is_zero", [True, False], ids=["zero", "trained"])
def test_scores_are_those_of_the_library(tmp_path, code, padding_is_zero):
    model = library(code, padding_is_zero=padding_is_zero)
    rec = load(trained(tmp_path, code, padding_is_zero=padding_is_zero), items=tiny_catalogue(N))
    torch.testing.assert_close(found(rec), scores(model), atol=1e-5, rtol=1e-5)
    rec.model.double()
    model.double()  # what still differs now is the computation, or a single rounding of padding
    close = {"atol": 1e-10, "rtol": 0} if padding_is_zero else {"atol": 1e-6, "rtol": 1e-6}
    torch.testing.assert_close(found(rec), scores(model), **close)
    assert rec.max_length == L
    assert rec.model.config.norm_first == NORM_FIRST[code]


@each
def test_the_four_codes_score_otherwise_with_equal_weights(code):
    """Or the test above would not tell them apart."""
    model = library("pre")
    before = scores(model)
    model.code = code
    if code == "2020":
        model.pos_emb.weight.data = model.pos_emb.weight.data[1:]
    assert torch.allclose(before, scores(model), atol=1e-3) == (code == "pre")


def test_the_clone_of_the_live_adapter_scores_the_same(tmp_path):
    live = PMIXER.build()
    lists = [history for history in LISTS if history]
    for module in live.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-8
    path = write(tmp_path, live.state_dict(), norm_first=False)
    rec = load(path)
    expected = PMIXER.score(live, lists)
    torch.testing.assert_close(found(rec, Histories.from_lists(lists)), expected)


def test_an_activation_of_other_code(tmp_path, monkeypatch):
    path = write(tmp_path, library("2020").state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "relu", lambda x: x)
        expected = scores(library("2020"))
    linear = load(path, hidden_act="linear")
    torch.testing.assert_close(found(linear), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found(load(path)), expected, atol=1e-2)


@each
def test_the_recommender_conforms_and_padding_and_ids_that_are_off_do_not(tmp_path, code):
    rec = load(trained(tmp_path, code))
    check_conformance(rec)
    right = rec.make_batch

    def shifted(step):
        return lambda histories: {
            "input_ids": right(histories)["input_ids"] + step * (right(histories)["input_ids"] > 0)
        }

    def other_side(histories):
        return {"input_ids": torch.from_numpy(histories.padded(L, -1, side="right") + 1)}

    for wrong, reason in (
        (other_side, "is the padding on the right side"),
        (shifted(-1), "the ids are off"),
        (shifted(1), "are the ids in its range"),
    ):
        rec.make_batch = wrong
        assert reason in "; ".join(conformance(rec).problems)


# --- what tells the settings --------------------------------------------------------------------


def test_positions_as_many_as_maxlen_are_of_the_oldest_code(tmp_path):
    path = write(tmp_path, library("2020").state_dict())
    torch.testing.assert_close(found(load(path)), scores(library("2020")))


@pytest.mark.parametrize("code", CODES[1:])
def test_without_args_norm_first_is_asked_for(tmp_path, code):
    path = write(tmp_path, library(code).state_dict())
    message = refusal(path)
    assert "does not say whether it was trained with --norm_first" in message
    assert f"pmixer:{path},norm_first=true or false, or norm_first=queries" in message
    rec = load(path, norm_first=NORM_FIRST[code])
    torch.testing.assert_close(found(rec), scores(library(code)))


@each
def test_under_another_name_without_args_everything_is_asked_for(tmp_path, code):
    path = write(tmp_path, library(code).state_dict(), name="model.pth")
    message = refusal(path)
    assert "does not say its number of attention heads" in message
    assert f"open it as pmixer:{path},heads=… with its --num_heads" in message
    assert "--norm_first" in refusal(path, heads=HEADS)
    settings = {"heads": HEADS, "norm_first": NORM_FIRST[code]}
    if code == "2020":
        message = refusal(path, **settings)
        assert f"has {L} positions, which do not tell" in message
        assert f"pmixer:{path},maxlen=… with its --maxlen" in message
        settings["maxlen"] = L
    torch.testing.assert_close(found(load(path, **settings)), scores(library(code)))


def test_args_are_believed_under_another_name(tmp_path):
    path = write(tmp_path, library("pre").state_dict(), name="best.pth", norm_first=True)
    torch.testing.assert_close(found(load(path)), scores(library("pre")))


@pytest.mark.parametrize(
    ("args", "note"),
    [
        (
            {"hidden_units": 64},
            f"the args.txt beside it is of another run: it has hidden_units 64, not {H}",
        ),
        ({"num_blocks": 3}, "num_blocks 3, not 2"),
        ({"maxlen": 50}, f"maxlen 50, not {L}"),
        ({"num_heads": 4}, f"num_heads 4, not {HEADS}"),
    ],
)
def test_args_of_another_run_are_not_believed(tmp_path, args, note):
    path = write(tmp_path, library("pre").state_dict(), norm_first=True, **args)
    assert note in refusal(path)
    assert load(path, norm_first=True).model.config.num_attention_heads == HEADS


def test_a_name_of_another_run_is_not_believed(tmp_path):
    name = NAME.replace(f"hidden={H}", "hidden=50")
    path = write(tmp_path, library("pre").state_dict(), name=name)
    assert f"its name is of another run: it has hidden_units 50, not {H}" in refusal(path)


@pytest.mark.parametrize("text", ["", "norm_first,True", "\0\xff,\n,,,\n", "num_heads,two\n" * 9])
def test_other_files_of_that_name_say_nothing(tmp_path, text):
    path = write(tmp_path, library("pre").state_dict())
    (tmp_path / "args.txt").write_text(text, encoding="latin-1")
    assert "--norm_first" in refusal(path)


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_oldest_code_knows_no_norm_first(tmp_path, norm_first):
    path = write(tmp_path, library("2020").state_dict())
    assert "its code is older: expected norm_first=queries" in refusal(path, norm_first=norm_first)


def test_a_window_that_positions_do_not_fit_is_refused(tmp_path):
    path = trained(tmp_path, "pre")
    assert f"has {L + 1} positions; expected 50 or 51" in refusal(path, maxlen=50)


def test_heads_have_to_divide_the_width(tmp_path):
    assert "hidden_size 8 is not a multiple of num_attention_heads 3" in refusal(
        trained(tmp_path, "pre"), heads=3
    )


# --- what is refused ----------------------------------------------------------------------------


def without(part):
    return lambda w: {name: tensor for name, tensor in w.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("in_proj_weight"), "is not a SASRec.pytorch SASRec checkpoint: it has"),
        (lambda w: w | {"user_emb.weight": torch.ones(3, H)}, "has user_emb besides what"),
        (without("conv2.bias"), "forward_layers.0.conv2.bias is missing"),
        (without("last_layernorm"), "last_layernorm.weight is missing"),
        (
            lambda w: w | {"forward_layers.0.alpha": torch.ones(1)},
            "forward_layers.0.alpha is none of its weights",
        ),
        (lambda w: w | {"item_emb.weight": torch.ones(3)}, "has shape (3,); expected a table"),
        (lambda w: w | {"pos_emb.weight": torch.ones(L + 1, 3)}, "does not fit SASRec.pytorch's"),
        (lambda w: w | {"last_layernorm.bias": torch.ones(3)}, "does not fit SASRec.pytorch's"),
        (
            lambda w: w | {"attention_layers.7.in_proj_bias": torch.ones(3 * H)},
            "the layers attention_layers.… are not numbered 0, 1, …",
        ),
        (
            lambda w: w | {"last_layernorm.bias": torch.full((H,), torch.nan)},
            "last_layernorm.bias is not all finite numbers",
        ),
        (
            lambda w: w | {"item_emb.weight": torch.full((N + 1, H), torch.inf)},
            "item_emb.weight is not all finite numbers",
        ),
        (
            lambda w: w | {"item_emb.weight": torch.ones(N + 1, H, dtype=torch.long)},
            "item_emb.weight is not all finite numbers",
        ),
    ],
)
def test_what_is_no_such_model_is_refused_in_one_line(tmp_path, change, message):
    path = write(tmp_path, change(dict(library("pre").state_dict())), norm_first=True)
    assert message in refusal(path)


def test_a_catalogue_of_another_size_is_refused(tmp_path):
    path = trained(tmp_path, "pre")
    message = refusal(path, items=tiny_catalogue(5))
    assert f"has {N} items, the catalogue has 5" in message
    assert "--item-map" in message


def test_what_torch_did_not_save_is_refused(tmp_path):
    (tmp_path / NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError):
        load(tmp_path / NAME)


# --- where a model is given ---------------------------------------------------------------------


def test_settings_behind_the_path(tmp_path):
    path = write(tmp_path, library("post").state_dict(), name="model.pth")
    rec = load_recommender(f"pmixer:{path},heads={HEADS},norm_first=false")
    torch.testing.assert_close(found(rec), scores(library("post")))
    assert rec.catalogue.item_ids.to_list() == list(range(1, N + 1))
    again = load_recommender(f"pmixer:{path}", heads=HEADS, norm_first=False)
    assert torch.equal(found(again), found(rec))


@each
def test_the_source_opens_the_same_model_without_what_told_its_settings(tmp_path, code):
    path = trained(tmp_path, code)
    rec = load_recommender(f"pmixer:{path}")
    source = rec.describe()["source"]
    (tmp_path / "args.txt").unlink()
    moved = source.replace(NAME, "model.pth")
    path.rename(tmp_path / "model.pth")
    assert torch.equal(found(load_recommender(moved)), found(rec))
    assert load_recommender(moved).describe()["config"] == rec.describe()["config"]


@each
def test_convert_writes_the_model_folder(tmp_path, capsys, code):
    from steerrec.cli.convert import convert

    path = trained(tmp_path / "run", code, padding_is_zero=False)
    convert(f"pmixer:{path}", tmp_path / "model", json_output=True)
    assert json.loads(capsys.readouterr().out)["items"] == N
    rec = load_recommender(tmp_path / "model")
    assert torch.equal(found(rec), found(load(path)))
    assert rec.describe()["config"] == load(path).describe()["config"]
    check_conformance(rec)


def test_a_wrapped_state_dict_is_found(tmp_path):
    weights = {f"module.{name}": tensor for name, tensor in library("pre").state_dict().items()}
    path = write(tmp_path, {"state_dict": weights, "epoch": 3}, norm_first=True)
    assert "item_emb.weight" in find_state_dict(read_checkpoint(path))
    torch.testing.assert_close(found(load(path)), scores(library("pre")))
