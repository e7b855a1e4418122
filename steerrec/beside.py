"""Parts of one job in several threads: for compiled loops, which run without Python's lock.

As many threads as torch is set to use, `torch.get_num_threads()`: where that is 1, none is started.
What the parts read and write is in use until all have ended, whatever happens meanwhile; so nothing
here returns before, on Ctrl-C neither.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

_MOST = max(1, min(64, os.cpu_count() or 1))
"""At most so many threads, whatever torch is set to use."""

_pool: ThreadPoolExecutor | None = None


def shares(rows: int, least: int) -> list[range]:
    """Rows 0 to `rows` in as many shares as there are threads, of `least` rows or more each."""
    number = max(1, min(torch.get_num_threads(), _MOST, rows // least))
    bounds = [rows * n // number for n in range(number + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def beside(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """What the calls return; they run at the same time, the first in this thread.

    A call that no thread has begun when this one is done with its own is made here. All have ended,
    or will never begin, when this returns, or raises what the first of those that failed raised.
    """
    turns = [_Turn(call) for call in calls]
    try:
        for turn in turns[1:]:
            _hand_over(turn)
        for turn in turns:
            turn.take(turns)
    finally:
        _wait(turns)
    return [turn.outcome() for turn in turns]


class _Turn(Generic[Result]):
    """A call that is made once, by whoever is the first to take it."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._taken: dict[None, object] = {}  # setdefault is one step: who takes it, has it
        self._found: list[Result] = []
        self._error: BaseException | None = None
        self._ended = False
        self._end = threading.Lock()
        self._end.acquire()

    def take(self, who: object = None) -> None:
        """Make the call, unless somebody has taken it."""
        who = object() if who is None else who
        if self._taken.setdefault(None, who) is not who:
            return
        try:
            self._found.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            self._ended = True
            self._end.release()

    def wait(self, who: object) -> None:
        """Until the call has ended, or will never be made since nobody else has taken it."""
        if self._taken.setdefault(None, who) is who:
            return
        while not self._ended:
            self._end.acquire(timeout=1)

    def outcome(self) -> Result:
        """What the call returned, or raise what it raised."""
        if self._error is not None:
            raise self._error
        return self._found[0]


def _wait(turns: list[_Turn[Result]]) -> None:
    try:
        for turn in turns:
            turn.wait(turns)
    except BaseException:  # Ctrl-C: that has to wait
        _wait(turns)
        raise


def _hand_over(turn: _Turn[Result]) -> None:
    """Let another thread take it, if there is one to be had."""
    global _pool
    try:
        if _pool is None:
            _pool = ThreadPoolExecutor(_MOST, thread_name_prefix="steerrec")
        _pool.submit(turn.take)
    except RuntimeError:  # the interpreter is about to end, or the system has no thread left
        pass


def _forget() -> None:
    """A forked process has none of the threads of its parent."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
