"""Plots of a comparison: what each method reaches, and at whose cost."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from steerrec.comparison_results import TASTES, Comparison, MethodResult
from steerrec.files import atomic_file
from steerrec.report import plain_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GREY, _INK = "#8a8f98", "#555b64"
_THREE = ("#c2410c", "#8a8f98", "#1f5fa8")
_STEERING = ("#0b3d91", "#4f8fe6", "#12a5b8", "#7b5cd6", "#9db8ea", "#0f6f7d")
_LEARNED = ("#9d1fb8", "#4c0f8f")
_SCORES = ("#1a7f37", "#8cc63f")
_RERANKING = (
    *("#d62728", "#ff7f0e", "#b8860b", "#e377c2", "#8c1d5b", "#8c564b", "#f2a1a1", "#c49c94"),
    "#e0b000",
)
_CONTROLS = ("#222222", "#8a8f98")
_MARKERS = "osD^vP"


class _Look(NamedTuple):
    colour: str
    marker: str
    line: str
    width: float


def plot_frontiers(comparison: Comparison, path: str | Path, *, title: str) -> None:
    """Draw what every method reaches within the budgets, nDCG against Gini and against LTC.

    Each line goes through the test metrics of the settings of one method, from the unchanged lists
    to a tenth of nDCG lost; controls are dotted. Marked is what is chosen on validation at 5 %.
    What is far on the wrong side of the unchanged lists leaves the picture.

    Parameters
    ----------
    comparison
        From `steerrec.compare`.
    path
        Where to; the suffix says the format: PNG, SVG or PDF.
    title
        What was compared, in a line.
    """
    figure = _figure(13.0, 6.6)
    k, base = comparison.protocol["k"], comparison.base["test"]
    panels = (
        (f"gini@{k}", f"Gini@{k} of item exposure  (lower is fairer)"),
        (f"ltc@{k}", f"Long-tail coverage@{k}  (higher is better)"),
    )
    looks = _looks(comparison.methods)
    both = figure.subplots(1, 2)
    for axes, (metric, label) in zip(both, panels, strict=True):
        _frontiers(axes, comparison, metric, looks)
        axes.set_ylabel(label, fontsize=11)
        axes.set_xlabel(f"nDCG@{k}  (higher is better)", fontsize=11)
        axes.scatter(
            [base[f"ndcg@{k}"]], [base[metric]], s=120, color=_GREY, zorder=6, label="unsteered"
        )
    handles, names = both[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=10)
    _headline(figure, comparison, title, "ringed: chosen on validation at 5 %")
    _save(figure, path)


def plot_who_loses(
    comparison: Comparison, path: str | Path, *, title: str, budget: float = 0.05
) -> None:
    """Draw at whose cost every method works: nDCG by the target's group and by the users' taste.

    Parameters
    ----------
    comparison
        From `steerrec.compare`.
    path
        Where to; the suffix says the format: PNG, SVG or PDF.
    title
        What was compared, in a line.
    budget
        Which of the budgets of the comparison.
    """
    k = comparison.protocol["k"]
    methods = comparison.methods
    figure = _figure(12.0, 2.6 + 0.3 * len(methods))
    both = figure.subplots(1, 2, sharey=True)
    changes = [comparison.changes(method, budget) for method in methods]
    panels = (
        ("targets", ("head", "mid", "tail"), "items that users took next", " items"),
        ("tastes", TASTES, "users by what they took so far", " taste"),
    )
    places = range(len(methods))
    for axes, (part, names, label, word) in zip(both, panels, strict=True):
        axes.axvline(0, color="#333a44", lw=1, zorder=1)
        for i, (name, colour, marker) in enumerate(zip(names, _THREE, "oDs", strict=True)):
            values = [change[part][i] for change in changes]
            known = [(v, y) for v, y in zip(values, places, strict=True) if v is not None]
            axes.scatter(
                [100 * value for value, _ in known],
                [y for _, y in known],
                s=46,
                color=colour,
                marker=marker,
                zorder=3,
                label=f"{name}{word}",
            )
        for y, change in zip(places, changes, strict=True):
            spread = [100 * value for value in change[part] if value is not None]
            if spread:
                axes.hlines(y, min(spread), max(spread), color="#c9cdd3", lw=2, zorder=2)
        axes.set_xlabel(f"change of nDCG@{k} in %, {label}", fontsize=11)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=10)
        plain_axes(axes)
        axes.margins(x=0.07)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
    both[0].set_yticks(places, [_label(m, budget) for m in methods], fontsize=10)
    both[0].invert_yaxis()
    _headline(figure, comparison, title, f"chosen on validation at {budget:.0%} of nDCG")
    _save(figure, path)


def _label(method: MethodResult, budget: float) -> str:
    notes = ["control"] if method.control else []
    if method.row(budget).value == method.settings[0].value:
        notes.append("unchanged")
    return method.name + (f" ({', '.join(notes)})" if notes else "")


def _frontiers(axes: Axes, comparison: Comparison, metric: str, looks: dict[str, _Look]) -> None:
    k, base = comparison.protocol["k"], comparison.base["test"]
    own, lowest = base[f"ndcg@{k}"], 0.88 * base[f"ndcg@{k}"]
    shown: list[float] = []
    for method in comparison.methods:
        look = looks[method.name]
        points = [s.test for s in method.settings if s.test[f"ndcg@{k}"] >= lowest]
        axes.plot(
            [point[f"ndcg@{k}"] for point in points],
            [point[metric] for point in points],
            color=look.colour,
            lw=look.width,
            ls=look.line,
            marker=look.marker,
            ms=3.5,
            zorder=2 + (look.width > 2),
            label=method.name + (" (control)" if method.control else ""),
        )
        if any(row.budget == 0.05 for row in method.rows):
            chosen = method.row(0.05)
            if chosen.value != method.settings[0].value:
                axes.scatter(
                    [chosen.metrics[f"ndcg@{k}"]],
                    [chosen.metrics[metric]],
                    s=85,
                    color=look.colour,
                    marker=look.marker,
                    zorder=5,
                    ec="black",
                    lw=1.4,
                )
        if not method.control:
            shown += [point[metric] for point in points]
    _limits(axes, shown, base[metric], lower_is_better=metric.startswith("gini"))
    axes.set_xlim(lowest, max(axes.get_xlim()[1], own * 1.004))
    top = axes.get_ylim()[1]
    for budget in (0.01, 0.05, 0.1):
        axes.axvline((1 - budget) * own, color="#b9bec6", lw=1, ls="--", zorder=0)
        axes.annotate(
            f"−{budget:.0%}",
            ((1 - budget) * own, top),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_INK,
        )
    plain_axes(axes)


def _limits(axes: Axes, shown: list[float], base: float, *, lower_is_better: bool) -> None:
    """All that is better than the unchanged lists, and a little of what is worse."""
    if not shown:
        return
    low, high = min([*shown, base]), max([*shown, base])
    better = (base - low if lower_is_better else high - base) or high - low or 1.0
    room = 0.06 * better
    if lower_is_better:
        axes.set_ylim(low - room, min(high + room, base + 0.2 * better))
    else:
        axes.set_ylim(max(low - room, base - 0.2 * better), high + room)


def _looks(methods: tuple[MethodResult, ...]) -> dict[str, _Look]:
    """Blue for steering, violet where it is learned, green for other scores, warm for re-ranking.

    Controls are dotted, learned steering and PopSteer itself are thick.
    """
    palettes = {
        "learned": cycle(_LEARNED),
        "steering": cycle(_STEERING),
        "scores": cycle(_SCORES),
        "re-ranking": cycle(_RERANKING),
        "control": cycle(_CONTROLS),
    }
    markers = {kind: cycle(_MARKERS) for kind in palettes}
    looks = {}
    for method in methods:
        kind = _kind(method)
        looks[method.name] = _Look(
            next(palettes[kind]),
            next(markers[kind]),
            ":" if method.control else "-",
            2.8 if method.name == "popsteer" or kind == "learned" else 1.6,
        )
    return looks


def _kind(method: MethodResult) -> str:
    if method.control:
        return "control"
    of = method.description.get("method", method.name)
    if of in ("logit-adjustment", "ipr"):
        return "scores"
    if of.startswith("learned"):
        return "learned"
    return "steering" if of in ("popsteer", "raw-popsteer", "mean-difference") else "re-ranking"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    return figure


def _headline(figure: Figure, comparison: Comparison, title: str, note: str) -> None:
    """A title at the left, and under it what was measured."""
    protocol: dict[str, Any] = comparison.protocol
    seen = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    subtitle = (
        f"{protocol['users']['test']:,} users, {protocol['items']:,} items, test split, {seen}; "
        f"{note}"
    )
    figure.suptitle(f"{title}\n\n", fontsize=14, fontweight="bold", x=0.01, ha="left")
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 - 0.52 / height, subtitle, fontsize=10, color=_INK)


def _save(figure: Figure, path: str | Path) -> None:
    suffix = Path(path).suffix.lstrip(".") or "png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=160)
