"""Whether Python is running for itself, or to have its tensor operations written down."""

from __future__ import annotations

import torch


def is_graphed() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording.

    What depends on the size of a batch or on values has to be left out then: it would be baked in.
    """
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
