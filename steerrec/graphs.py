"""Whether Python is running for itself, or to have its tensor operations written down."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_graphed() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording.

    What depends on the size of a batch or on values has to be left out then: it would be baked in.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is one of plain numbers, that Python may look at and compute with.

    It is not while operations are recorded, under a dispatch mode (FakeTensor, make_fx), inside a
    transform of functorch or forward-mode differentiation, nor as an object of a subclass.
    """
    return (
        type(tensor) is Tensor
        and not is_graphed()
        and not torch._C._len_torch_dispatch_stack()
        and forward_ad._current_level < 0
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
