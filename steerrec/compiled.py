"""Whether the loops of `steerrec.kernels` may stand in for torch operations, and their arrays."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from steerrec.graphs import is_graphed

Arrays = tuple[NDArray[Any], ...]


@cache
def kernels() -> ModuleType | None:
    """The compiled loops, or None where numba cannot be imported."""
    try:
        return import_module("steerrec.kernels")
    except ImportError as error:
        warnings.warn(
            f"numba cannot be imported ({error}): steering on a CPU is slower without it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def as_arrays(first: Tensor, *others: Tensor) -> Arrays | None:
    """Contiguous float32 tensors as arrays of the same memory, or None where torch is needed.

    Torch is needed in a graph that is being recorded, where gradients are wanted, under a mode or a
    transform of functorch, on another device and in another dtype. `others` are like the first.
    """
    if (
        first.dtype is not torch.float32
        or first.device.type != "cpu"
        or type(first) is not Tensor
        or is_graphed()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    ):
        return None
    arrays = []
    try:
        for tensor in (first, *others):
            if not tensor.is_contiguous():
                return None
            if tensor.requires_grad:
                if torch.is_grad_enabled():
                    return None
                tensor = tensor.detach()
            arrays.append(tensor.numpy())
    except RuntimeError:  # a transform of functorch
        return None
    return tuple(arrays)
