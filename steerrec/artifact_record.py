"""The record of an artifact, `steerrec.json`: its format version, and whether it is complete."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steerrec.artifact_site import RECORD
from steerrec.errors import ArtifactError
from steerrec.untrusted import plain_name, read_json, shown

FORMAT_VERSION = "1.0"
"""Major and minor: a minor one adds only what an older steerrec may pass over."""

KNOWN = frozenset({"format_version", "base_model", "sites", "data", "about", "versions"})
"""Keys of the record; others, of a newer steerrec, are kept."""

_VERSION = re.compile(r"(\d{1,4})\.(\d{1,4})")
_PACKAGES = ("steerrec", "torch", "transformers", "safetensors", "numpy", "polars")


def read_record(folder: Path, root: Path) -> dict[str, Any]:
    """Read the record of the artifact in a folder, whose links may lead into `root`.

    What it says of each site is checked where the site is read.

    Raises
    ------
    ArtifactError
        If there is none, it is of another major version, or does not hold a base model with a
        fingerprint for each of its sites, all with plain names.
    """
    file = folder / RECORD
    if not file.is_file():
        raise ArtifactError(
            f"{file} does not exist; expected an artifact folder written by `steerrec attach`"
        )
    record = read_json(file, root)
    _check_version(folder, record)
    match record:
        case {"base_model": {"fingerprint": dict() as marks}, "sites": dict() as entries} if (
            entries and _is_reading(record.get("data", {})) and _is_about(record.get("about", {}))
        ):
            pass
        case _:
            raise ArtifactError(f"{file} is not complete: expected base model, sites and data")
    for name in entries:
        plain_name(name, f"{file}: site folder")
        if not _is_mark(marks.get(name)):
            raise ArtifactError(f"{file} is not complete: site folder {name!r} has no fingerprint")
    record["base_model"]["fingerprint"] = {name: marks[name] for name in entries}
    return record


def _is_mark(mark: object) -> bool:
    """Whether this can be a fingerprint."""
    return isinstance(mark, dict) and all(isinstance(v, str | int) for v in mark.values())


def _is_reading(data: object) -> bool:
    """Whether this can be how data were read; what a newer steerrec adds to it is let be."""
    if not isinstance(data, dict):
        return False
    texts = [data.get(key) for key in ("format", "user_col", "item_col", "time_col")]
    k_core, dedup = data.get("k_core", 0), data.get("dedup", False)
    return (
        all(isinstance(text, str | None) for text in texts)
        and type(k_core) is int
        and type(dedup) is bool
    )


def _is_about(about: object) -> bool:
    """Whether this can be what people said of the artifact."""
    if not isinstance(about, dict):
        return False
    names = about.get("datasets", [])
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return named and isinstance(about.get("license", ""), str)


def _check_version(folder: Path, record: Mapping[str, Any]) -> None:
    """Raise unless this steerrec reads the format: the same major version, any minor one."""
    if "format_version" not in record:
        raise ArtifactError(
            f"{folder} is not an artifact (its {RECORD} has no format version); expected a folder "
            "written by `steerrec attach`"
        )
    found, major = record["format_version"], FORMAT_VERSION.split(".")[0]
    if not isinstance(found, str) or not _VERSION.fullmatch(found) or found.split(".")[0] != major:
        raise ArtifactError(
            f"{folder} has format version {shown(found)}; this steerrec reads {major}.x: upgrade "
            "steerrec"
        )


def minor(format_version: str) -> int:
    """The minor version."""
    return int(format_version.split(".")[1])


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter: recorded, never compared."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
