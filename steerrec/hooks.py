"""Forward hooks that read (`capture`) or replace (`edit`) what is at a site of a model.

Nothing here knows what an SAE or a recommender is. Every handle that this module makes is removed
on every exit, and nothing that the model handed over is ever written to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from steerrec.diagnosis import (
    fires_too_often,
    refuse_compiled,
    refuse_last,
    require_finite,
    why_silent,
)
from steerrec.errors import SiteError
from steerrec.handles import FastPathOff, hook_method, needs_fast_path_off
from steerrec.nested import describe, get_in, replace_in, tensors_in
from steerrec.positions import Firing, find_rows, oriented, put_rows
from steerrec.sites import Lengths, RealMask, SelectPath, Site, TokenIds, expand, get_module


class _Forward:
    """Where the present forward is."""

    inside = False  # whether a call of the root is under way
    calls = 0  # firings so far
    seen: tuple[Tensor, ...] = ()  # token ids, masks or lengths, the latest last


class _ForwardOfThread(_Forward, threading.local):
    """The same for each thread."""


class _Handle(Protocol):
    def remove(self) -> None: ...


class SiteHook:
    """The hooks of one site on one model: `function` is called at each firing that counts.

    Parameters
    ----------
    model
        Any torch module.
    site
        Where.
    function
        Called with a `Firing`; returns None to leave the rows as they are, or their replacement
        [R, H] in the same dtype.
    mha_fast_path
        False takes torch's fast path for multi-head attention off until `remove`, True leaves it
        alone; by default it is taken off where the site needs that (inside a
        `nn.TransformerEncoderLayer`). The switch is global to the process.
    last_call
        For a site with ``call="last"``: the number of its last firing in one forward.

    Attributes
    ----------
    firings
        How often the site has fired.
    used
        How many of those firings counted.
    traced
        Whether torch.compile has taken the hook into a graph, where firings are not counted.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        function: Callable[[Firing], Tensor | None],
        *,
        mha_fast_path: bool | None = None,
        last_call: int | None = None,
    ) -> None:
        matches = expand(model, site)
        if len(matches) > 1:
            names = ", ".join(match.path for match in matches[:5])
            raise SiteError(
                f"pattern {site.path!r} matches {len(matches)} modules, such as {names}; expected "
                "one: attach to each of them by its name"
            )
        self._model = model
        self.site = site = matches[0]
        self.firings = self.used = 0
        self.traced = False
        self.last_call = last_call
        self.shape: tuple[int, ...] | None = None
        self.fast_path_off = False
        self._looked = False
        self._function: Callable[[Firing], Tensor | None] | None = function
        self._forward = _ForwardOfThread()
        self._traced_forward = _Forward()
        self._handles: list[_Handle] = []
        try:
            self._hook(model, get_module(model, site.path), mha_fast_path)
        except BaseException:
            self.remove()
            raise

    def _hook(self, model: nn.Module, module: nn.Module, mha_fast_path: bool | None) -> None:
        site, root, source = self.site, get_module(model, ""), self.site.positions_from
        watched = [site.path]
        if isinstance(source, TokenIds | Lengths | RealMask):
            watched.append(source.path)
        for path in watched:
            refuse_compiled(model, path)
        if mha_fast_path is None:
            mha_fast_path = not needs_fast_path_off(root, module)
        if not mha_fast_path:
            self.fast_path_off = True
            self._handles.append(FastPathOff(self))
        keep = self._handles.append
        keep(root.register_forward_pre_hook(self._begin))
        if isinstance(source, TokenIds | Lengths | RealMask):
            teller = get_module(model, source.path)
            if not isinstance(source, TokenIds) and source.method is not None:
                keep(hook_method(teller, source.method, before=self._see))
            else:
                keep(teller.register_forward_pre_hook(self._see, with_kwargs=True))
        at_input = site.at == "input"
        if site.method is not None:
            before, after = (self._on_input, None) if at_input else (None, self._on_output)
            keep(hook_method(module, site.method, before=before, after=after))
        elif at_input:
            keep(module.register_forward_pre_hook(self._on_input, with_kwargs=True))
        else:
            keep(module.register_forward_hook(self._on_output))
        keep(root.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Take the hooks off the model; harmless when done twice."""
        while self._handles:
            self._handles.pop().remove()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle of a hooked model leaves the hook behind: its own does nothing."""
        return {"site": self.site}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, firings=0, used=0, traced=False, shape=None, _handles=[])
        self._function = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    @property
    def model_ran(self) -> bool:
        """Whether a forward of the model was seen, at its root or at `positions_from`."""
        return self._ran or self.firings > 0

    _ran = False

    # --- one forward and the next

    def _now(self) -> _Forward:
        """The present forward; torch.compile traces one of its own."""
        return self._traced_forward if torch.compiler.is_compiling() else self._forward

    def _begin(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        if self._function is None:
            return
        self._ran = True
        now = self._now()
        now.inside, now.calls, now.seen = True, 0, ()

    def _end(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        if self._function is None:
            return
        now = self._now()
        now.inside, now.seen = False, ()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._function is None:
            return
        seen = self._positions(args, kwargs)
        if seen is None:
            return
        self._ran = True
        now = self._now()
        if now.inside:
            now.seen = (*now.seen[-7:], seen)
        elif torch.compiler.is_compiling():  # reading what another forward left would be a guard
            now.calls, now.seen = 0, (seen,)
        else:  # the root is bypassed: once the site has fired, new ids are a new forward
            now.seen = (seen,) if now.calls else (*now.seen[-7:], seen)
            now.calls = 0

    def _positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Token ids, mask or lengths among the arguments of the module that takes them."""
        source = self.site.positions_from
        if isinstance(source, Lengths | RealMask) and source.select:
            try:
                found = get_in(kwargs if isinstance(source.select[0], str) else args, source.select)
            except SiteError as error:
                raise SiteError(f"site {self.site.name}: positions_from: {error}") from error
            if not isinstance(found, Tensor):
                raise SiteError(
                    f"site {self.site.name}: positions_from leads to {describe(found)}, no tensor"
                )
            if isinstance(source, RealMask) and found.ndim == 3 and found.shape[2] == 1:
                found = found.squeeze(2)
            return found
        axes = 2 if isinstance(source, TokenIds) else 1
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.int64 and first.ndim == axes:
            return first  # as it nearly always is
        integers = (
            tensor
            for _, tensor in tensors_in((args, kwargs))
            if not tensor.is_floating_point() and tensor.dtype != torch.bool and tensor.ndim == axes
        )
        return next(integers, None)

    # --- the site

    def _on_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return None if self._function is None else self._visit(output, self.site.select)

    def _on_input(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._function is None:
            return None
        select = self.site.select or ((0,) if args else tuple(kwargs)[:1])
        if select and isinstance(select[0], str):
            new = self._visit(kwargs, select)
            return None if new is None else (args, new)
        new = self._visit(args, select)
        return None if new is None else (new, kwargs)

    def _visit(self, value: Any, select: SelectPath) -> Any:
        """Hand the site's rows to the function; the new value, or None where nothing changes."""
        call = self._count()
        if call is None:
            return None
        site, emitted = self.site, self._at(value, select)
        place, firing = find_rows(site, oriented(site, emitted), self._now().seen, call)
        if not self._looked and not torch.compiler.is_compiling():
            require_finite(site, firing.rows)
            self._looked = True  # once: looking makes a GPU wait
        assert self._function is not None  # only a copy's is None, and a copy's hooks do nothing
        new_rows = self._function(firing)
        if new_rows is None:
            return None
        rows = firing.rows
        if new_rows.shape != rows.shape or new_rows.dtype != rows.dtype:
            raise SiteError(
                f"site {site.name} gives {rows.dtype} {tuple(rows.shape)}; expected the same of "
                f"its replacement, got {new_rows.dtype} {tuple(new_rows.shape)}"
            )
        return replace_in(value, select, put_rows(site, emitted, place, rows, new_rows))

    def _count(self) -> int | None:
        """Number of this firing in its forward if it counts, None if it is to be passed over."""
        site = self.site
        now = self._now()
        if torch.compiler.is_compiling():
            self.traced = True
        else:
            self.firings += 1
        if not now.inside and not isinstance(site.positions_from, TokenIds | Lengths | RealMask):
            now.calls = 0  # nothing tells one forward from the next: each firing is one
            if site.call not in ("only", "all"):
                raise SiteError(
                    f"site {site.name}: call={site.call!r} needs to know where a forward begins, "
                    "but the model's own forward is bypassed; expected "
                    "positions_from=TokenIds(...) too, or call='all'"
                )
        call = now.calls
        now.calls = call + 1
        if not self._counts(call):
            return None
        if not torch.compiler.is_compiling():
            self.used += 1
        return call

    def _counts(self, call: int) -> bool:
        wanted = self.site.call
        if wanted == "only" and call > 0:
            raise SiteError(fires_too_often(self.site, call + 1))
        if wanted == "last" and self.last_call is not None:
            if call > self.last_call:
                raise SiteError(
                    f"site {self.site.name} fired more often in one forward than the "
                    f"{self.last_call + 1} times seen before; expected call to be a number, "
                    "'first' or 'all' where the number of firings changes"
                )
            return call == self.last_call
        return wanted in ("only", "all", "last") or call == (0 if wanted == "first" else wanted)

    def _at(self, value: Any, select: SelectPath) -> Tensor:
        """The site's tensor as the module has it, checked."""
        site = self.site
        try:
            tensor = get_in(value, select)
        except SiteError as error:
            raise SiteError(f"site {site.name}: {error}") from error
        if not isinstance(tensor, Tensor):
            raise SiteError(
                f"site {site.name} emits {describe(tensor)}; expected a tensor: choose one with "
                "`select`"
            )
        if tensor.is_nested and (site.layout != "jagged" or tensor.layout != torch.jagged):
            raise SiteError(
                f"site {site.name} emits a NestedTensor, as torch's fast path for multi-head "
                "attention makes them; expected a plain tensor: pass mha_fast_path=False"
            )
        axes = 3 if tensor.is_nested else 2 if site.layout == "jagged" else len(site.layout)
        if tensor.ndim != axes:
            raise SiteError(
                f"site {site.name} emits shape {tuple(tensor.shape)}; expected the {axes} axes of "
                f"layout {site.layout}"
            )
        if not torch.compiler.is_compiling():
            self.shape = tuple(tensor.shape) if not tensor.is_nested else None
        return tensor

    def require_fired(self) -> None:
        """Raise SiteError, with the likely cause, if no firing of the site counted."""
        if self.used or self.traced:
            return
        if self.firings:
            raise SiteError(
                f"site {self.site.name} fired {self.firings} times, but never as the "
                f"call={self.site.call} that counts"
            )
        scored = f"while {type(get_module(self._model, '')).__name__} scored"
        reason = why_silent(self._model, self.site)
        raise SiteError(f"site {self.site.name} never fired {scored}: {reason}")


class _StopForward(BaseException):
    """Ends a forward pass once every captured site has fired.

    A BaseException, so that no `except Exception` in the model's code can swallow it.
    """


class Captured:
    """What `capture` read: for each site the rows of all its firings.

    Attributes
    ----------
    sites
        The sites read, patterns replaced by what they matched.
    """

    def __init__(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        self._of = {site: expand(model, site) for site in sites}
        self.sites: list[Site] = list(
            dict.fromkeys(s for found in self._of.values() for s in found)
        )
        self._rows: dict[Site, list[Tensor]] = {site: [] for site in self.sites}

    def __getitem__(self, site: Site) -> Tensor:
        """The rows [sum of R, H] of a site, or of the one module that a pattern matched.

        Raises
        ------
        SiteError
            If the site was not captured, has not fired yet, or is a pattern with several matches.
        """
        found = self._of.get(site, [site])
        if len(found) > 1:
            names = ", ".join(match.path for match in found)
            raise SiteError(f"pattern {site.path!r} captured {names}: ask for one of `sites`")
        rows = self._rows.get(found[0])
        if not rows:
            raise SiteError(f"nothing was captured at site {site.name}")
        return torch.cat(rows)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)


@contextmanager
def capture(
    model: nn.Module,
    *sites: Site,
    stop: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    sink: Callable[[Site, Tensor], None] | None = None,
    mha_fast_path: bool | None = None,
) -> Iterator[Captured]:
    """Read one or more sites during the forward passes made inside the block.

    The rows are detached clones: some libraries write into a layer's output afterwards.

    Parameters
    ----------
    model
        Any torch module.
    sites
        The sites to read, all in the same forward; one with a pattern for a path reads every
        module that it matches.
    stop
        End the forward pass, and with it the block, as soon as every site has what it wants of
        one forward. A site with ``call="last"`` or ``"all"`` wants all of it.
    dtype, device
        Cast and move the rows.
    sink
        Called with a site and its rows [R, H] at each firing; nothing is then kept in memory.
    mha_fast_path
        See `SiteHook`.

    Raises
    ------
    SiteError
        If a site does not exist, emits no such tensor or values that are not finite, or never
        fired.

    Examples
    --------
    >>> site = Site("0", layout="BH")
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    >>> with capture(model, site) as captured:
    ...     _ = model(torch.ones(4, 3))
    >>> captured[site].shape
    torch.Size([4, 2])
    """
    captured = Captured(model, sites)
    hooks: list[SiteHook] = []
    pending: dict[Site, Tensor] = {}

    def keep(site: Site, rows: Tensor) -> None:
        if sink is None:
            captured._rows[site].append(rows)
        else:
            sink(site, rows)

    def reader(site: Site) -> Callable[[Firing], None]:
        def read(firing: Firing) -> None:
            require_finite(site, firing.rows)
            rows = firing.rows.detach().to(device, dtype, copy=True)
            if site.call == "last":
                if firing.call == 0 and site in pending:
                    keep(site, pending.pop(site))
                pending[site] = rows
                return
            keep(site, rows)
            if stop and all(hook.used and hook.site.call != "all" for hook in hooks):
                raise _StopForward(captured)

        return read

    try:
        for site in captured.sites:
            hook = SiteHook(model, site, reader(site), mha_fast_path=mha_fast_path)
            hooks.append(hook)
        yield captured
    except _StopForward as stopped:
        if stopped.args[0] is not captured:  # an outer block's
            raise
    finally:
        for hook in hooks:
            hook.remove()
    for site, rows in pending.items():
        keep(site, rows)
    for hook in hooks:
        hook.require_fired()


def edit(
    model: nn.Module,
    site: Site,
    function: Callable[[Tensor], Tensor | None],
    *,
    mha_fast_path: bool | None = None,
) -> SiteHook:
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
    mha_fast_path
        See `SiteHook`.
    """
    refuse_last(site)
    return SiteHook(model, site, lambda firing: function(firing.rows), mha_fast_path=mha_fast_path)
