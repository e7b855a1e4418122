"""Leave-one-out split: each user's last item is the test, the last but one the validation."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from steerrec.data.histories import DataWarning, Histories
from steerrec.errors import DataError

MIN_EVALUATED = 3
"""Interactions a user needs to be evaluated: one to start from, validation, test."""


@dataclass(frozen=True, eq=False)
class Split:
    """Histories split for training and evaluation.

    Attributes
    ----------
    histories : Histories [U]
        The whole histories.
    evaluated : int64 array [E]
        Users with at least three interactions.
    train : Histories [U]
        Without the last two interactions of the evaluated users; of the others, all.
    num_items : int
        Size N of the catalogue.
    """

    histories: Histories
    evaluated: NDArray[np.int64]
    train: Histories
    num_items: int

    def held_out(self, which: Literal["valid", "test"]) -> tuple[Histories, NDArray[np.int64]]:
        """What the evaluated users are asked: their history so far, and the item that came next.

        Returns
        -------
        histories : Histories [E]
            For "test" the validation item is part of them.
        targets : int64 array [E]
            Catalogue rows.
        """
        if which not in ("valid", "test"):
            raise ValueError(f"which is {which!r}; expected 'valid' or 'test'")
        back = 1 if which == "test" else 2
        users = self.histories.select(self.evaluated)
        return users.cut(back), users.items[users.offsets[1:] - back]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Training interactions per catalogue row, int64 [N]."""
        return np.bincount(self.train.items, minlength=self.num_items).astype(np.int64)


def leave_one_out(histories: Histories, num_items: int) -> Split:
    """Hold out the last two interactions of every user who has at least three.

    Parameters
    ----------
    histories : Histories [U]
        Oldest first.
    num_items : int
        Size N of the catalogue.

    Raises
    ------
    DataError
        If no user has three interactions.

    Warns
    -----
    DataWarning
        With the number of users too short to be evaluated.
    """
    evaluated = np.flatnonzero(histories.lengths >= MIN_EVALUATED)
    short = len(histories) - len(evaluated)
    if not evaluated.size:
        raise DataError(
            f"none of {len(histories):,} users has {MIN_EVALUATED} interactions: nothing is left "
            "to evaluate"
        )
    if short:
        warnings.warn(
            f"{short:,} of {len(histories):,} users have fewer than {MIN_EVALUATED} interactions: "
            "they train but are not evaluated",
            DataWarning,
            stacklevel=2,
        )
    return Split(histories, evaluated, histories.cut(held_back(histories)), num_items)


def held_back(histories: Histories) -> NDArray[np.int64]:
    """How many last interactions of each user are not for training: two or none, [U]."""
    return np.where(histories.lengths >= MIN_EVALUATED, 2, 0)
