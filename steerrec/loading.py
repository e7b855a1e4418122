"""Finding a recommender from what a user types: a folder, a Hub id, or a function of theirs."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from steerrec.data import Catalogue
from steerrec.errors import ModelError
from steerrec.files import recover_folder
from steerrec.loaders import (
    Loader,
    from_function,
    published_adapters,
    published_loader,
    warn_of_namesakes,
)
from steerrec.recommender import Recommender

_FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BUILT_IN = {
    "sasrec": "steerrec.adapters.sasrec:load",
    "recbole": "steerrec.adapters.recbole_checkpoint:load",
}
_MODEL_TYPES = {"steerrec_sasrec": "sasrec"}


def load_recommender(
    spec: str | Path, *, device: str = "cpu", items: Catalogue | None = None, **hub: Any
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
        `revision`, `token`, `cache_dir`, `local_files_only`, for a Hub repository.

    Raises
    ------
    ModelError
        If nothing of the kind can be found or loaded.
    """
    text = str(spec)
    path = Path(spec)
    recover_folder(path)
    if items is not None:
        if not holds_no_items(text):
            raise ModelError(f"{text} holds its own items; expected no others, nor an item map")
        hub["items"] = items
    if path.is_dir():
        return _adapter(_adapter_of_folder(path))(path, device=device)
    name, _, rest = text.partition(":")
    if rest and name in _adapter_targets():
        if name in _BUILT_IN:
            warn_of_namesakes(name)
        return _adapter(name)(rest, device=device, **hub)
    if (match := _FILE.fullmatch(text)) and (file := Path(match["file"])).is_file():
        raise ModelError(
            f"{text!r} names a file; expected a module as Python imports it, such as "
            f"{file.stem}:{match['function']}"
        )
    if match := _FUNCTION.fullmatch(text):
        if device != "cpu" or any(value is not None for value in hub.values()):
            raise ModelError(
                f"{text} is a function: it chooses device and revision by itself; expected neither"
            )
        return from_function(match["module"], match["function"])
    if _HUB_ID.fullmatch(text) and not path.exists():
        return _adapter("sasrec")(text, device=device, **hub)
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


def _adapter_targets() -> Collection[str]:
    return {*_BUILT_IN, *published_adapters()}


def _adapter(name: str) -> Loader:
    if name not in _BUILT_IN:
        return published_loader(name, published_adapters()[name])
    module, _, attribute = _BUILT_IN[name].partition(":")
    loader: Loader = getattr(importlib.import_module(module), attribute)
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
