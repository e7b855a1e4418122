"""Adapters of live models of other libraries, on clones of these: the library's own scores."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
import transformers

from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.conformance import check_conformance, conformance
from steerrec.data import Histories
from steerrec.errors import ModelError
from steerrec.evaluation import recommend
from steerrec.handles import FastPathOff
from steerrec.steering import Steering, SteerTransform
from steerrec.wrapping import wrap

from .clones import CLONES, H, N
from .toy_models import hooked, tiny_catalogue

FAMILIES = {
    "bert4rec_vae": ["BERT4Rec-VAE"],
    "gru4rec": ["GRU4Rec"],
    "gsasrec": ["gSASRec"],
    "huggingface": ["GPT-2 backbone", "BERT backbone"],
    "recbole": [f"RecBole {name}" for name in ("SASRec", "BERT4Rec", "GRU4Rec", "NARM", "CORE")],
    "rectools": ["RecTools SASRec", "RecTools Flat SASRec"],
    "replay": ["RePlay SasRec, legacy", "RePlay Bert4Rec, legacy", "RePlay SasRec"],
    "sasrec_pytorch": ["SASRec.pytorch"],
}
SETTINGS = {"BERT backbone": {"padding": "right", "pad_id": 0, "mask_id": N + 1}}
CLONE = {clone.name: clone for clone in CLONES}
HISTORIES = [[0, 5, 3, 1], [7], [2, 2, 9, 4, 11, 6], [8, 0, 10]]
each = pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in FAMILIES.items() for name in names]
)


def adapter(family):
    return import_module(f"steerrec.adapters.{family}")


def wrapped(family, name):
    model = CLONE[name].build()
    return adapter(family).from_model(model, tiny_catalogue(N), **SETTINGS.get(name, {}))


@each
def test_an_adapter_gives_the_scores_of_the_library(family, name):
    rec = wrapped(family, name)
    check_conformance(rec)
    scores = rec.score(rec.make_batch(Histories.from_lists(HISTORIES)))
    off = FastPathOff() if CLONE[name].needs_slow_attention else None
    expected = CLONE[name].score(CLONE[name].build(), HISTORIES)
    del off
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@each
def test_steering_through_the_hook_is_steering_user_vectors(family, name):
    rec = wrapped(family, name)
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(H, 32, k=4, generator=generator).requires_grad_(False)
    steering = Steering(torch.randn(32, generator=generator), alpha=2.0)
    histories = Histories.from_lists(HISTORIES)
    base = recommend(rec, histories, k=N)
    with attach(rec, sae, steering=steering):
        through_hook = rec.score(rec.make_batch(histories))
        lists = recommend(rec, histories, k=N)
    by_vectors = recommend(rec, histories, k=N, transform=SteerTransform(sae, steering))
    assert torch.equal(lists.ids, by_vectors.ids)
    assert not torch.equal(lists.ids, base.ids)
    found = torch.empty(len(histories), N).scatter_(1, lists.ids, lists.scores)
    torch.testing.assert_close(through_hook, found, atol=1e-4, rtol=1e-4)
    plain = CLONE[name].build()
    CLONE[name].score(plain, HISTORIES)  # transformers adds hooks of its own at the first forward
    assert hooked(rec.model) == hooked(plain)


@each
def test_the_wrong_padding_side_is_noticed(family, name):
    rec = wrapped(family, name)
    other = {"left": "right", "right": "left"}[rec.scheme.padding]
    right = rec.scheme.padding
    rec.scheme = replace(rec.scheme, padding=other)
    assert conformance(rec).problems[0] == f"padding={right!r} would mend it"


@pytest.mark.parametrize("step", [1, -1])
@each
def test_ids_that_are_off_by_one_are_noticed(family, name, step):
    rec = wrapped(family, name)
    right = rec.scheme.first_id
    rec.scheme = replace(rec.scheme, first_id=right + step)
    found = conformance(rec)
    assert found.problems[0] == f"first_id={right} would mend it"


@each
def test_another_number_of_items_is_refused(family, name):
    if family == "huggingface":
        pytest.skip("its items cannot be told from spare ids")
    with pytest.raises(ModelError, match="has 12 items, but 11 ids were given") as refused:
        adapter(family).from_model(
            CLONE[name].build(), list(range(N - 1)), **SETTINGS.get(name, {})
        )
    assert "\n" not in str(refused.value)


@each
def test_the_item_head_follows_the_weights(family, name):
    rec = wrapped(family, name)
    before = rec.item_head.weight.clone()
    for parameter in rec.model.parameters():
        parameter.data.mul_(-1.5)
    assert not torch.allclose(rec.item_head.weight, before)


@each
def test_only_its_own_models_are_recognised(family, name):
    model = CLONE[name].build()
    assert [f for f in FAMILIES if adapter(f).recognises(model)] == [family]
    stranger = torch.nn.Linear(2, 2)
    assert not adapter(family).recognises(stranger)
    with pytest.raises(ModelError):
        adapter(family).from_model(stranger, tiny_catalogue(N))


def test_wrap_finds_the_adapter_of_a_live_model():
    rec = wrap(CLONE["RecBole SASRec"].build(), tiny_catalogue(N), source="run 7")
    assert rec.describe() == {"adapter": "recbole", "source": "run 7", "class": "RecBoleSASRec"}
    check_conformance(rec)
    with pytest.raises(ModelError, match=r"Linear is no model of a library .* expected max_length"):
        wrap(torch.nn.Linear(2, 2), tiny_catalogue(N))


# --- what transformers objects do not hold --------------------------------------------------------


def bert(**settings):
    model = CLONE["BERT backbone"].build()
    return adapter("huggingface").from_model(model, list(range(N)), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_id": N + 1}, "does not say how histories are padded; expected padding='left' or"),
        ({"padding": "right"}, "reads both ways, .*; expected its mask_id"),
        ({"padding": "right", "mask_id": 3}, "12 items from id 1 on do not fit .* 3 for the mask"),
        ({"padding": "right", "mask_id": N + 1, "first_id": 3}, "from id 3 on do not fit"),
    ],
)
def test_a_backbone_has_to_be_told_what_it_does_not_hold(settings, message):
    with pytest.raises(ModelError, match=message):
        bert(**settings)


LANGUAGE_MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_positions=6, n_embd=H, n_layer=2, n_head=2, **VOCABULARY)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(max_position_embeddings=6, num_key_value_heads=1, **SIZE)
    ),
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(max_position_embeddings=6, **SIZE)
    ),
}
VOCABULARY = {"vocab_size": N + 2, "pad_token_id": N, "bos_token_id": None, "eos_token_id": None}
SIZE = VOCABULARY | {
    "hidden_size": H,
    "intermediate_size": 2 * H,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_a_language_model_whose_words_are_items(kind, padding):
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[kind]()
    mask = {"mask_id": N + 1} if kind == "bert" else {}
    rec = adapter("huggingface").from_model(model, list(range(N)), padding=padding, **mask)
    check_conformance(rec)
    assert rec.max_length == (5 if mask else 6)
    history = [0, 5, 3]
    ids = torch.tensor([[*history, *mask.values()]])
    expected = model(input_ids=ids).logits[:, -1, :N]
    if kind == "llama" or padding == "right":  # the others count positions from the padding on
        scores = rec.score(rec.make_batch(Histories.from_lists([history])))
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
