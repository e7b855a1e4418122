"""Options of what runs over blocks on an engine, and of the dtype of the item matrix."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

    from steerrec.engines import Engine
    from steerrec.recommender import Recommender

PANEL = "Engine"


class EngineName(StrEnum):
    """What runs over blocks."""

    local = "local"
    ray = "ray"


class ItemDtypeName(StrEnum):
    """What the item matrix is held in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


EngineOption = Annotated[
    EngineName | None,
    typer.Option(
        "--engine",
        help="Work block by block, to be gone on with after a stop: in this process, or on Ray.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray cluster, such as auto; without it one is started on this machine.",
        rich_help_panel=PANEL,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Ray workers; as many as CPUs.", rich_help_panel=PANEL),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of a worker; 1.", rich_help_panel=PANEL),
]
ItemDtypeOption = Annotated[
    ItemDtypeName,
    typer.Option("--item-dtype", help="Hold the item matrix in this; the error is told."),
]

_SAMPLE = 1000  # users whom the error of an item matrix is told for


def engine_of(
    name: EngineName,
    address: str | None,
    workers: int | None,
    threads: int | None,
    device: str = "cpu",
) -> Engine:
    """The engine of that name, or a usage error for options that it does not have."""
    if name is EngineName.local:
        from steerrec.engines import LocalEngine

        refuse(**{"--address": address, "--workers": workers})
        return LocalEngine(threads=threads or 1)
    from steerrec.ray_engine import RayEngine

    gpus = 0 if device == "cpu" else 1
    return RayEngine(address=address, workers=workers, threads=threads or 1, gpus=gpus)


def refuse(**options: Any) -> None:
    """A usage error for options that go with --engine, where it is not given or has not them."""
    if given := [name for name, value in options.items() if value is not None]:
        goes = "--engine" if set(given) - {"--address", "--workers"} else "--engine ray"
        raise typer.BadParameter(f"{given[0]} goes with {goes}")


def error_of(
    rec: Recommender, compacted: Recommender, dtype: ItemDtypeName, vectors: Tensor, k: int
) -> dict[str, Any]:
    """What ranking by a compacted item matrix gets wrong, for JSON; empty for float32."""
    if dtype is ItemDtypeName.float32:
        return {}
    from steerrec.item_dtypes import item_dtype_error

    sample = vectors[:: max(1, len(vectors) // _SAMPLE)]
    found = item_dtype_error(rec.item_head, compacted.item_head, sample, k=k)
    return {"item_dtype": {"dtype": dtype.value, **found}}


def describe_error(found: dict[str, Any], k: int) -> str:
    """The same in a line."""
    about = found["item_dtype"]
    size = about["bytes"]
    return (
        f"items in {about['dtype']}: recall@{k} {about[f'recall@{k}']:.4f} of the float32 lists, "
        f"{about['same_lists']:.1%} of the lists the same, largest score error "
        f"{about['score_error']:.2g} ({about['relative_score_error']:.2g} of the largest score), "
        f"{size['other'] / 2**20:,.1f} MiB instead of {size['float32'] / 2**20:,.1f} "
        f"({about['users']:,} users)"
    )
