"""A picture of how well the columns of an attribution table go with the causal effect."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from steerrec.agreement import AttributionStudy, comparable
from steerrec.attribution import AttributionTable
from steerrec.files import atomic_file
from steerrec.objectives import mid_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = "#1f5fa8", "#d9730d"


def plot_attribution_study(
    table: AttributionTable, study: AttributionStudy, path: str | Path, *, title: str
) -> None:
    """Draw rank correlations with their intervals, and ranks of each column against the effect.

    Parameters
    ----------
    table
        The table that was studied.
    study
        From `attribution_study`.
    path
        Where to; the suffix says the format: PNG, SVG or PDF.
    title
        What was studied, in a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = 4
    down = math.ceil(len(study.rows) / across)
    figure = Figure(figsize=(13.5, 3.4 + 3.0 * down), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=[2.6, 3.0 * down])
    upper, lower = (figure.add_subfigure(grid[row]) for row in (0, 1))
    _draw_intervals(upper.subplots(), study)
    panels = lower.subplots(down, across, squeeze=False).flatten().tolist()
    usable = comparable(table, study.least_active)
    effect = mid_ranks(table.signed(study.target)[usable].double())
    size = 4 if study.neurons > 1000 else 10
    for axes, row in zip(panels, study.rows, strict=False):
        ranks = mid_ranks(table.signed(row.column)[usable].double())
        axes.scatter(ranks.numpy(), effect.numpy(), s=size, alpha=0.35, color=_BLUE, lw=0)
        axes.set_title(f"{row.column}: {row.correlation:+.2f}", fontsize=10)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        _plain(axes)
    for axes in panels[len(study.rows) :]:
        axes.set_visible(False)
    lower.supxlabel("rank of the neuron by the column", fontsize=10)
    lower.supylabel(f"rank by {study.target}", fontsize=10)
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold", x=0.01, ha="left")
    where = f" active in over {study.least_active:.1%} of users" if study.least_active else ""
    subtitle = (
        f"{study.neurons:,} neurons{where}, each switched off alone; Spearman's rank correlation "
        f"with {study.target}, 95 % interval over neurons"
    )
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.42 / height, subtitle, fontsize=9.5, color="#555b64")
    suffix = Path(path).suffix.lstrip(".") or "png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=140)


def _draw_intervals(axes: Axes, study: AttributionStudy) -> None:
    names = [row.column for row in study.rows]
    places = range(len(names))
    sides = (
        ("signed", _BLUE, -0.13, "correlation", "interval"),
        ("size alone", _ORANGE, 0.13, "magnitude", "magnitude_interval"),
    )
    for label, colour, shift, value, ends in sides:
        for place, row in zip(places, study.rows, strict=True):
            low, high = getattr(row, ends)
            axes.plot([low, high], [place + shift] * 2, color=colour, lw=2, alpha=0.55)
        values = [getattr(row, value) for row in study.rows]
        axes.scatter(values, [p + shift for p in places], s=30, color=colour, label=label, zorder=3)
    axes.axvline(0, color="#8a8f98", lw=1)
    axes.set_yticks(list(places), names, fontsize=9.5)
    axes.invert_yaxis()
    axes.set_xlim(min(-0.1, axes.get_xlim()[0]), 1.02)
    axes.set_xlabel("rank correlation with the causal effect")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(color="#e6e8eb", lw=0.8)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
