"""Writing files and folders whole: a crash leaves the old one or the new one, never a half."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from polars.exceptions import PolarsError
from safetensors import SafetensorError

from steerrec.errors import StorageError


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one StorageError that names the path."""
    try:
        yield
    except (OSError, SafetensorError, PolarsError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageError(
            f"cannot write {path}: {reason}; nothing half-written was left, free space or choose "
            "another place and run again"
        ) from error


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error."""
    path = Path(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    temporary = Path(name)
    try:
        with storage_errors(path):
            yield temporary
            _settle(temporary)
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    An existing folder at `path` is replaced whole; a file there is an error.
    """
    path = Path(path).resolve()  # of a link, the folder behind it is replaced
    with storage_errors(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    retired = temporary.with_name(temporary.name + ".old")
    try:
        with storage_errors(path):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _settle(file)
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                path.replace(retired)
            temporary.replace(path)
    except BaseException:
        if retired.exists() and not path.exists():
            retired.replace(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def _settle(path: Path) -> None:
    """Flush a file to disk and give it the usual permissions; temporary ones have narrower."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
