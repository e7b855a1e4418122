"""What a learned steering does, neuron by neuron: how often, how much, and for which items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.evaluation import CapturedUsers, measure
from steerrec.operations import ResponseSteering
from steerrec.recommender import ItemHead, Recommender

_SHOWN = (
    "cohens_d",
    "auroc",
    "logit_attribution",
    "grad_attribution",
    "causal_effect",
    "firing_rate_a",
    "firing_rate_b",
)


@dataclass(frozen=True)
class NeuronEffect:
    """What one neuron's response does.

    Attributes
    ----------
    neuron
        Its number.
    share
        Its part of all that the responses do: of the sum over neurons of the root mean square
        length of what they add.
    firing_rate
        Share of the users in whom it is active.
    raises, lowers
        Catalogue rows of the items whose scores it raises and lowers most, [items] each.
    """

    neuron: int
    share: float
    firing_rate: float
    raises: Tensor
    lowers: Tensor


@torch.no_grad()
def neuron_effects(
    steering: ResponseSteering,
    sae: SparseAutoencoder,
    head: ItemHead,
    user_vectors: Tensor,
    *,
    neurons: int = 20,
    items: int = 5,
    chunk: int = 4096,
) -> list[NeuronEffect]:
    """The neurons whose responses change most, strongest first.

    Parameters
    ----------
    steering
        Responses.
    sae
        The SAE that they belong to.
    head
        How items are scored from the user vector.
    user_vectors
        Users to look at, [U, H].
    neurons, items
        How many neurons, and how many items of each, at most.
    chunk
        Users encoded at a time.
    """
    square = torch.zeros(sae.d_sae, dtype=torch.float64)
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    for part in user_vectors.split(chunk):
        values, indices = sae.encode(part.to(sae.W_enc))
        values, indices = values.cpu().flatten(), indices.cpu().flatten()
        square.index_add_(0, indices, values.double().square())
        fired += torch.bincount(indices[values > 0], minlength=sae.d_sae)
    users = len(user_vectors)
    size = (square / users).sqrt() * steering.vectors.norm(dim=1).double()  # [d_sae]
    order = size.argsort(descending=True, stable=True)[:neurons]
    raised, lowered = moved_items(steering.vectors[order], head, items)
    return [
        NeuronEffect(
            neuron=int(neuron),
            share=float(size[neuron] / size.sum()),
            firing_rate=int(fired[neuron]) / users,
            raises=raised[place].cpu(),
            lowers=lowered[place].cpu(),
        )
        for place, neuron in enumerate(order)
        if size[neuron] > 0
    ]


@dataclass(frozen=True)
class PartialEffect:
    """What a steering does if only its strongest neurons are used, with the constant.

    Attributes
    ----------
    neurons
        How many of them; 0 is the constant alone.
    share
        Their part of all that the responses do, as in `NeuronEffect`.
    metrics
        Of the lists that come out.
    """

    neurons: int
    share: float
    metrics: dict[str, float]


def strongest_alone(
    steering: ResponseSteering,
    sae: SparseAutoencoder,
    rec: Recommender,
    users: CapturedUsers,
    *,
    counts: Sequence[int] = (0, 20, 100),
    k: int = 10,
    mask_seen: bool = False,
) -> list[PartialEffect]:
    """What is left of a steering without all but its strongest neurons, and with all of them.

    Parameters
    ----------
    steering
        Responses.
    sae, rec
        The SAE that they belong to, and its recommender.
    users
        Users to look at, from `capture_held_out`.
    counts
        How many neurons to use; all are added.
    k, mask_seen
        See `steerrec.evaluation.measure`.
    """
    every = neuron_effects(steering, sae, rec.item_head, users.vectors, neurons=sae.d_sae, items=1)
    order = torch.tensor([effect.neuron for effect in every], dtype=torch.int64)
    shares = torch.tensor([effect.share for effect in every], dtype=torch.float64)
    found = []
    for count in sorted({*(min(count, len(every)) for count in counts), len(every)}):
        transform = steering.only(order[:count]).transform(sae)
        metrics = measure(rec, users, k=k, mask_seen=mask_seen, transform=transform).metrics
        found.append(PartialEffect(count, float(shares[:count].sum()), metrics))
    return found


@torch.no_grad()
def moved_items(vectors: Tensor, head: ItemHead, items: int) -> tuple[Tensor, Tensor]:
    """Items whose scores vectors [V, H] raise and lower most when added: two of [V, items]."""
    weight = F.normalize(head.weight, dim=-1) if head.normalize else head.weight
    effects = vectors.to(weight) @ weight.T  # [V, N]
    count = min(items, len(head))
    return effects.topk(count).indices, effects.topk(count, largest=False).indices


def table_in_words(
    table: AttributionTable,
    sae: SparseAutoencoder,
    rec: Recommender,
    *,
    neurons: int = 10,
    items: int = 5,
    by: str | None = None,
) -> dict[str, Any]:
    """The strongest neurons of a contrast with the titles of the items that each moves, JSON-able.

    Parameters
    ----------
    table
        Attribution table of the contrast.
    sae
        An SAE of the vector that the scores are computed from.
    rec
        Its recommender.
    neurons, items
        How many neurons, and how many items of each, at most.
    by
        The column that says which are the strongest; by default `AttributionTable.ranking`.
    """
    by = by or table.ranking
    order = table.strongest(neurons, by=by)
    raised, lowered = moved_items(sae.W_dec[order.to(sae.W_dec.device)], rec.item_head, items)
    titles = rec.catalogue.titles

    def named(rows: Tensor) -> list[str]:
        return [titles[row] for row in rows.tolist()]

    return {
        "contrast": table.contrast,
        "by": by,
        "neurons": [
            {
                "neuron": neuron,
                **{name: float(table[name][neuron]) for name in _SHOWN if name in table.columns},
                "raises": named(raised[place]),
                "lowers": named(lowered[place]),
            }
            for place, neuron in enumerate(order.tolist())
        ],
    }
