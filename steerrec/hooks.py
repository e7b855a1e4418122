"""Sites in a model, and the forward hooks that read (`capture`) or replace (`edit`) what is there.

Nothing here knows what an SAE or a recommender is. Every handle that this module makes is removed
on every exit, and nothing that the model handed over is ever written to.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

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
        if isinstance(source := known.get("positions_from"), Mapping):
            known["positions_from"] = TokenIds(**source)
        try:
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


class SiteHook:
    """The hooks of one site on one model: `function` is called with its rows at each firing.

    Parameters
    ----------
    model
        Any torch module.
    site
        Where.
    function
        Called with the rows [R, H] of the site's positions; returns None to leave them as they
        are, or their replacement [R, H] in the same dtype.

    Attributes
    ----------
    firings
        How often the site has fired.
    """

    def __init__(
        self, model: nn.Module, site: Site, function: Callable[[Tensor], Tensor | None]
    ) -> None:
        self.site = site
        self.firings = 0
        self._function = function
        self._seen = threading.local()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        module = get_module(model, site.path)
        source = site.positions_from
        try:
            if isinstance(source, TokenIds):
                tokens = get_module(model, source.path)
                self._handles.append(
                    tokens.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
                )
            if site.at == "output":
                self._handles.append(module.register_forward_hook(self._on_output))
            else:
                self._handles.append(
                    module.register_forward_pre_hook(self._on_input, with_kwargs=True)
                )
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks off the model; harmless when done twice."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def _see_tokens(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        self._seen.tokens = next((v for v in values if isinstance(v, Tensor)), None)

    def _on_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return self._visit(output, self.site.select)

    def _on_input(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        select = self.site.select or ((0,) if args else tuple(kwargs)[:1])
        if select and isinstance(select[0], str):
            new = self._visit(kwargs, select)
            return None if new is None else (args, new)
        new = self._visit(args, select)
        return None if new is None else (new, kwargs)

    def _visit(self, value: Any, select: SelectPath) -> Any:
        """Hand the site's rows to the function; the new value, or None where nothing changes."""
        self.firings += 1
        tensor = self._checked(_get(value, select, self.site))
        index = self._index(tensor)
        rows = tensor if index is None else tensor[index]
        new_rows = self._function(rows)
        if new_rows is None:
            return None
        if index is None:
            new = new_rows
        else:
            new = tensor.clone()
            new[index] = new_rows
        return _replaced(value, select, self._restored(new))

    def _checked(self, tensor: Any) -> Tensor:
        """The site's tensor with axes in the order [B, L, H] or [B, H]."""
        site = self.site
        if not isinstance(tensor, Tensor):
            raise SiteError(
                f"site {site.path!r} emits {_shape_of(tensor)}; expected a tensor: choose one with "
                "`select`"
            )
        if tensor.is_nested:
            raise SiteError(
                f"site {site.path!r} emits a NestedTensor; call "
                "torch.backends.mha.set_fastpath_enabled(False) first"
            )
        if tensor.ndim != len(site.layout):
            raise SiteError(
                f"site {site.path!r} emits shape {tuple(tensor.shape)}; expected {len(site.layout)} "
                f"axes for layout {site.layout}"
            )
        if site.layout == "LBH":
            return tensor.transpose(0, 1)
        if site.layout == "BHL":
            return tensor.transpose(1, 2)
        return tensor

    def _restored(self, tensor: Tensor) -> Tensor:
        if self.site.layout == "LBH":
            return tensor.transpose(0, 1)
        if self.site.layout == "BHL":
            return tensor.transpose(1, 2)
        return tensor

    def _index(self, tensor: Tensor) -> tuple[Tensor, Tensor] | tuple[Tensor] | None:
        """What picks the site's rows out of [B, L, H]; None for every row of [B, H]."""
        site = self.site
        if site.layout == "BH":
            return None
        batch, length = tensor.shape[:2]
        if site.positions == "all":
            return (torch.ones(batch, length, dtype=torch.bool, device=tensor.device),)
        users = torch.arange(batch, device=tensor.device)
        if site.positions_from == "last":
            return users, torch.full_like(users, length - 1)
        real = self._real(tensor)
        if site.positions == "real":
            return (real,)
        steps = torch.arange(length, device=tensor.device)
        return users, (real * steps).amax(dim=1)

    def _real(self, tensor: Tensor) -> Tensor:
        """Boolean [B, L]: which positions of the tensor are not padding."""
        source = self.site.positions_from
        assert isinstance(source, TokenIds)  # noqa: S101 (Site.__post_init__ saw to it)
        tokens: Tensor | None = getattr(self._seen, "tokens", None)
        if tokens is None:
            raise SiteError(
                f"site {self.site.path!r} fired before module {source.path!r} saw any token ids; "
                "expected positions_from to name a module that runs earlier in the same forward"
            )
        if tokens.shape != tensor.shape[:2]:
            raise SiteError(
                f"site {self.site.path!r} has positions {tuple(tensor.shape[:2])}, but the ids at "
                f"{source.path!r} have shape {tuple(tokens.shape)}; expected the same batch"
            )
        return tokens.to(tensor.device) != source.pad_id


def _get(value: Any, select: SelectPath, site: Site) -> Any:
    for key in select:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise SiteError(
                f"site {site.path!r}: nothing at select={select!r}; it emits {_shape_of(value)}"
            ) from error
    return value


def _replaced(value: Any, select: SelectPath, new: Tensor) -> Any:
    """`value` with the tensor at `select` exchanged, in new containers of the same types."""
    if not select:
        return new
    key, rest = select[0], select[1:]
    child = _replaced(value[key], rest, new)
    if isinstance(value, tuple):
        items = list(value)
        items[key] = child  # type: ignore[call-overload]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    shallow = copy.copy(value)
    shallow[key] = child
    return shallow


def _shape_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {', '.join(map(str, value))}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


class _StopForward(BaseException):
    """Ends a forward pass once every captured site has fired.

    A BaseException, so that no `except Exception` in the model's code can swallow it.
    """


@dataclass
class Captured:
    """What `capture` read: for each site the rows of all its firings, [sum of R, H]."""

    rows: dict[Site, list[Tensor]] = field(default_factory=dict)

    def __getitem__(self, site: Site) -> Tensor:
        return torch.cat(self.rows[site])


@contextmanager
def capture(model: nn.Module, *sites: Site, stop: bool = False) -> Iterator[Captured]:
    """Read one or more sites during the forward passes made inside the block.

    The rows are detached clones: some libraries write into a layer's output afterwards.

    Parameters
    ----------
    model
        Any torch module.
    sites
        The sites to read, all in the same forward.
    stop
        End the forward pass, and with it the block, as soon as every site has fired once.

    Raises
    ------
    SiteError
        If a site does not exist, emits no such tensor, or never fired.

    Examples
    --------
    >>> site = Site("0", layout="BH")
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with capture(model, site) as captured:
    ...     _ = model(torch.ones(4, 3))
    >>> captured[site].shape
    torch.Size([4, 2])
    """
    captured = Captured({site: [] for site in sites})
    with _hooked(model, captured, stop) as hooks:
        try:
            yield captured
        except _StopForward:
            pass
    for hook in hooks:
        require_fired(hook, model)


@contextmanager
def _hooked(model: nn.Module, captured: Captured, stop: bool) -> Iterator[list[SiteHook]]:
    hooks: list[SiteHook] = []

    def reader(rows: list[Tensor]) -> Callable[[Tensor], None]:
        def read(values: Tensor) -> None:
            rows.append(values.detach().clone())
            if stop and all(captured.rows.values()):
                raise _StopForward

        return read

    try:
        for site, rows in captured.rows.items():
            hooks.append(SiteHook(model, site, reader(rows)))
        yield hooks
    finally:
        for hook in hooks:
            hook.remove()


def require_fired(hook: SiteHook, model: nn.Module) -> None:
    """Raise SiteError if the hook's site never fired."""
    if hook.firings == 0:
        raise SiteError(
            f"site {hook.site.path!r} never fired while {type(model).__name__} scored: its forward "
            "is bypassed; `steerrec layers` lists the modules that fire"
        )


def edit(model: nn.Module, site: Site, function: Callable[[Tensor], Tensor | None]) -> SiteHook:
    """Replace what is at a site until the returned hook is removed; a context manager too.

    Parameters
    ----------
    model
        Any torch module.
    site
        Where.
    function
        Called with the rows [R, H]; returns their replacement, or None to leave them alone (the
        model's output is then the very same object). It must not write to its argument.
    """
    return SiteHook(model, site, function)
