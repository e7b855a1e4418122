"""`steerrec convert`: another library's checkpoint as a MODEL folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt


def convert(
    model: Annotated[
        str, typer.Argument(help="Checkpoint, such as recbole:FILE or pmixer:FILE,heads=2.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="MODEL folder to write.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="What it was trained on: ids, titles and popularity."),
    ] = None,
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
    """Write the safe form of a checkpoint: safetensors, configuration and items in a MODEL folder.

    Nothing in the checkpoint is executed. Item ids come from --item-map, or from --data: in the
    order of their first appearance for RecBole, as its own numbers 1 to N for the others.
    """
    from steerrec.adapters.sasrec import SASRecRecommender, save
    from steerrec.errors import ModelError
    from steerrec.files import atomic_folder, write_json
    from steerrec.loading import check_settings, holds_no_items, items_of, load_recommender

    opt.refuse_existing(output, force, kind="MODEL folder")
    if not holds_no_items(model):
        raise ModelError(f"{model} is no checkpoint of another library, such as recbole:model.pth")
    check_settings(model)
    interactions = None
    if data is not None:
        interactions = opt.read_data(
            data,
            user_col=user_col,
            item_col=item_col,
            time_col=time_col,
            k_core=k_core,
            dedup=dedup,
            format=format,
        )
    rec = load_recommender(model, items=items_of(model, interactions, item_map))
    if not isinstance(rec, SASRecRecommender):
        raise ModelError(
            f"{model} is a {type(rec.model).__name__}; only what can be rebuilt as the reference "
            "SASRec can be converted"
        )
    record = {"data": {} if interactions is None else interactions.preparation.to_dict()}
    with atomic_folder(output) as folder:
        save(rec, folder)
        write_json(folder / "steerrec.json", record)
    if json_output:
        opt.print_json({"model": str(output), "items": len(rec.catalogue), **record})
        return
    opt.note(f"{output}: {len(rec.catalogue):,} items")
