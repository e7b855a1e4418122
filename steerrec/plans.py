"""A recipe laid out for the compiled loop of `step_kernels`: tables of addresses, made once.

Steering one user vector takes microseconds, and so would looking at each tensor of a recipe. The
addresses are those of the recipe's own tensors: what is written to these is seen at once, and a
tensor that was exchanged (by moving the module, say) is noticed by its address.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from operator import getitem
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from steerrec.beside import beside, shares
from steerrec.compiled import step_kernels
from steerrec.graphs import has_values
from steerrec.terms import FACTORS, TERMS

if TYPE_CHECKING:
    from steerrec.steering import SteerTransform
    from steerrec.terms import Factor, Operand

ROWS_AT_ONCE = 128
"""On a CPU torch steers so many user vectors at once: their pre-activations stay in its cache."""

_SHARE = 64
"""A thread is given at least so many, or handing them over would cost what it saves."""

_LARGEST = float(np.finfo(np.float32).max)
_ADDED, _PLAIN, _REPLACED = range(3)


class Plan:
    """The tables of one transform, for as long as its tensors are where they were.

    Parameters
    ----------
    transform
        Whose SAE and recipe.

    Attributes
    ----------
    usable
        Whether the loop can stand in for torch: every step of the recipe can be taken apart, and
        all tensors are contiguous float32 on a CPU.
    width
        H, of the vectors.
    """

    def __init__(self, transform: SteerTransform) -> None:
        self._tensors: list[Tensor] = []
        self._modules: list[dict[str, Tensor]] = []
        self._names: list[str] = []
        sae, replaces, terms = transform.sae, transform.step.replaces, transform.step.terms()
        self.usable = False
        self._last = 0.0, np.zeros((1, 1), np.float32)
        whole = [self._tensor((sae, "W_enc")), self._tensor((transform, "bias"))]
        whole += [self._tensor((sae, "W_dec")), self._tensor((sae, "b_dec"))]
        if sae.threshold is not None:
            whole.append(self._tensor((sae, "threshold")))
        factors: dict[int, tuple[Factor, list[Tensor]]] = {}
        laid_out = []
        for term in terms or ():
            laid_out.append((term, [self._tensor(operand) for operand in term.operands]))
            for factor in term.factors:
                if id(factor) not in factors:  # a gate of several terms is asked once
                    operands = [self._tensor(operand) for operand in factor.operands]
                    factors[id(factor)] = factor, operands
        self._memory = [tensor.detach() for tensor in self._tensors]  # none gets an old address
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]
        if terms is None or not all(map(_fits, self._tensors)):
            return
        self.usable = True
        self.width, self._end = sae.d_in, _REPLACED if replaces else _ADDED
        at = [tensor.data_ptr() for tensor in whole]
        sizes = np.array([sae.d_sae, sae.d_in, sae.k or 0, *at, *[0] * (5 - len(at))])
        numbers, uses, rows = list(factors), list[int](), []
        for term, operands in laid_out:
            start = len(uses)
            uses += [numbers.index(id(factor)) for factor in term.factors]
            places = [tensor.data_ptr() for tensor in operands]
            places += [0] * (4 - len(places))
            rows.append([TERMS.index(term.kind), *places, start, len(uses)])
        self._tables = (
            sizes,
            np.array(rows, np.int64).reshape(-1, 7),
            np.array(uses, np.int64),
            np.array([_row_of(*each) for each in factors.values()], np.int64).reshape(-1, 3),
            np.array([factor.threshold for factor, _ in factors.values()], np.float32),
        )

    def _tensor(self, operand: Operand) -> Tensor:
        """A tensor, remembered with the place where it can be looked up again."""
        owner, name = operand
        where: Any = owner._buffers if name in owner._buffers else owner._parameters
        tensor: Tensor = where[name]
        known = zip(self._modules, self._names, strict=True)
        if not any(where is module and name == other for module, other in known):
            self._tensors.append(tensor)
            self._modules.append(where)
            self._names.append(name)
        return tensor

    def holds(self) -> bool:
        """Whether all tensors are where they were."""
        return list(map(Tensor.data_ptr, self._now())) == self._addresses  # in C, at each call

    def _now(self) -> Iterator[Tensor]:
        """The tensors that are now where those of the plan were."""
        return map(getitem, self._modules, self._names)

    def strengths_of(self, strength: float) -> np.ndarray:
        """A strength for all rows as the loop takes it, [1, 1]; the one of last time is kept."""
        last, array = self._last
        if strength != last:
            array = np.array([[strength]], np.float32)
            self._last = strength, array
        return array

    def wants_gradients(self) -> bool:
        """Whether gradients of a tensor of the recipe are wanted."""
        return any(tensor.requires_grad for tensor in self._now())

    def steered(self, loops: Any, x: Tensor, strengths: np.ndarray) -> Tensor | None:
        """Vectors [B, H] at contiguous strengths [A, B] or [A, 1]: [A, B, H], or [B, H] if A is 1.

        In the dtype of the vectors; None, since torch has to do it, if a number on the way is not
        finite.
        """
        vectors, end = x, self._end
        if x.dtype is not torch.float32:
            vectors, end = x.to(torch.float32), _PLAIN if end == _ADDED else end
        if not vectors.is_contiguous():
            vectors = vectors.contiguous()
        batch, width = vectors.shape
        number = len(strengths)
        out = torch.empty(batch, width) if number == 1 else torch.empty(number, batch, width)
        tables = *self._tables, end
        if batch < 2 * _SHARE:
            places = vectors.data_ptr(), out.data_ptr()
            done = loops.steered(*places, 0, batch, batch, strengths, *tables)
        else:

            def steer(rows: range) -> bool:  # it holds all whose addresses it hands over
                here = strengths
                if strengths.shape[1] > 1:
                    here = np.ascontiguousarray(strengths[:, rows.start : rows.stop])
                places = vectors.data_ptr(), out.data_ptr()
                done: bool = loops.steered(*places, rows.start, len(rows), batch, here, *tables)
                return done and self.usable

            done = all(beside([partial(steer, rows) for rows in shares(batch, _SHARE)]))
        if not done:
            return None
        if x.dtype is torch.float32:
            return out
        return x + out.to(x.dtype) if end == _PLAIN else out.to(x.dtype)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of a transform makes its own: this one knows the memory of the original."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def planned(transform: SteerTransform, x: Tensor) -> tuple[Plan, Any] | None:
    """The plan of a transform and the loops, or None where torch has to steer these vectors.

    Torch has to in a graph that is being recorded, where gradients are wanted, under a mode or a
    transform of functorch, on another device and in another dtype.
    """
    if not x.is_cpu:
        transform._plan = None  # it would hold the memory that the transform had here
        return None
    if not has_values(x):
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    plan = transform._plan
    if plan is None or not plan.holds():
        plan = transform._plan = Plan(transform)
    if not plan.usable or x.shape[1] != plan.width:
        return None
    if torch.is_grad_enabled() and (x.requires_grad or plan.wants_gradients()):
        return None
    loops = step_kernels()
    return None if loops is None else (plan, loops)


def steered(transform: SteerTransform, x: Tensor, strength: float | Tensor) -> Tensor | None:
    """User vectors [B, H] steered by the compiled loop, or None where torch has to do it.

    `strength` is one number, or [B, 1] or [1, 1].
    """
    found = planned(transform, x)
    if found is None:
        return None
    if isinstance(strength, Tensor):
        if not has_values(strength) or (strength.requires_grad and torch.is_grad_enabled()):
            return None
        strengths = np.ascontiguousarray(strength.detach().numpy().reshape(1, -1))
    elif abs(strength) > _LARGEST:
        return None
    else:
        strengths = found[0].strengths_of(strength)
    plan, loops = found
    return plan.steered(loops, x, strengths)


def _row_of(factor: Factor, operands: list[Tensor]) -> list[int]:
    places = [operand.data_ptr() for operand in operands]
    if factor.kind == "number":
        places = [places[0] + factor.entry * operands[0].element_size(), 0]
    elif factor.kind == "neuron":
        places = [factor.entry, int(factor.fires)]
    return [FACTORS.index(factor.kind), *places]


def _fits(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu
    return plain and tensor.dtype is torch.float32 and tensor.is_contiguous()
