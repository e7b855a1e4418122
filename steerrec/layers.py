"""What a model's layers do while it scores, which of them can hold an SAE, and which should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerrec.capturing import capture
from steerrec.data import Histories
from steerrec.diagnosis import why_silent
from steerrec.errors import SiteError
from steerrec.handles import FastPathOff, needs_fast_path_off
from steerrec.nested import describe, tensors_in
from steerrec.probes import probe
from steerrec.recommender import Recommender
from steerrec.sites import Call, Layout, SelectPath, Site, get_module


@dataclass(frozen=True)
class LayerReport:
    """How one module behaved while a model scored.

    Attributes
    ----------
    path, kind
        Dotted path and class of the module.
    firings
        How often a hook on it fired.
    output
        What it emitted last: shape of a tensor, kind and size of a container.
    select
        Path to the tensor of vectors inside that, as in `Site.select`.
    shape, dtype
        Of that tensor; None where there is none.
    layout
        Its axis order, as far as the shapes tell.
    finite
        Whether its values are.
    mutated
        Whether the model wrote into the tensor after the module had emitted it.
    fast_path_off
        Whether a hook here needs torch's fast path for multi-head attention off.
    usable
        Whether an SAE can be attached here.
    reason
        Why not; or what to know.
    score_error
        Largest difference between the model's scores and those that the item head makes of the
        vectors here, where that was asked and the width fits.
    """

    path: str
    kind: str
    firings: int
    output: str = "–"
    select: SelectPath = ()
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    layout: Layout | None = None
    finite: bool = True
    mutated: bool = False
    fast_path_off: bool = False
    usable: bool = False
    reason: str = ""
    score_error: float | None = None


@dataclass(frozen=True)
class SiteReport:
    """What `site_report` found.

    Attributes
    ----------
    layers
        Every module of the model.
    recommended
        Where to attach an SAE.
    reason
        Why there.
    """

    layers: list[LayerReport]
    recommended: Site
    reason: str


@dataclass
class _Seen:
    firings: int = 0
    output: Any = None
    vectors: tuple[SelectPath, Tensor] | None = None
    tensors: list[tuple[Tensor, int | None, Tensor]] = field(default_factory=list)


@torch.no_grad()
def layer_report(model: nn.Module, run: Callable[[], object]) -> list[LayerReport]:
    """Which modules of a model fire, how often, what they emit, and what can be attached to.

    Parameters
    ----------
    model
        Any torch module.
    run
        Makes the model score a small batch, once; histories of different lengths tell layouts
        apart best.
    """
    root = get_module(model, "")
    modules = [(path, module) for path, module in root.named_modules() if path]
    seen = {path: _Seen() for path, _ in modules}
    ids: list[Tensor] = []
    handles: list[Any] = []

    def watch_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = (tensor for _, tensor in tensors_in((args, kwargs)))
        ids.extend(t for t in found if t.ndim == 2 and t.dtype in (torch.int64, torch.int32))

    def watch_output(path: str) -> Callable[..., None]:
        def watch(_: nn.Module, __: object, output: object) -> None:
            entry = seen[path]
            entry.firings += 1
            entry.output = output
            vectors = [found for found in tensors_in(output) if found[1].is_floating_point()]
            entry.vectors = vectors[0] if vectors else None
            if vectors and not vectors[0][1].is_nested:
                entry.tensors.append((vectors[0][1], *_state(vectors[0][1])))

        return watch

    try:
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in root.modules()):
            handles.append(FastPathOff())
        for path, module in modules:
            handles.append(module.register_forward_pre_hook(watch_input, with_kwargs=True))
            handles.append(module.register_forward_hook(watch_output(path)))
        run()
        shape = (ids[0].shape[0], ids[0].shape[1]) if ids else None
        return [_judged(root, path, module, seen[path], shape) for path, module in modules]
    finally:
        for handle in handles:
            handle.remove()


def _state(tensor: Tensor) -> tuple[int | None, Tensor]:
    """Version and values of a tensor: what writing into it would change."""
    version = None if tensor.is_inference() else tensor._version
    return version, tensor.clone() if version is None else tensor


def _written_to(tensor: Tensor, version: int | None, before: Tensor) -> bool:
    return tensor._version != version if version is not None else not torch.equal(tensor, before)


def _judged(
    root: nn.Module, path: str, module: nn.Module, seen: _Seen, ids: tuple[int, int] | None
) -> LayerReport:
    kind = type(module).__name__
    report = LayerReport(path, kind, seen.firings)
    if not seen.firings:
        return replace(report, reason=why_silent(root, Site(path, layout="BH")))
    report = replace(
        report,
        output=describe(seen.output),
        fast_path_off=needs_fast_path_off(root, module),
        mutated=any(_written_to(*entry) for entry in seen.tensors),
    )
    if seen.vectors is None:
        return replace(report, reason="emits no tensor of floating-point numbers")
    select, tensor = seen.vectors
    report = replace(report, select=select, dtype=str(tensor.dtype).removeprefix("torch."))
    if tensor.is_nested:
        if tensor.layout != torch.jagged:
            return replace(report, reason="emits a NestedTensor; pass mha_fast_path=False")
        return replace(report, layout="jagged", usable=True)
    report = replace(
        report,
        shape=tuple(tensor.shape),
        finite=bool(tensor.isfinite().all()),
        layout=_layout(tuple(tensor.shape), ids),
    )
    notes = []
    if not report.finite:
        return replace(report, reason="emits values that are not finite")
    if report.layout is None:
        return replace(report, reason="not one vector for each item or history, by its shape")
    if seen.firings > 1:
        notes.append(f"fires {seen.firings} times: set call")
    if report.mutated:
        notes.append("the model writes into its output afterwards")
    if report.fast_path_off:
        notes.append("torch's MHA fast path is off while attached")
    return replace(report, usable=True, reason="; ".join(notes))


def _layout(shape: tuple[int, ...], ids: tuple[int, int] | None) -> Layout | None:
    """Axis order of a tensor of vectors, for token ids of shape [B, L]."""
    if len(shape) == 2:
        return "BH" if ids is None or shape[0] == ids[0] else None
    if len(shape) != 3 or ids is None:
        return None
    batch, length = ids
    if shape[:2] == (batch, length):
        return "BLH"
    if shape[:2] == (length, batch):
        return "LBH"
    if (shape[0], shape[2]) == (batch, length):
        return "BHL"
    return None


@torch.no_grad()
def site_report(rec: Recommender, *, histories: Histories | None = None) -> SiteReport:
    """Layer report of a recommender, and the site whose vectors its scores are made of.

    Parameters
    ----------
    rec
        The recommender.
    histories
        What to score; five of random items and different lengths by default.
    """
    batch = rec.make_batch(_probe(rec) if histories is None else histories)
    layers = layer_report(rec.model, lambda: rec.score(batch))
    scores = rec.score(batch)
    places = {layer.path: place for layer in layers if (place := _place(rec, layer)) is not None}
    found = dict(read_each(rec.model, [rec.site, *places.values()], lambda: rec.score(batch)))
    errors = {path: _error_of(rec, found.get(place), scores) for path, place in places.items()}
    rated = [replace(layer, score_error=errors.get(layer.path)) for layer in layers]
    own = _error_of(rec, found.get(rec.site), scores)
    largest = float(scores.nan_to_num(0, 0, 0).abs().max())  # a model may mask with infinities
    close = 1e-4 * max(1.0, largest)
    if own is not None and own <= close:
        reason = (
            "its vector times the item matrix gives the model's own scores (largest difference "
            f"{own:.1g})"
        )
        return SiteReport(rated, rec.site, reason)
    for path, error in reversed(errors.items()):
        if error is not None and error <= close:
            reason = (
                f"{path}, not the adapter's {rec.site.name}, gives the model's own scores when "
                f"multiplied with the item matrix (largest difference {error:.1g})"
            )
            return SiteReport(rated, places[path], reason)
    how_far = "it cannot be read" if own is None else f"the largest difference is {own:.3g}"
    reason = (
        f"the adapter names it, but no layer's vector times the item matrix gives the model's "
        f"scores ({how_far}): the item head lacks something, or the vector is made outside of "
        "layers"
    )
    return SiteReport(rated, rec.site, reason)


def site_at(
    rec: Recommender, path: str, *, call: Call | int = "only", histories: Histories | None = None
) -> Site:
    """A site of a recommender by its path: layout and select as its layers show them.

    Parameters
    ----------
    rec
        The recommender.
    path
        Dotted path of a module, as in `Site.path`.
    call
        Which firing counts, as in `Site.call`.
    histories
        What to score to see the layer at work; a few of random items by default.

    Raises
    ------
    SiteError
        If there is no such layer, or no SAE can be attached to it; the message says why.
    """
    if not path:
        raise SiteError(
            "the model itself is no layer; expected the path of one (`steerrec layers` lists them)"
        )
    if path == rec.site.path:
        return replace(rec.site, call=call) if call != "only" else rec.site
    module = get_module(rec.model, path)
    batch = rec.make_batch(_probe(rec) if histories is None else histories)
    layers = layer_report(rec.model, lambda: rec.score(batch))
    names = {id(module): name for name, module in get_module(rec.model, "").named_modules()}
    layer = next(layer for layer in layers if layer.path == names[id(module)])
    if not layer.usable or layer.layout is None:
        fired = "" if layer.firings else f"never fired while {type(rec.model).__name__} scored: "
        raise SiteError(f"site {path!r} {fired}{layer.reason}")
    return Site(
        layer.path,
        select=layer.select,
        layout=layer.layout,
        positions_from=rec.site.positions_from,
        call=call,
    )


def _probe(rec: Recommender) -> Histories:
    """Five histories of random items, of lengths that tell the axes of a batch apart."""
    rng = np.random.default_rng(0)
    lengths = [min(n, rec.max_length) for n in (7, 5, 4, 3, 2)]
    items = len(rec.catalogue)
    return probe(rec, [rng.integers(items, size=n).tolist() for n in lengths])


def _place(rec: Recommender, layer: LayerReport) -> Site | None:
    """The site of a layer that could emit what the item head scores."""
    if not layer.usable or layer.shape is None or layer.layout is None:
        return None
    if layer.shape[1 if layer.layout == "BHL" else -1] != rec.item_head.width:
        return None
    try:
        return Site(
            layer.path,
            select=layer.select,
            layout=layer.layout,
            positions_from=rec.site.positions_from,
            call="only" if layer.firings == 1 else layer.firings - 1,
        )
    except SiteError:  # the adapter's site is [B, H]: nothing says where users are
        return None


def read_each(
    model: nn.Module, sites: list[Site], run: Callable[[], object]
) -> Iterator[tuple[Site, Tensor]]:
    """Each site with its rows [R, H], all from one call of `run` where all can be read.

    A site that cannot be read is left out.
    """
    try:
        with capture(model, *sites) as captured:
            run()
        yield from ((site, captured[site]) for site in captured)
    except SiteError:
        for site in sites:
            with suppress(SiteError):
                with capture(model, site) as captured:
                    run()
                yield site, captured[site]


def _error_of(rec: Recommender, vectors: Tensor | None, scores: Tensor) -> float | None:
    """Largest difference of the item head's scores of these vectors from the model's."""
    if vectors is None or vectors.shape != (len(scores), rec.item_head.width):
        return None
    difference = (rec.item_head.scores(vectors) - scores).abs()
    told = scores.isfinite()  # a model may mask what it does not recommend
    return float(difference[told].max()) if 2 * int(told.sum()) > told.numel() else None
