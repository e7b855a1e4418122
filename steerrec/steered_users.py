"""What steering does to the lists of a few real users, item by item, and which neurons did it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Catalogue
from steerrec.enrichment import ItemAttributes, item_attributes
from steerrec.evaluation import CapturedUsers, rank
from steerrec.neurons import ItemFacts, ItemNote
from steerrec.recipes import Recipe
from steerrec.recommender import ItemHead, Recommender
from steerrec.steering import Steering, SteerTransform

_LATEST = 6
_TASTES = 3
_CANDIDATES = 2000


@dataclass(frozen=True)
class Mover:
    """A neuron that steering turned, and what came of it.

    Attributes
    ----------
    neuron
        Its number.
    turned
        By how much its activation changed.
    moved
        By how much that moved the score of an item, less the mean of that over the items of both
        lists: places depend only on how an item fares beside the others.
    """

    neuron: int
    turned: float
    moved: float


@dataclass(frozen=True)
class ListedItem:
    """An item in one of a user's lists.

    Attributes
    ----------
    item
        Which.
    before, after
        Its place in the list, from 1; None where it is not listed.
    score_change
        By how much steering changed its score.
    moved_by
        The neurons that had most part in its going up or down, the largest first.
    held_out
        Whether it is what the user took next.
    """

    item: ItemNote
    before: int | None
    after: int | None
    score_change: float
    moved_by: tuple[Mover, ...]
    held_out: bool


@dataclass(frozen=True)
class SteeredUser:
    """A real user, before and after.

    Attributes
    ----------
    user_id
        Id in the data.
    length
        Items in the history.
    taste
        Share of all users whose taste is less for popular items, 0 to 1.
    attributes
        What the history holds most of, with the share of its items.
    latest
        The latest items, oldest first.
    items
        All items of both lists: those of the steered one in order, then those that left.
    turned
        Neurons whose activation steering changed most, each with that change.
    """

    user_id: str
    length: int
    taste: float
    attributes: tuple[tuple[str, float], ...]
    latest: tuple[ItemNote, ...]
    items: tuple[ListedItem, ...]
    turned: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return asdict(self)


@torch.no_grad()
def describe_users(
    rec: Recommender,
    sae: SparseAutoencoder,
    steering: Recipe,
    users: CapturedUsers,
    *,
    count: int = 12,
    k: int = 10,
    mask_seen: bool = False,
    catalogue: Catalogue | None = None,
    movers: int = 2,
) -> tuple[SteeredUser, ...]:
    """Users of different taste with their lists before and after, from those for popular items on.

    They are taken evenly over the taste for popular items (the mean of log(1 + training
    interactions) of a history), and among users of like taste for that the one whose user vector is
    least like those that were chosen before.

    Parameters
    ----------
    rec, sae, steering
        What is steered with what, at the recipe's strength; the SAE is one of the scored vector.
    users
        Whom to choose from, with what they took next if that is known.
    count
        How many.
    k, mask_seen
        As for `steerrec.recommend`.
    catalogue
        The recommender's catalogue with more attributes, if the data has some.
    movers
        Neurons that are named for each item, at most.

    Notes
    -----
    With ``y = x + sum_j (f'_j - f_j) W_dec[j]`` the score of item i changes by ``sum_j (f'_j - f_j)
    W_dec[j] . e_i``, times the head's scale: each summand is the part of neuron j. Heads that
    normalise user vectors divide by the new length, and what the length itself does is no neuron's.
    Recipes that are no `Steering` add other vectors than these: no neurons are named for them.
    """
    tastes = _tastes(rec, users)
    chosen = _of_different_taste(users.vectors, tastes, count)
    picked = CapturedUsers(
        users.vectors[chosen],
        users.histories.select(chosen),
        None if users.targets is None else users.targets[chosen],
        users.split,
    )
    transform = SteerTransform(sae, steering)
    steered = transform(picked.vectors.to(sae.W_enc))
    before = rank(rec, picked, k=k, mask_seen=mask_seen)
    after = rank(rec, picked, k=k, mask_seen=mask_seen, transform=transform)
    change = _latent_change(sae, steering, picked.vectors)  # [C, D]

    catalogue = catalogue or rec.catalogue
    attributes = item_attributes(catalogue)
    spoken = [picked.histories.items, before.ids.numpy().ravel(), after.ids.numpy().ravel()]
    facts = ItemFacts.of(catalogue, attributes, np.concatenate(spoken))
    order = tastes.argsort(kind="stable").argsort(kind="stable") / max(len(tastes) - 1, 1)
    found = []
    for place, user in enumerate(chosen.tolist()):
        lists = before.ids[place].tolist(), after.ids[place].tolist()
        target = None if picked.targets is None else int(picked.targets[place])
        moved = _moved(
            rec.item_head, sae, picked.vectors[place], steered[place], change[place], lists, movers
        )
        history = picked.histories[place]
        strongest = change[place].abs().sort(descending=True, stable=True).indices[:4].tolist()
        found.append(
            SteeredUser(
                user_id=str(picked.histories.user_ids[place]),
                length=len(history),
                taste=float(order[user]),
                attributes=_likes(attributes, history),
                latest=tuple(facts.note(row) for row in history[-_LATEST:].tolist()),
                items=tuple(
                    ListedItem(
                        item=facts.note(row),
                        before=lists[0].index(row) + 1 if row in lists[0] else None,
                        after=lists[1].index(row) + 1 if row in lists[1] else None,
                        score_change=score_change,
                        moved_by=by,
                        held_out=row == target,
                    )
                    for row, score_change, by in moved
                ),
                turned=tuple(
                    (neuron, float(change[place, neuron]))
                    for neuron in strongest
                    if change[place, neuron] != 0
                ),
            )
        )
    return tuple(found)


def _tastes(rec: Recommender, users: CapturedUsers) -> NDArray[np.float64]:
    """Mean of log(1 + training interactions) over the history of each user, [U]."""
    histories = users.histories
    owner = np.repeat(np.arange(len(histories)), histories.lengths)
    weights = np.log1p(rec.catalogue.counts.astype(np.float64))[histories.items]
    totals = np.bincount(owner, weights, minlength=len(histories))
    return np.asarray(totals / np.maximum(histories.lengths, 1))


def _of_different_taste(
    vectors: Tensor, tastes: NDArray[np.float64], count: int
) -> NDArray[np.int64]:
    """Indices of users, the ones most for popular items first."""
    order = np.argsort(-tastes, kind="stable")
    if len(order) > _CANDIDATES:
        order = order[np.linspace(0, len(order) - 1, _CANDIDATES).astype(np.int64)]
    directions = F.normalize(vectors[torch.from_numpy(order)].float(), dim=1)
    likeness = torch.full((len(order),), -1.0)  # to the most like of those chosen
    chosen: list[int] = []
    for part in np.array_split(np.arange(len(order)), min(count, len(order))):
        place = int(part[int(likeness[part].argmin())])
        chosen.append(place)
        likeness = torch.maximum(likeness, directions @ directions[place])
    return order[chosen]


def _latent_change(sae: SparseAutoencoder, steering: Recipe, vectors: Tensor) -> Tensor:
    """By how much a shift changes every latent, [C, D]."""
    if not isinstance(steering, Steering):
        return torch.zeros(len(vectors), sae.d_sae)
    pre_acts = sae.pre_acts(vectors.to(sae.W_enc))
    moved = pre_acts + steering.alpha * steering.shift.to(pre_acts)
    after, before = (sae.activate(acts).dense(sae.d_sae) for acts in (moved, pre_acts))
    return (after - before).float().cpu()


def _moved(
    head: ItemHead,
    sae: SparseAutoencoder,
    before: Tensor,
    after: Tensor,
    change: Tensor,
    lists: tuple[list[int], list[int]],
    movers: int,
) -> list[tuple[int, float, tuple[Mover, ...]]]:
    """(row, change of score, neurons) of the items of both lists of one user."""
    rows = [row for row in (*lists[1], *(r for r in lists[0] if r not in lists[1])) if row >= 0]
    weight = head.weight[torch.tensor(rows, device=head.weight.device)]  # [R, H]
    bias = None if head.bias is None else head.bias[torch.tensor(rows, device=weight.device)]
    few = ItemHead(weight, bias, head.scale, head.normalize)
    both = torch.stack([before.to(weight), after.to(weight)])
    scores = few.scores(both).float().cpu()  # [2, R]
    parts = part_of_neurons(few, sae, change, both[1]).cpu()  # [J, R]
    parts = parts - parts.mean(dim=1, keepdim=True)
    active = change.nonzero().squeeze(1).tolist()
    found = []
    for place, row in enumerate(rows):
        up = row not in lists[0] or (row in lists[1] and lists[1].index(row) < lists[0].index(row))
        column = parts[:, place] if up else -parts[:, place]
        best = column.sort(descending=True, stable=True).indices[:movers].tolist()
        by = tuple(
            Mover(active[j], float(change[active[j]]), float(parts[j, place]))
            for j in best
            if float(column[j]) > 0
        )
        found.append((row, float(scores[1, place] - scores[0, place]), by))
    return found


def part_of_neurons(
    head: ItemHead, sae: SparseAutoencoder, change: Tensor, after: Tensor
) -> Tensor:
    """By how much each changed neuron moved the score of each item, [J, R].

    Parameters
    ----------
    head
        Head of R items.
    sae
        The SAE.
    change
        Change of every latent, [D]; J of them are not 0.
    after
        The steered user vector, [H].
    """
    active = change.nonzero().squeeze(1)
    rows = sae.W_dec[active.to(sae.W_dec.device)].to(head.weight)
    weight, scale = head.weight, head.scale
    if head.normalize:
        weight = F.normalize(weight, dim=-1)
        scale = scale / float(after.norm().clamp_min(1e-12))
    return (change[active].to(rows)[:, None] * (rows @ weight.T) * scale).float()


def _likes(attributes: ItemAttributes, history: NDArray[np.int64]) -> tuple[tuple[str, float], ...]:
    """The data's attributes that most of a history's items have."""
    counts = attributes.count(history, np.zeros(len(history), dtype=np.int64), 1)[0]
    order = np.argsort(-counts[: attributes.described], kind="stable")[:_TASTES]
    return tuple(
        (attributes.names[i], float(counts[i] / len(history))) for i in order if counts[i] > 0
    )
