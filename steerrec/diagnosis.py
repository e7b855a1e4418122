"""Why a site cannot be used: the checks of hooks, each with one message that says what to do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from steerrec.errors import SiteError
from steerrec.sites import Site, get_module, is_wrapper


def refuse_compiled(model: nn.Module, path: str) -> None:
    """Raise if torch.compile has been applied to a module on the way from the root to `path`."""
    module, parts = model, [part for part in path.split(".") if part]
    while True:
        if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
            raise SiteError(
                f"{type(get_module(model, '')).__name__} is already compiled, and torch ignores "
                "hooks that come later; attach to the plain model first, then call torch.compile: "
                "strength and on/off can still change afterwards"
            )
        inner = module._modules.get("module") if is_wrapper(module) else None
        if inner is not None:
            module = inner
            continue
        if not parts:
            return
        part = parts.pop(0)
        if part.startswith("-"):
            part = str(len(module) + int(part))  # type: ignore[arg-type]
        child = module._modules.get(part)
        if child is not None:  # None: the name of a wrapper that is not here
            module = child


def fires_too_often(site: Site, firings: int) -> str:
    """What to say of a site that is to fire once in a forward and does not."""
    return (
        f"site {site.name} fired {firings} times in one forward; say which counts: call='first', "
        "'last', 'all' or its number from 0"
    )


def refuse_last(site: Site) -> None:
    """Raise SiteError for a site that only the end of a forward can tell."""
    if site.call == "last":
        raise SiteError(
            f"site {site.name}: which firing is the last is known only once the forward is over; "
            "expected its number from 0 as call (`steerrec layers` counts the firings)"
        )


def require_finite(site: Site, rows: Tensor) -> None:
    """Raise SiteError if rows of a site hold NaN or infinity."""
    if not bool(rows.isfinite().all()):
        fast_path = torch.backends.mha.get_fastpath_enabled()
        hint = "; where torch's fast path for multi-head attention is the cause (it is on), pass "
        raise SiteError(
            f"site {site.name} emits values that are not finite"
            + (
                f"{hint}mha_fast_path=False"
                if fast_path
                else "; look for the layer that makes them"
            )
        )


def why_silent(model: nn.Module, site: Site) -> str:
    """The likely reason why a site does not fire while a model scores, and what to do."""
    root, module = get_module(model, ""), get_module(model, site.path)
    name = type(module).__name__
    report = "`steerrec layers` lists the modules that fire"
    if site.method is not None:
        return f"nothing calls {name}.{site.method}() on this object while the model scores"
    for path, parent in root.named_modules():
        if isinstance(parent, nn.MultiheadAttention) and module is parent.out_proj:
            return (
                "nn.MultiheadAttention uses the weights of its out_proj without calling it; attach "
                f"to {path!r} with select=(0,)"
            )
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return f"a {name} is a container that is never called; attach to one of its modules"
    if module is root:
        return (
            f"{name}.forward is called directly, which hooks cannot see, or another method makes "
            f"the scores; attach to a layer ({report}), or name that method: method='forward'"
        )
    return (
        "it is no part of scoring, only its weights are used, its forward is called directly "
        f"(which method='forward' sees), or the model was compiled before; {report}"
    )
