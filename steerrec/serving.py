"""Steering where production retrieves: user vectors before an index of items.

What an index by inner product has to hold, and what it has to be asked with, so that it ranks as
the model does; and whether steering user vectors is steering the model at all. Not here: files for
other runtimes (`exporting`), how much an approximate index misses (`ann`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.errors import SiteError
from steerrec.recommender import ItemHead, Recommender
from steerrec.sites import Site
from steerrec.steering import SteerTransform


@dataclass(frozen=True)
class Querying:
    """How a user vector is made the query of an index by inner product.

    Attributes
    ----------
    normalize
        Whether it is brought to unit length: the model compares by cosine.
    constant
        Whether a 1 is appended: the model has an item bias, which is one more dimension of items.
    """

    normalize: bool = False
    constant: bool = False

    @classmethod
    def of(cls, head: ItemHead) -> Querying:
        """What the item head of a model asks for."""
        return cls(head.normalize, head.bias is not None)

    def __call__(self, user_vectors: Tensor) -> Tensor:
        """Queries [B, H], or [B, H + 1] with a constant, of user vectors [B, H]."""
        queries = F.normalize(user_vectors, dim=-1) if self.normalize else user_vectors
        return F.pad(queries, (0, 1), value=1.0) if self.constant else queries

    @property
    def reason(self) -> str:
        """Why inner products with these queries are the model's scores, in a sentence."""
        cosine = "brought to unit length after steering, since the model compares by cosine"
        bias = "followed by a 1, which the item bias is multiplied with"
        told = [text for text, is_so in ((cosine, self.normalize), (bias, self.constant)) if is_so]
        if not told:
            return "the steered user vector is the query: the model scores by inner product"
        return f"the query is the steered user vector, {', and '.join(told)}"


@dataclass(frozen=True)
class RetrievalVectors:
    """Item vectors for an index by inner product, and how to ask it.

    ``queries(user_vectors) @ items.T`` are the model's own scores, so that the index is built once,
    offline, and steering changes queries alone.

    Attributes
    ----------
    items
        Float32 [N, D] on the CPU, row i for catalogue row i; a factor on all scores is in them.
    queries
        Makes queries [B, D] of user vectors [B, H], steered or not.
    """

    items: Tensor
    queries: Querying

    def __len__(self) -> int:
        return len(self.items)

    @property
    def width(self) -> int:
        """Width D of items and queries."""
        return self.items.shape[1]


@torch.no_grad()
def retrieval_vectors(source: Recommender | ItemHead) -> RetrievalVectors:
    """What to put into an index by inner product, and how to ask it.

    Exact for every item head: by inner product as it is, a bias as one more dimension, cosine with
    vectors of unit length.

    Parameters
    ----------
    source
        A recommender, or its item head.

    Examples
    --------
    >>> head = ItemHead(torch.eye(2), bias=torch.tensor([0.0, 5.0]))
    >>> vectors = retrieval_vectors(head)
    >>> vectors.queries(torch.tensor([[1.0, 0.0]])) @ vectors.items.T
    tensor([[1., 5.]])
    """
    head = source if isinstance(source, ItemHead) else source.item_head
    items = head.weight.detach().float().cpu()
    if head.normalize:
        items = F.normalize(items, dim=-1)
    items = items * head.scale
    if head.bias is not None:
        items = torch.cat([items, head.bias.detach().float().cpu()[:, None]], dim=1)
    return RetrievalVectors(items.contiguous(), Querying.of(head))


class QueryTransform(nn.Module):
    """Steered queries of user vectors: a `SteerTransform`, then `Querying`.

    Parameters
    ----------
    transform
        The steering.
    querying
        What is done to the steered vector.
    """

    def __init__(self, transform: SteerTransform, querying: Querying) -> None:
        super().__init__()
        self.transform, self.querying = transform, querying

    def forward(self, x: Tensor, alpha: float | Tensor | None = None) -> Tensor:
        """Queries [B, D] of user vectors [B, H] at a strength, as in `SteerTransform`."""
        return self.querying(self.transform(x, alpha))


# --- whether steering user vectors is steering the model


def scoring_record(rec: Recommender) -> dict[str, Any]:
    """Where and how a model scores: what an artifact records, to be served without the model."""
    head = rec.item_head
    return {
        "site": rec.site.to_dict(),
        "normalize": head.normalize,
        "bias": head.bias is not None,
    }


def querying_of_record(record: Mapping[str, Any]) -> Querying:
    """What `scoring_record` says of queries."""
    return Querying(bool(record.get("normalize")), bool(record.get("bias")))


def require_scored(site: Site, scored: Site | Mapping[str, Any]) -> None:
    """Raise SiteError unless the SAE's site is where the model's scores are computed from.

    Parameters
    ----------
    site
        Where the SAE is.
    scored
        The site of the scored vector (`Recommender.site`), or the record of one.
    """
    recorded = scored.to_dict() if isinstance(scored, Site) else dict(scored)
    if site.to_dict() != recorded:
        raise SiteError(
            f"the SAE is at {site.name}, but the model scores from the vector at "
            f"{Site.from_dict(recorded).name}: the layers between the two have to run, so this "
            "steering cannot be served on user vectors; attach it to the model "
            "(steerrec.attach), or train an SAE at the scored site"
        )
