"""`steerrec evaluate`: accuracy and exposure of the unsteered model."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from typing import Annotated

import typer

from steerrec.cli import engine_options as eng
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
    max_users: opt.MaxUsers = None,
    seed: opt.Seed = 0,
    item_dtype: eng.ItemDtypeOption = eng.ItemDtypeName.float32,
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
    from steerrec.evaluation import capture_held_out, measure
    from steerrec.item_dtypes import with_item_dtype

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
    held_out = capture_held_out(
        rec, opt.split_for(rec, interactions), split.value, max_users=max_users, seed=seed
    )
    compacted = with_item_dtype(rec, item_dtype.value)
    error = eng.error_of(rec, compacted, item_dtype, held_out.vectors, k)
    found = measure(compacted, held_out, k=k, mask_seen=mask_seen)
    if json_output:
        opt.print_json({"model": model, **found.to_dict(), **error})
        return
    opt.print_evaluations({"unsteered": found})
    if error:
        opt.note(eng.describe_error(error, k))
