"""What all steering recipes have in common: a name, a strength, arithmetic, and a step.

A recipe says what to do; its step does it to the pre-activations of one SAE, inside the pure
module `SteerTransform`. Kinds: `Steering` (pre-activations are shifted), those of `operations`
(latents are changed after selection), `sums`, and `gates` (a strength for each user).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from steerrec.errors import ArtifactError

if TYPE_CHECKING:
    from steerrec.autoencoder import Latents, SparseAutoencoder
    from steerrec.steering import SteerTransform
    from steerrec.terms import Term

Strength = float | Tensor
"""One number, or one per row [B, 1]."""


class Encoding:
    """A batch of user vectors and what the SAE makes of them.

    The active latents are selected when a step first asks for them, and once for all steps.

    Parameters
    ----------
    sae
        The SAE.
    x
        User vectors, [B, H].
    pre_acts
        Their pre-activations, [B, d_sae].
    """

    def __init__(self, sae: SparseAutoencoder, x: Tensor, pre_acts: Tensor) -> None:
        self.sae, self.x, self.pre_acts = sae, x, pre_acts
        self.selected: Latents | None = None

    @property
    def latents(self) -> Latents:
        """The active latents."""
        if self.selected is None:
            self.selected = self.sae.activate(self.pre_acts)
        return self.selected


class Step(nn.Module, ABC):
    """What a recipe does to one batch; its buffers are in the dtype of the SAE."""

    replaces: ClassVar[bool] = False
    """Whether the result stands in place of the vector (less the decoder bias), or is added."""

    @abstractmethod
    def forward(self, here: Encoding, strength: Strength) -> Tensor:
        """What comes of a batch of user vectors, [B, H]."""

    kind: str
    """Of which kind it is, in words: steps of one kind can take over each other's tensors."""

    def terms(self) -> tuple[Term, ...] | None:
        """The same as terms, for the compiled loop; None where it cannot be put so."""
        return None

    def copy_from(self, other: Step) -> None:
        """Take over the tensors of another step of the same kind."""
        for (_, own), (_, theirs) in zip(self.named_buffers(), other.named_buffers(), strict=True):
            own.copy_(theirs)


class Recipe(ABC):
    """A steering recipe.

    Attributes
    ----------
    alpha
        Strength; 0 changes nothing.
    name
        What an artifact calls it.
    provenance
        Rule and settings that made it, JSON-able.
    unknown
        What a newer steerrec stored with it, which an artifact keeps.
    """

    operation: ClassVar[str]
    """What files and messages call this kind."""

    alpha: float
    name: str
    provenance: Mapping[str, Any]
    unknown: Mapping[str, Any]

    @property
    @abstractmethod
    def latents(self) -> int:
        """How many latents the SAE has that it is for."""

    @abstractmethod
    def step(self, sae: SparseAutoencoder) -> Step:
        """The step on this SAE, on its device and in its dtype."""

    def transform(self, sae: SparseAutoencoder) -> SteerTransform:
        """The recipe as a pure function of user vectors, [B, H] to [B, H]."""
        from steerrec.steering import SteerTransform

        return SteerTransform(sae, self)

    def with_alpha(self, alpha: float) -> Self:
        """The same recipe at another strength."""
        return self._with(alpha=alpha)

    def named(self, name: str) -> Self:
        """The same recipe under another name."""
        return self._with(name=name)

    def _with(self, **changes: Any) -> Self:
        return cast(Self, replace(cast(Any, self), **changes))

    def __mul__(self, factor: float) -> Self:
        return self.with_alpha(self.alpha * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Self:
        return self * -1.0

    def __add__(self, other: object) -> Recipe:
        from steerrec.sums import added

        return added(self, other) if isinstance(other, Recipe) else NotImplemented

    def __sub__(self, other: object) -> Recipe:
        return self + -other if isinstance(other, Recipe) else NotImplemented

    def describe(self) -> dict[str, Any]:
        """Name, operation and provenance, JSON-able."""
        return {"name": self.name, "operation": self.operation, **self.provenance}

    def require(self, sae: SparseAutoencoder) -> None:
        """Raise ArtifactError unless the recipe has as many latents as the SAE."""
        if self.latents != sae.d_sae:
            raise ArtifactError(
                f"steering {self.name!r} is for {self.latents} latents, the SAE has "
                f"{sae.d_sae}; use the SAE that it was made with"
            )


def own(step: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    """Give a step a tensor of its own, contiguous: graphs keep it, and it is written to."""
    fresh = value.to(like).clone(memory_format=torch.contiguous_format)
    step.register_buffer(name, fresh, persistent=False)
