"""Forward hooks that read (`capture`) or replace (`edit`) what is at a site of a model.

Nothing here knows what an SAE or a recommender is. Every handle that this module makes is removed
on every exit, and nothing that the model handed over is ever written to.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from steerrec.errors import SiteError
from steerrec.sites import SelectPath, Site, TokenIds, get_module


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

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle of a hooked model leaves the hook behind: its own does nothing."""
        return {
            "site": self.site,
            "firings": 0,
            "_function": _leave_alone,
            "_seen": SimpleNamespace(),
            "_handles": [],
        }

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
        rows = tensor.flatten(0, -2) if index is None else tensor[index]
        new_rows = self._function(rows)
        if new_rows is None:
            return None
        if new_rows.shape != rows.shape or new_rows.dtype != rows.dtype:
            raise SiteError(
                f"site {self.site.path!r} gives {rows.dtype} {tuple(rows.shape)}; expected the "
                f"same of its replacement, got {new_rows.dtype} {tuple(new_rows.shape)}"
            )
        if index is None:
            new = new_rows.view_as(tensor)
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
                f"site {site.path!r} emits shape {tuple(tensor.shape)}; expected the "
                f"{len(site.layout)} axes of layout {site.layout}"
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
        """What picks the site's rows out of [B, L, H]; None for every row there is."""
        site = self.site
        if site.layout == "BH" or site.positions == "all":
            return None
        batch, length = tensor.shape[:2]
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
        assert isinstance(source, TokenIds)  # Site.__post_init__ saw to it
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


def _leave_alone(_: Tensor) -> None:
    return None


def _get(value: Any, select: SelectPath, site: Site) -> Any:
    for key in select:
        if isinstance(value, Tensor):
            raise SiteError(
                f"site {site.path!r}: select={select!r} goes on inside {_shape_of(value)}; "
                "expected it to end there"
            )
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
        items[key] = child  # type: ignore[index]
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, Mapping) and isinstance(key, int) and key not in value:
        key = list(value)[key]  # a ModelOutput can be read by position, but not written
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
        except _StopForward as stopped:
            if stopped.args[0] is not captured:  # an outer block's
                raise
    for hook in hooks:
        require_fired(hook, model)


@contextmanager
def _hooked(model: nn.Module, captured: Captured, stop: bool) -> Iterator[list[SiteHook]]:
    hooks: list[SiteHook] = []

    def reader(rows: list[Tensor]) -> Callable[[Tensor], None]:
        def read(values: Tensor) -> None:
            rows.append(values.detach().clone())
            if stop and all(captured.rows.values()):
                raise _StopForward(captured)

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


@dataclass(frozen=True)
class LayerReport:
    """How one module behaved while a model scored.

    Attributes
    ----------
    path, kind
        Dotted path and class of the module.
    firings
        How often its forward hook fired; 0 for a module whose forward is bypassed.
    output
        What it emitted last: shape and dtype of a tensor, kind and size of a container.
    """

    path: str
    kind: str
    firings: int
    output: str


def layer_report(model: nn.Module, run: Callable[[], object]) -> list[LayerReport]:
    """Which modules of a model fire, how often, and what they emit, while `run` is called.

    Parameters
    ----------
    model
        Any torch module.
    run
        Makes the model score something, once.
    """
    counts: dict[str, int] = {}
    outputs: dict[str, str] = {}
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def watcher(path: str) -> Callable[..., None]:
        def watch(_: nn.Module, __: object, output: object) -> None:
            counts[path] = counts.get(path, 0) + 1
            outputs[path] = _shape_of(output)

        return watch

    modules = [(path, module) for path, module in model.named_modules() if path]
    try:
        for path, module in modules:
            handles.append(module.register_forward_hook(watcher(path)))
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [
        LayerReport(path, type(module).__name__, counts.get(path, 0), outputs.get(path, "–"))
        for path, module in modules
    ]
