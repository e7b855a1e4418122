"""What steerrec needs of a recommender: its histories turned into user vectors, and its item head.

Not here: how a given library does it (`steerrec.adapters`), nor how to rank (`steerrec.ranking`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.capturing import capture
from steerrec.data import Catalogue, Histories
from steerrec.errors import ModelError
from steerrec.sites import Site, get_module


@dataclass(frozen=True)
class ItemHead:
    """The last step of a recommender: scores of all items from a user vector.

    ``scores = scale * (u @ weight.T) + bias``, with u and the rows of `weight` brought to unit
    length first if `normalize` is set. Row i belongs to catalogue row i; padding and mask tokens
    have no row.

    Attributes
    ----------
    weight
        Item matrix, [N, H].
    bias
        One value per item, [N], or None.
    scale
        Factor on the dot product (one over a softmax temperature).
    normalize
        Whether user vectors and item rows are L2-normalised first (cosine similarity).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.weight.ndim != 2:
            raise ModelError(
                f"the item matrix has shape {tuple(self.weight.shape)}; expected [items, width]"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ModelError(
                f"the item bias has shape {tuple(self.bias.shape)}; expected [{len(self.weight)}], "
                "one value per row of the item matrix"
            )

    def __len__(self) -> int:
        return len(self.weight)

    @property
    def width(self) -> int:
        """Width H of the user vectors that this head scores."""
        return self.weight.shape[1]

    def cast(self, user_vectors: Tensor) -> Tensor:
        """User vectors in the dtype and on the device that `scores` takes them in."""
        return user_vectors.to(self.weight)

    def scores(self, user_vectors: Tensor) -> Tensor:
        """Scores [B, N] of every item for `user_vectors` [B, H]."""
        weight = self.weight
        if self.normalize:
            user_vectors = F.normalize(user_vectors, dim=-1)
            weight = F.normalize(weight, dim=-1)
        scores = user_vectors @ weight.T
        if self.scale != 1.0:
            scores = scores * self.scale
        return scores if self.bias is None else scores + self.bias

    def chunk(self, start: int, stop: int) -> ItemHead:
        """The head of the catalogue rows from `start` up to, not including, `stop`."""
        bias = None if self.bias is None else self.bias[start:stop]
        return replace(self, weight=self.weight[start:stop], bias=bias)


@runtime_checkable
class Recommender(Protocol):
    """Any torch model that maps an item history to a score per item.

    An adapter implements this protocol for one library's models. Items are catalogue rows
    0..N-1 everywhere; the adapter alone knows the ids that the model uses inside.

    One whose `make_batch` needs more of the histories than their items also has `reads`, the names
    of those columns, and where they are not only `time`, `example`: a few real histories with
    them, to try the model on.
    """

    @property
    def model(self) -> nn.Module:
        """The torch model, frozen and in eval mode."""

    @property
    def catalogue(self) -> Catalogue:
        """Ids, titles, attributes and training counts of the N items."""

    @property
    def site(self) -> Site:
        """Where the user vector is: the recommended site for an SAE."""

    @property
    def max_length(self) -> int:
        """How many of a history's latest items the model reads."""

    @property
    def item_head(self) -> ItemHead:
        """How the model scores items from the user vector at `site`."""

    def make_batch(self, histories: Histories) -> Mapping[str, Tensor]:
        """The model's own input for these histories (windowed, padded, on its device)."""

    def score(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The model's own scoring call: [B, N] in catalogue order."""

    def describe(self) -> dict[str, Any]:
        """JSON-able facts for an artifact's record: adapter, path or Hub id, configuration."""


def columns_read(rec: Recommender) -> tuple[str, ...]:
    """Names of the columns of histories that a recommender reads beside items."""
    return tuple(getattr(rec, "reads", ()))


@torch.no_grad()
def user_vectors(rec: Recommender, histories: Histories, site: Site | None = None) -> Tensor:
    """User vectors at a site, read by a hook during the model's own scoring call.

    The forward pass stops once the site has fired, so that no item is scored in vain.

    Parameters
    ----------
    rec
        The recommender.
    histories
        B histories of catalogue rows, oldest first.
    site
        The site to read; the recommender's own by default.

    Returns
    -------
    Tensor
        [B, H], in the dtype of the model, on its device.
    """
    site = site or rec.site
    if _is_training(rec.model):
        raise ModelError(
            f"{type(rec.model).__name__} is in training mode: dropout would change user vectors "
            "at every call; call model.eval() first"
        )
    with capture(rec.model, site, stop=True) as captured:
        rec.score(rec.make_batch(histories))
    vectors = captured[site]
    if len(vectors) != len(histories):
        raise ModelError(
            f"site {site.path!r} gave {len(vectors)} user vectors for {len(histories)} histories; "
            "expected one each: use a site with positions='user'"
        )
    return vectors


def _is_training(model: nn.Module) -> bool:
    """Whether any part of a model is in training mode; asked at every batch, so without names."""
    found = [model]
    for module in found:
        if module.training:
            return True
        found.extend(part for part in module._modules.values() if part is not None)
    return False


def fingerprint(rec: Recommender, site: Site | None = None) -> dict[str, Any]:
    """What an SAE depends on in a model: class, configuration, shapes, weights; those at a site.

    Two models with equal fingerprints give the same user vectors at `site` up to the layers
    below it and score them alike; an artifact records it and checks it on load.
    """
    head = rec.item_head
    config = json.dumps(rec.describe().get("config"), sort_keys=True, default=str)
    mark = {
        "class": type(rec.model).__name__,
        "width": head.width,
        "items": len(head),
        "parameters": sum(p.numel() for p in rec.model.parameters()),
        "item_matrix_sha256": _digest({"weight": head.weight}),
        "model_sha256": _digest(dict(rec.model.state_dict())),
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
    }
    if site is not None:
        module = get_module(rec.model, site.path)
        mark |= {"site": site.path, "site_sha256": _digest(dict(module.state_dict()))}
    return mark


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
