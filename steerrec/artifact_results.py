"""What was measured for a site of an artifact: results as JSON, and a picture of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerrec.errors import ArtifactError
from steerrec.files import atomic_file
from steerrec.untrusted import json_able, open_inside, parse_object, plain_name, read_json

RESULTS = "results"
"""The folder of a site that they are in: ``NAME.json``, and ``NAME.png`` if there is a picture."""

MAX_PICTURE = 2 << 20
"""Bytes of a picture that are read at most."""

_PNG = b"\x89PNG\r\n\x1a\n"


def read_results(folder: Path, root: Path) -> tuple[dict[str, dict[str, Any]], dict[str, bytes]]:
    """Results and pictures by name, of a site's folder whose links may lead into `root`.

    A picture is passed on as it is, never decoded.

    Raises
    ------
    ArtifactError
        If one cannot be read, is too large, or is no JSON object or PNG file.
    """
    try:
        files = sorted((folder / RESULTS).glob("*.*"))
    except OSError as error:
        raise ArtifactError(f"{folder / RESULTS} cannot be read: {error}") from error
    results: dict[str, dict[str, Any]] = {}
    pictures: dict[str, bytes] = {}
    for file in files:
        if file.suffix == ".json":
            results[plain_name(file.stem, f"{folder / RESULTS}: file")] = read_json(file, root)
        elif file.suffix == ".png":
            pictures[plain_name(file.stem, f"{folder / RESULTS}: file")] = _picture(file, root)
    return results, pictures


def write_result(
    folder: Path, name: str, found: Mapping[str, Any], picture: bytes | None = None
) -> Path:
    """Write a result into a site's folder, and its picture; an older picture of it is removed."""
    plain_name(name, "the name")
    file = folder / RESULTS / f"{name}.json"
    text = json.dumps(json_able(found), indent=1, ensure_ascii=False) + "\n"
    parse_object(text, f"result {name!r}")  # what could not be read is not written
    drawn = file.with_suffix(".png")
    if picture is None:
        drawn.unlink(missing_ok=True)
    else:
        write_picture(folder, name, picture)
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


def write_picture(folder: Path, name: str, picture: bytes) -> None:
    """Write a picture into a site's folder."""
    if not picture.startswith(_PNG) or len(picture) > MAX_PICTURE:
        raise ArtifactError(
            f"the picture of {name!r} is no PNG file of {MAX_PICTURE >> 20} MiB at most"
        )
    with atomic_file(folder / RESULTS / f"{name}.png") as temporary:
        temporary.write_bytes(picture)


def _picture(file: Path, root: Path) -> bytes:
    with open_inside(file, root) as stream:
        data = stream.read(MAX_PICTURE + 1)
    if not data.startswith(_PNG) or len(data) > MAX_PICTURE:
        raise ArtifactError(
            f"{file} is no PNG file of {MAX_PICTURE >> 20} MiB at most; remove it, or draw it again"
        )
    return data
