"""The reference SASRec: the model against a naive one, its files, and what it refuses."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from steerrec.adapters.sasrec import (
    SASRecConfig,
    SASRecModel,
    SASRecRecommender,
    load,
    save,
)
from steerrec.conformance import check_conformance
from steerrec.data import Histories
from steerrec.errors import DataError, ModelError
from steerrec.recommender import fingerprint

from .toy_models import tiny_catalogue, tiny_config, tiny_sasrec

IDS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0], [8, 0, 0, 0, 0, 0]])
norms = pytest.mark.parametrize(
    "norm_first", [True, False, "queries"], ids=["pre-norm", "post-norm", "queries"]
)


def hidden(model, ids):
    return model(ids).last_hidden_state


# --- the model ----------------------------------------------------------------------------------


def naive_norm(x, weight, bias, eps):
    """Layer norm of one vector."""
    centred = x - x.mean()
    return weight * centred / (centred.square().mean() + eps).sqrt() + bias


def naive_attention(asking, states, weights, heads):
    """Causal attention, one position and one head at a time; states [L, H]."""
    sources = (asking, states, states)
    q, k, v = (x @ w.T + b for x, (w, b) in zip(sources, weights["qkv"], strict=True))
    size = states.shape[1] // heads
    mixed = torch.zeros_like(states)
    for position in range(len(states)):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            logits = [
                float(q[position, part] @ k[j, part]) / size**0.5 for j in range(position + 1)
            ]
            shares = torch.tensor(logits, dtype=states.dtype).exp()
            shares = shares / shares.sum()
            mixed[position, part] = sum(s * v[j, part] for j, s in enumerate(shares))
    return mixed @ weights["out"][0].T + weights["out"][1]


def naive_sasrec(model, ids):
    """Hidden states [L, H] of one history, written from the paper's equations.

    Its ids hold padding, 0, only where the model reads it.
    """
    config, state = model.config, model.state_dict()

    def pair(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(name, states):
        return torch.stack([naive_norm(x, *pair(name), config.layer_norm_eps) for x in states])

    def attention(layer, states, asking=None):
        weight, bias = pair(f"{layer}.attention.qkv")
        qkv = zip(weight.chunk(3), bias.chunk(3), strict=True)
        parts = {"qkv": list(qkv), "out": pair(f"{layer}.attention.out")}
        asking = states if asking is None else asking
        return naive_attention(asking, states, parts, config.num_attention_heads)

    def feed_forward(layer, states):
        (w1, b1), (w2, b2) = pair(f"{layer}.feed_forward.0"), pair(f"{layer}.feed_forward.2")
        activation = {"gelu": F.gelu, "relu": torch.relu}[config.hidden_act]
        return activation(states @ w1.T + b1) @ w2.T + b2

    scale = config.hidden_size**0.5 if config.scale_embeddings else 1.0
    real = (ids != 0).unsqueeze(1)
    first = config.max_position_embeddings - len(ids) if config.positions_from_end else 0
    x = state["item_embedding.weight"][ids] * scale
    x = x + state["position_embedding.weight"][first : first + len(ids)] * real
    if config.embedding_norm:
        x = norm("embedding_norm", x)
    if config.zero_padding:
        x = x * real
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}"
        first, second = f"{layer}.attention_norm", f"{layer}.feed_forward_norm"
        if config.norm_first == "queries":
            queries = norm(first, x)
            x = norm(second, queries + attention(layer, x, queries))
            x = x + feed_forward(layer, x)
        elif config.norm_first:
            x = x + attention(layer, norm(first, x))
            x = x + feed_forward(layer, norm(second, x))
        else:
            x = norm(first, x + attention(layer, x))
            x = norm(second, x + feed_forward(layer, x))
        if config.zero_padding:
            x = x * real
    last = config.norm_first if config.final_norm is None else config.final_norm
    return norm("final_norm", x) if last else x


@norms
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_attention_heads": 1, "hidden_act": "relu"},
        {"num_attention_heads": 4, "embedding_norm": True},
        {"scale_embeddings": True, "layer_norm_eps": 0.1, "num_hidden_layers": 1},
        {"final_norm": True, "positions_from_end": True, "max_position_embeddings": 7},
        {"final_norm": False, "zero_padding": True},
    ],
    ids=lambda settings: ", ".join(settings) or "default",
)
def test_the_model_equals_a_naive_one(norm_first, settings):
    model = tiny_sasrec(norm_first=norm_first, **settings).model.double()
    states = hidden(model, IDS)
    for user, row in enumerate(IDS):
        real = row[row != 0]
        torch.testing.assert_close(states[user, : len(real)], naive_sasrec(model, real))


def left(rows, window):
    """The ids of some rows, padding last, with the padding first and as wide as the window."""
    return torch.stack([F.pad(row[row != 0], (window - int((row != 0).sum()), 0)) for row in rows])


@norms
@pytest.mark.parametrize("zero", [True, False], ids=["zeroed", "kept"])
def test_padding_on_the_left_is_read_as_an_item_without_a_position(norm_first, zero):
    rec = tiny_sasrec(
        norm_first=norm_first,
        padding_side="left",
        zero_padding=zero,
        scale_embeddings=True,
        max_position_embeddings=8,
    )
    model = rec.model.double()
    torch.nn.init.normal_(model.item_embedding.weight.data[0])  # it has a say, unless it is zeroed
    rows = torch.cat([IDS, torch.zeros(1, 6, dtype=torch.long)])  # and a history of nothing
    ids = left(rows, 8)
    states = hidden(model, ids)
    for user, row in enumerate(ids):
        torch.testing.assert_close(states[user], naive_sasrec(model, row))
    torch.testing.assert_close(model.score(ids), states[:, -1] @ model.item_matrix.T)
    lists = [[item - 1 for item in row.tolist() if item] for row in rows]
    batch = rec.make_batch(Histories.from_lists(lists))
    assert torch.equal(batch["input_ids"], ids)
    check_conformance(rec)


@norms
@pytest.mark.parametrize("tied", [True, False])
def test_scores_are_the_last_real_state_times_the_item_embeddings(norm_first, tied):
    model = tiny_sasrec(norm_first=norm_first, tie_word_embeddings=tied).model.double()
    state = model.state_dict()
    items = state["item_embedding.weight"][1:] if tied else state["output_embedding.weight"]
    scores = model.score(IDS)
    for user, row in enumerate(IDS):
        last = naive_sasrec(model, row[row != 0])[-1]
        torch.testing.assert_close(scores[user], items @ last)


@norms
def test_a_later_item_does_not_change_an_earlier_state(norm_first):
    model = tiny_sasrec(norm_first=norm_first).model
    plain = hidden(model, IDS)
    for position in range(1, IDS.shape[1]):
        changed = IDS.clone()
        changed[:, position] = 11
        states = hidden(model, changed)
        assert torch.equal(states[:, :position], plain[:, :position])
        assert not torch.allclose(states[:, position], plain[:, position])


@norms
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), extra=st.integers(0, 2))
def test_padding_does_not_matter(norm_first, lengths, extra):
    model = tiny_sasrec(norm_first=norm_first, max_position_embeddings=8).model
    rng = np.random.default_rng(sum(lengths))
    rows = [torch.from_numpy(rng.integers(1, 13, length)) for length in lengths]
    width = max(lengths) + extra
    padded = torch.stack([F.pad(row, (0, width - len(row))) for row in rows])
    scores = model.score(padded)
    for user, row in enumerate(rows):
        torch.testing.assert_close(scores[user], model.score(row[None])[0])


def test_an_earlier_item_and_the_order_do_matter():
    model = tiny_sasrec().model
    a, b, c = (model.score(torch.tensor([ids])) for ids in ([1, 2, 3], [4, 2, 3], [2, 1, 3]))
    assert not torch.allclose(a, b)
    assert not torch.allclose(a, c)


def test_dropout_acts_in_training_alone():
    model = tiny_sasrec(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5).model
    assert torch.equal(hidden(model, IDS), hidden(model, IDS))
    model.train()
    assert not torch.equal(hidden(model, IDS), hidden(model, IDS))


def test_padding_has_a_zero_embedding_and_learns_nothing():
    model = SASRecModel(tiny_config())
    assert not model.item_embedding.weight[0].any()
    assert model.item_embedding.weight[1:].any(dim=1).all()
    hidden(model, IDS).square().sum().backward()
    assert not model.item_embedding.weight.grad[0].any()
    assert model.item_embedding.weight.grad[3].any()


def test_a_history_longer_than_the_window_is_refused_by_the_model():
    with pytest.raises(ModelError, match="histories of 7 items; this model reads at most 6"):
        tiny_sasrec().model(torch.ones(1, 7, dtype=torch.long))


def test_left_padding_has_to_fill_the_window():
    model = tiny_sasrec(padding_side="left").model
    with pytest.raises(ModelError, match=r"ids 5 wide; .* padded on the left to all of its .* 6"):
        model(torch.ones(1, 5, dtype=torch.long))


# --- the configuration --------------------------------------------------------------------------


def test_heads_have_to_divide_the_width():
    with pytest.raises(
        ModelError, match="hidden_size 8 is not a multiple of num_attention_heads 3"
    ):
        tiny_config(num_attention_heads=3)
    with pytest.raises(ModelError, match="is not a multiple of num_attention_heads 0"):
        tiny_config(num_attention_heads=0)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ModelError, match="hidden_act 'gulu' is no activation that transformers"):
        tiny_config(hidden_act="gulu")


def test_a_configuration_from_before_the_options_is_that_of_their_defaults():
    old = {"num_items": 12, "hidden_size": 8, "norm_first": False, "model_type": "steerrec_sasrec"}
    config = SASRecConfig.from_dict(old)
    found = (config.norm_first, config.final_norm, config.padding_side, config.zero_padding)
    assert found == (False, None, "right", False)
    assert not config.positions_from_end


# --- the recommender ----------------------------------------------------------------------------


def test_a_batch_holds_the_latest_items_right_padded_to_the_longest():
    rec = tiny_sasrec()
    batch = rec.make_batch(Histories.from_lists([[0, 1], [4, 5, 6]]))
    assert batch["input_ids"].tolist() == [[1, 2, 0], [5, 6, 7]]
    batch = rec.make_batch(Histories.from_lists([[11], [0, 1, 2, 3, 4, 5, 6, 7]]))
    assert batch["input_ids"].tolist() == [[12, 0, 0, 0, 0, 0], [3, 4, 5, 6, 7, 8]]


def test_an_empty_history_gets_finite_scores():
    rec = tiny_sasrec()
    for lists in ([[]], [[], [1, 2]]):
        assert rec.score(rec.make_batch(Histories.from_lists(lists))).isfinite().all()


def test_a_recommender_freezes_its_model():
    model = SASRecModel(tiny_config())
    assert model.training
    rec = SASRecRecommender(model, tiny_catalogue(12))
    assert not rec.model.training
    assert not any(p.requires_grad for p in rec.model.parameters())
    assert rec.max_length == 6


def test_a_catalogue_of_another_size_is_refused():
    with pytest.raises(ModelError, match="the model has 12 items, its catalogue 11"):
        SASRecRecommender(SASRecModel(tiny_config()), tiny_catalogue(11))


def test_what_is_recorded_of_it_is_json():
    record = tiny_sasrec().describe()
    assert json.loads(json.dumps(record)) == record
    assert (record["adapter"], record["config"]["num_items"]) == ("sasrec", 12)


@pytest.mark.parametrize(
    "setting",
    [
        {"num_attention_heads": 4},
        {"hidden_act": "relu"},
        {"norm_first": "queries"},
        {"padding_side": "left"},
        {"positions_from_end": True},
    ],
)
def test_what_weights_do_not_show_is_in_the_record_and_in_the_fingerprint(setting):
    plain, other = tiny_sasrec(), tiny_sasrec(**setting)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, other.model.state_dict()[name])
    assert other.describe()["config"] == plain.describe()["config"] | setting
    one, two = (fingerprint(rec, rec.site) for rec in (plain, other))
    assert {key for key in one if one[key] != two[key]} == {"config_sha256"}


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save(tiny_sasrec(), tmp_path / "model")
    return tmp_path / "model"


SETTINGS = {
    "pre-norm": {},
    "post-norm": {"norm_first": False, "embedding_norm": True, "scale_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "of another library": {
        "norm_first": "queries",
        "final_norm": False,
        "zero_padding": True,
        "positions_from_end": True,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_saved_and_loaded_it_scores_the_same(settings, tmp_path):
    rec = tiny_sasrec(**settings)
    save(rec, tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded.model.score(IDS), rec.model.score(IDS))
    assert loaded.catalogue.frame.equals(rec.catalogue.frame)
    assert loaded.source == str(tmp_path)
    for name, tensor in rec.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)


def test_the_ways_of_transformers_work(folder):
    plain = tiny_sasrec().model.score(IDS)
    for model in (SASRecModel.from_pretrained(folder), AutoModel.from_pretrained(folder)):
        assert isinstance(model, SASRecModel)
        assert torch.equal(model.score(IDS), plain)
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, SASRecConfig)
    assert (config.num_items, config.max_position_embeddings) == (12, 6)


def test_a_saved_folder_holds_no_pickle(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.json", "items.parquet", "model.safetensors"]


def test_a_bf16_model_stays_one(tmp_path):
    rec = tiny_sasrec()
    rec.model.to(torch.bfloat16)
    plain = rec.model.score(IDS)
    save(rec, tmp_path)
    assert torch.equal(load(tmp_path).model.score(IDS), plain)
    assert plain.dtype == torch.bfloat16


def test_a_folder_without_items_is_refused(folder):
    (folder / "items.parquet").unlink()
    with pytest.raises(ModelError, match=r"has no items\.parquet"):
        load(folder)


def test_items_of_another_run_are_refused(folder):
    tiny_catalogue(13).write(folder / "items.parquet")
    with pytest.raises(ModelError, match="the model has 12 items, its catalogue 13"):
        load(folder)


def test_damaged_items_are_refused(folder):
    (folder / "items.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"items\.parquet"):
        load(folder)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_named(folder):
    change_weights(folder, lambda weights: weights.pop("layers.1.attention.out.bias"))
    with pytest.raises(ModelError, match=r"layers\.1\.attention\.out\.bias is missing"):
        load(folder)


def test_a_weight_too_many_is_named(folder):
    change_weights(folder, lambda weights: weights.update({"backdoor.weight": torch.zeros(9)}))
    with pytest.raises(ModelError, match=r"backdoor\.weight is not expected"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"final_norm.bias": None}, r"final_norm\.bias is missing"),
        ({"backdoor.weight": torch.zeros(9)}, r"backdoor\.weight is not expected"),
    ],
)
@pytest.mark.parametrize("auto", [SASRecModel, AutoModel])
def test_transformers_makes_up_no_weight_and_drops_none(folder, auto, change, complaint):
    def apply(weights):
        for name, tensor in change.items():
            if tensor is None:
                del weights[name]
            else:
                weights[name] = tensor

    change_weights(folder, apply)
    with pytest.raises(ModelError, match=f"{folder} does not fit its configuration: {complaint}"):
        auto.from_pretrained(folder)


def test_transformers_reads_no_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for auto in (SASRecModel, AutoModel):
        with pytest.raises(OSError, match="safetensors"):
            auto.from_pretrained(folder)


def test_the_report_of_transformers_is_still_to_be_had(folder):
    model, report = SASRecModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, SASRecModel)
    assert not report["missing_keys"]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_everything_that_a_model_holds_is_saved(settings, tmp_path):
    """What is not, such as a non-persistent buffer, would come back from loading as garbage."""
    model = tiny_sasrec(**settings).model
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert set(held) == set(model.state_dict())
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(held)
    for module in AutoModel.from_pretrained(tmp_path).modules():
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())


def test_a_saved_folder_asks_for_no_code(folder):
    """A class of one's own in the folder would be run by whoever trusts it."""
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert not list(folder.glob("*.py"))


@pytest.mark.parametrize(
    "change",
    [
        {"num_items": 10**12},
        {"hidden_size": 10**9, "num_attention_heads": 1},
        {"num_hidden_layers": 10**9},
        {"max_position_embeddings": 10**12},
        {"num_items": -5},
        {"quantization_config": {"quant_method": "bitsandbytes"}, "num_items": 11},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_allocates_nothing(folder, change):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError):
        load(folder)


def test_settings_of_other_models_are_passed_over(folder):
    """Such as those that make transformers load kernels, or code."""
    config = json.loads((folder / "config.json").read_text())
    hostile = {
        "auto_map": {"AutoModel": "evil.Evil"},
        "_attn_implementation_internal": "evil/kernel",
        "quantization_config": {"quant_method": "awq"},
        "architectures": ["Evil"],
    }
    (folder / "config.json").write_text(json.dumps(config | hostile))
    assert torch.equal(load(folder).model.score(IDS), tiny_sasrec().model.score(IDS))


def test_weights_that_are_no_numbers_are_refused(folder):
    change_weights(folder, lambda weights: weights["final_norm.bias"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"final_norm\.bias holds what is not a finite number"):
        load(folder)


def test_a_header_without_end_is_not_read(folder):
    (folder / "model.safetensors").write_bytes((10**9).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="has a header of 1000000000 bytes"):
        load(folder)


def test_a_weight_of_another_shape_is_named(folder):
    change_weights(folder, lambda weights: weights.update({"final_norm.bias": torch.zeros(9)}))
    with pytest.raises(ModelError, match=r"final_norm\.bias has shape \(9,\), expected \(8,\)"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b"no tensors"),
        ("model.safetensors", b""),
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "steerrec_sasrec", "hidden_size": "wide"}'),
        ("config.json", b'{"model_type": "steerrec_sasrec", "hidden_act": "nonsense"}'),
        ("config.json", b'{"model_type": "steerrec_sasrec", "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "steerrec_sasrec", "num_attention_heads": 7}'),
    ],
)
def test_damaged_files_are_told_in_one_line(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "\n" not in str(error.value)
