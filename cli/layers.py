"""`steerrec layers`: what an SAE can be attached to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from steerrec.cli import options as opt


def layers(
    model: Annotated[str, typer.Argument(help="MODEL folder, Hub id, or pkg.module:function.")],
    device: opt.Device = "cpu",
    json_output: opt.Json = False,
) -> None:
    """List the modules of MODEL, how often each fires when it scores, and what it emits."""
    import numpy as np

    from steerrec.data import Histories
    from steerrec.hooks import layer_report
    from steerrec.loading import load_recommender

    rec = load_recommender(model, device=device)
    rng = np.random.default_rng(0)
    probe = Histories.from_lists(
        [rng.integers(len(rec.catalogue), size=min(n, rec.max_length)).tolist() for n in (5, 3)]
    )
    report = layer_report(rec.model, lambda: rec.score(rec.make_batch(probe)))
    if json_output:
        site = rec.site.to_dict()
        opt.print_json({"recommended": site, "layers": [asdict(layer) for layer in report]})
        return
    rows = [
        [
            f"{layer.path} *" if layer.path == rec.site.path else layer.path,
            str(layer.firings),
            layer.kind,
            layer.output,
        ]
        for layer in report
    ]
    title = f"{type(rec.model).__name__}, 2 histories scored; * is the recommended site"
    opt.print_table(title, ["layer", "fires", "module", "emits"], rows)
