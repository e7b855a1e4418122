"""Many users on a local Ray cluster, a worker killed on the way, against one process.

    python tests/benchmarks/ray_at_scale.py --users 2000000 --folder FOLDER

makes users with histories drawn by popularity, a small SASRec and SAE with initialised weights
(what lists are worth does not matter here), recommends to all of them by `steerrec steer --engine
local` and `--engine ray`, kills a Ray worker with SIGKILL once a third of the blocks is done, and
prints one JSON document: whether all lists are the same, throughput per core, memory of a worker.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

WORKER = b"ray::MapWorker"


def make_users(folder: Path, users: int, items: int, length: int, size: int = 250_000) -> None:
    """Files of histories; what a user takes is drawn by a Zipf law."""
    rng = np.random.default_rng(0)
    popularity = 1 / np.arange(1, items + 1)
    cumulative = np.cumsum(popularity) / popularity.sum()
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, users, size)):
        count = min(size, users - start)
        drawn = np.searchsorted(cumulative, rng.random((count, length))).astype(np.int64) + 1
        lists = pl.Series("item_ids", drawn, dtype=pl.Array(pl.Int64, length)).arr.to_list()
        kept = rng.integers(3, length + 1, count)
        frame = pl.DataFrame(
            {"user_id": np.arange(start, start + count), "item_ids": lists, "kept": kept}
        )
        frame = frame.select("user_id", pl.col("item_ids").list.head(pl.col("kept")))
        frame.write_parquet(folder / f"users-{number:03d}.parquet")


def make_model(folder: Path, items: int, width: int, length: int) -> None:
    """MODEL and ARTIFACT folders, with the weights that they are initialised with."""
    import torch

    from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender, save
    from steerrec.artifacts import Artifact
    from steerrec.autoencoder import SparseAutoencoder
    from steerrec.data import Catalogue
    from steerrec.steering import Steering

    torch.manual_seed(0)
    config = SASRecConfig(
        num_items=items,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=2 * width,
        max_position_embeddings=length,
    )
    frame = pl.DataFrame(
        {
            "row": np.arange(items),
            "item_id": np.arange(1, items + 1),
            "title": [f"Item {n}" for n in range(1, items + 1)],
            "count": (1e6 / np.arange(1, items + 1)).astype(np.int64) + 1,
        }
    )
    rec = SASRecRecommender(SASRecModel(config).eval(), Catalogue(frame))
    save(rec, folder / "model")
    sae = SparseAutoencoder(width, 8 * width, 8, generator=torch.Generator().manual_seed(0))
    artifact = Artifact.create(rec, sae.requires_grad_(False))
    shift = torch.randn(8 * width, generator=torch.Generator().manual_seed(1))
    artifact.at().steerings["shift"] = Steering(shift, name="shift")
    artifact.save(folder / "artifact")


def workers_of(pid: int) -> list[int]:
    """Process ids of the Ray workers below a process."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rsplit(")")[-1].split()[1]
                )
                names[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue

    def is_below(child: int) -> bool:
        while child in parents:
            if child == pid:
                return True
            child = parents[child]
        return False

    return sorted(n for n, name in names.items() if name.startswith(WORKER) and is_below(n))


def steer(folder: Path, name: str, *options: str, kill_after: int | None = None) -> dict:
    """Recommend to all users; kill a worker once so many blocks are done."""
    out = folder / name
    command = [
        *(sys.executable, "-m", "steerrec.cli", "steer", str(folder / "artifact")),
        *("--model", str(folder / "model"), "--data", str(folder / "users"), "--recipe", "shift"),
        *("-o", str(out), "--json", *options),
    ]
    sys.stderr.write(" ".join(command) + "\n")
    started = time.perf_counter()
    # in that folder: Ray puts the current one on its workers' path, and a checkout is no package
    printed = folder / f"{name}.json"
    with (
        printed.open("w") as stdout,
        subprocess.Popen(command, stdout=stdout, cwd=folder) as process,
    ):
        killed = None
        while kill_after is not None and killed is None and process.poll() is None:
            time.sleep(0.2)
            if len(list((out / "_blocks").glob("[0-9]*"))) >= kill_after and (
                found := workers_of(process.pid)
            ):
                os.kill(found[0], signal.SIGKILL)
                killed = found[0]
                sys.stderr.write(f"killed worker {killed} of {found}\n")
        process.wait()
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}")
    found = json.loads((out / "steer.json").read_text())
    return {**found, "killed": killed, "wall": time.perf_counter() - started}


def same_lists(one: Path, other: Path) -> bool:
    """Whether all parts of two folders hold the same rows, scores to the last bit."""
    names = sorted(path.name for path in one.glob("part-*.parquet"))
    if not names or names != sorted(path.name for path in other.glob("part-*.parquet")):
        return False
    return all(pl.read_parquet(one / n).equals(pl.read_parquet(other / n)) for n in names)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=2_000_000)
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--length", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block-users", type=int, default=16_384)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    args.folder = args.folder.absolute()
    if not (args.folder / "artifact").exists():
        make_users(args.folder / "users", args.users, args.items, args.length)
        make_model(args.folder, args.items, args.width, args.length)
    size = ("--block-users", str(args.block_users))
    blocks = -(-args.users // args.block_users)
    ray = steer(
        *(args.folder, "ray", "--engine", "ray", "--workers", str(args.workers), *size),
        kill_after=max(1, blocks // 3),
    )
    local = steer(args.folder, "local", "--engine", "local", *size)
    per_core = {
        name: {
            "users_per_cpu_second": run["users"] / run["cpu_seconds"],
            "users_per_worker_second": run["users"] / run["worker_seconds"],
            "users_per_second": run["users"] / run["seconds"],
            "wall": run["wall"],
            "peak_mib_of_a_worker": run["peak_bytes"] / 2**20,
        }
        for name, run in (("ray", ray), ("local", local))
    }
    one, other = per_core["ray"], per_core["local"]
    found = {
        "users": ray["users"],
        "blocks": ray["blocks"],
        "killed": ray["killed"],
        "same_lists": same_lists(args.folder / "ray", args.folder / "local"),
        "same_metrics": ray["metrics"] == local["metrics"],
        **per_core,
        "per_core": {
            "by_cpu": one["users_per_cpu_second"] / other["users_per_cpu_second"],
            "by_clock": one["users_per_second"] / args.workers / other["users_per_second"],
        },
    }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
