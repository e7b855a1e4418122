"""What hooks hold on to while they are on a model, and give back: methods, and torch's fast path.

Everything here removes its own handle only, whatever others did in between.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from steerrec.errors import SiteError

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
PostHook = Callable[[nn.Module, tuple[Any, ...], Any], Any]

_lock = threading.RLock()
_keys = itertools.count()


class WatchedMethod:
    """Stands in for a method of one module and calls hooks before and after it.

    It lives in the module's own `__dict__` while anybody watches. A copy or a pickle of the module
    gets the plain method back.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self.own = module.__dict__.get(name)
        self.original: Callable[..., Any] = getattr(module, name)
        self.before: dict[int, PreHook] = {}
        self.after: dict[int, PostHook] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method between its hooks."""
        for pre_hook in tuple(self.before.values()):
            changed = pre_hook(self.module, args, kwargs)
            if changed is not None:
                args, kwargs = changed
        output = self.original(*args, **kwargs)
        for hook in tuple(self.after.values()):
            changed = hook(self.module, args, output)
            if changed is not None:
                output = changed
        return output

    def __reduce__(self) -> Any:
        # the module is rebuilt before its __dict__, so that the name leads to its class's method
        return (_same, (self.own,)) if self.own is not None else (getattr, (self.module, self.name))


def _same(value: Any) -> Any:
    return value


class MethodHandle:
    """One hook on a method of a module; `remove` takes it off."""

    def __init__(self, watched: WatchedMethod, key: int) -> None:
        self._watched, self._key = watched, key

    def remove(self) -> None:
        """Take the hook off; with the last one the module gets its method back."""
        watched = self._watched
        with _lock:
            watched.before.pop(self._key, None)
            watched.after.pop(self._key, None)
            in_place = watched.module.__dict__.get(watched.name) is watched
            if watched.before or watched.after or not in_place:
                return
            if watched.own is None:
                del watched.module.__dict__[watched.name]
            else:
                watched.module.__dict__[watched.name] = watched.own


def hook_method(
    module: nn.Module, name: str, *, before: PreHook | None = None, after: PostHook | None = None
) -> MethodHandle:
    """Call `before` and `after` around every call of a method of this one module.

    They are called as torch calls forward hooks: ``before(module, args, kwargs)`` may return new
    ``(args, kwargs)``, ``after(module, args, output)`` a new output.

    Raises
    ------
    SiteError
        If there is no such method.
    """
    with _lock:
        watched = module.__dict__.get(name)
        if not isinstance(watched, WatchedMethod):
            method = getattr(module, name, None)
            if not callable(method) or isinstance(method, nn.Module):
                raise SiteError(
                    f"{type(module).__name__} has no method {name!r}; expected the name of a "
                    "method that the model calls while it scores"
                )
            watched = module.__dict__[name] = WatchedMethod(module, name)
        key = next(_keys)
        if before is not None:
            watched.before[key] = before
        if after is not None:
            watched.after[key] = after
        return MethodHandle(watched, key)


class FastPathOff:
    """torch's fast path for multi-head attention, off from now until `remove`.

    The switch is global to the process, so it is counted: the last one to go restores what the
    first one found. It goes by itself when nobody holds it any more.
    """

    _count = 0
    _found = True

    def __init__(self) -> None:
        with _lock:
            if FastPathOff._count == 0:
                FastPathOff._found = torch.backends.mha.get_fastpath_enabled()
            FastPathOff._count += 1
            self.remove = weakref.finalize(self, FastPathOff._give_back)
            torch.backends.mha.set_fastpath_enabled(False)

    @classmethod
    def _give_back(cls) -> None:
        with _lock:
            cls._count -= 1
            if cls._count == 0:
                torch.backends.mha.set_fastpath_enabled(cls._found)


def needs_fast_path_off(model: nn.Module, *modules: nn.Module) -> bool:
    """Whether hooks on `modules` are seen, and see plain tensors, only without the fast path.

    True for a `nn.TransformerEncoderLayer` and all that is inside one: its fast path calls none of
    them, and `nn.TransformerEncoder` hands its layers NestedTensors.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    inside = (part for layer in layers for part in layer.modules())
    return any(part is module for part in inside for module in modules)
