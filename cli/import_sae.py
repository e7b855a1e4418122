"""`steerrec import-sae`: another library's SAE as an ARTIFACT."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt


class SAEFormat(StrEnum):
    """Whose SAE it is."""

    saelens = "saelens"
    sparsify = "sparsify"
    dictionary_learning = "dictionary_learning"
    popsteer = "popsteer"


def import_sae(
    sae: Annotated[
        Path,
        typer.Argument(
            help="Folder of SAELens, sparsify or dictionary_learning, or a PopSteer .pth.",
            show_default=False,
        ),
    ],
    model: Annotated[str, typer.Argument(help="MODEL folder or Hub id that it was trained on.")],
    data: opt.DataOption,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="ARTIFACT folder to write.", show_default=False)
    ],
    layer: opt.Layer = None,
    call: Annotated[
        str,
        typer.Option("--call", help="Which firing of --layer: only, first, last, all or a number."),
    ] = "only",
    sae_format: Annotated[
        SAEFormat | None,
        typer.Option("--sae-format", help="Whose SAE it is, where it is not recognised."),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option("--k", min=1, help="Latents active at once, where the files do not say it."),
    ] = None,
    dict_class: Annotated[
        str | None,
        typer.Option("--dict-class", help="Class of a dictionary_learning SAE without config."),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", help="Module of a PopSteer checkpoint with several SAEs."),
    ] = None,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    item_map: opt.ItemMap = None,
    user_col: opt.UserCol = None,
    item_col: opt.ItemCol = None,
    time_col: opt.TimeCol = None,
    k_core: opt.KCore = None,
    dedup: opt.Dedup = None,
    format: opt.Format = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Read another library's SAE, measure it at a layer of MODEL, and save it in an ARTIFACT.

    Nothing in the files is executed. An ARTIFACT that is there gets one more site.
    """
    from steerrec.artifacts import Artifact, save_site
    from steerrec.attachment import count_firings
    from steerrec.importing import import_sae as read_sae
    from steerrec.layers import site_at

    adding = opt.adds_to(output, force)
    imported = read_sae(
        sae,
        format=None if sae_format is None else sae_format.value,
        k=k,
        dict_class=dict_class,
        part=part,
    )
    read = partial(
        opt.read_data,
        data,
        user_col=user_col,
        item_col=item_col,
        time_col=time_col,
        k_core=k_core,
        dedup=dedup,
        format=format,
    )
    rec, interactions = opt.open_model(model, read, item_map, device, revision=revision)
    site = site_at(rec, layer, call=opt.call_of(call)) if layer else rec.site
    count_firings(rec, site, width=imported.d_in)
    if adding:
        opt.refuse_held(output, rec, site)
    read_as = interactions.preparation.to_dict()
    artifact = Artifact.create(rec, imported.to(device), site=site, data=read_as)
    fit = artifact.measure_fit(rec, opt.split_for(rec, interactions).train)
    measured = {"fvu": fit.fvu, "l0": fit.l0, "dead_share": None, "rows": fit.rows}
    training = {"imported": str(sae.name), "reconstruction": measured}
    if adding:
        save_site(output, rec, imported.cpu(), site=site, training=training)
    else:
        artifact.at().training.update(training)
        artifact.save(output)
    if json_output:
        opt.print_json({"artifact": str(output), "site": site.to_dict(), **training})
        return
    rows = [["FVU", opt.number(fit.fvu)], ["L0", f"{fit.l0:.1f}"]]
    title = f"{output}: {imported.d_sae} latents at {site.path}, on {fit.rows:,} prefixes"
    opt.print_table(title, ["", "value"], rows)
    if not fit.fits:
        opt.note(
            f"this SAE reconstructs badly here (FVU {fit.fvu:.4f}); is it of this layer of this "
            "model?"
        )
