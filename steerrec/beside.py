"""Parts of one job in several threads: for compiled loops, which run without Python's lock.

As many threads as torch is set to use, `torch.get_num_threads()`: where that is 1, none is started.
What the parts read and write is in use until all have ended, so nothing here returns before, nor on
Ctrl-C (though two at the wrong moment get through: a part should hold references to what it uses).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")

_MOST = max(1, min(64, os.cpu_count() or 1))
"""At most so many threads, whatever torch is set to use."""


def shares(rows: int, least: int) -> list[range]:
    """Rows 0 to `rows` in as many shares as there are threads, of `least` rows or more each."""
    number = max(1, min(torch.get_num_threads(), _MOST, rows // least))
    bounds = [rows * n // number for n in range(number + 1)]
    return [range(*pair) for pair in pairwise(bounds)]


def beside(calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """What the calls return; they run at the same time, the first in this thread.

    A call that no thread has begun when this one is done with its own is made here. All have ended,
    or will never begin, when this returns, or raises what one that failed raised.
    """
    me, turns = object(), [_Turn(call) for call in calls]
    try:
        for turn in turns[1:]:
            _pool.hand_over(turn)
        for turn in turns:
            turn.take(me)
            if turn.error is not None:
                break
        _wait(turns, me)
    except BaseException:
        _wait(turns, me)
        raise
    errors = [turn.error for turn in turns if turn.error is not None]
    if not errors:
        return [result for turn in turns for result in turn.found]
    # no frame of the traceback may hold the error, which holds the traceback
    for turn in turns:
        turn.error = None
    errors.sort(key=lambda error: isinstance(error, Exception))  # Ctrl-C before any other
    raise errors.pop(0)


class _Turn(Generic[Result]):
    """A call that is made once, by whoever is the first to take it.

    Attributes
    ----------
    found, error
        What it returned, in a list, or raised.
    """

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call: Callable[[], Result] | None = call
        self._taken: dict[None, object] = {}  # setdefault is one step: who takes it, has it
        self._ended = False
        self._end = threading.Lock()
        self._end.acquire()
        self.found: list[Result] = []
        self.error: BaseException | None = None

    def take(self, who: object) -> None:
        """Make the call, unless somebody else has taken it."""
        if self._taken.setdefault(None, who) is not who:
            return
        try:
            assert self._call is not None
            self.found.append(self._call())
        except BaseException as error:
            self.error = error
        finally:
            self._ended = True
            self._end.release()

    def wait(self, who: object) -> None:
        """Until the call has ended, or will never be made since nobody else has taken it."""
        if self._taken.setdefault(None, who) is who:
            self._call = None  # what still waits in a queue holds nothing
            return
        while not self._ended:
            self._end.acquire(timeout=1)


def _wait(turns: Sequence[_Turn[Result]], who: object) -> None:
    try:
        for turn in turns:
            turn.wait(who)
    except BaseException:  # Ctrl-C: that has to wait
        _wait(turns, who)
        raise


class _Pool:
    """Threads that take turns; they end with the process."""

    def __init__(self) -> None:
        self._turns: SimpleQueue[_Turn[object]] = SimpleQueue()
        self._threads = 0
        self._lock = threading.Lock()

    def hand_over(self, turn: _Turn[Result]) -> None:
        """Let another thread take it, if there is one to be had."""
        if self._threads < _MOST:
            try:
                with self._lock:
                    threading.Thread(target=self._work, name="steerrec", daemon=True).start()
                    self._threads += 1
            except RuntimeError:  # the interpreter is about to end, or there are too many
                if not self._threads:
                    return
        self._turns.put(turn)  # type: ignore[arg-type]

    def _work(self) -> None:
        while True:
            turn = self._turns.get()
            turn.take(object())
            del turn  # while it waits for the next, nothing is kept


_pool = _Pool()


def _forget() -> None:
    """A forked process has none of the threads of its parent."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
