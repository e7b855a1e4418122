"""``adapter:path,setting=value``: the settings behind a path that an adapter opens.

A comma, because a shell takes it as it is, where ``?`` and ``&`` would have to be quoted.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from steerrec.errors import ModelError

_SETTING = re.compile(r",([a-z]\w*)=([^,=/]*)")
HUB_OPTIONS = frozenset(
    {"revision", "token", "cache_dir", "local_files_only", "subfolder", "endpoint"}
)
_NOT_SETTINGS = HUB_OPTIONS | {"items", "device"}


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """The path, and the settings behind it as they were written.

    A text that names something on disk as a whole is a path without settings.

    Raises
    ------
    ModelError
        If a setting is given twice.

    Examples
    --------
    >>> split_spec("run/SASRec.lr=0.1.pth,heads=2,norm_first=true")
    ('run/SASRec.lr=0.1.pth', {'heads': '2', 'norm_first': 'true'})
    """
    start = len(text)
    while not is_there(text[:start]) and (comma := text.rfind(",", 0, start)) >= 0:
        if not _SETTING.fullmatch(text, comma, start):
            break
        start = comma
    settings: dict[str, str] = {}
    for name, value in _SETTING.findall(text, start):
        if name in settings:
            raise ModelError(f"{text} gives {name} twice; expected each setting once")
        settings[name] = value
    return text[:start], settings


def is_there(path: str | Path) -> bool:
    """Whether a path names something; one that no file could have names nothing."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def join_spec(adapter: str, path: str | Path, **settings: Any) -> str:
    """The text that opens it so again, without the settings that are None.

    Examples
    --------
    >>> join_spec("pmixer", "model.pth", heads=None, norm_first=True)
    'pmixer:model.pth,norm_first=true'
    """
    given = [
        f",{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in settings.items()
        if value is not None
    ]
    return f"{adapter}:{path}{''.join(given)}"


def read_settings(
    adapter: str, load: Callable[..., Any], written: Mapping[str, str]
) -> dict[str, Any]:
    """Settings as the arguments of an adapter's ``load``, in the types that it annotates.

    Raises
    ------
    ModelError
        If there is no such setting, or its value is of no type that it takes.
    """
    hints = settings_of(load)
    values = {}
    for name, text in written.items():
        if name not in hints:
            there = ", ".join(hints) or "none"
            raise ModelError(f"{adapter} has no setting {name!r}; expected {there}")
        values[name] = _value(f"{adapter}: {name}", text, hints[name])
    return values


def settings_of(load: Callable[..., Any]) -> dict[str, Any]:
    """The names of an adapter's own settings, and what each is annotated as."""
    try:
        signature = inspect.signature(load, eval_str=True)
    except NameError:  # annotated with what only a type checker imports
        signature = inspect.signature(load)
    parameters = list(signature.parameters.values())[1:]
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {
        p.name: p.annotation for p in parameters if p.kind in named and p.name not in _NOT_SETTINGS
    }


def _value(what: str, text: str, hint: Any) -> Any:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    expected: list[str] = []
    for kind in kinds:
        if kind is bool:
            expected += ["true", "false"]
            if text in ("true", "false"):
                return text == "true"
        elif kind is int:
            expected.append("a whole number")
            if re.fullmatch(r"-?\d{1,18}", text):
                return int(text)
        elif kind is float:
            expected.append("a number")
            if re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", text):
                return float(text)
        elif get_origin(kind) is Literal:
            expected += map(str, get_args(kind))
            if text in get_args(kind):
                return text
        elif kind is not NoneType:
            return text
    raise ModelError(f"{what} is {text!r}; expected {' or '.join(expected)}")
