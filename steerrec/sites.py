"""Sites: where in a model vectors can be read or replaced, named so that it survives as JSON."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from torch import nn

from steerrec.errors import SiteError

Layout = Literal["BLH", "LBH", "BHL", "BH"]
Positions = Literal["user", "real", "all"]
SelectPath = tuple[int | str, ...]


@dataclass(frozen=True)
class TokenIds:
    """Where a site learns which positions are real: the ids that enter module `path`.

    Attributes
    ----------
    path
        Dotted path of a module whose first input is the token ids [B, L] of the same forward,
        usually the item embedding.
    pad_id
        The id of padding.
    """

    path: str
    pad_id: int = 0


@dataclass(frozen=True)
class Site:
    """A place in a model where vectors of width H can be read or replaced.

    Attributes
    ----------
    path
        Dotted path of a module, as in `model.named_modules()`; `layers.-1` counts from the end.
    at
        Whether the module's `output` or its `input` is meant.
    select
        Keys and indices that lead to the tensor inside a nested output: `(0,)` for the first of a
        tuple, `("hidden", -1)` for the last of a list in a dict. Empty for a plain tensor. For an
        input, the first one is a position among the arguments or a keyword.
    layout
        Axis order of the tensor: B batch, L length, H width.
    positions
        Which rows: the `user` position (the last real one of each history), every `real`
        position, or `all` of them, padding included.
    positions_from
        How the real positions are known: `TokenIds`, or `"last"` where every history ends at the
        last position (left padding; enough for `user` only). Required for `user` and `real`
        unless the layout is `BH`: a layer sees [B, L, H] but no lengths.
    """

    path: str
    at: Literal["output", "input"] = "output"
    select: SelectPath = ()
    layout: Layout = "BLH"
    positions: Positions = "user"
    positions_from: TokenIds | Literal["last"] | None = None

    def __post_init__(self) -> None:
        _one_of("at", self.at, ("output", "input"))
        _one_of("layout", self.layout, get_args(Layout))
        _one_of("positions", self.positions, get_args(Positions))
        if self.layout == "BH" or self.positions == "all":
            return
        if self.positions_from is None:
            raise SiteError(
                f"site {self.path!r} works on {self.positions} positions but cannot know them: set "
                "positions_from=TokenIds('<item embedding>', pad_id=...), or 'last' for "
                "left-padded models"
            )
        if self.positions_from == "last" and self.positions == "real":
            raise SiteError(
                f"site {self.path!r}: positions_from='last' finds only the user position; expected "
                "TokenIds(...) for positions='real'"
            )

    def to_dict(self) -> dict[str, Any]:
        """The site as JSON-able values; `Site.from_dict` gives an equal site back."""
        return {**asdict(self), "select": list(self.select)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Site:
        """Rebuild a site from `to_dict`."""
        known = {**values, "select": tuple(values.get("select", ()))}
        try:
            if isinstance(source := known.get("positions_from"), Mapping):
                known["positions_from"] = TokenIds(**source)
            return cls(**known)
        except TypeError as error:
            raise SiteError(f"not a site: {error}") from error

    @property
    def folder(self) -> str:
        """A folder name of its own for this site: slug of the path and a hash of the rest."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", self.path).strip("-") or "site"
        text = json.dumps(self.to_dict(), sort_keys=True)
        return f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SiteError(f"a site's {name} is one of {', '.join(allowed)}; got {value!r}")


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path; negative indices count from the end of a list.

    Raises
    ------
    SiteError
        If there is none; the message lists the nearest names.
    """
    module: nn.Module = model
    for part in path.split("."):
        if re.fullmatch(r"-\d+", part) and isinstance(module, nn.ModuleList | nn.Sequential):
            part = str(len(module) + int(part))
        child = module._modules.get(part)
        if child is None:
            names = [name for name, _ in model.named_modules() if name]
            near = difflib.get_close_matches(path, names, n=5, cutoff=0.3) or names[:5]
            raise SiteError(
                f"no module {path!r} in {type(model).__name__}; nearest: {', '.join(near)}"
            )
        module = child
    return module
