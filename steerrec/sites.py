"""Sites: where in a model vectors can be read or replaced, named so that it survives as JSON."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from steerrec.errors import SiteError

Layout = Literal["BLH", "LBH", "BHL", "BH", "jagged"]
Positions = Literal["user", "real", "all"]
Call = Literal["only", "first", "last", "all"]
SelectPath = tuple[int | str, ...]

WRAPPERS = ("module", "_orig_mod")
"""Where DataParallel, DistributedDataParallel and torch.compile keep the model they wrap."""


@dataclass(frozen=True)
class TokenIds:
    """Where a site learns which positions are real: the ids that enter module `path`.

    Attributes
    ----------
    path
        Dotted path of a module that the token ids [B, L] enter in the same forward, usually the
        item embedding.
    pad_id
        The id of padding.
    select
        Which argument holds them: its position or keyword first, then as in `Site.select`. Needed
        only where several integer tensors enter.
    """

    path: str
    pad_id: int = 0
    select: SelectPath = ()

    def __post_init__(self) -> None:
        _check_path(self, self.path)
        object.__setattr__(self, "select", _as_select(self.select))


@dataclass(frozen=True)
class Lengths:
    """Where a site learns how long each history is: a tensor of lengths that enters module `path`.

    Histories begin at position 0: right-padded, or jagged.

    Attributes
    ----------
    path
        Dotted path of a module that is called before the site in the same forward; "" is the root.
    select
        Which argument: its position or keyword first, then as in `Site.select`. The first integer
        tensor if empty.
    offsets
        Whether the tensor holds B + 1 offsets (0, end of the first history, …) and not B lengths.
    method
        A method of the module, as in `Site.method`.
    """

    path: str
    select: SelectPath = ()
    offsets: bool = False
    method: str | None = None

    def __post_init__(self) -> None:
        _check_path(self, self.path)
        object.__setattr__(self, "select", _as_select(self.select))


@dataclass(frozen=True)
class RealMask:
    """Where a site learns which positions are real: a mask [B, L] that enters module `path`.

    For models whose ids do not tell, because an item shares its id with the padding.

    Attributes
    ----------
    path
        Dotted path of a module that is called before the site in the same forward; "" is the root.
    select
        Which argument: its position or keyword first, then as in `Site.select`.
    padding
        Whether the mask is true (not 0) at padding, as a key padding mask is, and not at what is
        real.
    method
        A method of the module, as in `Site.method`.
    """

    path: str
    select: SelectPath
    padding: bool = False
    method: str | None = None

    def __post_init__(self) -> None:
        _check_path(self, self.path)
        object.__setattr__(self, "select", _as_select(self.select))
        object.__setattr__(self, "padding", bool(self.padding))


PositionsFrom = TokenIds | Lengths | RealMask | Literal["last"]
_SOURCES = {"TokenIds": TokenIds, "Lengths": Lengths, "RealMask": RealMask}


@dataclass(frozen=True)
class Site:
    """A place in a model where vectors of width H can be read or replaced.

    Attributes
    ----------
    path
        Dotted path of a module, as in `model.named_modules()`; "" is the model itself,
        `layers.-1` counts from the end, and `layers.*.norm` is a pattern (as in `fnmatch`, where
        `*` matches dots too) that `capture` expands and `attach` wants to match one module.
    at
        Whether the module's `output` or its `input` is meant.
    select
        Keys, indices and attribute names that lead to the tensor inside a nested output: `(0,)`
        for the first of a tuple, `("hidden", -1)` for the last of a list in a dict. Empty for a
        plain tensor. For an input, the first one is a position among the arguments or a keyword.
    layout
        Axis order of the tensor: B batch, L length, H width. `jagged` is [sum of lengths, H], one
        history after another without padding, or torch's jagged NestedTensor.
    positions
        Which rows: the `user` position (the last real one of each history), every `real`
        position, or `all` of them, padding included.
    positions_from
        How the real positions are known: `TokenIds`, `RealMask`, `Lengths`, or `"last"` where
        every history ends at the last position (left padding; enough for `user` only). Required
        for `user` and `real` unless the layout is `BH`: a layer sees [B, L, H] but no lengths.
    call
        Which firing of one forward counts where a module runs more than once: `only` (the
        default: it runs once, and more is an error), `first`, `last`, `all`, or a number from 0.
    method
        A method of the module to watch in place of its forward, where no module emits the vector:
        `score_items`, say. `forward` also sees direct calls of `.forward()`, which module hooks
        do not.
    """

    path: str
    at: Literal["output", "input"] = "output"
    select: SelectPath = ()
    layout: Layout = "BLH"
    positions: Positions = "user"
    positions_from: PositionsFrom | None = None
    call: Call | int = "only"
    method: str | None = None

    def __post_init__(self) -> None:
        _check_path(self, self.path)
        object.__setattr__(self, "select", _as_select(self.select))
        _one_of("at", self.at, ("output", "input"))
        _one_of("layout", self.layout, get_args(Layout))
        _one_of("positions", self.positions, get_args(Positions))
        if not isinstance(self.call, int) or isinstance(self.call, bool) or self.call < 0:
            _one_of("call", self.call, (*get_args(Call), "a number from 0"))
        if self.method is not None and not str(self.method).isidentifier():
            raise SiteError(f"a site's method is the name of one; got {self.method!r}")
        source = self.positions_from
        if not (source in (None, "last") or isinstance(source, TokenIds | Lengths | RealMask)):
            raise SiteError(
                f"a site's positions_from is TokenIds(...), RealMask(...), Lengths(...), 'last' or "
                f"None; got {source!r}"
            )
        if self.layout == "BH" or self.positions == "all":
            return
        if self.positions_from is None and self.layout != "jagged":
            raise SiteError(
                f"site {self.name} works on {self.positions} positions but cannot know them: set "
                "positions_from=TokenIds('<item embedding>', pad_id=...), RealMask, Lengths, or "
                "'last' for left-padded models"
            )
        if self.positions_from == "last" and self.positions == "real":
            raise SiteError(
                f"site {self.name}: positions_from='last' finds only the user position; expected "
                "TokenIds(...) for positions='real'"
            )
        if self.positions_from == "last" and self.layout == "jagged":
            raise SiteError(
                f"site {self.name}: a jagged layout has no last position; expected Lengths(...) or "
                "TokenIds(...) for positions_from"
            )

    @property
    def name(self) -> str:
        """What messages call the site: its path, quoted, with the method if there is one."""
        name = f"{self.path}.{self.method}()" if self.method else self.path
        return repr(name.removeprefix("."))

    @property
    def is_pattern(self) -> bool:
        """Whether `path` may stand for several modules."""
        return re.search(r"[*?[]", self.path) is not None

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-able values; `Site.from_dict` gives an equal site back.

        What a later version added is left out where it is as by default, so that a site keeps the
        name of its folder.
        """
        values = {**asdict(self), "select": list(self.select)}
        source = self.positions_from
        if isinstance(source, TokenIds) and not source.select:
            values["positions_from"] = {"path": source.path, "pad_id": source.pad_id}
        elif isinstance(source, TokenIds | Lengths | RealMask):
            kind = {"kind": type(source).__name__}
            values["positions_from"] = kind | asdict(source) | {"select": list(source.select)}
        added = {"call": "only", "method": None}
        return {k: v for k, v in values.items() if k not in added or v != added[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Site:
        """Rebuild a site from `to_dict`."""
        try:
            known = {**values, "select": tuple(values.get("select", ()))}
            if isinstance(source := known.get("positions_from"), Mapping):
                fields = {k: tuple(v) if k == "select" else v for k, v in source.items()}
                kind = fields.pop("kind", "TokenIds")
                if kind not in _SOURCES:
                    raise SiteError(
                        f"not a site: positions_from is a {kind!r}; expected one of "
                        f"{', '.join(_SOURCES)}"
                    )
                known["positions_from"] = _SOURCES[kind](**fields)
            return cls(**known)
        except TypeError as error:
            raise SiteError(f"not a site: {error}") from error

    @property
    def folder(self) -> str:
        """A folder name of its own for this site: slug of the path and a hash of the rest."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.path)[:80].strip("-") or "site"
        text = json.dumps(self.to_dict(), sort_keys=True)
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _as_select(select: Any) -> SelectPath:
    """A path into nested values as a tuple."""
    if isinstance(select, list | tuple) and all(type(key) in (int, str) for key in select):
        return tuple(select)
    raise SiteError(
        f"select is a tuple of keys, names and indices, such as (0,) or ('hidden', -1); got "
        f"{select!r}"
    )


def _check_path(where: object, path: object) -> None:
    if not isinstance(path, str):
        raise SiteError(f"the path of a {type(where).__name__} is text; got {path!r}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SiteError(f"a site's {name} is one of {', '.join(allowed)}; got {value!r}")


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path; negative indices count from the end of a list.

    The wrappers of DataParallel, DistributedDataParallel and torch.compile are looked through,
    whether or not the path names them.

    Raises
    ------
    SiteError
        If there is none; the message lists the nearest names.
    """
    module = _unwrapped(model)
    for part in path.split(".") if path else ():
        if re.fullmatch(r"-\d+", part) and isinstance(module, nn.ModuleList | nn.Sequential):
            part = str(len(module) + int(part))
        child = module._modules.get(part)
        if child is None:
            if part in WRAPPERS:
                continue  # the path was noted on a wrapped model
            raise _unknown(model, path)
        module = _unwrapped(child)
    return module


def expand(model: nn.Module, site: Site) -> list[Site]:
    """The sites that a site with a pattern for a path stands for, in the order of the modules.

    A module whose name is the pattern to the letter comes before any matching.

    Raises
    ------
    SiteError
        If no module matches.
    """
    if not site.is_pattern:
        get_module(model, site.path)
        return [site]
    root = _unwrapped(model)
    names = [name for name, _ in root.named_modules() if name]
    pattern = _counted_from_the_end(model, site.path)
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if site.path in names:
        found = [site.path]
    while not found and pattern.startswith(tuple(f"{wrapper}." for wrapper in WRAPPERS)):
        pattern = pattern.partition(".")[2]  # it was noted on a wrapped model
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        raise _unknown(model, site.path)
    return [replace(site, path=name) for name in found]


def _counted_from_the_end(model: nn.Module, pattern: str) -> str:
    """The pattern with each `-1` that follows a plain path made a plain index."""
    parts = pattern.split(".")
    for i, part in enumerate(parts):
        before = ".".join(parts[:i])
        if re.fullmatch(r"-\d+", part) and not re.search(r"[*?[]", before):
            container = get_module(model, before)
            if not isinstance(container, nn.ModuleList | nn.Sequential):
                raise _unknown(model, pattern)
            parts[i] = str(len(container) + int(part))
    return ".".join(parts)


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module only runs another one, in parallel."""
    return isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)


def _unwrapped(module: nn.Module) -> nn.Module:
    while True:
        if is_wrapper(module):
            module = module.module  # type: ignore[assignment]
        elif "_orig_mod" in module._modules:
            inner = module._modules["_orig_mod"]
            assert inner is not None
            module = inner
        else:
            return module


def _unknown(model: nn.Module, path: str) -> SiteError:
    root = _unwrapped(model)
    names = [name for name, _ in root.named_modules() if name]
    near = difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:5]
    listed = f"; nearest: {', '.join(near)}" if near else ", which has no submodules"
    return SiteError(f"no module {path!r} in {type(root).__name__}{listed}")
