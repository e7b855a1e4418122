"""Charts of the report page as plain numbers: the template draws them as SVG, without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

WIDTH, HEIGHT = 420, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 22, 12, 44
_NAMED = 6  # methods with a colour of their own; the others are thin and grey
_LOWEST = 0.88  # share of the base nDCG that the picture goes down to


@dataclass(frozen=True)
class Line:
    """A line with points, in the pixels of its chart."""

    name: str
    style: str
    path: str
    points: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True)
class Chart:
    """Axes and what is drawn on them, in pixels.

    Attributes
    ----------
    title, summary
        What it shows, and what is to be seen in it, for those who cannot see it.
    x_label, y_label
        Of the axes.
    x_ticks, y_ticks
        Place and text of each tick.
    lines
        In the order of drawing.
    bars
        x, y, width, height and text of each.
    band
        First and last x of what is shaded; None for nothing.
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Line, ...] = ()
    bars: tuple[tuple[float, float, float, float, str], ...] = ()
    band: tuple[float, float] | None = None
    width: int = WIDTH
    height: int = HEIGHT
    box: tuple[float, float, float, float] = field(
        default=(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
    )


@dataclass(frozen=True)
class _Axes:
    """From values to pixels."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.across(x), self.up(y)

    def across(self, x: float) -> float:
        share = (x - self.x[0]) / (self.x[1] - self.x[0])
        return round(_LEFT + share * (WIDTH - _LEFT - _RIGHT), 1)

    def up(self, y: float) -> float:
        share = (y - self.y[0]) / (self.y[1] - self.y[0])
        return round(HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM), 1)

    def x_ticks(self) -> tuple[tuple[float, str], ...]:
        return tuple((self.across(value), text) for value, text in _ticks(*self.x))

    def y_ticks(self) -> tuple[tuple[float, str], ...]:
        return tuple((self.up(value), text) for value, text in _ticks(*self.y))


def lorenz_chart(items: Sequence[float], before: Sequence[float], after: Sequence[float]) -> Chart:
    """Share of list slots that the least listed items hold, before and after."""
    axes = _Axes((0.0, 1.0), (0.0, 1.0))
    percent = tuple(
        (value, f"{value:.0%}".replace("%", " %")) for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    )
    half = int(np.searchsorted(items, 0.8))
    return Chart(
        title="How evenly items are shown",
        summary=(
            f"The least shown 80 % of all items hold {before[half]:.1%} of the places in lists "
            f"before steering and {after[half]:.1%} after."
        ),
        x_label="share of items, the least shown first",
        y_label="share of places in lists",
        x_ticks=tuple((axes.across(value), text) for value, text in percent),
        y_ticks=tuple((axes.up(value), text) for value, text in percent),
        lines=(
            Line("all items alike", "even", _path([axes.at(0, 0), axes.at(1, 1)])),
            Line("before", "base", _path(list(map(axes.at, items, before)))),
            Line("after", "steered", _path(list(map(axes.at, items, after)))),
        ),
    )


def density_chart(rates: Tensor) -> Chart:
    """How many neurons fire how often, by powers of ten."""
    values = rates.double().numpy()
    live = values[values > 0]
    low = math.floor(math.log10(live.min())) if len(live) else -1
    edges = np.linspace(low, 0, 4 * -low + 1)
    counts = np.histogram(np.log10(live), bins=edges)[0] if len(live) else np.zeros(len(edges) - 1)
    never = int((values == 0).sum())
    heights = np.concatenate([[never], counts])
    axes = _Axes((-3.0, len(counts)), (0.0, float(heights.max(initial=1)) * 1.08))
    bars = []
    for place, height in enumerate(heights.tolist()):
        left = place - 1 if place else -3.0
        x = axes.across(left)
        width = round(axes.across(left + 1) - x - 1.5, 1)
        y = axes.up(height)
        if place:
            span = f"{10 ** edges[place - 1]:.2%} to {10 ** edges[place]:.2%} of histories"
        else:
            span = "no history"
        bars.append(
            (x, y, width, round(axes.up(0) - y, 1), f"{int(height):,} neurons fire after {span}")
        )
    ticks = [(axes.across(-2.5), "never")]
    for power in range(low, 1):
        place = (power - low) * 4
        ticks.append((axes.across(place), f"{10.0**power:.{max(0, -power - 2)}%}"))
    return Chart(
        title="How often neurons fire",
        summary=(
            f"{never:,} of {len(values):,} neurons fire after no history here; the median of the "
            f"others fires after {np.median(live) if len(live) else 0:.2%} of them."
        ),
        x_label="share of real histories that fire a neuron",
        y_label="neurons",
        x_ticks=tuple(ticks),
        y_ticks=axes.y_ticks(),
        bars=tuple(bars),
    )


def tradeoff_charts(
    sweep: Mapping[str, Any], comparison: Mapping[str, Any] | None, alpha: float
) -> tuple[Chart, ...]:
    """nDCG against Gini and against long-tail coverage: of all methods, or of the strengths."""
    k = sweep["points"][0]["test"]["protocol"]["k"]
    pairs = (
        (f"gini@{k}", f"Gini@{k} (lower is fairer)"),
        (f"ltc@{k}", f"long-tail coverage@{k} (higher is better)"),
    )
    series = _of_methods(comparison) if comparison else []
    if not series:
        series = [
            (
                "PopSteer, by strength" if _is_popsteer(sweep) else "steered, by strength",
                "steered",
                _of_sweep(sweep),
            )
        ]
    return tuple(
        chart
        for metric, label in pairs
        if (chart := _tradeoff(series, f"ndcg@{k}", metric, label, alpha)) is not None
    )


def _is_popsteer(sweep: Mapping[str, Any]) -> bool:
    steering = sweep.get("steering")
    return isinstance(steering, Mapping) and steering.get("rule") == "popsteer"


_Points = list[tuple[float, Mapping[str, Any]]]


def _of_sweep(sweep: Mapping[str, Any]) -> _Points:
    return [(point["alpha"], point["test"]["metrics"]) for point in sweep["points"]]


def _of_methods(comparison: Mapping[str, Any]) -> list[tuple[str, str, _Points]]:
    """Name, style and points of each method that is no control, the best ones last."""
    found = []
    for method in comparison.get("methods", []):
        if not isinstance(method, Mapping) or method.get("control"):
            continue
        points = [(each.get("value", 0), each["test"]) for each in method.get("settings", [])]
        volume = (method.get("hypervolume") or {}).get("gini") or 0.0
        found.append((volume, str(method.get("name"))[:40], points))
    found.sort(key=lambda each: -each[0])
    named = [each for each in found if each[1].lower().startswith("popsteer")][:1]
    named += [each for each in found if each not in named][: _NAMED - len(named)]
    styled = [
        (name, "other", points)
        for _, name, points in found
        if all(name != each[1] for each in named)
    ]
    styled += [(name, f"method-{place}", points) for place, (_, name, points) in enumerate(named)]
    return styled


def _tradeoff(
    series: list[tuple[str, str, _Points]], ndcg: str, metric: str, label: str, alpha: float
) -> Chart | None:
    drawn = []
    for name, style, points in series:
        pairs = [
            (metrics[ndcg], metrics[metric], value)
            for value, metrics in points
            if _finite(metrics.get(ndcg)) and _finite(metrics.get(metric))
        ]
        if pairs:
            drawn.append((name, style, pairs))
    if not drawn:
        return None
    base = drawn[-1][2][0]
    floor = _LOWEST * base[0]
    kept = [
        (name, style, [pair for pair in pairs if pair[0] >= floor]) for name, style, pairs in drawn
    ]
    every = [pair for _, _, pairs in kept for pair in pairs]
    axes = _Axes(_around([pair[0] for pair in every]), _around([pair[1] for pair in every]))
    alone = len(drawn) == 1
    lines = [
        Line(
            name,
            style,
            _path([axes.at(*pair[:2]) for pair in pairs]),
            tuple(
                (
                    *axes.at(*pair[:2]),
                    f"{name}, strength {pair[2]:g}: nDCG {pair[0]:.4f}, {metric} {pair[1]:.4f}",
                )
                for pair in pairs
            )
            if style != "other"
            else (),
        )
        for name, style, pairs in kept
    ]
    place = (*axes.at(*base[:2]), f"before: nDCG {base[0]:.4f}, {metric} {base[1]:.4f}")
    lines.append(Line("before", "base", "", (place,)))
    chosen = [pair for pair in kept[-1][2] if alone and pair[2] == alpha]
    if chosen:
        at = axes.at(*chosen[0][:2])
        text = (
            f"shown below, strength {alpha:g}: nDCG {chosen[0][0]:.4f}, {metric} {chosen[0][1]:.4f}"
        )
        lines.append(Line(f"strength {alpha:g}, shown below", "chosen", "", ((*at, text),)))
    best = every[
        int(
            np.argmin([p[1] for p in every])
            if metric.startswith("gini")
            else np.argmax([p[1] for p in every])
        )
    ]
    return Chart(
        title=f"Accuracy against {label.partition(' (')[0]}",
        summary=(
            f"From nDCG {base[0]:.4f} and {base[1]:.4f} before, to {best[1]:.4f} at nDCG "
            f"{best[0]:.4f}."
        ),
        x_label=f"{ndcg.replace('ndcg', 'nDCG')} (higher is better)",
        y_label=label,
        x_ticks=axes.x_ticks(),
        y_ticks=axes.y_ticks(),
        lines=tuple(lines),
        band=(
            max(axes.across(0.95 * base[0]), _LEFT),
            min(axes.across(base[0]), WIDTH - _RIGHT),
        ),
    )


def _around(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return low - room, high + room


def _ticks(low: float, high: float, count: int = 5) -> list[tuple[float, str]]:
    """Round numbers within, about so many."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough)
    digits = next(n for n in range(12) if abs(step - round(step, n)) < 1e-9 * step or n == 11)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:,.{digits}f}") for i in range(first, last + 1)]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) if points else ""


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
