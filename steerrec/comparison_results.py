"""What a comparison of methods finds, and how it is kept on disk."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerrec.choosing import By
from steerrec.files import write_json
from steerrec.metrics import GROUP_NAMES
from steerrec.significance import Replicates

TASTES = ("rare", "mixed", "popular")
"""Three equal parts of the users, by the mean log popularity of what they have taken."""


@dataclass(frozen=True)
class Setting:
    """One strength of a method.

    Attributes
    ----------
    value
        The strength.
    valid, test
        Metrics on both held-out parts.
    """

    value: float
    valid: dict[str, float]
    test: dict[str, float]


@dataclass(frozen=True)
class Row:
    """What a method reaches at one budget, measured on test.

    Attributes
    ----------
    budget
        Share of nDCG that may be lost, on validation.
    by
        What it was chosen by: lowest Gini or highest LTC.
    value
        The strength that was chosen.
    metrics
        On test.
    interval
        95 % bootstrap intervals of nDCG, LTC and Gini over users.
    against
        Differences to PopSteer at the same budget on the same users, with interval and p-value;
        empty for PopSteer itself.
    outside
        Share of list slots whose item is not among the user's 100 best of the unsteered model.
    by_taste
        For the parts of the users named by `TASTES`: nDCG `unsteered` and by the `method`, and the
        shares of users for whom it is `worse` and `better`.
    """

    budget: float
    by: By
    value: float
    metrics: dict[str, float]
    interval: dict[str, tuple[float, float]]
    against: dict[str, dict[str, Any]]
    outside: float
    by_taste: dict[str, list[float | None]]


@dataclass(frozen=True)
class MethodResult:
    """One method with all its settings.

    Attributes
    ----------
    name
        Name in tables and plots.
    description
        Method and parameters.
    control
        Whether it randomises or fills slots, and is there for comparison only.
    settings
        In order of strength, the unchanged lists first.
    rows
        What it reaches at each budget.
    hypervolume
        ``10 * integral from r = 0.9 to 1 of max(0, gain(r)) dr``, where gain(r) is what the setting
        chosen on validation at retention r gains on test: Gini lost, LTC won.
    milliseconds
        What it adds to scoring and ranking a user, on this machine; the median of its settings.
    fit_seconds
        What it took to make it, where that is known.
    """

    name: str
    description: dict[str, Any]
    control: bool
    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    hypervolume: dict[str, float]
    milliseconds: float
    fit_seconds: float | None = None

    def row(self, budget: float, by: By = "gini") -> Row:
        """The row of a budget."""
        return next(row for row in self.rows if row.budget == budget and row.by == by)


@dataclass(frozen=True)
class Comparison:
    """Methods on the same users, from the same model.

    Attributes
    ----------
    protocol
        `mask_seen`, `k`, `items`, `pool`, `seed`, `replicates`, and the users of both parts.
    base
        Metrics of the model as it is, on `valid` and `test`.
    methods
        In the order in which they were given.
    ranking_milliseconds
        What scoring and ranking a user takes without any method.
    """

    protocol: dict[str, Any]
    base: dict[str, dict[str, float]]
    methods: tuple[MethodResult, ...]
    ranking_milliseconds: float

    def changes(self, method: MethodResult, budget: float) -> dict[str, list[float | None]]:
        """Who gains and who loses: relative changes of nDCG, None where there was none to lose.

        Returns
        -------
        dict
            `targets`: by the group of the item that was taken next, head, mid, tail. `tastes`: by
            the users' own taste, see `TASTES`.
        """
        k, row = self.protocol["k"], method.row(budget)
        names = [f"ndcg_{group}@{k}" for group in GROUP_NAMES]
        targets = [_relative(row.metrics[name], self.base["test"][name]) for name in names]
        pairs = zip(row.by_taste["method"], row.by_taste["unsteered"], strict=True)
        return {"targets": targets, "tastes": [_relative(new, own) for new, own in pairs]}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values; what is undefined becomes null."""
        found: dict[str, Any] = plain(asdict(self))
        return found


def _relative(new: float | None, own: float | None) -> float | None:
    if new is None or own is None or not own > 0:
        return None
    return new / own - 1


def keep(path: Path, key: str, found: tuple[MethodResult, dict[str, Replicates]]) -> None:
    """Write a method's result, under a key of all that it depends on."""
    result, samples = found
    replicates = {
        name: {metric: values.tolist() for metric, values in sample.values.items()}
        for name, sample in samples.items()
    }
    write_json(path, {"key": key, "result": plain(asdict(result)), "replicates": replicates})


def kept(path: Path, key: str) -> tuple[MethodResult, dict[str, Replicates]] | None:
    """What `keep` wrote under this key; None where there is nothing, or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] != key:
            return None
        result = dict(found["result"])
        result["settings"] = tuple(Setting(**_numbers(each)) for each in result["settings"])
        result["rows"] = tuple(Row(**_numbers(each)) for each in result["rows"])
        samples = {
            name: Replicates({metric: np.array(values) for metric, values in sample.items()})
            for name, sample in found["replicates"].items()
        }
        return MethodResult(**result), samples
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is made again


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Metrics with NaN where JSON has null."""
    metrics = ("valid", "test", "metrics")
    return {
        name: {m: math.nan if v is None else v for m, v in value.items()}
        if name in metrics
        else {m: tuple(v) for m, v in value.items()}
        if name == "interval"
        else value
        for name, value in row.items()
    }


def plain(value: Any) -> Any:
    """A nested value as JSON has it: text for keys, lists, null for what is not finite."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
