"""What of a MODEL or ARTIFACT folder belongs on the Hub, without what is only of this machine.

Both directions go by it: nothing else is pushed, and nothing else is pulled or kept. Not here: how
files get there (`steerrec.pushing`, `steerrec.pulling`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from steerrec.errors import HubError
from steerrec.files import write_json

Kind = Literal["MODEL", "ARTIFACT"]

RECORD = "steerrec.json"
CARD = "README.md"
ORIGIN = "hub"  # in the record of a MODEL folder: where on the Hub the same files are

# As the client filters names; a star stands for slashes too, so `belongs` looks again.
PATTERNS = (
    RECORD,
    CARD,
    "catalogue.parquet",
    "*/cfg.json",
    "*/sae_weights.safetensors",
    "*/attribution/*.safetensors",
    "*/steering/*.safetensors",
    "*/results/*.json",
    "*/results/*.png",
    "config.json",
    "model.safetensors",
    "items.parquet",
)
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_FILES: dict[Kind, re.Pattern[str]] = {
    "ARTIFACT": re.compile(
        rf"steerrec\.json|README\.md|catalogue\.parquet|{_NAME}/(?:cfg\.json|sae_weights\.safetensors"
        rf"|(?:attribution|steering)/{_NAME}\.safetensors|results/{_NAME}\.(?:json|png))"
    ),
    "MODEL": re.compile(
        r"steerrec\.json|README\.md|config\.json|model\.safetensors|items\.parquet"
    ),
}


def belongs(path: str, kind: Kind) -> bool:
    """Whether a file of this name, with ``/`` between folders, is part of such a folder."""
    return _FILES[kind].fullmatch(path) is not None


def is_part(path: str) -> bool:
    """Whether a file of this name is part of a folder of either kind."""
    return any(pattern.fullmatch(path) for pattern in _FILES.values())


def kind_of(folder: Path) -> Kind:
    """What a folder is.

    Raises
    ------
    HubError
        If it is neither a MODEL nor an ARTIFACT.
    """
    if (folder / "config.json").is_file() and (folder / "items.parquet").is_file():
        return "MODEL"
    record = _json(folder / RECORD)
    if isinstance(record, dict) and "format_version" in record:
        return "ARTIFACT"
    raise HubError(
        f"{folder} is neither a MODEL nor an ARTIFACT; expected a folder written by "
        "`steerrec train` or `steerrec attach`"
    )


def files_of(folder: Path, kind: Kind) -> dict[str, Path]:
    """The files that are part of a MODEL or ARTIFACT folder, by name with ``/`` between folders.

    Raises
    ------
    HubError
        If one of them is a link to somewhere else than the folder, or than the Hub's cache that it
        is in; or a folder inside is a link.
    """
    roots = [root.resolve() for root in (folder, cache_of(folder)) if root is not None]
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        real = path.resolve()
        inside = any(real.is_relative_to(root) for root in roots)
        if path.is_symlink() and (real.is_dir() or (belongs(name, kind) and not inside)):
            raise HubError(f"{path} is a link out of its folder; expected a file")
        if real.is_file() and belongs(name, kind):
            found[name] = path
    return found


def cache_of(folder: Path) -> Path | None:
    """The cache of the Hub's client that a folder is in: there files are links to blobs."""
    found = (
        parent
        for parent in folder.absolute().parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    )
    snapshots = next(found, None)
    return None if snapshots is None else snapshots.parents[1]


def contents(
    folder: Path, kind: Kind, *, base_model: dict[str, Any] | None = None, card: str | None = None
) -> dict[str, Path | bytes]:
    """What to publish of a folder: files as they are, and text files without local paths.

    An absolute path of this machine, which says who works where and opens nothing elsewhere, is
    cut down to its last part in the JSON files, and in the card where it is one of those.

    Parameters
    ----------
    folder
        A MODEL or ARTIFACT folder.
    kind
        Which of the two.
    base_model
        Fields of the record's base model to set.
    card
        Text of the card, in place of the folder's own.
    """
    cut: dict[str, str] = {}
    found: dict[str, Path | bytes] = dict(files_of(folder, kind))
    for name in [name for name in found if name.endswith(".json")]:
        value = _json(folder / name)
        shown = _without_paths(value, cut)
        if name == RECORD and isinstance(shown, dict):
            shown.pop(ORIGIN, None)
            if base_model:
                shown["base_model"] = {**shown["base_model"], **base_model}
        if shown != value:
            found[name] = (json.dumps(shown, indent=2, ensure_ascii=False) + "\n").encode()
    if card is None and CARD in found:
        card = (folder / CARD).read_text(encoding="utf-8")
    if card is not None:
        for path in sorted(cut, key=len, reverse=True):
            card = card.replace(path, cut[path])
        found[CARD] = card.encode()
    return found


def base_model_of(files: Mapping[str, Path | bytes]) -> dict[str, str] | None:
    """Repository and commit of the base model that the record among these files names, if any."""
    record = json.loads(dict(texts(files)).get(RECORD, "{}"))
    found = record.get("base_model", {})
    return {key: found[key] for key in ("repo_id", "revision")} if "repo_id" in found else None


def remember(folder: Path, repo_id: str, revision: str) -> None:
    """Write into the record of a MODEL folder where on the Hub the same files are."""
    file = folder / RECORD
    record = _json(file)
    if not isinstance(record, dict | None):
        raise HubError(f"{file} is not a JSON object; expected the record of a training run")
    write_json(file, {**(record or {}), ORIGIN: {"repo_id": repo_id, "revision": revision}})


def without_path(text: str) -> str:
    """A text that is an absolute path, or ``adapter:path`` with one, with its last part only."""
    prefix, colon, rest = text.partition(":")
    if colon and len(prefix) > 1 and not text.startswith("/") and not rest.startswith("//"):
        return f"{prefix}:{without_path(rest)}"
    if PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name
    if text.startswith(("/", "~")):
        return PurePosixPath(text).name
    return text


def _without_paths(value: Any, cut: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(entry, cut) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry, cut) for entry in value]
    if isinstance(value, str) and without_path(value) != value:
        cut[value] = without_path(value)
        return cut[value]
    return value


def texts(files: Mapping[str, Path | bytes]) -> Iterator[tuple[str, str]]:
    """Name and text of the files that are no tensors or tables."""
    for name, content in files.items():
        if name.endswith((".json", ".md")):
            raw = content if isinstance(content, bytes) else content.read_bytes()
            yield name, raw.decode(errors="replace")


def size_of(content: Path | bytes) -> int:
    """Size of a file to publish, in bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise HubError(f"{file} cannot be read: {error}") from error
