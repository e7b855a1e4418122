"""Reading what strangers wrote: files that lie in their folder, and JSON that hides no trap.

What is in the files is checked by whoever asks for it; tensors are read by `tensor_files`.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from steerrec.errors import ArtifactError

MAX_JSON = 4 << 20
"""Bytes of JSON that are read at most: values in it may take ten times the memory."""

# a pipe would be waited for until somebody writes; what Windows calls text is not wanted
_AS_IT_IS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_VALUES = 100_000
_MAX_DEPTH = 50
_MAX_DIGITS = 18


def open_inside(file: Path, root: Path) -> BinaryIO:
    """Open a regular file that lies inside the folder `root`, links followed.

    Raises
    ------
    ArtifactError
        If it does not exist, cannot be read, is no regular file, or a link leads out of `root`.
    """
    try:
        real = file.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise ArtifactError(
                f"{file} is a link that leads out of {root}; expected the file itself there"
            )
        stream = os.fdopen(os.open(real, os.O_RDONLY | _AS_IT_IS), "rb")
    except FileNotFoundError as error:
        raise ArtifactError(f"{file} does not exist") from error
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links is a RuntimeError
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise ArtifactError(f"{file} cannot be read: it is no regular file")
    return stream


def read_json(file: Path, root: Path) -> dict[str, Any]:
    """The JSON object in a file inside `root`; see `parse_json` for what is refused.

    Raises
    ------
    ArtifactError
        If the file cannot be read, or holds anything else.
    """
    with open_inside(file, root) as stream:
        try:
            data = stream.read(MAX_JSON + 1)
        except OSError as error:
            raise ArtifactError(f"{file} cannot be read: {error}") from error
    return parse_object(data, file)


def parse_object(data: bytes | str, where: object) -> dict[str, Any]:
    """`parse_json` of what has to be a JSON object."""
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is not a JSON object")
    return value


def parse_json(data: bytes | str, where: object) -> Any:
    """The value of a JSON text.

    Refused are texts of over 4 MiB, over 100,000 values or 50 levels; keys that occur twice in one
    object; integers of over 18 digits; NaN, infinities and numbers that overflow to one; and
    strings that are not Unicode.

    Parameters
    ----------
    data
        The text, as UTF-8 if it is bytes.
    where
        What messages call it.

    Raises
    ------
    ArtifactError
        If it is refused, or is no JSON.
    """
    try:
        if len(data) > MAX_JSON:
            raise ValueError(f"it is longer than {MAX_JSON} bytes")
        text = data if isinstance(data, str) else data.decode("utf-8")
        if sum(map(text.count, ",[{")) > _MAX_VALUES:  # at least as many as there are values
            raise ValueError(f"it has more than {_MAX_VALUES} values")
        value = json.loads(
            text,
            object_pairs_hook=_without_repetition,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
        _check_strings_and_depth(value)
    except RecursionError as error:
        raise ArtifactError(f"{where} cannot be read: it is too deeply nested") from error
    except ValueError as error:
        raise ArtifactError(f"{where} cannot be read: {error}") from error
    return value


def plain_name(name: str, what: str) -> str:
    """The name, if it can be that of a file or folder everywhere and leads nowhere else.

    Raises
    ------
    ArtifactError
        If it is anything else.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"{what} {shown(name)} cannot be a file name; expected letters, digits, dots, dashes, "
            "underscores, 100 at most"
        )
    return name


def shown(value: object, limit: int = 80) -> str:
    """A value from a file as messages show it: escaped, and no longer than a line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def printable(text: str, limit: int = 200) -> str:
    """A text in which there is something from a file, such that it cannot garble a terminal."""
    return text[:limit].encode("unicode_escape").decode()


def json_able(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite as None, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): json_able(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_able(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is not None and not isinstance(value, str | int | float):
        raise ArtifactError(f"a {type(value).__name__} cannot be saved in JSON: {shown(value)}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {shown(key)} occurs twice in one object")
        values[key] = value
    return values


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS + 1:  # a sign
        raise ValueError(f"it holds an integer of {len(text)} characters")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("it holds a number that is not finite")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"it holds {text}, which is not JSON")


def _check_strings_and_depth(root: Any) -> None:
    pending = [(root, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("it is too deeply nested")
        if isinstance(value, str):
            value.encode()  # a lone surrogate could not be written again
        elif isinstance(value, dict):
            pending += [(inner, depth + 1) for inner in (*value, *value.values())]
        elif isinstance(value, list):
            pending += [(inner, depth + 1) for inner in value]
