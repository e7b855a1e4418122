"""The engine that runs workers on Ray Data: a cluster that is there, or one on this machine.

Ray places the workers, hands out blocks, and starts a worker and its block anew when its process
or machine dies. All machines need this package, and must see the same files under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, ClassVar

from steerrec.engines import MakeWorker, Spec, told, unless_told
from steerrec.errors import EngineError, SteerrecError

_OBJECTS = 256 << 20  # bytes of Ray's object store on this machine: only records pass through it
_TRIES = 5  # a block that takes its worker down so often is not tried again


@dataclass(frozen=True)
class RayEngine:
    """Workers on Ray Data.

    Attributes
    ----------
    address
        Of a cluster, as `ray.init` takes it (`auto`, `ray://host:10001`); None starts one on this
        machine, and ends it afterwards.
    workers
        How many; as many as the cluster has CPUs for by default.
    threads
        Threads of torch, and CPUs, of a worker.
    gpus
        GPUs of a worker.
    """

    address: str | None = None
    workers: int | None = None
    threads: int = 1
    gpus: float = 0
    in_process: ClassVar[bool] = False

    def run(
        self, worker: MakeWorker, spec: Spec, blocks: Sequence[Spec]
    ) -> Iterator[dict[str, Any]]:
        """See `Engine`.

        Raises
        ------
        EngineError
            If Ray is not installed, there is no such cluster, it has no CPU for a worker, or a
            block took its worker down again and again.
        """
        if not blocks:
            return
        ray = _imported()
        with redirect_stdout(sys.stderr), self._cluster(ray):  # what Ray prints of dead workers
            cpus = int(ray.cluster_resources().get("CPU", 0))
            workers = min(self.workers or max(1, cpus // self.threads), len(blocks))
            if cpus < self.threads:
                raise EngineError(
                    f"the Ray cluster has {cpus} CPUs; a worker of {self.threads} threads needs "
                    f"{self.threads}: use fewer threads"
                )
            texts = [{"block": json.dumps(dict(block))} for block in blocks]
            data = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
                _Actor,
                batch_size=1,
                batch_format="numpy",
                num_cpus=self.threads,
                num_gpus=self.gpus,
                compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
                fn_constructor_args=(worker, dict(spec), self.threads),
                max_restarts=-1,
                max_task_retries=_TRIES,
            )
            try:
                for row in data.iter_rows():
                    yield unless_told(json.loads(row["record"]))
            except ray.exceptions.RayError as error:
                reason = str(error).strip().split("\n")[-1]
                raise EngineError(
                    f"Ray gave up: {reason}; the blocks that are done are kept, run the same "
                    "command again"
                ) from error

    @contextmanager
    def _cluster(self, ray: Any) -> Iterator[None]:
        """A connection to the cluster, which is closed if it was opened here."""
        if ray.is_initialized():
            yield
            return
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self.address is None:
            workers = self.workers or max(1, (os.cpu_count() or 1) // self.threads)
            options |= {"num_cpus": workers * self.threads, "include_dashboard": False}
            options |= {"object_store_memory": _OBJECTS, "address": "local"}
        else:
            options["address"] = self.address
        try:
            ray.init(**options)
        except Exception as error:  # Ray raises bare ones too
            reason = str(error).strip().split("\n")[0]
            where = "on this machine" if self.address is None else f"at {self.address}"
            raise EngineError(f"no Ray cluster {where}: {reason}") from error
        try:
            yield
        finally:
            ray.shutdown()


class _Actor:
    """A worker as Ray Data calls it: with a batch of blocks, each a JSON text."""

    def __init__(self, worker: MakeWorker, spec: Spec, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._failed: dict[str, Any] | None = None
        try:
            self._worker = worker(spec)
        except SteerrecError as error:
            self._failed = told(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"record": [json.dumps(self._done(json.loads(text))) for text in batch["block"]]}

    def _done(self, block: Spec) -> dict[str, Any]:
        if self._failed is not None:
            return self._failed
        try:
            return self._worker(block)
        except SteerrecError as error:  # said here, since Ray would wrap it, or try again
            return told(error)


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "300")  # 30 are few on a busy machine
    # A cluster on this machine has no GPU of its own unless it is asked for.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(
            f"Ray cannot be imported ({error}); install it: pip install 'steerrec[ray]'"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # steerrec has its own
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as exceptions too
    return ray
