"""A recipe's step taken apart for the compiled loop: terms, and factors on their strengths.

Only what they are and where their tensors are; `plans` lays them out for `step_kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

Kind = Literal["shift", "response", "latents"]
FactorKind = Literal["number", "neuron", "taste"]
TERMS, FACTORS = get_args(Kind), get_args(FactorKind)
"""Their places here are what the compiled loop calls them."""

Operand = tuple[nn.Module, str]
"""A module and the name of a buffer of it: looked up anew, since moving a module exchanges it."""


@dataclass(frozen=True, eq=False)
class Factor:
    """A factor on the strength of a term: a number, or one for each user.

    Attributes
    ----------
    kind
        `number`: an entry of a buffer. `neuron`: 1 or 0, as a latent is active or not. `taste`:
        linear in the user vector, within bounds.
    operands
        Buffers: the one of the number; weights [H] and bias, lower and upper bound [3] of a taste.
    entry
        Which entry of the buffer is the number; which latent is looked at.
    threshold
        What the latent has to be above.
    fires
        Whether the factor is 1 where it is, or where it is not.
    """

    kind: FactorKind
    operands: tuple[Operand, ...] = ()
    entry: int = 0
    threshold: float = 0.0
    fires: bool = True


@dataclass(frozen=True, eq=False)
class Term:
    """One thing that is added to user vectors.

    Attributes
    ----------
    kind
        `shift` [d_sae] of pre-activations; `response`: vectors [d_sae, H] and constant [H];
        `latents`: gain, low and high [d_sae], and constant [H].
    operands
        Its buffers, in this order.
    factors
        Factors on its strength.
    """

    kind: Kind
    operands: tuple[Operand, ...]
    factors: tuple[Factor, ...] = ()

    def times(self, *factors: Factor) -> Term:
        """The same with more factors."""
        return replace(self, factors=(*self.factors, *factors))
