"""Shards of activations captured on an engine: one block a shard, the same rows as in one process.

Each worker loads the model itself and reads the prefixes of a shard from a file beside it.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from steerrec.activations import (
    ActivationSampling,
    begin,
    capture_activations,
    collect_user_vectors,
    planned_shards,
    refuse_other_settings,
    shard_settings,
    write_shard,
)
from steerrec.data import Catalogue, Histories
from steerrec.data.history_files import Slice, read_slice, write_histories
from steerrec.engines import Engine, Spec
from steerrec.errors import ModelError
from steerrec.loading import holds_no_items, load_recommender
from steerrec.progress import track
from steerrec.recommender import Recommender, columns_read, fingerprint
from steerrec.sites import Site

_PREFIXES = "prefixes"


class CaptureWorker:
    """Captures shards; made by an engine.

    Parameters
    ----------
    spec
        `model`, `revision` and `device`, as `load_recommender` takes them; `items`, the catalogue's
        file; `site`; `fingerprint` of the model that the rows are to be of; `batch_size`.
    """

    def __init__(self, spec: Spec) -> None:
        options: dict[str, Any] = {"device": spec["device"]}
        if spec["revision"] is not None:
            options["revision"] = spec["revision"]
        elif holds_no_items(spec["model"]):
            options["items"] = Catalogue.read(spec["items"])
        self._rec = load_recommender(spec["model"], **options)
        self._site = Site.from_dict(spec["site"])
        self._batch_size = int(spec["batch_size"])
        if fingerprint(self._rec, self._site) != spec["fingerprint"]:
            raise ModelError(
                f"a worker has loaded another model as {spec['model']}; expected the same files on "
                "all machines"
            )

    def __call__(self, block: Spec) -> dict[str, Any]:
        """Capture a shard."""
        part = Slice(block["file"], 0, block["rows"])
        prefixes, _ = read_slice(part, self._rec.catalogue, columns=columns_read(self._rec))
        vectors = collect_user_vectors(
            self._rec, prefixes, self._site, batch_size=self._batch_size, description="shard"
        )
        write_shard(Path(block["shard"]), vectors)
        return {"shard": block["shard"]}


def capture_on_engine(
    rec: Recommender,
    train: Histories,
    folder: str | Path,
    engine: Engine,
    *,
    model: str,
    revision: str | None = None,
    site: Site | None = None,
    sampling: ActivationSampling | None = None,
    batch_size: int = 256,
    device: str = "cpu",
) -> None:
    """The same as `capture_activations`, by workers that load the model from `model` themselves.

    Parameters
    ----------
    rec, train, site, sampling, batch_size
        As there.
    folder
        Where the shards go; workers have to see it too.
    engine
        What runs the workers.
    model, revision
        The recommender as `load_recommender` takes it.
    device
        Where a worker computes.
    """
    folder, site = Path(folder).absolute(), site or rec.site
    sampling = sampling or ActivationSampling()
    settings = shard_settings(rec, train, site, sampling)
    refuse_other_settings(folder, settings)
    shards = planned_shards(train, sampling, rec.max_length)
    left = [shard for shard in shards if not shard.path(folder).is_file()]
    if left:
        prefixes = folder / _PREFIXES
        rec.catalogue.write(prefixes / "items.parquet")
        blocks: list[dict[str, Any]] = []
        for shard in left:
            path = shard.path(folder)
            file = prefixes / f"{path.stem}.parquet"
            write_histories(shard.prefixes(train, rec.max_length), rec.catalogue, file)
            blocks.append({"file": str(file), "rows": len(shard.users), "shard": str(path)})
        spec = {
            "model": model,
            "revision": revision,
            "items": str(prefixes / "items.parquet"),
            "device": device,
            "site": settings["site"],
            "fingerprint": settings["model"],
            "batch_size": batch_size,
        }
        begin(folder, settings)
        with track(blocks, "capture", unit="shard") as bar:
            for _ in engine.run(CaptureWorker, spec, blocks):
                bar.update()
        shutil.rmtree(prefixes)
    capture_activations(rec, train, folder, site=site, sampling=sampling)  # notes that all is there
