"""What every re-ranking baseline is: parameters, one of them its strength, that make lists.

The baselines themselves are one a file; `steerrec.rerank.METHODS` names them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from steerrec.errors import MethodError
from steerrec.rerank.candidates import Candidates

Need = Literal["pool", "groups", "counts", "histories", "vectors", "dimensions", "transform"]
"""What a method looks at: the m best items of each user (`pool`), the k best of each popularity
group (`groups`), training counts, histories, user vectors with the item head (`vectors`). The last
two are parameters without a default: an attribution table of the user vector's own dimensions
(`dimensions`), and a step on user vectors (`transform`)."""


@dataclass(frozen=True)
class Reranker(ABC):
    """A method with its parameters; `lists` makes the lists of all users.

    Attributes
    ----------
    name
        What comparisons and the command line call it.
    strength
        The parameter that trades accuracy for exposure.
    settings
        Twenty values of it to sweep by default; the first leaves every list as it is.
    needs
        What it looks at.
    control
        Whether it is there to show what a metric cannot see: it randomises or fills slots, and is
        no method to use.
    """

    name: ClassVar[str]
    strength: ClassVar[str]
    settings: ClassVar[tuple[float, ...]]
    needs: ClassVar[tuple[Need, ...]]
    control: ClassVar[bool] = False

    @abstractmethod
    def lists(self, candidates: Candidates) -> Tensor:
        """Re-ranked lists.

        Returns
        -------
        Tensor
            Catalogue rows, best first, int64 [U, k]; -1 in slots for which no item was left. No
            item twice, and none that the candidates leave out. The same candidates give the same
            lists.
        """

    def at(self, value: float) -> Self:
        """The same method at another strength.

        Raises
        ------
        MethodError
            If the method has no such strength.
        """
        return replace(self, **{self.strength: value})

    def sweep(self, settings: Sequence[float] | None = None) -> Iterator[Self]:
        """The method at each of these strengths, by default at its own `settings`."""
        return (self.at(value) for value in (self.settings if settings is None else settings))

    def describe(self) -> dict[str, Any]:
        """Name and parameters, JSON-able; tensors and tables are left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {k: v for k, v in values.items() if isinstance(v, str | int | float | None)}
        return {"method": self.name, "strength": self.strength, "parameters": plain}


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise MethodError unless ``low <= value <= high`` and the value is finite."""
    if low <= value <= high and math.isfinite(value):
        return
    most = "" if high == math.inf else f" and at most {high:g}"
    raise MethodError(f"{name} is {value}; expected a number of at least {low:g}{most}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise MethodError unless the value is one of these."""
    if value not in choices:
        raise MethodError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
