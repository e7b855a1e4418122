"""Adapters of live models of other libraries, on clones of these: the library's own scores."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

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
    rec.scheme = replace(rec.scheme, padding=other)
    assert not conformance(rec).ok


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
