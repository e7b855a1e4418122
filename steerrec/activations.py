"""User vectors of many histories: collected in memory, or captured once into safetensors shards.

A shard folder holds `train-00000.safetensors`, …, `held_out-00000.safetensors`, … with one tensor
`user_vectors` [R, H] each, and `activations.json`, written last: a folder without it is not whole,
and capturing goes on where it ended.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerrec.data import Histories
from steerrec.errors import DataError, TrainingError
from steerrec.files import atomic_file, write_json
from steerrec.progress import track
from steerrec.recommender import Recommender, fingerprint, user_vectors
from steerrec.sites import Site

MANIFEST = "activations.json"
TENSOR = "user_vectors"
_SETTINGS = "settings.json"
Part = Literal["train", "held_out"]


def length_batches(lengths: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Row numbers in batches of similar length, so that little padding is computed."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def digest(histories: Histories) -> str:
    """A hash of all that histories hold: whether a run goes on with the data it began with."""
    sha = hashlib.sha256(histories.offsets.tobytes())
    sha.update(histories.items.tobytes())
    for name, values in sorted(histories.columns.items()):
        sha.update(f"{name}:{values.dtype};".encode() + values.tobytes())
    return sha.hexdigest()


def collect_user_vectors(
    rec: Recommender,
    histories: Histories,
    site: Site | None = None,
    *,
    batch_size: int = 256,
    description: str = "user vectors",
) -> Tensor:
    """User vectors [U, H] of all histories, in their order, as float32 on the CPU."""
    out: Tensor | None = None
    # the model reads only its window: longer histories are no longer to it
    lengths = np.minimum(histories.lengths, rec.max_length)
    for rows in track(length_batches(lengths, batch_size), description, unit="batch"):
        vectors = user_vectors(rec, histories.select(rows), site).float().cpu()
        if out is None:
            out = torch.empty(len(histories), vectors.shape[1])
        out[torch.from_numpy(rows)] = vectors
    if out is None:
        raise DataError("no histories to read user vectors from; expected at least one")
    return out


def sample_prefixes(
    train: Histories, n: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training prefixes drawn uniformly: a history cut at one of its training positions.

    Drawn without replacement while there are enough of them.

    Parameters
    ----------
    train
        Training histories; one of t items has the prefixes of 1 to t - 1 items.
    n
        How many.
    rng
        Source of randomness.

    Returns
    -------
    users, lengths
        Index of the user and number of items of each prefix, [n].
    """
    ends = np.cumsum(np.maximum(train.lengths - 1, 0))
    total = int(ends[-1]) if len(ends) else 0
    if total == 0:
        raise DataError("no training prefixes: every training history has a single item")
    drawn = rng.choice(total, n, replace=n > total)
    users = np.searchsorted(ends, drawn, side="right")
    starts = np.concatenate([[0], ends[:-1]])
    return users, drawn - starts[users] + 1


@dataclass(frozen=True)
class ActivationSampling:
    """Which training prefixes an SAE is trained on.

    Attributes
    ----------
    rows
        At most this many prefixes, drawn uniformly from the users that are not held out.
    held_out_users
        Share of the users kept apart to measure reconstruction on.
    held_out_rows
        At most this many prefixes of the users held out.
    shard_rows
        Rows in one shard: what an interruption can cost.
    seed
        Same seed, same prefixes.
    """

    rows: int = 200_000
    held_out_users: float = 0.05
    held_out_rows: int = 20_000
    shard_rows: int = 16_384
    seed: int = 0


class ActivationShards:
    """A whole shard folder, opened for reading; rows are paged in from disk as they are asked for.

    Parameters
    ----------
    folder
        Written by `capture_activations`.
    part
        Rows to train on, or those of the users held out.

    Raises
    ------
    TrainingError
        If the folder is not whole or a shard is damaged.
    """

    def __init__(self, folder: str | Path, part: Part = "train") -> None:
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            sizes, width = manifest["parts"][part], manifest["width"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{folder} holds no complete set of activations; capture them again"
            ) from error
        self.manifest: dict[str, Any] = manifest
        self.width: int = width
        self._shards = [
            _read_shard(_shard_path(self.folder, part, i), size, self.width)
            for i, size in enumerate(sizes)
        ]
        self._ends = np.cumsum(sizes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """The rows [R] as a tensor [R, H] of its own."""
        out = torch.empty(len(rows), self.width)
        owners = np.searchsorted(self._ends, rows, side="right")
        for owner in np.unique(owners):
            here = np.flatnonzero(owners == owner)
            first = self._ends[owner] - len(self._shards[owner])
            out[torch.from_numpy(here)] = self._shards[owner][torch.from_numpy(rows[here] - first)]
        return out

    def chunks(self, size: int = 2048) -> list[NDArray[np.int64]]:
        """Row numbers of all rows in order, in chunks."""
        return [np.arange(i, min(i + size, len(self))) for i in range(0, len(self), size)]


def capture_activations(
    rec: Recommender,
    train: Histories,
    folder: str | Path,
    *,
    site: Site | None = None,
    sampling: ActivationSampling | None = None,
    batch_size: int = 256,
) -> None:
    """Capture user vectors of sampled training prefixes into a shard folder.

    The model is frozen and in eval mode, and runs once over each prefix. Shards that are already
    there from an interrupted run of the same settings are kept.

    Parameters
    ----------
    rec
        The frozen recommender.
    train
        Training histories.
    folder
        Where the shards go.
    site
        What to capture; the recommender's own site by default.
    sampling
        Which prefixes.
    batch_size
        Prefixes in one forward pass.

    Raises
    ------
    TrainingError
        If the folder holds the shards of other settings, data or another model.
    StorageError
        If a shard cannot be written.
    """
    folder, sampling, site = Path(folder), sampling or ActivationSampling(), site or rec.site
    settings = shard_settings(rec, train, site, sampling)
    refuse_other_settings(folder, settings)
    if (folder / MANIFEST).is_file():
        return
    shards = planned_shards(train, sampling, rec.max_length)
    for shard in track(shards, "capture", unit="shard"):
        if (path := shard.path(folder)).is_file():
            continue
        vectors = collect_user_vectors(
            rec,
            shard.prefixes(train, rec.max_length),
            site,
            batch_size=batch_size,
            description=f"{shard.part} shard {shard.number + 1}",
        )
        begin(folder, settings)  # only now: a site that fails leaves nothing in the way
        write_shard(path, vectors)
    with safe_open(_shard_path(folder, "train", 0), framework="pt") as file:
        width = file.get_slice(TENSOR).get_shape()[1]
    parts: dict[str, list[int]] = {}
    for shard in shards:
        parts.setdefault(shard.part, []).append(len(shard.users))
    write_json(folder / MANIFEST, {"width": width, "parts": parts})


@dataclass(frozen=True, eq=False)
class PlannedShard:
    """Which prefixes a shard holds: user and number of items of each, [R]."""

    part: Part
    number: int
    users: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def path(self, folder: Path) -> Path:
        """Where it is, or is to be."""
        return _shard_path(folder, self.part, self.number)

    def prefixes(self, train: Histories, max_length: int) -> Histories:
        """Its prefixes, windowed."""
        return train.prefixes(self.users, self.lengths, max_length)


def planned_shards(
    train: Histories, sampling: ActivationSampling, max_length: int
) -> list[PlannedShard]:
    """All shards of a folder; prefixes are in order of length, so that a batch has little padding.

    Training shuffles all rows.
    """
    planned = []
    for part, users, lengths in _parts(train, sampling):
        order = np.argsort(np.minimum(lengths, max_length), kind="stable")
        for number, start in enumerate(range(0, len(order), sampling.shard_rows)):
            rows = order[start : start + sampling.shard_rows]
            planned.append(PlannedShard(part, number, users[rows], lengths[rows]))
    return planned


def shard_settings(
    rec: Recommender, train: Histories, site: Site, sampling: ActivationSampling
) -> dict[str, Any]:
    """All that the rows of a shard folder depend on, JSON-able."""
    return {
        "site": site.to_dict(),
        "sampling": vars(sampling) | {},
        "data": digest(train),
        "max_length": rec.max_length,
        "model": fingerprint(rec, site),
    }


def refuse_other_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise TrainingError if a shard folder was begun with other settings."""
    started = folder / _SETTINGS
    if started.is_file() and _read_settings(started) != settings:
        raise TrainingError(
            f"{folder} holds activations of other settings, data or another model; run with those "
            "that they were started with, or delete that folder"
        )


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Note what a shard folder is begun with."""
    if not (folder / _SETTINGS).is_file():
        write_json(folder / _SETTINGS, settings)


def write_shard(path: Path, vectors: Tensor) -> None:
    """Write the rows [R, H] of a shard, whole or not at all."""
    with atomic_file(path) as temporary:
        save_file({TENSOR: vectors}, temporary)


def _parts(
    train: Histories, sampling: ActivationSampling
) -> list[tuple[Part, NDArray[np.int64], NDArray[np.int64]]]:
    """For each part the user and the length of every sampled prefix."""
    rng = np.random.default_rng(sampling.seed)
    usable = np.flatnonzero(train.lengths > 1)
    held_out = np.zeros(len(train), dtype=bool)
    size = max(1, round(len(usable) * sampling.held_out_users))
    if len(usable) < 2:
        raise DataError("no training prefixes: fewer than two users have two training interactions")
    held_out[rng.choice(usable, size, replace=False)] = True
    drawn: list[tuple[Part, NDArray[np.int64], NDArray[np.int64]]] = []
    names: tuple[tuple[Part, bool, int], ...] = (
        ("train", False, sampling.rows),
        ("held_out", True, sampling.held_out_rows),
    )
    for part, apart, limit in names:
        members = np.flatnonzero(held_out == apart)
        chosen = train.select(members)
        available = int(np.maximum(chosen.lengths - 1, 0).sum())
        users, lengths = sample_prefixes(chosen, min(limit, available), rng)
        drawn.append((part, members[users], lengths))
    return drawn


def _read_settings(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # damaged: unequal to any


def _shard_path(folder: Path, part: str, number: int) -> Path:
    return folder / f"{part}-{number:05d}.safetensors"


def _read_shard(path: Path, rows: int, width: int) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(TENSOR)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"shard {path} cannot be read ({error}); delete its folder") from error
    if tensor.shape != (rows, width):
        raise TrainingError(
            f"shard {path} has shape {tuple(tensor.shape)}; expected {(rows, width)}; delete its "
            "folder and capture again"
        )
    return tensor
