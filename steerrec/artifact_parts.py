"""What the safetensors files of an artifact have in common: names, and JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from steerrec.errors import ArtifactError
from steerrec.tensor_files import TensorFile
from steerrec.untrusted import json_able, parse_object, plain_name

IN_HEADER = "__metadata__"
"""What safetensors calls the metadata, under which its unknown keys are kept."""


def without(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The entries whose keys are not known."""
    return {key: value for key, value in values.items() if key not in known}


def part_file(folder: Path, kind: str, name: str) -> Path:
    """The file of a table or a recipe of this name in a site's folder."""
    return folder / kind / f"{plain_name(name, 'the name')}.safetensors"


def part_files(folder: Path) -> list[Path]:
    """The safetensors files in a folder that may not be there."""
    try:
        files = sorted(folder.glob("*.safetensors"))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read: {error}") from error
    for file in files:
        plain_name(file.stem, f"{folder}: file")
    return files


def make_metadata(key: str, made: Mapping[str, Any], unknown: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file: one JSON, and what a newer steerrec had beside it."""
    whole = dict(made) | without(unknown, {IN_HEADER})
    text = json.dumps(json_able(whole), ensure_ascii=False)
    parse_object(text, f"the metadata of {key}")  # what could not be read is not written
    return {key: text} | dict(unknown.get(IN_HEADER, {}))


def read_metadata(opened: TensorFile, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON in a file's metadata, and the rest of the metadata, if any."""
    if key not in opened.metadata:
        raise ArtifactError(
            f"{opened.path} has no {key!r} in its metadata; it is no artifact's file"
        )
    made = parse_object(opened.metadata[key], f"the metadata of {opened.path}")
    rest = without(opened.metadata, {key})
    return made, {IN_HEADER: rest} if rest else {}
