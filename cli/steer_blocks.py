"""`steerrec steer --engine`: what it does beside calling `steerrec.batch_scoring`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.batch_scoring import ScoringSpec
    from steerrec.data import Interactions
    from steerrec.engines import Engine
    from steerrec.recommender import Recommender

OUTPUT = Path("recommendations")
_HISTORIES = "_histories"


def steer_blocks(
    spec: ScoringSpec,
    data: Path,
    output: Path | None,
    read: Callable[..., Interactions],
    item_map: Path | None,
    engine: Engine,
    *,
    block_users: int | None,
    force: bool,
    json: bool,
) -> None:
    """Score the histories of DATA in blocks, into a folder."""
    from steerrec.batch_scoring import BLOCK_USERS, score_blocks

    folder = output or OUTPUT
    _make_room(folder, force)
    size = block_users or BLOCK_USERS
    work = folder / _HISTORIES
    spec, files, rec = _histories(spec, data, read, item_map, work, size)
    result = score_blocks(spec, files, folder, engine=engine, block_users=size, rec=rec)
    shutil.rmtree(work, ignore_errors=True)
    if json:
        opt.print_json({"recommendations": str(folder), **result.to_dict()})
        return
    opt.print_evaluations({"steered": result.evaluation})
    new = result.blocks - result.kept
    opt.note(
        f"{folder}: {result.blocks:,} blocks, {result.kept:,} of them done before; {new:,} in "
        f"{result.seconds:.1f} s, {result.cpu_seconds:.1f} s of CPU"
        + (f", at most {result.peak_bytes / 2**20:,.0f} MiB a worker" if result.peak_bytes else "")
    )


def _histories(
    spec: ScoringSpec,
    data: Path,
    read: Callable[..., Interactions],
    item_map: Path | None,
    work: Path,
    users: int,
) -> tuple[ScoringSpec, list[Path], Recommender | None]:
    """Files of histories: those of DATA as they are, or made of its interactions."""
    import numpy as np

    from steerrec.data.history_files import history_files, write_histories
    from steerrec.loading import holds_no_items, items_of

    files = history_files(data) if data.exists() else []
    if files:
        items = None
        if spec.model is not None and item_map is not None:
            items = items_of(spec.model, None, item_map)
        if items is not None:
            items.write(work / "items.parquet")
            spec = replace(spec, items=str((work / "items.parquet").absolute()))
        return spec, files, None
    opened, rec, interactions = opt.open_artifact(
        spec.artifact,
        spec.model,
        read,
        item_map,
        spec.device,
        site=spec.site,
        strict=spec.strict,
        revision=spec.revision,
    )
    opt.check_k(spec.k, rec)
    histories = opt.histories_for(rec, interactions)
    del opened, interactions
    for number, start in enumerate(range(0, len(histories), users)):
        part = histories.select(np.arange(start, min(start + users, len(histories))))
        files.append(work / f"histories-{number:05d}.parquet")
        write_histories(part, rec.catalogue, files[-1])
    if spec.model is not None and holds_no_items(spec.model):
        rec.catalogue.write(work / "items.parquet")
        spec = replace(spec, items=str((work / "items.parquet").absolute()))
    return spec, files, rec


def _make_room(folder: Path, force: bool) -> None:
    """Refuse a folder that holds anything but an unfinished run, or remove a run that it holds."""
    from steerrec.batch_scoring import has_blocks, is_complete
    from steerrec.errors import StorageError

    if folder.suffix in (".parquet", ".csv", ".tsv"):
        raise typer.BadParameter(f"--engine writes a folder of Parquet files, not {folder}")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not has_blocks(folder):
        if folder.is_dir() and [entry.name for entry in folder.iterdir()] == [_HISTORIES]:
            return  # stopped before the first block
        raise StorageError(
            f"{folder} holds something else than recommendations in blocks; choose another name"
        )
    if force:
        shutil.rmtree(folder)
    elif is_complete(folder):
        raise StorageError(f"{folder} exists; choose another name, or replace it with --force")
