"""`steerrec evaluate`: accuracy and exposure of the unsteered model."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from steerrec.cli import options as opt


class SplitName(StrEnum):
    """Held-out parts."""

    valid = "valid"
    test = "test"


def evaluate(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP)],
    data: opt.DataOption,
    k: opt.K = 10,
    split: Annotated[SplitName, typer.Option("--split", help="Held-out part.")] = SplitName.test,
    mask_seen: opt.MaskSeen = False,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    item_map: opt.ItemMap = None,
    user_col: opt.UserCol = None,
    item_col: opt.ItemCol = None,
    time_col: opt.TimeCol = None,
    k_core: opt.KCore = None,
    dedup: opt.Dedup = None,
    format: opt.Format = None,
    json_output: opt.Json = False,
) -> None:
    """Measure accuracy and exposure of the unsteered MODEL over the full catalogue."""
    from steerrec import evaluation

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
    opt.check_k(k, rec)
    opt.warn_unless_conforming(rec)
    found = evaluation.evaluate(
        rec, opt.split_for(rec, interactions), which=split.value, k=k, mask_seen=mask_seen
    )
    if json_output:
        opt.print_json({"model": model, **found.to_dict()})
    else:
        opt.print_evaluations({"unsteered": found})
