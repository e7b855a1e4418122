"""Steered lists for any number of users: block by block, on any engine, gone on with after a stop.

A block is a slice of a file of histories. Its lists go to `part-00000.parquet` of the output
folder, and what is to be known of them (digest, users, how often each item is listed) to
`_blocks/00000.safetensors`, written last: a block with that file is done. A digest is one of all
that the lists depend on, so that no block is taken over from a run with other settings.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from steerrec.activations import collect_user_vectors
from steerrec.artifacts import load_artifact
from steerrec.attachment import attach
from steerrec.data import Catalogue, DataWarning, Histories
from steerrec.data.history_files import Slice, read_slice, slices
from steerrec.engines import Engine, LocalEngine, Spec, peak_bytes
from steerrec.errors import ArtifactError, DataError, StorageError
from steerrec.evaluation import Evaluation, steered
from steerrec.expressions import named_recipe
from steerrec.files import atomic_file, write_json
from steerrec.item_dtypes import ItemDtype, compact
from steerrec.loading import holds_no_items, load_recommender
from steerrec.metrics import RankingMetrics
from steerrec.progress import track
from steerrec.ranking import TopK, top_k
from steerrec.recipes import Recipe
from steerrec.recommendations import recommendation_frame
from steerrec.recommender import Recommender, columns_read, fingerprint
from steerrec.steering import SteerTransform

BLOCK_USERS = 16_384
"""Users in a block by default: what an interruption can cost, and what a worker holds at once."""

RECORD = "steer.json"
"""Written last: a folder with it is complete."""

_BLOCKS = "_blocks"
_VERSION = 1  # of what lists are made how; another one takes over no blocks


@dataclass(frozen=True)
class ScoringSpec:
    """All that a worker needs to make steered lists; strings and numbers only.

    Attributes
    ----------
    artifact, revision, site
        The artifact, its revision if it is on the Hub, and which site of it.
    model
        The recommender as `load_recommender` takes it; None for the one on the Hub that the
        artifact records.
    items
        Catalogue file, for a checkpoint that holds no ids and an artifact that does neither.
    strict
        Whether another model than the one that the artifact was made for is an error.
    recipe
        Recipe of the artifact, or an expression of several (`steerrec.expressions`); None for the
        PopSteer rule with `contrast`, `neurons`, `splice` and `popsteer_compat`.
    alpha
        Strength; the recipe's own if None.
    k, mask_seen
        See `steerrec.evaluation.measure`.
    item_dtype
        See `steerrec.item_dtypes`.
    batch_size
        Histories in a forward pass.
    device
        Where a worker computes.
    """

    artifact: str
    revision: str | None = None
    site: str | None = None
    model: str | None = None
    items: str | None = None
    strict: bool = True
    recipe: str | None = None
    contrast: str = "popularity"
    neurons: int | None = None
    splice: Any = None
    popsteer_compat: bool = False
    alpha: float | None = None
    k: int = 10
    mask_seen: bool = False
    item_dtype: ItemDtype = "float32"
    batch_size: int = 256
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Spec) -> Self:
        """Inverse of `to_dict`."""
        return cls(**values)


class Scorer:
    """Makes steered lists; loaded from a spec once, then asked for one slice after the other.

    Parameters
    ----------
    spec
        What to load, and how to steer.
    rec
        The recommender of the spec, if it is loaded already.

    Attributes
    ----------
    digest
        Of all that lists depend on, users apart: weights, SAE, recipe, settings.
    """

    def __init__(self, spec: ScoringSpec, rec: Recommender | None = None) -> None:
        self.spec = spec
        hub: dict[str, Any] = {} if spec.revision is None else {"revision": spec.revision}
        artifact = load_artifact(spec.artifact, **hub)
        here = artifact.at(spec.site)
        if rec is None:
            rec = self._load(artifact.items)
        if spec.model is None:
            rec = rec or artifact.load_base_model(device=spec.device, strict=spec.strict)
        assert rec is not None
        artifact.check(rec, strict=spec.strict)
        self.rec: Recommender = rec
        self.site, self.sae = here.site, here.sae.to(spec.device)
        self.steering: Recipe = named_recipe(
            here,
            spec.recipe,
            spec.contrast,
            neurons=spec.neurons,
            splice=spec.splice,
            popsteer_compat=spec.popsteer_compat,
        )
        if spec.alpha is not None:
            self.steering = self.steering.with_alpha(spec.alpha)
        self.transform = SteerTransform(self.sae, self.steering)
        self.head = compact(rec.item_head, spec.item_dtype)
        if not 1 <= spec.k <= len(self.head):
            raise DataError(
                f"k is {spec.k} but the catalogue has {len(self.head)} items; choose k between 1 "
                f"and {len(self.head)}"
            )
        self.digest = self._digest()

    def _load(self, recorded: Catalogue | None) -> Recommender | None:
        spec = self.spec
        if spec.model is None:
            return None
        items = None
        if holds_no_items(spec.model):
            items = recorded if spec.items is None else Catalogue.read(spec.items)
        return load_recommender(spec.model, device=spec.device, items=items)

    def _digest(self) -> str:
        spec = self.spec
        settings = [spec.k, spec.mask_seen, spec.item_dtype, spec.batch_size]
        mark = fingerprint(self.rec, self.site)
        about = [_VERSION, settings, mark, self.site.to_dict(), self.steering.alpha]
        sha = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
        sha.update(type(self.steering).__name__.encode())
        tensors = [*self.transform.state_dict().values(), *self.transform.buffers()]
        for tensor in tensors:
            sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def lists(self, histories: Histories) -> TopK:
        """Steered lists of histories of catalogue rows."""
        spec = self.spec
        if self.site == self.rec.site:
            vectors = steered(self._vectors(histories), self.transform)
        else:
            with attach(self.rec, self.sae, site=self.site, steering=self.steering):
                vectors = self._vectors(histories)
        seen = histories if spec.mask_seen else None
        return top_k(vectors, self.head, spec.k, seen=seen)

    def _vectors(self, histories: Histories) -> Tensor:
        return collect_user_vectors(
            self.rec, histories, batch_size=self.spec.batch_size, description="block"
        )


class ScoringWorker:
    """Scores blocks; made by an engine, in a process of its own where the engine has several.

    Parameters
    ----------
    spec
        `scoring`, a `ScoringSpec`; `folder`, where the parts go; `digest`, that of the one who
        asked: a worker that has loaded something else says so.
    """

    def __init__(self, spec: Spec, scorer: Scorer | None = None) -> None:
        self._folder = Path(spec["folder"])
        self._scorer = scorer or Scorer(ScoringSpec.from_dict(spec["scoring"]))
        if self._scorer.digest != spec["digest"]:
            raise ArtifactError(
                "a worker has loaded another model, artifact or recipe under the same names; "
                "expected the same files on all machines"
            )

    def __call__(self, block: Spec) -> dict[str, Any]:
        """Score a block, write its part, and say how that went."""
        started, busy = time.perf_counter(), time.process_time()
        rec, number = self._scorer.rec, int(block["number"])
        part = Slice(block["file"], block["start"], block["stop"])
        histories, dropped = read_slice(part, rec.catalogue, columns=columns_read(rec))
        empty = torch.empty(0, self._scorer.spec.k)
        lists = TopK(empty.long(), empty)
        if len(histories):
            lists = self._scorer.lists(histories)
        ids = lists.ids.cpu()
        frame = recommendation_frame(
            rec.catalogue, histories.user_ids, TopK(ids, lists.scores.cpu())
        )
        with atomic_file(_part(self._folder, number)) as temporary:
            frame.write_parquet(temporary)
        rows, counts = ids[ids >= 0].unique(return_counts=True)
        record = {
            "number": number,
            "digest": block["digest"],
            "users": len(histories),
            "dropped": dropped,
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - busy, 3),
            "peak_bytes": peak_bytes(),
        }
        with atomic_file(_sidecar(self._folder, number)) as temporary:
            about = {"block": json.dumps(record)}
            save_file({"rows": rows, "counts": counts}, temporary, metadata=about)
        return record


@dataclass(frozen=True)
class BatchResult:
    """How a run over blocks went.

    Attributes
    ----------
    evaluation
        Exposure metrics of all lists, and the protocol.
    users
        For whom there are lists.
    blocks, kept
        How many blocks there are, and how many of them were done before this run.
    seconds
        Of this run, from the first block on.
    worker_seconds, cpu_seconds
        Spent in blocks of this run by all workers together: of the clock, and of their CPUs, which
        says the same on a machine that has other things to do.
    peak_bytes
        The most memory that a worker has held, blocks of earlier runs included; None where nobody
        counts it.
    """

    evaluation: Evaluation
    users: int
    blocks: int
    kept: int
    seconds: float
    worker_seconds: float
    cpu_seconds: float
    peak_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        about = {
            key: value
            for key, value in vars(self).items()
            if key != "evaluation" and value is not None
        }
        return {**about, **self.evaluation.to_dict()}


def score_blocks(
    spec: ScoringSpec,
    files: Sequence[Path],
    folder: str | Path,
    *,
    engine: Engine | None = None,
    block_users: int = BLOCK_USERS,
    rec: Recommender | None = None,
) -> BatchResult:
    """Steered lists of all histories in files, one part of the output folder a block.

    The same call goes on where an earlier one stopped. The lists are the same on every engine, for
    the same blocks and the same number of threads.

    Parameters
    ----------
    spec
        What to load, and how to steer.
    files
        Histories in Parquet (`steerrec.data.history_files`).
    folder
        Where the parts go, and `steer.json` at the end.
    engine
        This process by default.
    block_users
        Users in a block.
    rec
        The recommender of the spec, if it is loaded already.

    Raises
    ------
    StorageError
        If the folder holds the blocks of other settings or data.
    DataError
        If no user has a known item, or what `read_slice` and `top_k` raise.
    EngineError
        If the engine gave up.

    Warns
    -----
    DataWarning
        With the number of interactions dropped.
    """
    folder = Path(folder).absolute()
    engine = engine or LocalEngine()
    scorer = Scorer(spec, rec)  # here too: it refuses what cannot work before any worker starts
    blocks = _blocks(files, block_users, scorer.digest)
    done = {n: r for n in range(len(blocks)) if (r := _record(folder, n)) is not None}
    if any(n >= len(blocks) or r["digest"] != blocks[n]["digest"] for n, r in done.items()) or (
        _sidecar(folder, len(blocks)).is_file()
    ):
        raise StorageError(
            f"{folder} holds recommendations of other settings, data or another model; choose "
            "another folder, or replace them with --force"
        )
    for stray in (*folder.glob(".part-*"), *(folder / _BLOCKS).glob(".*")):
        stray.unlink()  # of a worker that was killed while it wrote
    kept = len(done)
    left = [block for block in blocks if block["number"] not in done]
    work = {"scoring": spec.to_dict(), "folder": str(folder), "digest": scorer.digest}
    started = time.perf_counter()
    here = (lambda given: ScoringWorker(given, scorer)) if engine.in_process else ScoringWorker
    with track(left, "blocks", unit="block") as bar:
        for record in engine.run(here, work, left):
            done[record["number"]] = record
            bar.update()
    seconds = time.perf_counter() - started
    result = _summed(scorer, folder, done, kept, seconds, {b["number"] for b in left})
    write_json(
        folder / RECORD, {**result.to_dict(), "settings": spec.to_dict(), "digest": scorer.digest}
    )
    return result


def is_complete(folder: str | Path) -> bool:
    """Whether a folder holds a run that came to its end."""
    return (Path(folder) / RECORD).is_file()


def has_blocks(folder: str | Path) -> bool:
    """Whether a folder holds blocks, of a run that came to its end or not."""
    return (Path(folder) / _BLOCKS).is_dir()


def _summed(
    scorer: Scorer,
    folder: Path,
    done: dict[int, dict[str, Any]],
    kept: int,
    seconds: float,
    new: set[int],
) -> BatchResult:
    """The counts of all blocks as one evaluation."""
    spec, catalogue = scorer.spec, scorer.rec.catalogue
    counts, labels = catalogue.counts.copy(), catalogue.groups.labels.copy()
    metrics = RankingMetrics(torch.from_numpy(counts), torch.from_numpy(labels), spec.k)
    for number in sorted(done):
        metrics.add_exposure(*_counts(folder, number))
    users = sum(record["users"] for record in done.values())
    if not users:
        raise DataError("no interactions are left to recommend from; expected known items")
    if dropped := sum(record["dropped"] for record in done.values()):
        warnings.warn(
            f"dropped: {dropped:,} interactions have an item id that the catalogue does not know",
            DataWarning,
            stacklevel=3,
        )
    protocol: dict[str, Any] = {
        "split": "none",
        "mask_seen": spec.mask_seen,
        "k": spec.k,
        "users": users,
        "items": len(catalogue),
    }
    if spec.item_dtype != "float32":
        protocol["item_dtype"] = spec.item_dtype
    fresh = [done[number] for number in sorted(new)]
    peaks = [record["peak_bytes"] for record in done.values() if record["peak_bytes"]]
    return BatchResult(
        evaluation=Evaluation(protocol, metrics.compute(), torch.empty(0)),
        users=users,
        blocks=len(done),
        kept=kept,
        seconds=round(seconds, 3),
        worker_seconds=round(sum(record["seconds"] for record in fresh), 3),
        cpu_seconds=round(sum(record["cpu_seconds"] for record in fresh), 3),
        peak_bytes=max(peaks, default=None),
    )


# --- blocks and their files


def _blocks(files: Iterable[Path], users: int, digest: str) -> list[dict[str, Any]]:
    """All blocks, each with a digest of its data and of what its lists are made with."""
    blocks: list[dict[str, Any]] = []
    for file in files:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        for part in slices([file.absolute()], users):
            key = f"{digest}:{content}:{part.start}:{part.stop}"
            sha = hashlib.sha256(key.encode()).hexdigest()
            blocks.append({"number": len(blocks), **vars(part), "digest": sha})
    if not blocks:
        raise DataError("no histories to recommend from; expected Parquet files with rows")
    return blocks


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def _sidecar(folder: Path, number: int) -> Path:
    return folder / _BLOCKS / f"{number:05d}.safetensors"


def _record(folder: Path, number: int) -> dict[str, Any] | None:
    """What is known of a block, if it is done."""
    path = _sidecar(folder, number)
    if not path.is_file() or not _part(folder, number).is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads(file.metadata()["block"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None  # damaged: the block is done again
    return record


def _counts(folder: Path, number: int) -> tuple[Tensor, Tensor]:
    with safe_open(_sidecar(folder, number), framework="pt") as file:
        return file.get_tensor("rows"), file.get_tensor("counts")
