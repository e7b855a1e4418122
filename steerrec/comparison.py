"""Methods on equal terms: each sweeps its own strength, is chosen on validation, told on test.

A method makes lists from `steerrec.rerank.Candidates`; steering does so by other user vectors.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerrec.choosing import BUDGETS, CRITERIA, By, choose, hypervolume, metric_of
from steerrec.comparison_results import (
    TASTES,
    Comparison,
    MethodResult,
    Row,
    Setting,
    keep,
    kept,
    plain,
)
from steerrec.data import Split
from steerrec.errors import DataError
from steerrec.evaluation import CapturedUsers, Which, capture_held_out, measure_lists
from steerrec.progress import track
from steerrec.ranking import TopK
from steerrec.recommender import Recommender
from steerrec.rerank import Candidates, Reranker, gather_candidates
from steerrec.significance import Replicates, bootstrap
from steerrec.steering import SteerTransform

OUTSIDE = 100
"""A slot counts as far from the model where its item is not among so many of the user's best."""


@dataclass
class _Measured:
    """A part of the data, with what every method is measured on."""

    users: CapturedUsers
    candidates: Candidates
    nearest: Tensor = field(repr=False)  # the OUTSIDE best of each user, sorted by row
    taste: Tensor = field(repr=False)  # [U], part of each user


def compare(
    rec: Recommender,
    split: Split,
    methods: dict[str, Reranker],
    *,
    reference: str = "popsteer",
    k: int = 10,
    mask_seen: bool = False,
    pool: int = 200,
    max_users: int | None = None,
    budgets: Sequence[float] = BUDGETS,
    replicates: int = 500,
    seed: int = 0,
    fit_seconds: dict[str, float] | None = None,
    folder: str | Path | None = None,
) -> Comparison:
    """Compare methods on equal terms.

    Every method is swept over its own settings. Of those that keep nDCG on validation within a
    budget, and nDCG on tail targets at or above the model's own, the one with the lowest Gini, and
    apart from it the one with the highest LTC, is measured on test. Slots that are filled at random
    or from a group would look good by exposure alone: methods that do so are marked as controls.

    Parameters
    ----------
    rec, split
        Model and data.
    methods
        Name and method; the settings are the method's own.
    reference
        The method that the others are compared with, user by user.
    k, mask_seen
        See `measure`.
    pool
        How many of a user's best items re-rankers choose from that cannot rank the catalogue; at
        least the 100 of `Row.outside`.
    max_users
        How many held-out users are ranked, on validation and on test, drawn by the seed; all by
        default.
    budgets
        Shares of nDCG that may be lost.
    replicates, seed
        Of the bootstrap over users; the seed is also that of methods that draw.
    fit_seconds
        What it took to make a method, by name.
    folder
        Where each method's result is kept as soon as it is there; one that was made from the same
        model, users and settings is read from there and not made again.

    Raises
    ------
    DataError
        If there is no method, the reference is not among them, or the model's own nDCG is zero.
    """
    if not methods:
        raise DataError("no method to compare; expected one at least")
    if reference not in methods:
        known = ", ".join(methods)
        raise DataError(f"the reference {reference!r} is not among the methods: {known}")
    parts = {
        which: _measured(
            rec,
            split,
            which,
            k=k,
            pool=pool,
            max_users=max_users,
            mask_seen=mask_seen,
            seed=seed,
        )
        for which in _PARTS
    }
    protocol = {
        "mask_seen": mask_seen,
        "k": k,
        "pool": parts["test"].candidates.pool,
        "items": len(rec.catalogue),
        "users": {which: len(part.users.histories) for which, part in parts.items()},
        "budgets": list(budgets),
        "replicates": replicates,
        "seed": seed,
    }
    if (drawn := parts["test"].users.sample) is not None:
        protocol["sample"] = drawn
    base: dict[str, dict[str, float]] = {
        which: _metrics(rec, part, part.candidates.base) for which, part in parts.items()
    }
    if not metric_of(base["valid"], "ndcg") > 0:
        raise DataError(
            "the model finds no target of the validation users: nDCG is 0, and no budget can be "
            "taken from it"
        )
    started = time.perf_counter()
    parts["test"].candidates.rank()
    ranking = time.perf_counter() - started
    about = _digest(protocol, parts)
    store = None if folder is None else Path(folder) / "methods"
    results: dict[str, tuple[MethodResult, dict[str, Replicates]]] = {}
    order = [reference, *(name for name in methods if name != reference)]
    for name in track(order, "methods", unit="method"):
        method = methods[name]
        key = f"{about}-{_method_digest(method)}"
        found = None if store is None else kept(store / f"{name}.json", key)
        if found is None:
            found = _run(rec, name, method, parts, protocol, ranking)
            if store is not None:
                keep(store / f"{name}.json", key, found)
        results[name] = found
    own = results[reference]
    finished = []
    for name in methods:
        result, samples = results[name]
        rows = tuple(_paired(row, samples, own, name == reference) for row in result.rows)
        seconds = (fit_seconds or {}).get(name)
        if result.fit_seconds is not None:  # learned for the users that it was given
            seconds = (seconds or 0.0) + result.fit_seconds
        finished.append(replace(result, rows=rows, fit_seconds=seconds))
    per_user = 1000 * ranking / max(len(parts["test"].users.histories), 1)
    return Comparison(protocol, base, tuple(finished), per_user)


_PARTS: tuple[Which, ...] = ("valid", "test")
_FORMAT = 2  # of what is kept of a method


# --- one method


def _run(
    rec: Recommender,
    name: str,
    method: Reranker,
    parts: dict[Which, _Measured],
    protocol: dict[str, Any],
    ranking: float,
) -> tuple[MethodResult, dict[str, Replicates]]:
    values = method.settings
    learned = _learning_seconds(method)
    valid = [
        _metrics(rec, parts["valid"], setting.lists(parts["valid"].candidates))
        for setting in track(list(method.sweep()), f"{name} on valid", unit="setting")
    ]
    chosen: dict[int, list[tuple[float, By]]] = {}
    for budget in protocol["budgets"]:
        for by in CRITERIA:
            chosen.setdefault(choose(valid, budget, by), []).append((budget, by))
    part, test, rows, samples = parts["test"], [], [], {}
    seconds = []
    unsteered = _user_ndcg(rec, part, part.candidates.base)
    settings = list(enumerate(method.sweep()))
    for i, setting in track(settings, f"{name} on test", unit="setting"):
        started = time.perf_counter()
        lists = setting.lists(part.candidates)
        seconds.append(time.perf_counter() - started)
        evaluation = measure_lists(rec, part.users, _top(lists), mask_seen=protocol["mask_seen"])
        test.append(evaluation.metrics)
        if i not in chosen:
            continue
        sample = bootstrap(
            lists,
            evaluation.user_ndcg,
            part.candidates.labels,
            replicates=protocol["replicates"],
            seed=protocol["seed"],
        )
        measured = {m: metric_of(evaluation.metrics, m) for m in sample.values}
        for budget, by in chosen[i]:
            samples[_row_name(budget, by)] = sample
            rows.append(
                Row(
                    budget=budget,
                    by=by,
                    value=values[i],
                    metrics=evaluation.metrics,
                    interval=dict(sample.interval(measured)),
                    against={},
                    outside=_outside(lists, part.nearest),
                    by_taste=_by_taste(evaluation.user_ndcg, unsteered, part.taste),
                )
            )
    whole_catalogue = "vectors" in method.needs
    changed = seconds[1:] or seconds
    added = float(np.median(changed)) - (ranking if whole_catalogue else 0.0)
    result = MethodResult(
        name=name,
        description=_described(method),
        control=method.control,
        settings=tuple(map(Setting, values, valid, test)),
        rows=tuple(sorted(rows, key=lambda row: (row.budget, row.by))),
        hypervolume={by: hypervolume(valid, test, by) for by in CRITERIA},
        milliseconds=1000 * max(added, 0.0) / max(len(part.users.histories), 1),
        fit_seconds=None if learned is None else (_learning_seconds(method) or 0.0) - learned,
    )
    return result, samples


def _learning_seconds(method: Reranker) -> float | None:
    """What learning has taken so far, of a method that learns for the users it is given."""
    seconds: float | None = getattr(getattr(method, "transform", None), "seconds", None)
    return seconds


def _measured(
    rec: Recommender,
    split: Split,
    which: Which,
    *,
    k: int,
    pool: int,
    max_users: int | None,
    mask_seen: bool,
    seed: int,
) -> _Measured:
    users = capture_held_out(rec, split, which, max_users=max_users, seed=seed)
    candidates = gather_candidates(
        users.vectors,
        rec.item_head,
        users.histories,
        rec.catalogue,
        k=k,
        pool=max(pool, min(OUTSIDE, len(rec.catalogue))),
        mask_seen=mask_seen,
        seed=seed,
    )
    nearest = candidates.ids[:, :OUTSIDE].sort(dim=1).values
    return _Measured(users, candidates, nearest, _taste(users, rec.catalogue.counts))


def _taste(users: CapturedUsers, counts: np.ndarray[Any, Any]) -> Tensor:
    """Which of `TASTES` each user has, by the mean log count of the history, [U]."""
    histories = users.histories
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    weights = np.log1p(counts.astype(np.float64))[histories.items]
    mean = np.bincount(owner, weights, minlength=len(histories)) / np.maximum(histories.lengths, 1)
    place = np.empty(len(mean), dtype=np.int64)
    place[np.argsort(mean, kind="stable")] = np.arange(len(mean))
    return torch.from_numpy(len(TASTES) * place // max(len(mean), 1))


def _top(lists: Tensor) -> TopK:
    return TopK(lists, torch.zeros(lists.shape))


def _metrics(rec: Recommender, part: _Measured, lists: Tensor) -> dict[str, float]:
    seen = part.candidates.seen is not None
    return measure_lists(rec, part.users, _top(lists), mask_seen=seen).metrics


def _user_ndcg(rec: Recommender, part: _Measured, lists: Tensor) -> Tensor:
    seen = part.candidates.seen is not None
    return measure_lists(rec, part.users, _top(lists), mask_seen=seen).user_ndcg


def _outside(lists: Tensor, nearest: Tensor) -> float:
    """Share of filled slots whose item is not among the user's best."""
    at = torch.searchsorted(nearest, lists.contiguous()).clamp_max(nearest.shape[1] - 1)
    filled = lists >= 0
    inside = (nearest.gather(1, at) == lists) & filled
    return 1 - float(inside.sum()) / max(int(filled.sum()), 1)


def _by_taste(ndcg: Tensor, unsteered: Tensor, taste: Tensor) -> dict[str, list[float | None]]:
    """See `Row.by_taste`; users without a part of theirs give None."""
    of_users = {
        "unsteered": unsteered,
        "method": ndcg,
        "worse": ndcg < unsteered,
        "better": ndcg > unsteered,
    }
    found: dict[str, list[float | None]] = {}
    for name, values in of_users.items():
        parts = [values[taste == part].double() for part in range(len(TASTES))]
        found[name] = [float(part.mean()) if len(part) else None for part in parts]
    return found


def _paired(
    row: Row,
    samples: dict[str, Replicates],
    reference: tuple[MethodResult, dict[str, Replicates]],
    is_reference: bool,
) -> Row:
    if is_reference:
        return row
    name = _row_name(row.budget, row.by)
    return replace(row, against=samples[name].against(reference[1][name]))


def _row_name(budget: float, by: By) -> str:
    return f"{budget:g}-{by}"


def _described(method: Reranker) -> dict[str, Any]:
    described = method.describe()
    transform = getattr(method, "transform", None)
    if isinstance(transform, SteerTransform):
        described["steering"] = transform.steering.describe()
    return described


def _digest(protocol: dict[str, Any], parts: dict[Which, _Measured]) -> str:
    sha = hashlib.sha256(json.dumps([_FORMAT, protocol], sort_keys=True).encode())
    for part in parts.values():
        for tensor in (part.users.vectors, part.candidates.ids, part.users.targets):
            if tensor is not None:
                sha.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    return sha.hexdigest()[:16]


def _method_digest(method: Reranker) -> str:
    sha = hashlib.sha256(json.dumps(plain(_described(method)), sort_keys=True).encode())
    sha.update(repr(method.settings).encode())
    transform = getattr(method, "transform", None)
    if isinstance(transform, nn.Module):
        tensors = [*transform.state_dict().values(), *transform.buffers()]
        for tensor in tensors:
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
