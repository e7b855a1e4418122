"""Finding a recommender from what a user types: a folder, a Hub id, or a function of theirs."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerrec.data import Catalogue, Interactions
from steerrec.errors import ModelError
from steerrec.files import recover_folder
from steerrec.hub_names import is_repo_id
from steerrec.loaders import (
    Loader,
    from_function,
    published_adapters,
    published_loader,
    warn_of_namesakes,
)
from steerrec.recommender import Recommender
from steerrec.specs import HUB_OPTIONS, is_there, read_settings, settings_of, split_spec

if TYPE_CHECKING:
    from steerrec.pulling import Snapshot

_FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")
_FILE = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")
_BUILT_IN = {
    "sasrec": "steerrec.adapters.sasrec:load",
    "recbole": "steerrec.adapters.recbole_checkpoint:load",
    "pmixer": "steerrec.adapters.pmixer_checkpoint:load",
    "gsasrec": "steerrec.adapters.gsasrec_checkpoint:load",
}
_NUMBERED = {"pmixer", "gsasrec"}  # trained on data whose items are the numbers 1..N themselves
_MODEL_TYPES = {"steerrec_sasrec": "sasrec"}


def load_recommender(
    spec: str | Path | Snapshot,
    *,
    device: str = "cpu",
    items: Catalogue | None = None,
    **options: Any,
) -> Recommender:
    """Load a recommender.

    Parameters
    ----------
    spec
        A saved MODEL folder, the id of a Hub repository, ``adapter:path`` for another library's
        checkpoint, or ``pkg.module:function`` returning a `Recommender`. The function is imported
        and called: give only one that you trust. Settings of an adapter that a checkpoint does not
        tell go behind its path: ``pmixer:model.pth,norm_first=true``.
    device
        Where the model goes.
    items
        The items in the order of the model's own ids, for a checkpoint of another library, which
        does not hold them.
    **options
        Options of `steerrec.pull` for a Hub repository: revision, token, cache_dir,
        local_files_only, subfolder, endpoint; or an adapter's settings, such as `heads`.

    Raises
    ------
    ModelError
        If nothing of the kind can be found or loaded, or the adapter has no such setting.
    HubError
        If a Hub repository does not exist or cannot be had.
    """
    text = os.fspath(spec)
    path = Path(spec)
    recover_folder(path)
    if items is not None:
        if not holds_no_items(text):
            raise ModelError(f"{text} holds its own items; expected no others, nor an item map")
        options["items"] = items
    if is_there(path) and path.is_dir():
        if options.get("revision") is not None:
            raise ModelError(f"{text} is a folder here: it has no revision {options['revision']!r}")
        if extra := sorted(options.keys() - HUB_OPTIONS):
            raise ModelError(f"{text} holds its own settings; expected no {extra[0]}")
        return _adapter(_adapter_of_folder(path))(spec, device=device)
    name, _, rest = text.partition(":")
    if holds_no_items(text) and options.get("revision") is not None:
        raise ModelError(f"{text} is a checkpoint here: it has no revision {options['revision']!r}")
    if rest and name in _adapter_targets():
        if name in _BUILT_IN:
            warn_of_namesakes(name)
        return _open(name, rest, {"device": device, **options})
    if (match := _FILE.fullmatch(text)) and is_there(file := Path(match["file"])):
        raise ModelError(
            f"{text!r} names a file; expected a module as Python imports it, such as "
            f"{file.stem}:{match['function']}"
        )
    if match := _FUNCTION.fullmatch(text):
        if device != "cpu" or any(value is not None for value in options.values()):
            raise ModelError(
                f"{text} is a function: it chooses device and revision by itself; expected neither"
            )
        return from_function(match["module"], match["function"])
    if is_repo_id(text) and not is_there(path):
        from steerrec.pulling import local_folder

        return load_recommender(local_folder(text, **options), device=device)
    known = ", ".join(f"{adapter}:PATH" for adapter in sorted(_adapter_targets()))
    raise ModelError(
        f"{text!r} is not a model: expected a folder written by `steerrec train`, a Hub id such as "
        f"'org/name', pkg.module:function, or {known}"
    )


def _open(name: str, text: str, options: dict[str, Any]) -> Recommender:
    """What an adapter makes of a path with settings behind it."""
    load, path, settings = _parsed(name, text)
    if twice := sorted(settings.keys() & options.keys()):
        raise ModelError(f"{name}:{text} and the call both give {twice[0]}; expected it once")
    options = {key: value for key, value in options.items() if value is not None}
    try:
        inspect.signature(load).bind(path, **settings, **options)
    except TypeError as error:
        there = ", ".join(settings_of(load)) or "none"
        raise ModelError(f"{name} cannot be opened so ({error}); its settings: {there}") from None
    return load(path, **settings, **options)


def _parsed(name: str, text: str) -> tuple[Loader, str, dict[str, Any]]:
    load = _adapter(name)
    path, written = split_spec(text)
    return load, path, read_settings(name, load, written)


def check_settings(spec: str | Path) -> None:
    """Raise ModelError for settings behind an ``adapter:path`` that its adapter does not have.

    `load_recommender` does so too; this is for before the data are read.
    """
    name, _, rest = str(spec).partition(":")
    if rest and name in _adapter_targets():
        _parsed(name, rest)


def holds_no_items(spec: str | Path) -> bool:
    """Whether a model is given as ``adapter:path``, a checkpoint that knows numbers, not ids."""
    name, _, rest = str(spec).partition(":")
    return bool(rest) and name not in ("", "sasrec") and name in _adapter_targets()


def items_of(
    spec: str | Path, interactions: Interactions | None, item_map: Path | None = None
) -> Catalogue | None:
    """The items of a checkpoint that knows numbers, in the order of these; None if nothing tells.

    Parameters
    ----------
    spec
        The checkpoint, as ``adapter:path``.
    interactions
        What it was trained on: they number the items as its library does.
    item_map
        A table of its numbers and the ids, which goes before the order of the data.

    Raises
    ------
    DataError
        If the table or the data do not tell.
    """
    if item_map is not None:
        return Catalogue.from_item_map(item_map, interactions)
    if interactions is None:
        return None
    if str(spec).partition(":")[0] in _NUMBERED:
        return Catalogue.from_numbers(interactions)
    return Catalogue.from_interactions(interactions)


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
