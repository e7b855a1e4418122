"""FA*IR: enough protected items in every prefix of a list for it to pass a statistical test.

Zehlike et al., "FA*IR: a fair top-k ranking algorithm" (CIKM 2017, arXiv 1706.06368). A ranking is
fair if no prefix holds fewer protected items than draws with probability p would hold but in a
share alpha of all rankings. The m-table says how many that is for each prefix, at a significance
that is corrected for the k tests of one ranking; a list takes the best item of all, unless the
table asks for a protected one. The protected items are those of the tail.

Exact over the whole catalogue, of which it needs the k best of each group; O(U * k) a setting, and
O(k^3) whole numbers for a table, which is kept.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import comb
from typing import ClassVar

import torch
from torch import Tensor

from steerrec.data import TAIL
from steerrec.errors import MethodError
from steerrec.rerank.base import Need, Reranker, check_range
from steerrec.rerank.candidates import Candidates
from steerrec.rerank.filling import fill


@dataclass(frozen=True)
class FairTopK(Reranker):
    """FA*IR with tail items as the protected group.

    Attributes
    ----------
    p
        Least share of protected items, below 1; 0 changes nothing.
    alpha
        Significance of the test of a whole ranking: the share of rankings drawn with probability p
        that may fail it.
    adjusted
        Whether the significance is corrected for testing every prefix.
    pool
        Choose among so many best items of a user, as the paper does from a candidate set; where no
        protected one is left among them the best other is taken. By default from the catalogue.
    """

    name: ClassVar[str] = "fair"
    strength: ClassVar[str] = "p"
    settings: ClassVar[tuple[float, ...]] = (
        *(0, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.475, 0.5, 0.525),
        *(0.55, 0.575, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
    )
    needs: ClassVar[tuple[Need, ...]] = ("groups",)

    p: float = 0.5
    alpha: float = 0.1
    adjusted: bool = True
    pool: int | None = None

    def __post_init__(self) -> None:
        check_range("p", self.p, 0, 0.999)
        check_range("alpha", self.alpha, 0, 0.999)
        check_range("pool", 1 if self.pool is None else self.pool, 1)

    def lists(self, candidates: Candidates) -> Tensor:
        """Lists of which every prefix passes, as far as there are tail items, [U, k]."""
        table = m_table(candidates.k, self.p, self.alpha, adjusted=self.adjusted)
        grouped = candidates.grouped
        size = self._size(candidates)
        places = grouped.ids.shape[1] * grouped.ids.shape[2]

        def utility(place: int, taken: Tensor) -> Tensor:
            worth = -grouped.next(grouped.order, taken).double()
            needed = taken[:, TAIL] < table[place]
            worth[:, TAIL] += needed * places  # ahead of every other item
            return worth.masked_fill(grouped.next(grouped.ranks, taken) >= size, -torch.inf)

        return fill(grouped, utility)[0]

    def _size(self, candidates: Candidates) -> int:
        """Below which place in a user's ranking an item is a candidate."""
        items = len(candidates.labels)
        if self.pool is None:
            return items + 1
        size = min(self.pool, items)
        if not candidates.k <= size <= candidates.pool:
            raise MethodError(
                f"fair chooses {candidates.k} among {size} items, and the candidates' pool holds "
                f"{candidates.pool}; expected a pool of at least k and at most that of the "
                "candidates: gather them with a larger one, or choose among fewer"
            )
        return size


def m_table(k: int, p: float, alpha: float, *, adjusted: bool = True) -> list[int]:
    """How many protected items the first 1, 2, ..., k places need.

    Place i needs the least m with ``P[Binomial(i, p) <= m] >= alpha'``. Adjusted, alpha' is the
    largest number up to alpha for which a ranking drawn with probability p has too few anywhere
    with probability alpha at most; otherwise it is alpha. p and alpha are taken for the decimal
    fractions that they are written as, and everything is computed in whole numbers: a table changes
    where a binomial probability equals alpha', which rounding can miss.

    Parameters
    ----------
    k
        Length of the lists.
    p
        Least share of protected items.
    alpha
        Significance.
    adjusted
        Whether alpha is corrected for k tests.

    Returns
    -------
    list of int
        [k].
    """
    return list(_m_table(k, Fraction(str(p)), Fraction(str(alpha)), adjusted))


def fail_probability(table: Sequence[int], p: float) -> Fraction:
    """How likely a ranking drawn with probability p has too few protected items somewhere."""
    share = Fraction(str(p))
    return 1 - Fraction(_passing(table, share), share.denominator ** len(table))


@lru_cache(maxsize=256)
def _m_table(k: int, p: Fraction, alpha: Fraction, adjusted: bool) -> tuple[int, ...]:
    whole = p.denominator**k  # probabilities are counted in units of 1 / whole
    cumulative = [_cumulative(i, p, whole) for i in range(1, k + 1)]

    def table(at: Fraction) -> tuple[int, ...]:
        return tuple(bisect_left(row, at) for row in cumulative)

    limit = alpha * whole
    if not adjusted:
        return table(limit)
    # The table changes at these values only, and asks for more at each.
    steps = sorted({units for row in cumulative for units in row if units < limit})
    levels = [Fraction(0), *map(Fraction, steps), limit]
    passing = (1 - alpha) * whole
    fails = bisect_left(levels, True, key=lambda at: _passing(table(at), p) < passing)
    return table(levels[fails - 1])


def _cumulative(trials: int, p: Fraction, whole: int) -> list[int]:
    """P[Binomial(trials, p) <= m] for m = 0..trials, in units of 1 / whole."""
    unit = whole // p.denominator**trials
    yes, no = p.numerator, p.denominator - p.numerator
    terms = (comb(trials, m) * yes**m * no ** (trials - m) * unit for m in range(trials + 1))
    return list(accumulate(terms))


def _passing(table: Sequence[int], p: Fraction) -> int:
    """Probability that a ranking passes everywhere, in units of 1 / p.denominator ** len(table)."""
    yes, no = p.numerator, p.denominator - p.numerator
    passing = [1]  # by how many protected items there are so far
    for needed in table:
        drawn = [no * a + yes * b for a, b in zip([*passing, 0], [0, *passing], strict=True)]
        passing = [0 if count < needed else units for count, units in enumerate(drawn)]
    return sum(passing)
