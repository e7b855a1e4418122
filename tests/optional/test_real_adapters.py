"""The adapters of live models on the libraries themselves, each where it is installed.

As `test_real_libraries`, which has the models and how their libraries score with them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

from steerrec import Steering, SteerTransform, attach, user_vectors
from steerrec.autoencoder import SparseAutoencoder
from steerrec.conformance import check_conformance
from steerrec.data import Histories
from steerrec.errors import ColumnError, ModelError
from steerrec.wrapping import LIBRARIES, WrappedRecommender

from ..unit import test_conformance as conformance
from ..unit.clones import Clone, H, L, N, masked
from .test_real_libraries import (
    CORNAC,
    PAD,
    RECBOLE,
    RECTOOLS,
    REPLAY,
    TRANSFORMERS,
    library,
    rectools_model,
    score_cornac,
    score_rectools,
)

USERS = ("Caser", "HGN", "NPE", "SHAN", "HRM", "FOSSIL", "TransRec")  # they read who it is
WITHIN = [clone for clone in RECBOLE if clone.name.removeprefix("RecBole ") not in USERS]
BEYOND = [clone for clone in RECBOLE if clone not in WITHIN]
KNOWN = [
    *WITHIN,
    *(clone for clone in RECTOOLS if "HSTU" not in clone.name),
    *REPLAY,
    *(clone for clone in CORNAC if "SASRec" not in clone.name),
    *TRANSFORMERS,
]
each = conformance.each


def adapter_of(model: nn.Module) -> Any:
    found = [import_module(f"steerrec.adapters.{family}") for family in LIBRARIES]
    (adapter,) = [adapter for adapter in found if adapter.recognises(model)]
    return adapter


def item_ids(model: Any) -> list[int]:
    """The items of a model in the order of its own ids."""
    if not hasattr(model, "recommender"):
        return list(range(N))
    return [int(id_) for id_ in model.recommender.data_preparator.item_id_map.external_ids[-N:]]


def wrapped(clone: Clone, model: nn.Module) -> WrappedRecommender:
    settings: dict[str, Any] = {}
    if clone in TRANSFORMERS:
        side = "left" if "left-padded" in clone.name else "right"
        settings = {"padding": side, "pad_id": PAD, "max_length": L}
        settings |= {"mask_id": N + 1} if clone.name.startswith("BERT") else {}
    rec: WrappedRecommender = adapter_of(model).from_model(model, item_ids(model), **settings)
    return rec


def own_scores(clone: Clone, model: Any) -> Tensor:
    """What the library gives, in the order of the items; Cornac's recommender adds the mask."""
    histories = conformance.HISTORIES
    if clone in CORNAC and getattr(model, "attention_type", "causal") != "causal":
        return score_cornac(model, masked(histories, N + 1))
    return clone.score(model, histories)[:, item_ids(model)]


def in_rows(model: nn.Module) -> Histories:
    row = {id_: row for row, id_ in enumerate(item_ids(model))}
    return Histories.from_lists([[row[id_] for id_ in h] for h in conformance.HISTORIES])


@each(KNOWN)
def test_an_adapter_gives_the_scores_of_the_library(clone: Clone) -> None:
    model = clone.build()
    rec = wrapped(clone, model)
    check_conformance(rec)
    conformance.close(rec.score(rec.make_batch(in_rows(model))), own_scores(clone, model))


@each(KNOWN)
def test_steering_through_the_hook_is_steering_user_vectors(clone: Clone) -> None:
    model = clone.build()
    rec, histories = wrapped(clone, model), in_rows(model)
    users = user_vectors(rec, histories)
    sae = SparseAutoencoder(H, 32, k=4)
    steering = Steering(torch.linspace(-1, 1, 32), alpha=2.0)
    with attach(rec, sae, steering=steering):
        scores = rec.score(rec.make_batch(histories))
    conformance.close(scores, rec.item_head.scores(SteerTransform(sae, steering)(users)))


@each(BEYOND)
def test_what_reads_users_is_refused(clone: Clone) -> None:
    model = clone.build()
    with pytest.raises(ModelError, match="reads 'user' besides 'item_list' and 'length'"):
        wrapped(clone, model)


hstu = partial(rectools_model, "hstu", "HSTUModel")


def timed(histories: list[list[int]]) -> Histories:
    """With the times that `rectools_dataset` gives them: an hour apart."""
    start = 1_704_067_200  # 2024-01-01
    times = [[start + 3600 * step for step in range(len(row))] for row in histories]
    return Histories.from_lists(histories, columns={"time": times})


def test_an_hstu_that_reads_timestamps_scores_as_its_library() -> None:
    model = hstu()
    rec = adapter_of(model).from_model(model, item_ids(model))
    check_conformance(rec)
    lists = [[0, 3, 1], [2], [4, 1, 0, 3, 2, 5, 4]]
    rows = rec.catalogue.rows_of(pl.Series([*range(N)]))
    histories = timed([[int(rows[item]) for item in row] for row in lists])
    conformance.close(rec.score(rec.make_batch(histories))[:, rows], score_rectools(model, lists))
    slower = replace(histories, columns={"time": histories.column("time") * 50})
    moved = rec.score(rec.make_batch(slower)) - rec.score(rec.make_batch(histories))
    assert (moved.abs().amax(dim=1) > 1e-7).tolist() == [True, False, True]
    with pytest.raises(ColumnError, match="no column 'time'"):
        rec.make_batch(Histories.from_lists(lists))


def test_an_hstu_that_reads_no_timestamps() -> None:
    model = hstu(relative_time_attention=False)
    rec = adapter_of(model).from_model(model, item_ids(model))
    check_conformance(rec)
    assert rec.item_head.normalize


def test_the_flat_network_of_rectools() -> None:
    kind = library("rectools", "rectools.fast_transformers.net").FlatSASRecNet
    torch.manual_seed(0)
    model = kind(n_items=N, n_factors=H, n_blocks=2, n_heads=2, session_max_len=L).eval()
    check_conformance(adapter_of(model).from_model(model, item_ids(model)))
