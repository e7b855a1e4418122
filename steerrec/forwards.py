"""Telling one forward of a model from the next, and what came by in it, for one site."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steerrec.diagnosis import fires_too_often
from steerrec.errors import SiteError
from steerrec.handles import hook_method
from steerrec.nested import describe, get_in, tensors_in
from steerrec.sites import Lengths, RealMask, Site, TokenIds, get_module

_USUAL = {torch.int64, torch.int32}


class Handle(Protocol):
    """Something that takes itself off."""

    def remove(self) -> None:
        """Take it off."""


class Forward:
    """Where the present forward is.

    Attributes
    ----------
    inside
        Whether a call of the root is under way.
    begun
        Whether its beginning was seen.
    calls
        Firings of the site so far.
    seen
        Token ids, masks or lengths that came by at `positions_from`, the latest last.
    """

    inside = False
    begun = False
    calls = 0
    seen: tuple[Tensor, ...] = ()


class _ForwardOfThread(Forward, threading.local):
    """The same for each thread."""


class Forwards:
    """Follows the forwards of a model for one site.

    A forward begins when the root is called or, where that is bypassed, when something new comes by
    at `positions_from` after the site has fired.

    Parameters
    ----------
    model, site
        As in `SiteHook`.
    last_call
        For a site with ``call="last"``: the number of its last firing in one forward.
    thread
        The only thread whose forwards count; None for all of them.
    """

    def __init__(
        self, model: nn.Module, site: Site, *, last_call: int | None, thread: int | None
    ) -> None:
        self.site, self.last_call, self.thread = site, last_call, thread
        self.active = True
        self.ran = False
        self.most_calls = 0  # firings in one forward
        self.counts_apart = True  # whether one forward was told from the next at each firing
        self._root = get_module(model, "")
        self._home = threading.get_ident()
        self._forward = _ForwardOfThread()
        self._traced = Forward()
        source = site.positions_from
        self._source = source if isinstance(source, TokenIds | Lengths | RealMask) else None
        self._source_reruns = (  # with the site, each time
            isinstance(source, Lengths | RealMask)
            and source.method is None
            and source.path != ""
            and f"{site.path}.".startswith(f"{source.path}.")
        )

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a hooked model leaves this behind: its own does nothing."""
        return {"active": False}

    def ignores(self) -> bool:
        """Whether what happens in this thread is none of the site's business."""
        if not self.active or self.thread is None:  # torch.compile cannot ask for the thread
            return not self.active
        return self.thread != threading.get_ident()

    def hook_beginnings(self, keep: Callable[[Handle], None]) -> None:
        """Register what has to run before the site fires."""
        keep(self._root.register_forward_pre_hook(self._begin))
        if self._source is not None:
            teller = get_module(self._root, self._source.path)
            if not isinstance(self._source, TokenIds) and self._source.method is not None:
                keep(hook_method(teller, self._source.method, before=self._see))
            else:
                keep(teller.register_forward_pre_hook(self._see, with_kwargs=True))

    def hook_ends(self, keep: Callable[[Handle], None]) -> None:
        """Register what has to run after it."""
        keep(self._root.register_forward_hook(self._end, always_call=True))

    @property
    def now(self) -> Forward:
        """The present forward; torch.compile traces one of its own."""
        return self._traced if torch.compiler.is_compiling() else self._forward

    def next_call(self, now: Forward) -> int | None:
        """Number of the firing that is just happening in the present forward, if it counts.

        None if it is to be passed over.

        Raises
        ------
        SiteError
            If the site fires more often than its `call` says, or the firings of one forward cannot
            be counted.
        """
        site = self.site
        self._refresh(now)
        if not now.inside and (self._source is None or self._source_reruns):
            now.calls = 0  # nothing tells one forward from the next: each firing is one
            self.counts_apart = False
            if site.call not in ("only", "all"):
                raise SiteError(
                    f"site {site.name}: call={site.call!r} needs to know where a forward begins, "
                    "but the model's own forward is bypassed; expected positions_from to name a "
                    "module that runs once in a forward, such as the item embedding, or call='all'"
                )
        unseen = self._source is not None and not now.begun and now is self._forward
        if unseen and threading.get_ident() != self._home:
            return None  # another thread was in the middle of a forward when the hooks came
        call = now.calls
        now.calls = call + 1
        if now is self._forward:
            self.most_calls = max(self.most_calls, now.calls)
        return call if self._counts(call) else None

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

    def _refresh(self, now: Forward) -> None:
        """Forget a call of the root that ended without a word: torch runs no hook on Ctrl-C."""
        if now is self._traced or not now.inside or not now.calls:
            return
        if not _is_being_called(self._root):
            now.inside, now.calls, now.seen = False, 0, ()

    def _begin(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        if self.ignores():
            return
        self.ran = True
        now = self.now
        now.inside, now.begun, now.calls, now.seen = True, True, 0, ()

    def _end(self, _: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
        if self.ignores():
            return
        now = self.now
        now.inside, now.seen = False, ()
        expected = 1 + (self.last_call or 0)
        if self.site.call != "last" or not 0 < now.calls < expected:
            return
        if sys.exc_info()[0] is None:  # else the forward has failed, and that is what to tell
            raise SiteError(
                f"site {self.site.name} fired {now.calls} times in one forward, fewer than the "
                f"{expected} times seen before: its last firing was not steered; expected call to "
                "be a number, 'first' or 'all' where the number changes"
            )

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.ignores():
            return
        seen = self._positions(args, kwargs)
        if seen is None:
            return
        self.ran = True
        now = self.now
        self._refresh(now)
        if now.inside:
            now.seen = (*now.seen[-7:], seen)
        elif now is self._traced:  # reading what another forward left would be a guard
            now.begun, now.calls, now.seen = True, 0, (seen,)
        else:  # the root is bypassed: once the site has fired, new ids are a new forward
            now.seen = (seen,) if now.calls else (*now.seen[-7:], seen)
            now.begun, now.calls = True, 0

    def _positions(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Token ids, mask or lengths among the arguments of the module that takes them."""
        source, site = self._source, self.site
        assert source is not None
        if source.select:
            given = kwargs if isinstance(source.select[0], str) else args
            try:
                found = get_in(given, source.select)
            except SiteError as error:
                raise SiteError(f"site {site.name}: positions_from: {error}") from error
            if not isinstance(found, Tensor):
                raise SiteError(
                    f"site {site.name}: positions_from leads to {describe(found)}, no tensor"
                )
            if isinstance(source, RealMask) and found.ndim > 2:
                sizes = [size for size in found.shape[1:] if size != 1]
                if len(sizes) < 2:  # [B, L, 1], [B, 1, 1, L]
                    found = found.reshape(len(found), -1)
            return found
        axes = 2 if isinstance(source, TokenIds) else 1
        if len(args) == 1 and not kwargs:  # as nearly always: the least that can be done
            only = args[0]
            if isinstance(only, Tensor) and only.ndim == axes and only.dtype in _USUAL:
                return only
        given = args
        if kwargs or not all(isinstance(value, Tensor) for value in args):
            given = tuple(tensor for _, tensor in tensors_in((args, kwargs)))
        candidates = [
            tensor
            for tensor in given
            if tensor.ndim == axes and not tensor.is_floating_point() and tensor.dtype != torch.bool
        ]
        if len(candidates) > 1 and isinstance(source, TokenIds):
            raise SiteError(
                f"site {site.name}: {len(candidates)} integer tensors enter {source.path!r}; say "
                f"which one holds the ids: TokenIds({source.path!r}, select=(...))"
            )
        return candidates[0] if candidates else None


def _is_being_called(module: nn.Module) -> bool:
    """Whether a call of the module, or of its replica, is on this thread's stack."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is _CALL:
            called = frame.f_locals.get("self")
            replica = type(called) is type(module) and getattr(called, "_is_replica", False)
            if called is module or replica:
                return True
        frame = frame.f_back
    return False


_CALL = nn.Module._call_impl.__code__
