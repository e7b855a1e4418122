"""Writing files and folders whole: a crash leaves the old one or the new one, never a half."""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import shutil
import stat
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
    temporary = _beside(path)
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # made here, so that the kernel gives it the permissions that any new file has
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            _settle(temporary, mode)
            temporary.replace(path)
            _flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    An existing folder at `path` is replaced whole; a file there is an error. Should the machine
    stop between the two renames that this takes, `recover_folder` puts the old one back.
    """
    path = Path(path).resolve()  # of a link, the folder behind it is replaced
    recover_folder(path)
    temporary = _beside(path)
    retired = temporary.with_name(temporary.name + _RETIRED)
    try:
        with storage_errors(path):
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            temporary.mkdir(parents=True)
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            for entry in temporary.rglob("*"):
                if entry.is_symlink():
                    continue  # it may lead to what is not ours
                if entry.is_file():
                    _settle(entry, mode & 0o666)
                elif entry.is_dir():
                    _flush(entry)  # the names in it
            _flush(temporary)
            if path.exists():
                path.replace(retired)
            temporary.replace(path)
            _flush(path.parent)
    except BaseException:
        if retired.exists() and not path.exists():
            retired.replace(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def recover_folder(path: str | Path) -> None:
    """Put back the folder that an `atomic_folder`, cut off in the middle, had moved aside."""
    try:
        path = Path(path).resolve()
        there = path.exists()
    except (OSError, ValueError):  # no folder can have such a name
        return
    if not there:
        for retired in path.parent.glob(f".{glob.escape(path.name)}.*{_RETIRED}"):
            retired.replace(path)
            return


_RETIRED = ".old"


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _settle(path: Path, mode: int) -> None:
    """Flush a file to disk and give it the usual permissions; some libraries give narrower."""
    _flush(path)
    path.chmod(mode)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
