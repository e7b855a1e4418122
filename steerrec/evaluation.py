"""Accuracy and exposure of a recommender's lists, steered or not.

Every set of metrics travels with its protocol: split, seen-item mask, k, users, items.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories, Split
from steerrec.item_dtypes import CompactItemHead
from steerrec.metrics import RankingMetrics
from steerrec.ranking import TopK, top_k
from steerrec.recipes import Recipe
from steerrec.recommender import Recommender
from steerrec.sites import Site
from steerrec.steering import Steering, SteerTransform

Which = Literal["valid", "test"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics and the protocol that they were measured under.

    Attributes
    ----------
    protocol
        `split`, `mask_seen`, `k`, `users`, `items`; with `mask_seen` also `unreachable`, the
        share of targets that are in their own history and so cannot be recommended; `sample`,
        `of` how many users they are a sample and by which `seed`; and `item_dtype`, where items
        are held in another dtype than the model's.
    metrics
        `ndcg@10`, `hr@10`, `ltc@10`, `gini@10`, …
    user_ndcg
        nDCG of each user, [U]; empty without targets.
    """

    protocol: dict[str, Any]
    metrics: dict[str, float]
    user_ndcg: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Protocol and metrics as JSON-able values; what is undefined becomes null."""
        metrics = {k: None if math.isnan(v) else v for k, v in self.metrics.items()}
        return {"protocol": self.protocol, "metrics": metrics}


@dataclass(frozen=True)
class CapturedUsers:
    """Users with their user vectors at the scored site: captured once, ranked often.

    Attributes
    ----------
    vectors
        User vectors, [U, H].
    histories
        What each has taken so far.
    targets
        The item that each took next, [U]; None for whole histories, where it is not known.
    split
        `valid` or `test`, `none` for whole histories.
    sample
        `of` how many users they are a sample, and its `seed`; None for all of them.
    """

    vectors: Tensor
    histories: Histories
    targets: Tensor | None
    split: Literal["valid", "test", "none"]
    sample: dict[str, int] | None = None


def capture_users(rec: Recommender, histories: Histories) -> CapturedUsers:
    """User vectors after whole histories."""
    return CapturedUsers(collect_user_vectors(rec, histories), histories, None, "none")


def capture_held_out(
    rec: Recommender, split: Split, which: Which, *, max_users: int | None = None, seed: int = 0
) -> CapturedUsers:
    """User vectors of the held-out users, at most `max_users` of them (a seeded sample)."""
    histories, targets = split.held_out(which)
    taken = None
    if max_users is not None and max_users < len(histories):
        rng = np.random.default_rng(seed)
        sample = np.sort(rng.choice(len(histories), max_users, replace=False))
        taken = {"of": len(histories), "seed": seed}
        histories, targets = histories.select(sample), targets[sample]
    vectors = collect_user_vectors(rec, histories, description=f"{which} users")
    return CapturedUsers(vectors, histories, torch.from_numpy(targets), which, taken)


def rank(
    rec: Recommender,
    users: CapturedUsers,
    *,
    k: int = 10,
    mask_seen: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> TopK:
    """Lists for captured users, on the CPU; see `measure` for the options."""
    seen = users.histories if mask_seen else None
    vectors = users.vectors if transform is None else steered(users.vectors, transform)
    lists = top_k(vectors, rec.item_head, k, seen=seen)
    return TopK(lists.ids.cpu(), lists.scores.cpu())


def measure_lists(
    rec: Recommender, users: CapturedUsers, lists: TopK, *, mask_seen: bool
) -> Evaluation:
    """Metrics of lists that `rank` made for these users."""
    count, k = lists.ids.shape
    catalogue = rec.catalogue
    counts, labels = catalogue.counts.copy(), catalogue.groups.labels.copy()
    scores = RankingMetrics(torch.from_numpy(counts), torch.from_numpy(labels), k)
    scores.update(lists.ids, users.targets)
    protocol: dict[str, Any] = {
        "split": users.split,
        "mask_seen": mask_seen,
        "k": k,
        "users": count,
        "items": len(catalogue),
    }
    if users.sample is not None:
        protocol["sample"] = users.sample
    if isinstance(head := rec.item_head, CompactItemHead):
        protocol["item_dtype"] = str(head.weight.dtype).removeprefix("torch.")
    if mask_seen and users.targets is not None:
        protocol["unreachable"] = _repeated(users.histories, users.targets)
    return Evaluation(protocol, scores.compute(), scores.user_ndcg)


def measure(
    rec: Recommender,
    users: CapturedUsers,
    *,
    k: int = 10,
    mask_seen: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Rank the catalogue for captured users and measure the lists.

    Parameters
    ----------
    rec
        Supplies item head and catalogue.
    users
        From `capture_held_out` or `capture_users`.
    k
        Length of the lists.
    mask_seen
        Leave out every item of a user's history, a repeated target included.
    transform
        Applied to the user vectors [B, H] before scoring; a `SteerTransform`, say.
    """
    lists = rank(rec, users, k=k, mask_seen=mask_seen, transform=transform)
    return measure_lists(rec, users, lists, mask_seen=mask_seen)


def rank_steered(
    rec: Recommender,
    sae: SparseAutoencoder,
    steering: Recipe,
    users: CapturedUsers,
    capture: Callable[[], CapturedUsers],
    *,
    site: Site | None = None,
    k: int = 10,
    mask_seen: bool = False,
) -> TopK:
    """Steered lists, by the cheaper of two ways that give the same.

    Where the SAE sits on the scored vector, the vectors in `users` are steered; anywhere else the
    model has to run again, by `capture`, with the SAE attached.
    """
    if site is None or site == rec.site:
        return rank(rec, users, k=k, mask_seen=mask_seen, transform=SteerTransform(sae, steering))
    with attach(rec, sae, site=site, steering=steering):
        return rank(rec, capture(), k=k, mask_seen=mask_seen)


def evaluate(
    rec: Recommender,
    split: Split,
    *,
    which: Which = "test",
    k: int = 10,
    mask_seen: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
    max_users: int | None = None,
) -> Evaluation:
    """Leave-one-out metrics of a recommender over the full catalogue.

    An attachment that is live on ``rec.model`` takes part: user vectors are read at the scored
    site after it. See `measure` for the options, `capture_held_out` for `max_users`.
    """
    users = capture_held_out(rec, split, which, max_users=max_users)
    return measure(rec, users, k=k, mask_seen=mask_seen, transform=transform)


def recommend(
    rec: Recommender,
    histories: Histories,
    *,
    k: int = 10,
    mask_seen: bool = False,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> TopK:
    """The k best items after each whole history: catalogue rows [U, k] and their scores.

    A slot that cannot be filled, because everything has been seen, holds -1. See `measure` for the
    options; an attachment that is live on ``rec.model`` takes part.
    """
    users = capture_users(rec, histories)
    return rank(rec, users, k=k, mask_seen=mask_seen, transform=transform)


def reconstruction_cost(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    *,
    site: Site | None = None,
    k: int = 10,
    max_users: int | None = None,
) -> dict[str, Any]:
    """Held-out metrics with the reconstruction in place of the vector, beside the model's own.

    Both splits are measured, and nothing is chosen by them. See `capture_held_out` for `max_users`.

    Returns
    -------
    dict
        For `valid` and for `test`: `base` and `reconstruction`, each with protocol and metrics, and
        `ndcg_kept`, the share of the model's nDCG that is left.
    """
    empty = Steering(torch.zeros(sae.d_sae), splice="reconstruct", name="reconstruction")
    found: dict[str, Any] = {}
    splits: tuple[Which, ...] = ("valid", "test")
    for which in splits:
        capture = partial(capture_held_out, rec, split, which, max_users=max_users)
        users = capture()
        base = measure(rec, users, k=k)
        lists = rank_steered(rec, sae, empty, users, capture, site=site, k=k)
        through = measure_lists(rec, users, lists, mask_seen=False)
        ndcg, own = through.metrics[f"ndcg@{k}"], base.metrics[f"ndcg@{k}"]
        found[which] = {
            "base": base.to_dict(),
            "reconstruction": through.to_dict(),
            "ndcg_kept": ndcg / own if own else None,
        }
    return found


@torch.no_grad()
def steered(vectors: Tensor, transform: Callable[[Tensor], Tensor], *, chunk: int = 4096) -> Tensor:
    """`transform` applied to user vectors [U, H] in chunks of rows."""
    return torch.cat([transform(part) for part in vectors.split(chunk)])


def _repeated(histories: Histories, targets: Tensor) -> float:
    """Share of users whose target is already in their history."""
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    hits = histories.items == targets.numpy()[owner]
    return float(np.bincount(owner[hits], minlength=len(histories)).astype(bool).mean())
