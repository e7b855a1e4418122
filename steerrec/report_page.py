"""The report as one HTML file: opens from disk, asks nothing of any network.

Texts are escaped by the template, and data for the script is JSON in which nothing can end it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from steerrec.card import METRICS, TITLES, budget_points
from steerrec.enrichment import GROUP_WORDS
from steerrec.files import atomic_file
from steerrec.neurons import NeuronDescriptions
from steerrec.report_charts import density_chart, lorenz_chart, tradeoff_charts
from steerrec.reporting import ReportData

TITLE = "What the recommender has learned, and what steering changes"

MAX_DETAIL = 3_200_000
"""Bytes that details of neurons may take: the strongest ones have them while there is room."""

COLUMNS = {
    "cohens_d": (
        "Cohen's d",
        "how far the two groups of made-up users lie apart, in standard deviations",
    ),
    "cohens_d_users": (
        "d, real users",
        "the same between real users of the one and the other taste",
    ),
    "auroc": (
        "AUROC",
        "chance that a made-up user of the first group has more of it than one of "
        "the second; 0.5 tells nothing",
    ),
    "point_biserial": ("Correlation", "of the neuron with the group of made-up users"),
    "logit_attribution": (
        "Logits",
        "how the scores that its decoder row adds go with the contrast's value of items",
    ),
    "direct_effect": ("Direct effect", "the same, times how active it is in real users"),
    "grad_attribution": (
        "Gradient",
        "how the contrast's value of whole lists would change with it, in real users",
    ),
    "causal_effect": ("Causal effect", "how lists of real users change when it is switched off"),
}
"""Columns of a table as people know them; any other column is shown under its own name."""

_INNER = ("zero_variance", "causal_measured")
_INNER_ENDS = ("_se", "_low", "_high", "_a", "_b")


def write_report(data: ReportData, path: str | Path, *, title: str = TITLE) -> Path:
    """Write the page of a report.

    Parameters
    ----------
    data
        From `report_data`.
    path
        Where to.
    title
        What it is called.
    """
    text = render_report(data, title=title)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def render_report(data: ReportData, *, title: str = TITLE) -> str:
    """The HTML of a report."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    folder = files("steerrec") / "page"
    style, script = ((folder / name).read_text("utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "count": "{:,}".format,
        "signed": _signed,
    }
    template = environment.from_string((folder / "report.html.j2").read_text("utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _page(data)
    return template.render(
        **page,
        title=title,
        style=Markup(style),
        script=Markup(script),
        script_hash=digest,
        payload=Markup(embedded(neuron_payload(data.neurons))),
    )


def embedded(value: Any) -> str:
    """JSON that is safe inside of a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    # a lone half of a pair of surrogates cannot be written as UTF-8
    return text.encode("utf-8", "replace").decode("utf-8")


def shown_columns(found: NeuronDescriptions) -> list[str]:
    """Columns of the table that people look at, the ones that have words first."""
    known = [name for name in COLUMNS if name in found.columns]
    others = [
        name
        for name in found.columns
        if name not in COLUMNS and name not in _INNER and not name.endswith(_INNER_ENDS)
    ]
    return known + others


def neuron_payload(found: NeuronDescriptions, *, max_detail: int = MAX_DETAIL) -> dict[str, Any]:
    """All neurons for the script: a row for each, and details of as many as there is room for."""
    names = shown_columns(found)
    order = found.strongest(len(found), found.ranking)
    rates = found.facts.firing_rate
    rows, details, size = [], {}, 0
    for neuron in order:
        label, evidence = found.label(neuron)
        rows.append(
            [
                neuron,
                label,
                _EVIDENCE.index(evidence),
                _short(float(rates[neuron])),
                *(_short(float(found.columns[name][neuron])) for name in names),
            ]
        )
        if size < max_detail:
            details[str(neuron)] = detail = _detail(found, neuron)
            size += len(json.dumps(detail, separators=(",", ":")))
    items = found.items
    return {
        "groups": [found.contrast[group]["label"] for group in ("group_a", "group_b")],
        "popularity": GROUP_WORDS,
        "attributes": list(items.names),
        "items": {
            str(row): [
                title,
                int(items.counts[place]),
                int(items.groups[place]),
                [i for i in items.attributes[place].tolist() if i >= 0],
            ]
            for place, (row, title) in enumerate(
                zip(items.rows.tolist(), items.titles, strict=True)
            )
        },
        "columns": [[name, *COLUMNS.get(name, (name.replace("_", " "), ""))] for name in names],
        "sort": found.ranking,
        "rows": rows,
        "details": details,
    }


_EVIDENCE = ("both", "items", "histories", "none")


def _detail(found: NeuronDescriptions, neuron: int) -> list[Any]:
    """What is shown of one neuron, as compact as it goes; report.js names the places."""
    facts = found.facts
    rate = [
        _short(float(found.columns[f"firing_rate_{group}"][neuron]))
        if f"firing_rate_{group}" in found.columns
        else None
        for group in "ab"
    ]
    histories = [
        [_short(activation), [row for row in rows if row >= 0]]
        for activation, rows in zip(
            facts.activations[neuron].tolist(), facts.fired_by[neuron].tolist(), strict=True
        )
        if activation > 0
    ]
    common = [
        [
            [
                found.items.names.index(note.name),
                _short(note.ratio),
                note.hits,
                note.drawn,
                float(f"{note.q:.1e}"),
            ]
            for note in found.attributes(neuron, of)
        ]
        for of in ("raises", "fired")
    ]
    return [
        _short(float(facts.mean_activation[neuron])),
        rate,
        [_short(float(facts.low[neuron])), _short(float(facts.high[neuron]))],
        facts.histogram_a[neuron].tolist(),
        facts.histogram_b[neuron].tolist(),
        [facts.raises[neuron].tolist(), _all_short(facts.raise_effects[neuron].tolist())],
        [facts.lowers[neuron].tolist(), _all_short(facts.lower_effects[neuron].tolist())],
        histories,
        common,
        [facts.similar[neuron].tolist(), _all_short(facts.cosines[neuron].tolist())],
    ]


def _page(data: ReportData) -> dict[str, Any]:
    """What the template fills in."""
    found = data.neurons
    points = budget_points(data.sweep)
    base, chosen = points if points is not None else (data.sweep["points"][0]["test"], [])
    k = base["protocol"]["k"]
    labels = [found.contrast[group]["label"] for group in ("group_a", "group_b")]
    at = next((test for _, alpha, test in chosen if alpha == data.alpha), None)
    exposure = data.exposure
    reconstruction = data.training.get("reconstruction")
    reconstruction = reconstruction if isinstance(reconstruction, Mapping) else {}
    return {
        "data": data,
        "labels": labels,
        "lead": (
            f"{data.latents:,} neurons of an autoencoder at {data.model['site']}, seen through the "
            f"contrast of {labels[0]} and {labels[1]} items"
        ),
        "k": k,
        "base": base,
        "metrics": [(name, TITLES[name].format(k=k)) for name in METRICS],
        "chosen": chosen,
        "shown_at": at,
        "health": {
            "fvu": reconstruction.get("fvu"),
            "l0": reconstruction.get("l0"),
            "dead": reconstruction.get("dead_share"),
        },
        "silent": int((found.facts.firing_rate == 0).sum()),
        "density": density_chart(found.facts.firing_rate),
        "tradeoff": tradeoff_charts(data.sweep, data.comparison, data.alpha),
        "lorenz": lorenz_chart(exposure.items, exposure.before, exposure.after),
        "methods": _methods(data.comparison),
        "columns": [COLUMNS[name] for name in shown_columns(found) if name in COLUMNS],
        "protocol": found.protocol,
        "words": GROUP_WORDS,
        "label_of": lambda neuron: found.label(neuron)[0],
        "first": _first_rows(found),
    }


def _first_rows(found: NeuronDescriptions, n: int = 20) -> list[tuple[int, str, float, float]]:
    """The strongest neurons that fire, for a page without its script."""
    rates = found.facts.firing_rate
    order = [j for j in found.strongest(len(found), found.ranking) if float(rates[j]) > 0][:n]
    d = found.columns["cohens_d"]
    return [(j, found.label(j)[0], float(rates[j]), float(d[j])) for j in order]


def _methods(comparison: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Each method at 5 %, the best first."""
    rows = []
    for method in (comparison or {}).get("methods", []):
        for row in method.get("rows", []):
            if row.get("budget") == 0.05 and row.get("by") == "gini":
                volume = method.get("hypervolume") or {}
                rows.append(
                    {
                        "name": str(method.get("name"))[:60],
                        "control": bool(method.get("control")),
                        "value": row.get("value"),
                        "metrics": row.get("metrics") or {},
                        "volume": volume,
                    }
                )
    return sorted(rows, key=lambda row: (row["control"], -(row["volume"].get("gini") or 0.0)))


def _short(value: float) -> float | None:
    """Three digits are enough for a picture."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _all_short(values: list[float]) -> list[float | None]:
    return [_short(value) for value in values]


def _number(value: Any, digits: int = 4) -> str:
    """A number, or a dash."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}f}"


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")


def _percent(value: Any, digits: int = 1) -> str:
    return "–" if _number(value) == "–" else f"{value:.{digits}%}".replace("%", " %")
