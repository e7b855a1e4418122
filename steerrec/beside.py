"""Parts of one job in several threads: for compiled loops, which run without Python's lock.

As many threads as torch is set to use, `torch.get_num_threads()`: where that is 1, as it is in the
workers of most servers, nothing here starts a thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

Result = TypeVar("Result")
Call = Callable[[], Result]

_MOST = 64
"""At most so many threads, whatever torch is set to use."""

_pool: ThreadPoolExecutor | None = None


def shares(rows: int, least: int) -> list[range]:
    """Rows 0 to `rows` in as many shares as there are threads, of `least` rows or more each."""
    number = max(1, min(torch.get_num_threads(), _MOST, rows // least))
    bounds = [rows * n // number for n in range(number + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def beside(calls: Sequence[Call[Result]]) -> list[Result]:
    """What the calls return; they run at the same time, the first in this thread.

    A call that no thread has begun when this one is done with its own is made here. All have ended
    when this returns, or raises what the first of those that failed raised.
    """
    futures = [_begun(call) for call in calls[1:]]
    try:
        found = [calls[0]()]
    except BaseException:
        for future in futures:
            if future is not None and not future.cancel():
                future.exception()
        raise
    failed: BaseException | None = None
    for call, future in zip(calls[1:], futures, strict=True):
        try:
            found.append(call() if future is None or future.cancel() else future.result())
        except BaseException as error:
            failed = failed or error
    if failed is not None:
        raise failed
    return found


def _begun(call: Call[Result]) -> Future[Result] | None:
    """The call handed to another thread, or None where there is none to be had."""
    global _pool
    try:
        if _pool is None:
            _pool = ThreadPoolExecutor(_MOST, thread_name_prefix="steerrec")
        return _pool.submit(call)
    except RuntimeError:  # the interpreter is about to end, or the system has no thread left
        return None


def _forget() -> None:
    """A forked process has none of the threads of its parent."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
