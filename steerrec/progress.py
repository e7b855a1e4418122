"""Progress bars on stderr: shown on a terminal, silent anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, unit: str = "it") -> tqdm[T]:
    """`items` with a progress bar while they are consumed."""
    total = len(items) if isinstance(items, Sized) else None
    # disable=None: off unless stderr is a terminal; leave=False: nothing stays behind
    return tqdm(items, desc=description, total=total, unit=unit, disable=None, leave=False)
