"""`steerrec export`: the steering of an ARTIFACT as a file for serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt


def export(
    artifact: opt.ArtifactArgument,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="FILE.onnx, or FILE.pt2 for torch.export.", show_default=False
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="A recipe saved in ARTIFACT.")
    ] = None,
    contrast: Annotated[
        str, typer.Option("--contrast", help="Else the PopSteer rule on this table.")
    ] = "popularity",
    neurons: Annotated[
        int | None, typer.Option("--neurons", min=1, help="Only the strongest N; all by default.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Default strength; 1, or the recipe's own.")
    ] = None,
    queries: Annotated[
        bool,
        typer.Option("--queries", help="Give queries for an index by inner product, not vectors."),
    ] = False,
    model: opt.ModelOption = None,
    site: opt.SiteName = None,
    revision: opt.Revision = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Write the steering of ARTIFACT as a file for serving: user vectors and strengths in.

    No hook and no model is needed to run it. --model is needed for an ARTIFACT that does not record
    where its model scores.
    """
    from steerrec.artifacts import load_artifact
    from steerrec.exporting import check_suffix, export_artifact
    from steerrec.loading import load_recommender
    from steerrec.recipes import Recipe
    from steerrec.steering import Steering

    if recipe and neurons:
        raise typer.BadParameter("--recipe says itself which neurons to turn")
    check_suffix(output)
    opt.refuse_existing(output, force)
    opened = load_artifact(artifact, **opt.hub_options(revision))
    steering: Recipe | str | None = recipe
    if neurons:
        steering = Steering.popsteer(opened.at(site).table(contrast), neurons=neurons)
    about = export_artifact(
        opened,
        output,
        steering=steering,
        contrast=contrast,
        site=site,
        alpha=alpha,
        rec=None if model is None else load_recommender(model),
        queries=queries,
    )
    opt.note(f"{output} written: {about['output']} of width {about['d_in']} in; {about['queries']}")
    if json_output:
        opt.print_json({"file": str(output), **about})
