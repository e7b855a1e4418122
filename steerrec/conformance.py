"""Whether a `Recommender` is what its model is: a check that catches what adapters get wrong."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.capturing import capture
from steerrec.data import Histories
from steerrec.errors import ModelError, SiteError
from steerrec.hooks import SiteHook
from steerrec.nested import tensors_in
from steerrec.probes import probe
from steerrec.recommender import ItemHead, Recommender
from steerrec.sites import TokenIds, get_module

FAILURES = (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model raises on ids or inputs that it does not know."""


@dataclass(frozen=True)
class Conformance:
    """What `conformance` found.

    Attributes
    ----------
    max_error
        Largest difference between the model's own scores and those of the item head on the user
        vectors; None where the vectors could not be read.
    tolerance
        What is allowed, for scores of this size.
    problems
        What is wrong, and what to look at, in words; empty if nothing is.
    """

    max_error: float | None
    tolerance: float
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@torch.no_grad()
def conformance(
    rec: Recommender, *, histories: Histories | None = None, tolerance: float = 1e-5
) -> Conformance:
    """Check a recommender against its own model.

    Scores from the captured user vectors and the item head must equal the model's own scoring
    call, also after the vectors were exchanged for others; one history must score in a batch as it
    does alone; and the token at the user position must be the newest item.

    Parameters
    ----------
    rec
        The recommender.
    histories
        What to score; eight of random items and different lengths by default.
    tolerance
        Largest difference allowed, times the largest score where that is above 1.
    """
    if histories is None:
        histories = _trial(rec)
    found = _examined(rec, histories, tolerance)
    if found.ok or (mended := _mended(rec, histories, tolerance)) is None:
        return found
    return replace(found, problems=[f"{mended} would mend it", *found.problems])


def _examined(rec: Recommender, histories: Histories, tolerance: float) -> Conformance:
    """`_conformance`, of what cannot even be scored too."""
    try:
        return _conformance(rec, histories, tolerance)
    except (ModelError, SiteError) as refused:
        return Conformance(None, tolerance, [str(refused)])
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        found = (
            f"the model cannot score what make_batch gives ({reason}): are the ids in its range, "
            "and the inputs what its scoring call takes?"
        )
        return Conformance(None, tolerance, [found])


def _mended(rec: Any, histories: Histories, tolerance: float) -> str | None:
    """What to change in the scheme of a `WrappedRecommender` so that nothing is wrong."""
    scheme = getattr(rec, "scheme", None)
    if scheme is None:
        return None
    changes = [
        {"padding": "left" if scheme.padding == "right" else "right"},
        {"first_id": scheme.first_id - 1},
        {"first_id": scheme.first_id + 1},
    ]
    for change in changes:
        if _examined(replace(rec, scheme=replace(scheme, **change)), histories, tolerance).ok:
            return ", ".join(f"{name}={value!r}" for name, value in change.items())
    return None


def _conformance(rec: Recommender, histories: Histories, tolerance: float) -> Conformance:
    batch = rec.make_batch(histories)
    vectors, scores = _run(rec, batch)
    allowed = tolerance * max(1.0, float(scores.abs().max()))
    shape = (len(histories), len(rec.catalogue))
    if tuple(scores.shape) != shape:
        found = f"score gives {tuple(scores.shape)}; expected [histories, items] = {shape}"
        return Conformance(None, allowed, [found])
    head = rec.item_head
    if tuple(vectors.shape) != (len(histories), head.width) or len(head) != shape[1]:
        found = (
            f"the site gives {tuple(vectors.shape)} for {len(histories)} histories and the item "
            f"head has {len(head)} rows of width {head.width}; expected one vector of that width "
            f"for each, and {shape[1]} rows, one for each item"
        )
        return Conformance(None, allowed, [found])
    if not bool(scores.isfinite().all()):
        return Conformance(None, allowed, ["the model's own scores are not all finite"])
    problems = []
    error = float((head.scores(vectors) - scores).abs().max())
    if not error <= allowed:
        cause = _cause(rec, batch, vectors, scores, allowed)
        problems.append(
            f"the item head on the vectors at {rec.site.name} gives other scores than the model "
            f"(largest difference {error:.3g}, allowed {allowed:.1g}): {cause}"
        )
    problems += _about_tokens(rec, histories)
    if not problems:
        problems += _about_edits(rec, batch, vectors, allowed)
    alone = torch.cat(
        [rec.score(rec.make_batch(histories.select([i]))) for i in range(len(histories))]
    )
    apart = float((alone - scores).abs().max())
    if not apart <= 10 * allowed:
        problems.append(
            f"a history scores differently in a batch than alone (largest difference {apart:.3g}): "
            "is the padding on the right side, with the right id, and masked? or does the model "
            "want batches of a fixed length?"
        )
    return Conformance(error, allowed, problems)


def check_conformance(rec: Recommender, *, tolerance: float = 1e-5) -> None:
    """Raise ModelError with everything that `conformance` finds wrong."""
    found = conformance(rec, tolerance=tolerance)
    if found.problems:
        raise ModelError(
            f"{type(rec.model).__name__} is not wrapped right: {'; '.join(found.problems)}"
        )


def _trial(rec: Recommender) -> Histories:
    """Eight histories of different lengths, with the first and the last item among them."""
    rng = np.random.default_rng(0)
    longest, items = min(rec.max_length, 12), len(rec.catalogue)
    lengths = sorted({1, 2, 3, longest // 2 or 1, max(longest - 1, 1), longest})
    lists = [rng.choice(items, n, replace=n > items).tolist() for n in (*lengths, longest, 2)]
    lists[-2][-1], lists[-1][-1] = items - 1, 0
    return probe(rec, lists)


def _run(rec: Recommender, batch: Any) -> tuple[Tensor, Tensor]:
    """User vectors and the model's scores, in one scoring call."""
    with capture(rec.model, rec.site) as captured:
        scores = rec.score(batch)
    return captured[rec.site], scores


# --- what an edit does ----------------------------------------------------------------------------


def _about_edits(rec: Recommender, batch: Any, vectors: Tensor, allowed: float) -> list[str]:
    """What is wrong where other vectors at the site do not give the item head's scores of them."""
    new, here = 1.5 * vectors.flip(0), threading.get_ident()  # others may be using the model
    with SiteHook(rec.model, rec.site, lambda _: None, thread=here) as counter:
        rec.score(batch)
    last = counter.firings - 1
    with SiteHook(rec.model, rec.site, lambda _: new, last_call=last, thread=here):
        scores = rec.score(batch)
    head = rec.item_head
    error = float((head.scores(new) - scores).abs().max())
    allowed = 2 * allowed
    if error <= allowed:
        return []
    other = _with_other_norm(head)
    if float((other.scores(new) - scores).abs().max()) <= allowed:
        cause = (
            "the model does not normalise user vectors after the site: normalize=False in the item "
            "head, with a weight that is normalised already, would mend it"
            if head.normalize
            else "the model normalises user vectors after the site: normalize=True would mend it"
        )
    else:
        cause = "does the site feed something else too, as the state of a recurrent network does?"
    return [
        f"with other vectors put in at {rec.site.name} the model's scores are not the item head's "
        f"of those (largest difference {error:.3g}, allowed {allowed:.1g}): {cause}"
    ]


def _with_other_norm(head: ItemHead) -> ItemHead:
    """The head with user vectors normalised where they were not, or not where they were."""
    weight = F.normalize(head.weight, dim=-1) if head.normalize else head.weight
    return replace(head, weight=weight, normalize=not head.normalize)


# --- the ids that stand for items -----------------------------------------------------------------


def _about_tokens(rec: Recommender, example: Histories) -> list[str]:
    """What is wrong with the ids that the model is given, and with where they are."""
    items = len(rec.catalogue)
    if items < 5 or rec.max_length < 3:
        return []
    # one history, once with another newest and once with another oldest item, and then with each
    # of some items as the newest; a longer one pads the others
    rows = [*dict.fromkeys((0, 1, items // 2, items - 1))]
    lists = [[0, 1, 2], [0, 1, 3], [4, 1, 2], *([1, 2, row] for row in rows)]
    lists.append([0, 1, 2, 3, 4][: rec.max_length])
    found = _tokens(rec, probe(rec, lists, example=example, alike=True))
    if found is None:
        return []
    table, tokens = found
    differs, oldest = ((tokens[0] != other).nonzero().flatten().tolist() for other in tokens[1:3])
    if len(differs) != 1:
        return [
            f"two histories that differ in the newest item alone give ids that differ at positions "
            f"{differs}; expected one: does make_batch keep each item, at its place?"
        ]
    newest, source = differs[0], rec.site.positions_from
    problems = []
    user = None
    if rec.site.layout == "BH":
        pass  # what it emits has no positions
    elif isinstance(source, TokenIds):
        real = (tokens[0] != source.pad_id).nonzero().flatten().tolist()
        user = real[-1] if real else None
    elif source == "last":
        user = tokens.shape[1] - 1
    if user is not None and user not in (newest, newest + 1):  # a mask token may come after it
        reversed_ = len(oldest) == 1 and oldest[0] > newest
        problems.append(
            f"the newest item enters at position {newest} of {tokens.shape[1]}, but the site reads "
            f"the user vector at position {user}: "
            + (
                "histories enter newest first; expected oldest first"
                if reversed_
                else "is the padding on the right side?"
            )
        )
    mask = int(tokens[0, user]) if user == newest + 1 else None
    entered = dict(zip(rows, tokens[3 : 3 + len(rows), newest].tolist(), strict=True))
    return problems + _about_ids(rec, table, entered, mask)


def _tokens(rec: Recommender, histories: Histories) -> tuple[nn.Module | None, Tensor] | None:
    """The ids [B, L] that stand for these histories, and the module that takes them, if known.

    Those that enter the module where the site looks for positions, or else those in the batch.
    """
    batch, source = rec.make_batch(histories), rec.site.positions_from
    if not isinstance(source, TokenIds) or rec.site.layout == "BH":
        found = [tensor for _, tensor in tensors_in(_as_tensors(batch))]
        ids = [t for t in found if t.ndim == 2 and len(t) == len(histories) and _are_ids(t)]
        return (None, _other(ids)) if ids else None
    module = get_module(rec.model, source.path)
    seen: list[Tensor] = []

    def look(entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for _, tensor in tensors_in((args, kwargs)):
            if tensor.ndim == 2 and _are_ids(tensor) and len(tensor) == len(histories):
                seen.append(tensor.detach().clone())

    with module.register_forward_pre_hook(look, with_kwargs=True):
        rec.score(batch)
    return (module, _other(seen)) if seen else None


def _other(tensors: list[Tensor]) -> Tensor:
    """The first tensor that tells two histories of other items apart, as their times do not."""
    return next((t for t in tensors if bool((t[0] != t[1]).any())), tensors[0])


def _are_ids(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _as_tensors(batch: Any) -> Any:
    """A batch, NumPy arrays in it as tensors."""
    if isinstance(batch, np.ndarray):
        return torch.from_numpy(batch)
    if isinstance(batch, tuple | list):
        return [_as_tensors(part) for part in batch]
    if isinstance(batch, dict):
        return {key: _as_tensors(part) for key, part in batch.items()}
    return batch


def _about_ids(
    rec: Recommender, module: nn.Module | None, entered: dict[int, int], mask: int | None
) -> list[str]:
    """Whether the ids by which catalogue rows enter fit the rows of the item matrix."""
    source, scheme = rec.site.positions_from, getattr(rec, "scheme", None)
    pad = source.pad_id if isinstance(source, TokenIds) else getattr(scheme, "pad_id", None)
    for name, token in (("padding", pad), ("mask", mask)):
        for row, id_ in entered.items():
            if id_ == token:
                return [
                    f"catalogue row {row} enters as {id_}, the id of the {name}: the ids are off; "
                    "is the first item's id right?"
                ]
    weight = rec.item_head.weight
    own = getattr(module, "weight", None)
    tables = [m.weight for m in rec.model.modules() if isinstance(m, nn.Embedding)]
    if isinstance(own, Tensor):
        tables = [p for p in rec.model.parameters() if p.ndim == 2 and len(p) == len(own)]
    for table in tables:
        if table.shape[1:] != weight.shape[1:]:
            continue
        for offset in (table == weight[0]).all(dim=1).nonzero().flatten().tolist():
            if not torch.equal(table[offset : offset + len(weight)], weight):
                continue
            for row, id_ in entered.items():
                if id_ != row + offset:
                    return [
                        f"catalogue row {row} enters as id {id_}, but is scored by row "
                        f"{row + offset} of a table of {len(table)} like the one it enters: the "
                        "ids are off"
                    ]
            return []
    return []


# --- why scores differ ----------------------------------------------------------------------------


def _cause(rec: Recommender, batch: Any, vectors: Tensor, scores: Tensor, allowed: float) -> str:
    """Which of the usual mistakes explains the difference."""
    head = rec.item_head

    def explains(other: ItemHead) -> bool:
        return float((other.scores(vectors) - scores).abs().max()) <= allowed

    for normalize in (head.normalize, not head.normalize):
        norm = "" if normalize == head.normalize else f"normalize={normalize}"
        plain = replace(head, normalize=normalize, bias=None, scale=1.0)
        if norm and explains(replace(head, normalize=normalize)):
            return f"{norm} in the item head would mend it"
        found = plain.scores(vectors)
        scale = float((found * scores).sum() / found.square().sum().clamp_min(1e-12))
        if explains(replace(plain, scale=scale)):
            also = f"{norm} and " if norm else ""
            wanted = f"{also}scale={scale:.6g} and no bias"
            return f"{wanted} in the item head would mend it (a temperature?)"
    bias = (scores - replace(head, bias=None).scores(vectors)).mean(dim=0)
    if explains(replace(head, bias=bias)):
        return "a bias per item in the item head would mend it"
    ours = head.scores(vectors)
    for mine, theirs in ((ours[:, 1:], scores[:, :-1]), (ours[:, :-1], scores[:, 1:])):
        if float((mine - theirs).abs().max()) <= allowed:
            return "the items are off by one: check which id the first item has"
    for name, other in _other_positions(rec, batch).items():
        if float((head.scores(other) - scores).abs().max()) <= allowed:
            return (
                f"the scored vector is at {name}, not at the site's position: is the padding on "
                "the right side, and positions_from right?"
            )
    return (
        "is the site the vector that is scored, at the right position and after the last "
        "normalisation? do the rows of the item head follow the catalogue?"
    )


def _other_positions(rec: Recommender, batch: Any) -> dict[str, Tensor]:
    """The vectors at the first and at the last position of each history, padding included."""
    site = rec.site
    if site.layout in ("BH", "jagged"):
        return {}
    everywhere = replace(site, positions="all", positions_from=None, call="all")
    try:
        with capture(rec.model, everywhere) as captured:
            scores = rec.score(batch)
        rows = captured[everywhere].unflatten(0, (len(scores), -1))
    except (SiteError, RuntimeError):
        return {}
    return {"the last position, padding or not": rows[:, -1], "the first position": rows[:, 0]}
