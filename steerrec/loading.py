"""Finding a recommender from what a user types: a folder, a Hub id, or a function of theirs."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.files import recover_folder
from steerrec.hub_names import is_repo_id
from steerrec.recommender import Recommender

if TYPE_CHECKING:
    from steerrec.pulling import Snapshot

_FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")
_BUILT_IN = {
    "sasrec": "steerrec.adapters.sasrec:load",
    "recbole": "steerrec.adapters.recbole_checkpoint:load",
}
_MODEL_TYPES = {"steerrec_sasrec": "sasrec"}


def load_recommender(
    spec: str | Path | Snapshot,
    *,
    device: str = "cpu",
    items: Catalogue | None = None,
    **hub: Any,
) -> Recommender:
    """Load a recommender.

    Parameters
    ----------
    spec
        A saved MODEL folder, the id of a Hub repository, ``adapter:path`` for another library's
        checkpoint, or ``pkg.module:function`` returning a `Recommender`. The function is imported
        and called: give only one that you trust.
    device
        Where the model goes.
    items
        The items in the order of the model's own ids, for a checkpoint of another library, which
        does not hold them.
    **hub
        Options of `steerrec.pull` for a Hub repository: revision, token, cache_dir,
        local_files_only, subfolder, endpoint.

    Raises
    ------
    ModelError
        If nothing of the kind can be found or loaded.
    HubError
        If a Hub repository does not exist or cannot be had.
    """
    text = os.fspath(spec)
    path = Path(spec)
    recover_folder(path)
    if items is not None:
        if not holds_no_items(text):
            raise ModelError(f"{text} holds its own items; expected no others, nor an item map")
        hub["items"] = items
    if path.is_dir():
        if hub.get("revision") is not None:
            raise ModelError(f"{text} is a folder here: it has no revision {hub['revision']!r}")
        return _adapter(_adapter_of_folder(path))(spec, device=device)
    name, _, rest = text.partition(":")
    if holds_no_items(text) and hub.get("revision") is not None:
        raise ModelError(f"{text} is a checkpoint here: it has no revision {hub['revision']!r}")
    if rest and name in _adapter_targets():
        return _adapter(name)(rest, device=device, **hub)
    if match := _FUNCTION.fullmatch(text):
        if device != "cpu" or any(value is not None for value in hub.values()):
            raise ModelError(
                f"{text} is a function: it chooses device and revision by itself; expected neither"
            )
        return _from_function(match["module"], match["function"])
    if is_repo_id(text) and not path.exists():
        from steerrec.pulling import local_folder

        return load_recommender(local_folder(text, **hub), device=device)
    known = ", ".join(f"{adapter}:PATH" for adapter in sorted(_adapter_targets()))
    raise ModelError(
        f"{text!r} is not a model: expected a folder written by `steerrec train`, a Hub id such as "
        f"'org/name', pkg.module:function, or {known}"
    )


def holds_no_items(spec: str | Path) -> bool:
    """Whether a model is given as ``adapter:path``, a checkpoint that knows numbers, not ids."""
    name, _, rest = str(spec).partition(":")
    return bool(rest) and name not in ("", "sasrec") and name in _adapter_targets()


def model_record(spec: str | Path) -> dict[str, Any]:
    """What a MODEL folder records of its data and training; empty for any other kind of model."""
    file = Path(spec) / "steerrec.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise ModelError(f"{file} is not a JSON object; expected the record of a training run")
    return record


def _adapter_targets() -> dict[str, str]:
    installed = {point.name: point.value for point in entry_points(group="steerrec.adapters")}
    return {**_BUILT_IN, **installed}


def _adapter(name: str) -> Callable[..., Recommender]:
    module, _, attribute = _adapter_targets()[name].partition(":")
    loader: Callable[..., Recommender] = getattr(importlib.import_module(module), attribute)
    return loader


def _adapter_of_folder(path: Path) -> str:
    file = path / "config.json"
    try:
        model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not a saved model: it has no config.json with a model_type; expected a "
            "folder written by `steerrec train`"
        ) from error
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise ModelError(
            f"{path} holds a {model_type!r} model; steerrec can open {', '.join(_MODEL_TYPES)}; "
            "wrap any other in a function and give pkg.module:function"
        )
    return _MODEL_TYPES[model_type]


def _from_function(module: str, function: str) -> Recommender:
    here = str(Path.cwd())
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.append(here)  # last: it can add modules, not hide any
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{module}:{function} cannot be imported: {error}") from error
    if not callable(make):
        raise ModelError(
            f"{module}:{function} is a {type(make).__name__}; expected a function that returns a "
            "steerrec.Recommender"
        )
    rec = make()
    if not isinstance(rec, Recommender):
        raise ModelError(
            f"{module}:{function} returned a {type(rec).__name__}; expected a steerrec.Recommender"
        )
    return rec
