"""Write a file whole or not at all, without what `steerrec.files` needs of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import polars as pl

from steerrec.errors import StorageError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` that takes its place when the block ends without an error.

    Raises
    ------
    StorageError
        If the file system refuses; what was at `path` before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).split("\n", 1)[0]
        raise StorageError(
            f"cannot write {path}: {reason}; free space or choose another place and run again"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
