"""Plots of what steering gains and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerrec.ablations import Ablations
from steerrec.files import atomic_file
from steerrec.tradeoff import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _GREY, _ORANGE = "#1f5fa8", "#8a8f98", "#d9730d"


def plot_tradeoff(sweep: Sweep, path: str | Path, *, title: str, budget: float = 0.05) -> None:
    """Draw nDCG against Gini and against LTC over the strengths of a sweep, as PNG, SVG or PDF.

    Test metrics; the strength chosen on validation at `budget` is marked, and the nDCG that the
    budget allows is shaded.

    Parameters
    ----------
    sweep
        From `steerrec.sweep()`.
    path
        Where to; the suffix says the format.
    title
        What was steered, in a line.
    budget
        Share of nDCG that may be given.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    protocol = sweep.points[0].test.protocol
    k = protocol["k"]
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        (f"gini@{k}", f"Gini@{k} of item exposure  (lower is fairer)"),
        (f"ltc@{k}", f"Long-tail coverage@{k}  (higher is better)"),
    )
    both = figure.subplots(1, 2)
    for axes, (metric, label) in zip(both, panels, strict=True):
        _draw(axes, sweep, metric, budget)
        axes.set_ylabel(label)
        axes.set_xlabel(f"nDCG@{k}  (higher is better)")
    figure.legend(
        *both[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=10,
    )
    seen = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    subtitle = f"{protocol['users']:,} users, {protocol['items']:,} items, test split, {seen}"
    figure.suptitle(f"{title}\n", fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.text(0.01, 0.915, subtitle, fontsize=9.5, color="#555b64")
    figure.canvas.draw()
    for axes in both:
        _thin_out(axes)
    suffix = Path(path).suffix.lstrip(".") or "png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=160)


def plot_ablations(ablations: Ablations, path: str | Path, *, title: str) -> None:
    """Draw the hypervolumes of all variants, study by study, beside those of the unvaried one.

    Parameters
    ----------
    ablations
        From `steerrec.ablate`.
    path
        Where to; the suffix says the format: PNG, SVG or PDF.
    title
        What was varied, in a line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    usual, *rows = ablations.rows
    places, labels, headings, y = [], [], [], 0.0
    for i, row in enumerate(rows):
        if not i or row.study != rows[i - 1].study:
            y += 0.6 if i else 0.0  # a gap between studies
            headings.append((y, row.study))
            y += 1
        places.append(y)
        labels.append(row.label)
        y += 1
    figure = Figure(figsize=(11.0, 2.4 + 0.22 * y), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("gini", "gain in Gini (HV)"), ("ltc", "gain in long-tail coverage (HV)"))
    both = figure.subplots(1, 2, sharey=True)
    colours = [_GREY if row.study == "controls" else _BLUE for row in rows]
    for axes, (by, label) in zip(both, panels, strict=True):
        values = [row.hypervolume[by] for row in rows]
        axes.axvline(usual.hypervolume[by], color=_ORANGE, lw=1.5, label="as it is")
        axes.hlines(places, 0, values, colors=colours, lw=1.5, alpha=0.45)
        for colour, name in ((_BLUE, "one thing varied"), (_GREY, "control")):
            chosen = [i for i, own in enumerate(colours) if own == colour]
            if chosen:
                axes.scatter(
                    [values[i] for i in chosen],
                    [places[i] for i in chosen],
                    s=28,
                    color=colour,
                    zorder=3,
                    clip_on=False,
                    label=name,
                )
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{label}  (more is better)", fontsize=11)
        plain_axes(axes)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0, pad=8)
    ticks = sorted([*zip(places, labels, strict=True), *headings])
    both[0].set_yticks([place for place, _ in ticks], [label for _, label in ticks], fontsize=9.5)
    bold = {place for place, _ in headings}
    for tick, (place, _) in zip(both[0].get_yticklabels(), ticks, strict=True):
        tick.set_fontweight("bold" if place in bold else "normal")
    both[0].set_ylim(y - 0.2, -0.8)
    handles = both[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    protocol = ablations.protocol
    seen = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    subtitle = (
        f"{protocol['users']:,} users, {protocol['items']:,} items, test split, {seen}; mean gain "
        "within 10 % of nDCG, chosen on validation"
    )
    figure.suptitle(f"{title}\n\n", fontsize=14, fontweight="bold", x=0.01, ha="left")
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 - 0.52 / height, subtitle, fontsize=10, color="#555b64")
    suffix = Path(path).suffix.lstrip(".") or "png"
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=suffix, dpi=160)


def plain_axes(axes: Axes) -> None:
    """Axes with a light grid and no frame."""
    axes.grid(color="#e6e8eb", lw=0.8)
    axes.set_axisbelow(True)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _draw(axes: Axes, sweep: Sweep, metric: str, budget: float) -> None:
    ndcg = metric.replace(metric.partition("@")[0], "ndcg")
    x = [point.test.metrics[ndcg] for point in sweep.points]
    y = [point.test.metrics[metric] for point in sweep.points]
    axes.axvspan(
        x[0] * (1 - budget), x[0], color=_BLUE, alpha=0.07, lw=0, label=f"within {budget:.0%} nDCG"
    )
    axes.plot(x, y, color=_BLUE, lw=2, marker="o", ms=5, zorder=3, label="steered, by α")
    axes.scatter(x[:1], y[:1], s=90, color=_GREY, zorder=4, label="unsteered")
    chosen = sweep.within(budget)
    if chosen.alpha:
        axes.scatter(
            [chosen.test.metrics[ndcg]],
            [chosen.test.metrics[metric]],
            s=110,
            color=_ORANGE,
            zorder=5,
            label=f"α = {chosen.alpha:g}, chosen on validation",
        )
    side = 1 if metric.startswith("gini") else -1  # labels away from the curve
    for point, px, py in list(zip(sweep.points, x, y, strict=True))[1:]:
        label = axes.annotate(
            f"{point.alpha:g}",
            (px, py),
            xytext=(7, -11 * side if side > 0 else 5),
            textcoords="offset points",
            fontsize=8.5,
            color="#333a44",
        )
        label.set_gid("strength")
        label.set_zorder(7 if point.alpha == chosen.alpha else 6)
    axes.margins(x=0.08, y=0.1)
    plain_axes(axes)


def _thin_out(axes: Axes) -> None:
    """Hide the labels that would lie over another; the chosen strength and the largest stay."""
    labels = [child for child in axes.texts if child.get_gid() == "strength"][::-1]
    labels.sort(key=lambda label: -label.get_zorder())
    kept: list[Any] = []
    for label in labels:
        box = label.get_window_extent()
        label.set_visible(not any(box.overlaps(other) for other in kept))
        if label.get_visible():
            kept.append(box)
