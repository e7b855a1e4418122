"""Forward hooks at a site of a model: `SiteHook`, and `edit`, which replaces what is there.

Nothing here knows what an SAE or a recommender is. Every handle that this module makes is removed
on every exit, and nothing that the model handed over is ever written to.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from steerrec.diagnosis import refuse_compiled, refuse_last, require_finite, why_silent
from steerrec.errors import SiteError
from steerrec.forwards import Forwards, Handle
from steerrec.handles import FastPathOff, hook_method, needs_fast_path_off
from steerrec.nested import describe, get_in, replace_in
from steerrec.positions import Firing, find_rows, oriented, put_rows
from steerrec.sites import SelectPath, Site, expand, get_module


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
        [R, H] in the same dtype, a tensor that nobody else needs: the model may write into it.
    mha_fast_path
        False takes torch's fast path for multi-head attention off until `remove`, True leaves it
        alone; by default it is taken off where the site needs that (inside a
        `nn.TransformerEncoderLayer`). The switch is global to the process.
    last_call
        For a site with ``call="last"``: the number of its last firing in one forward.
    thread
        The only thread (`threading.get_ident()`) whose forwards count; all of them if None.
    install
        Whether to put the hooks on at once, and not only by `install`: for whoever has to hold the
        object first, so as to remove them whatever interrupts.

    Attributes
    ----------
    firings
        How often the site has fired.
    used
        How many of those firings counted.
    traced, exported
        Whether torch.compile or torch.export has taken the hook into a graph, where firings are
        not counted.
    shape
        Shape of what the site emitted last; None before.
    forwards
        Tells one forward of the model from the next.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        function: Callable[[Firing], Tensor | None],
        *,
        mha_fast_path: bool | None = None,
        last_call: int | None = None,
        thread: int | None = None,
        install: bool = True,
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
        self.traced = self.exported = False
        self.shape: tuple[int, ...] | None = None
        self.fast_path_off = False
        self._looked = False
        self._function = function
        self.forwards = Forwards(model, site, last_call=last_call, thread=thread)
        self._handles: list[Handle] = []
        self._mha_fast_path = mha_fast_path
        if install:
            self.install()

    def install(self) -> None:
        """Put the hooks on the model, or none of them where that fails."""
        try:
            self._install(self._model, get_module(self._model, self.site.path))
        except BaseException:
            self.remove()
            raise

    def _install(self, model: nn.Module, module: nn.Module) -> None:
        site, source = self.site, self.site.positions_from
        told_at = [] if source is None or source == "last" else [source.path]
        for path in [site.path, *told_at]:
            refuse_compiled(model, path)
        if isinstance(model, nn.DataParallel) and site.method is not None:
            raise SiteError(
                f"site {site.name}: the replicas of DataParallel cannot be watched at a method; "
                "expected a module, or the model without DataParallel"
            )
        mha_fast_path = self._mha_fast_path
        if mha_fast_path is None:
            hooked = [module, *(get_module(model, path) for path in told_at)]
            mha_fast_path = not needs_fast_path_off(get_module(model, ""), *hooked)
        keep = self._handles.append
        if not mha_fast_path:
            self.fast_path_off = True
            keep(FastPathOff())
        self.forwards.hook_beginnings(keep)
        at_input = site.at == "input"
        if site.method is not None:
            before, after = (self._on_input, None) if at_input else (None, self._on_output)
            keep(hook_method(module, site.method, before=before, after=after))
        elif at_input:
            keep(module.register_forward_pre_hook(self._on_input, with_kwargs=True))
        else:
            keep(module.register_forward_hook(self._on_output))
        self.forwards.hook_ends(keep)

    def remove(self) -> None:
        """Take the hooks off the model; harmless when done twice."""
        self.forwards.active = False  # first: what an interruption leaves on does nothing
        while self._handles:
            self._handles[-1].remove()
            self._handles.pop()

    def __getstate__(self) -> dict[str, Any]:
        """A copy or pickle of a hooked model leaves the hook behind: its own does nothing."""
        return {"site": self.site, "forwards": self.forwards, "_handles": []}

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
        return self.forwards.ran or self.firings > 0

    @property
    def has_fired(self) -> bool:
        """Whether a firing counted, or is in a graph."""
        return self.used > 0 or self.traced or self.exported

    def require_fired(self) -> None:
        """Raise SiteError, with the likely cause, if no firing of the site counted."""
        if self.has_fired:
            return
        if self.firings:
            raise SiteError(
                f"site {self.site.name} fired {self.firings} times, but never as the "
                f"call={self.site.call} that counts"
            )
        scored = f"while {type(get_module(self._model, '')).__name__} scored"
        reason = why_silent(self._model, self.site)
        raise SiteError(f"site {self.site.name} never fired {scored}: {reason}")

    def _on_output(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return None if self.forwards.ignores() else self._visit(output, self.site.select)

    def _on_input(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.forwards.ignores():
            return None
        select = self.site.select
        if not select and not args and len(kwargs) > 1:
            raise SiteError(
                f"site {self.site.name} is given {', '.join(kwargs)} by name; say which one is "
                "meant: select=('name',)"
            )
        select = select or ((0,) if args else tuple(kwargs))
        if select and isinstance(select[0], str):
            new = self._visit(kwargs, select)
            return None if new is None else (args, new)
        new = self._visit(args, select)
        return None if new is None else (new, kwargs)

    def _visit(self, value: Any, select: SelectPath) -> Any:
        """Hand the site's rows to the function; the new value, or None where nothing changes."""
        compiling = torch.compiler.is_compiling()
        if compiling and torch.compiler.is_exporting():
            self.exported = True
        elif compiling:
            self.traced = True
        else:
            self.firings += 1
        now = self.forwards.now
        call = self.forwards.next_call(now)
        if call is None:
            return None
        site, emitted = self.site, self._at(value, select)
        place, firing = find_rows(site, oriented(site, emitted), now.seen, call)
        if not compiling:
            self.used += 1
            self.shape = None if emitted.is_nested else tuple(emitted.shape)
            if not self._looked:
                require_finite(site, firing.rows)
                self._looked = True  # once: looking makes a GPU wait
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

    def _at(self, value: Any, select: SelectPath) -> Tensor:
        """The site's tensor as the module has it, checked."""
        site = self.site
        does = "emits" if site.at == "output" else "is given"
        try:
            tensor = get_in(value, select) if select else value
        except SiteError as error:
            raise SiteError(f"site {site.name} {does} {describe(value)}: {error}") from error
        if isinstance(tensor, PackedSequence):
            raise SiteError(
                f"site {site.name} {does} a PackedSequence, whose rows are in the order of time; "
                "expected a tensor: attach after pad_packed_sequence"
            )
        if not isinstance(tensor, Tensor):
            raise SiteError(
                f"site {site.name} {does} {describe(tensor)}; expected a tensor: choose one with "
                "`select`"
            )
        if tensor.is_nested:
            self._check_nested(tensor)
        axes = 3 if tensor.is_nested else 2 if site.layout == "jagged" else len(site.layout)
        if tensor.ndim != axes:
            raise SiteError(
                f"site {site.name} {does} shape {tuple(tensor.shape)}; expected the {axes} axes of "
                f"layout {site.layout}"
            )
        return tensor

    def _check_nested(self, tensor: Tensor) -> None:
        if self.site.layout != "jagged" or tensor.layout != torch.jagged:
            raise SiteError(
                f"site {self.site.name} emits a NestedTensor, as torch's fast path for multi-head "
                "attention makes them; expected a plain tensor: pass mha_fast_path=False"
            )
        ragged: Any = tensor
        if ragged._ragged_idx != 1 or ragged.lengths() is not None:
            raise SiteError(
                f"site {self.site.name} emits a jagged tensor with holes or another ragged axis; "
                "expected histories one after another: make it contiguous first"
            )


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
        Called with a copy of the rows [R, H]; returns their replacement, or None to leave them
        alone (the model's output is then the very same object).
    mha_fast_path
        See `SiteHook`.
    """
    refuse_last(site)

    def replace_rows(firing: Firing) -> Tensor | None:
        new_rows = function(firing.rows.clone())
        return new_rows.clone() if isinstance(new_rows, Tensor) else new_rows  # it may keep its own

    return SiteHook(model, site, replace_rows, mha_fast_path=mha_fast_path)
