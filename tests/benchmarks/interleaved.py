"""Ratios of times that a busy machine spoils least: taken in turns, and compared within a round.

What else runs on a machine changes from second to second, hardly within the milliseconds of a
round. So a ratio is the median over the rounds of what a function took in a round divided by what
the first one took in the same, with an interval from resampling the rounds.
"""

import time
from typing import NamedTuple

import numpy as np


class Timing(NamedTuple):
    """Seconds of one function, and how they compare with the first one's.

    Attributes
    ----------
    best, median
        Of all rounds, in seconds.
    ratio
        Median over the rounds of its time divided by the first function's of the same round.
    low, high
        90 % of what the ratio is when rounds are drawn with replacement.
    """

    best: float
    median: float
    ratio: float
    low: float
    high: float


def compare(named, *, rounds, clock=time.perf_counter, before=0):
    """Seconds of each function, called in turns that begin with another one each round.

    Parameters
    ----------
    named
        Functions without arguments by name, the first being what the others are compared with.
    rounds
        How often each is called, after a warm-up.
    clock
        `time.perf_counter`, or `time.process_time` for the work of all threads of this process.
    before
        How often each is called just before it is timed: then what it reads is in the cache, as it
        is where no other runs in turn with it.

    Returns
    -------
    dict
        A `Timing` for each name.
    """
    names, taken = list(named), np.empty((rounds, len(named)))
    for turn in range(-2, rounds):
        for step in range(len(names)):
            place = (turn + step) % len(names)
            function = named[names[place]]
            for _ in range(before):
                function()
            start = clock()
            function()
            if turn >= 0:
                taken[turn, place] = clock() - start
    ratios = taken / taken[:, :1]
    drawn = np.random.default_rng(0).integers(rounds, size=(1000, rounds))
    low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.05, 0.95], axis=0)
    columns = taken.min(axis=0), np.median(taken, axis=0), np.median(ratios, axis=0), low, high
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return {name: Timing(*row) for name, row in zip(names, rows, strict=True)}


def show(title, found):
    """Print a table: ratios to the first row within rounds, and milliseconds."""
    print(f"\n{title}")  # noqa: T201
    for name, timing in found.items():
        print(  # noqa: T201
            f"  {name:<44} {timing.ratio:6.3f} ({timing.low:.3f} to {timing.high:.3f})   "
            f"{1e3 * timing.best:9.3f} ms best {1e3 * timing.median:9.3f} ms median"
        )
