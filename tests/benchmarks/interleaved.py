"""Ratios of times that a busy machine spoils least: taken in turns, best and middle of many."""

import time

import numpy as np


def compare(named, *, rounds, clock=time.perf_counter):
    """Seconds of each function, called in turns.

    Parameters
    ----------
    named
        Functions without arguments by name, the first being what the others are compared with.
    rounds
        How often each is called, after a warm-up.
    clock
        `time.perf_counter`, or `time.process_time` for the work of all threads of this process.

    Returns
    -------
    dict
        For each name ``(best, median)`` in seconds.
    """
    taken = {name: [] for name in named}
    for turn in range(rounds + 2):
        for name, function in named.items():
            start = clock()
            function()
            if turn >= 2:
                taken[name].append(clock() - start)
    return {name: (float(np.min(t)), float(np.median(t))) for name, t in taken.items()}


def show(title, found):
    """Print a table: milliseconds, and ratios to the first row, of the best and of the median."""
    (best, median), *_ = found.values()
    print(f"\n{title}")  # noqa: T201
    for name, (least, middle) in found.items():
        print(  # noqa: T201
            f"  {name:<44} {1e3 * least:9.3f} ms best {least / best:6.3f}   "
            f"{1e3 * middle:9.3f} ms median {middle / median:6.3f}"
        )
