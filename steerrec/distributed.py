"""Training by several processes, started by torch's own launcher (`torchrun`).

Every process takes its share of each batch, and gradients are summed over all of them, weighted so
that they take the steps of one process that had the whole batch. With one process nothing here
does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from steerrec.errors import TrainingError


@contextmanager
def process_group() -> Iterator[None]:
    """The processes that torchrun started, if it did; by gloo, which every machine has."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the processes of this run do not find each other ({error}); start them by torchrun"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process; the first, 0, is the one that writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


def launched_as() -> int:
    """Number that the launcher gave this process, also outside of its group."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return int(os.environ.get("RANK", "0")) if several else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Go on once every process is here."""
    if size() > 1:
        dist.barrier()


def share(x: Tensor) -> tuple[Tensor, float]:
    """The rows of a batch [B, H] for this process, and the weight of a loss that is their FVU.

    The FVU of the batch is the sum over processes of ``weight * FVU``: the squared error is summed
    over rows, and the weight is the ratio of the two denominators. What else is in a loss (AuxK) is
    that of each share, weighted so too.
    """
    if size() == 1:
        return x, 1.0
    if len(x) < 2 * size():
        raise TrainingError(
            f"a batch of {len(x)} rows for {size()} processes; expected at least two rows each"
        )
    mine = x.tensor_split(size())[rank()]
    return mine, float(_spread(mine) / _spread(x).clamp_min(1e-30))


def _spread(x: Tensor) -> Tensor:
    return (x - x.mean(dim=0)).square().sum()


@torch.no_grad()
def sum_gradients(parameters: Iterable[Tensor], weight: float) -> None:
    """Give every parameter the weighted sum of its gradients over all processes."""
    if size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # all processes have to take part in every sum
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.mul_(weight)
        dist.all_reduce(parameter.grad)


@torch.no_grad()
def summed(value: Tensor, weight: float) -> Tensor:
    """The weighted sum of a value over all processes."""
    if size() == 1:
        return value
    value = value.detach() * weight
    dist.all_reduce(value)
    return value


def smallest(values: Tensor) -> None:
    """Put the smallest of all processes' values in place of each value."""
    if size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MIN)
