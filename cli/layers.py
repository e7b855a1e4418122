"""`steerrec layers`: what an SAE can be attached to."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.layers import LayerReport


def layers(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP)],
    revision: opt.Revision = None,
    device: opt.Device = "cpu",
    json_output: opt.Json = False,
) -> None:
    """List the modules of MODEL, what each does when it scores, and where an SAE belongs."""
    from steerrec.layers import site_report
    from steerrec.loading import load_recommender

    rec = load_recommender(model, device=device, **opt.hub_options(revision))
    report = site_report(rec)
    if json_output:
        opt.print_json(
            {
                "recommended": report.recommended.to_dict(),
                "reason": report.reason,
                "layers": [asdict(layer) for layer in report.layers],
            }
        )
        return
    rows = [
        [
            f"{layer.path} *" if layer.path == report.recommended.path else layer.path,
            str(layer.firings),
            layer.kind,
            layer.output,
            layer.layout or "–",
            "yes" if layer.usable else "no",
            "–" if layer.score_error is None else f"{layer.score_error:.1g}",
        ]
        for layer in report.layers
    ]
    title = f"{type(rec.model).__name__}, 5 histories scored; * is the recommended site"
    columns = ["layer", "fires", "module", "emits", "layout", "usable", "scores off by"]
    opt.print_table(title, columns, rows)
    opt.note(f"{report.recommended.name} is recommended: {report.reason}")
    for reason, layers in _by_reason(report.layers).items():
        opt.note(f"{', '.join(layers)}: {reason}")


def _by_reason(layers: list[LayerReport]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.reason:
            found.setdefault(layer.reason, []).append(layer.path)
    return found
