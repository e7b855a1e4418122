"""Whether the loops that numba compiles may stand in for torch here, and their arrays."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from steerrec.graphs import has_values

Arrays = tuple[NDArray[Any], ...]


@cache
def kernels() -> ModuleType | None:
    """The compiled loops over the k largest, or None where numba cannot compile them."""
    return _loops("steerrec.kernels")


@cache
def jump_kernels() -> ModuleType | None:
    """The compiled loops over what is above thresholds, or None, as above."""
    return None if kernels() is None else _loops("steerrec.jump_kernels")


@cache
def served_kernels() -> ModuleType | None:
    """The compiled loops of learning for the users who are served, or None, as above."""
    return None if kernels() is None else _loops("steerrec.served_kernels")


@cache
def step_kernels() -> ModuleType | None:
    """The compiled loop over rows that does a whole recipe, or None, as above."""
    return None if kernels() is None else _loops("steerrec.step_kernels")


def _loops(name: str) -> ModuleType | None:
    try:
        loops = import_module(name)
        if not import_module("numba").config.DISABLE_JIT:
            return loops
        reason = "NUMBA_DISABLE_JIT is set"
    except Exception as error:  # a full disk, a damaged cache, another numpy than numba's
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"numba cannot be used ({reason}): steering on a CPU is slower without it",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def as_arrays(first: Tensor, *others: Tensor) -> Arrays | None:
    """Contiguous float32 tensors as arrays of the same memory, or None where torch is needed.

    Torch is needed in a graph that is being recorded, where gradients are wanted, under a mode or a
    transform of functorch, on another device and in another dtype.
    """
    arrays = []
    if not has_values(first):
        return None
    for tensor in (first, *others):
        if (
            tensor.dtype is not torch.float32
            or tensor.device.type != "cpu"
            or not tensor.is_contiguous()
        ):
            return None
        if tensor.requires_grad:
            if torch.is_grad_enabled():
                return None
            tensor = tensor.detach()
        arrays.append(tensor.numpy())
    return tuple(arrays)
