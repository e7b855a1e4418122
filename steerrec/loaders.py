"""What stands behind a MODEL: adapters that packages publish, and functions of the user's.

Not here: which of them a given MODEL means (`steerrec.loading`).
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast

from torch import nn

from steerrec.errors import ModelError, ModelWarning
from steerrec.recommender import Recommender

GROUP = "steerrec.adapters"
Loader = Callable[..., Recommender]

_MEMBERS = (
    *("model", "catalogue", "site", "max_length", "item_head"),
    *("make_batch", "score", "describe"),
)


def published_adapters() -> dict[str, list[EntryPoint]]:
    """Entry points of other packages in the group `steerrec.adapters`, by name."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        if _package(point) == "steerrec":
            continue
        if point not in found.setdefault(point.name, []):  # the same of two packages is one
            found[point.name].append(point)
    return found


def warn_of_namesakes(name: str) -> None:
    """Say that what packages publish by the name of an adapter of steerrec's own is left out.

    What `recbole:PATH` opens must not depend on what else is installed.
    """
    for point in published_adapters().get(name, []):
        warnings.warn(
            f"the adapter {name!r} of {_package(point)} is left out: steerrec has one of that name",
            ModelWarning,
            stacklevel=3,
        )


def published_loader(name: str, points: list[EntryPoint]) -> Loader:
    """The function that an entry point names; what it returns is checked.

    Raises
    ------
    ModelError
        If it cannot be imported, or several packages publish the name.
    """
    if len(points) > 1:
        packages = " and ".join(sorted(_package(point) for point in points))
        raise ModelError(f"{packages} publish an adapter {name!r}; uninstall one of them")
    (point,) = points
    what = f"the adapter {name!r} of {_package(point)}"
    try:
        with _naming(what):
            load = point.load()
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{what} cannot be imported from {point.value!r}: {error}") from error
    if not callable(load):
        raise ModelError(
            f"{what} is a {type(load).__name__}; expected a function load(path, *, items, device) "
            "that returns a steerrec.Recommender"
        )

    @wraps(load)
    def checked(*args: Any, **options: Any) -> Recommender:
        with _naming(what):
            made = load(*args, **options)
        return _as_recommender(made, what)

    return checked


def from_function(module: str, function: str) -> Recommender:
    """What a function of the user's returns; its module may lie in the working directory.

    Raises
    ------
    ModelError
        If it cannot be imported, or returns no recommender. An error inside the function is the
        user's own, and is left as it is but for a note that names the function.
    """
    spec, here = f"{module}:{function}", str(Path.cwd())
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.append(here)  # last: it can add modules, not hide any
    try:
        with _naming(spec):
            make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        hint = ""
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            hint = "; it has to be installed, or in a folder on PYTHONPATH" + (
                "" if sys.flags.safe_path else f", or in {here}"
            )
        raise ModelError(f"{spec} cannot be imported: {error}{hint}") from error
    if not callable(make):
        raise ModelError(
            f"{spec} is a {type(make).__name__}; expected a function that returns a "
            "steerrec.Recommender"
        )
    with _naming(spec):
        made = make()
    return _as_recommender(made, spec)


def _package(point: EntryPoint) -> str:
    return "a package without a name" if point.dist is None else point.dist.name


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Whose code it was, as a note on whatever it raises."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {what}")
        raise


def _as_recommender(made: object, what: str) -> Recommender:
    if isinstance(made, type):
        raise ModelError(
            f"{what} returned the class {made.__name__}; expected an object of it, a "
            "steerrec.Recommender"
        )
    missing = [name for name in _MEMBERS if not _has(made, name)]
    if not missing:
        rec = cast(Recommender, made)
        try:
            json.dumps(dict(rec.describe()))
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"describe() of the {type(made).__name__} of {what} cannot be written as JSON "
                f"({error}); expected a dict of plain values"
            ) from error
        return rec
    if isinstance(made, nn.Module):
        raise ModelError(
            f"{what} returned a {type(made).__name__}, a bare torch module; expected a "
            "steerrec.Recommender, which steerrec.wrap makes of it"
        )
    lacks = f", which has no {', '.join(missing)}" if len(missing) < len(_MEMBERS) else ""
    raise ModelError(
        f"{what} returned a {type(made).__name__}{lacks}; expected a steerrec.Recommender"
    )


def _has(made: object, name: str) -> bool:
    """Whether there is such a member, without running a property."""
    try:
        inspect.getattr_static(made, name)
    except AttributeError:
        return hasattr(made, name)
    return True
