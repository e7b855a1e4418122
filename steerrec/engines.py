"""Engines: what runs a worker over many blocks of work, in this process or on a cluster.

A worker is made once per process from a small JSON-able spec, never from a live model, and called
with one block after the other; what a block yields it writes itself, whole or not at all. Which
process gets which block, and what happens when one dies, is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from steerrec import errors
from steerrec.errors import SteerrecError

Spec = Mapping[str, Any]
"""JSON-able."""


Worker = Callable[[Spec], dict[str, Any]]
"""Does a block of work, and says how it went, JSON-able."""

MakeWorker = Callable[[Spec], Worker]
"""Makes a worker from a spec: a class, or any function that another process can import."""


class Engine(Protocol):
    """Runs workers.

    Attributes
    ----------
    in_process
        Whether they are in this very process, so that what makes one may hold what is here.
    """

    in_process: ClassVar[bool]

    def run(
        self, worker: MakeWorker, spec: Spec, blocks: Sequence[Spec]
    ) -> Iterator[dict[str, Any]]:
        """Do all blocks, in any order, and yield what the workers say as soon as they do."""


@dataclass(frozen=True)
class LocalEngine:
    """One block after the other, in this process.

    Attributes
    ----------
    threads
        Of torch, while it runs; as they are if None.
    """

    threads: int | None = None
    in_process: ClassVar[bool] = True

    def run(
        self, worker: MakeWorker, spec: Spec, blocks: Sequence[Spec]
    ) -> Iterator[dict[str, Any]]:
        """See `Engine`."""
        with torch_threads(self.threads):
            here = worker(spec)
            for block in blocks:
                yield here(block)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """So many threads for torch inside the block; the last bit of a sum may depend on them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def told(error: SteerrecError) -> dict[str, Any]:
    """An error as a worker's process hands it on to the one that asked."""
    return {"error": {"kind": type(error).__name__, "message": str(error)}}


def unless_told(record: dict[str, Any]) -> dict[str, Any]:
    """The record, unless it is an error, which is raised."""
    if "error" not in record:
        return record
    kind = getattr(errors, str(record["error"]["kind"]), SteerrecError)
    raise kind(record["error"]["message"])


def peak_bytes() -> int | None:
    """The most memory that this process has held at once; None where nobody counts it."""
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
