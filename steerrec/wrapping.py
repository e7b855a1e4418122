"""`wrap`: an in-house torch model as a `Recommender`, with what can be inferred inferred."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import FunctionType
from typing import Any

import polars as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerrec.conformance import FAILURES, conformance
from steerrec.data import Catalogue, Histories
from steerrec.errors import ModelError, SiteError
from steerrec.handles import hook_method
from steerrec.inputs import Side as Side
from steerrec.inputs import TokenScheme as TokenScheme
from steerrec.inputs import as_reads
from steerrec.inputs import with_mask as with_mask
from steerrec.layers import LayerReport, layer_report, read_each
from steerrec.nested import tensors_in
from steerrec.probes import examples, probe
from steerrec.recommender import ItemHead
from steerrec.sites import Layout, PositionsFrom, SelectPath, Site, TokenIds, get_module

LIBRARIES = (
    "recbole",
    "rectools",
    "replay",
    "gsasrec",
    "sasrec_pytorch",
    "bert4rec_vae",
    "gru4rec",
    "huggingface",
)


def as_catalogue(
    items: Catalogue | Sequence[int | str], *, of: nn.Module | None = None, found: int | None = None
) -> Catalogue:
    """A catalogue of the items, bare ids without titles and counts if it is none yet.

    Parameters
    ----------
    items
        The catalogue, or the external ids of the items in the order of the model's ids.
    of, found
        A model, and how many items it has, where that is to be checked.

    Raises
    ------
    ModelError
        If the model has more or fewer items.
    """
    if found is not None and found != len(items):
        raise ModelError(
            f"{type(of).__name__} has {found} items, but {len(items)} ids were given; expected one "
            "id for each of its items, in the order of its own ids, and none for padding or mask"
        )
    if isinstance(items, Catalogue):
        return items
    return Catalogue(
        pl.DataFrame({"item_id": list(items)}).select(
            pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
            pl.col("item_id"),
            pl.lit(None, dtype=pl.String).alias("title"),
            pl.lit(0, dtype=pl.Int64).alias("count"),
        )
    )


def unknown_model(model: nn.Module, family: str, expected: str) -> ModelError:
    """The error of an adapter that is given a model which it does not recognise."""
    return ModelError(
        f"{type(model).__name__} is not a model of {family}; expected {expected}: steerrec.wrap "
        "takes any torch model"
    )


@dataclass(eq=False)
class WrappedRecommender:
    """A torch model and what `wrap` or an adapter knows of it, as a `Recommender`.

    Attributes
    ----------
    model, catalogue, site
        As in `Recommender`.
    scheme
        How histories become ids.
    scorer
        The model's own scoring call on what `make_inputs` gives: [B, M], M at least N.
    head
        How items are scored from a user vector: a fixed one, or a function that reads the model's
        weights as they are.
    make_inputs
        From ids [B, L], and then each column that is read, to what `scorer` takes; the ids
        themselves by default.
    columns
        Which column of the scores belongs to catalogue row 0; N columns follow.
    record
        What `describe` gives.
    reads
        Columns of histories that the model reads beside items, and what pads each.
    example
        A few real histories with such columns, to try the model on.
    """

    model: nn.Module
    catalogue: Catalogue
    site: Site
    scheme: TokenScheme
    scorer: Callable[[Any], Tensor]
    head: ItemHead | Callable[[], ItemHead]
    make_inputs: Callable[..., Any] | None = None
    columns: int = 0
    record: dict[str, Any] = field(default_factory=dict)
    reads: Mapping[str, float] = field(default_factory=dict)
    example: Histories | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)

    @property
    def max_length(self) -> int:
        """Window of the model, in items."""
        return self.scheme.max_length

    @property
    def item_head(self) -> ItemHead:
        """How items are scored from a user vector."""
        return self.head() if callable(self.head) else self.head

    def make_batch(self, histories: Histories) -> Any:
        """The model's own input for these histories, on its device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        ids = self.scheme.encode(histories).to(device)
        if self.make_inputs is None:
            return ids
        columns = (self.scheme.column(histories, *column) for column in self.reads.items())
        return self.make_inputs(ids, *(column.to(device) for column in columns))

    def score(self, batch: Any) -> Tensor:
        """The model's own scores, [B, N] in catalogue order."""
        scores = self.scorer(batch)
        items = len(self.catalogue)
        if scores.ndim != 2 or scores.shape[1] < self.columns + items:
            raise ModelError(
                f"the scoring call gives {tuple(scores.shape)}; expected [histories, at least "
                f"{self.columns + items}], one score for each of the {items} items"
            )
        return scores[:, self.columns : self.columns + items]

    def describe(self) -> dict[str, Any]:
        """What an artifact records of the model."""
        return {"adapter": "wrap", "source": None, **self.record}


def wrap(
    model: nn.Module,
    items: Catalogue | Sequence[int | str],
    *,
    score: Callable[[Any], Tensor] | None = None,
    make_batch: Callable[..., Any] | None = None,
    reads: Sequence[str] | Mapping[str, float] = (),
    max_length: int | None = None,
    site: Site | str | None = None,
    item_head: ItemHead | Callable[[], ItemHead] | None = None,
    first_id: int | None = None,
    pad_id: int | None = None,
    padding: Side | None = None,
    fixed_length: bool | None = None,
    example: Histories | None = None,
    source: str | None = None,
) -> WrappedRecommender:
    """Make a `Recommender` of a torch model.

    What is not given is looked for: ids and padding from the embedding, the site and the item head
    among the layers and weights, until the vectors there and the item head give the model's own
    scores. Nothing is guessed: what does not conform, or conforms in two ways, is an error.

    Parameters
    ----------
    model
        Any torch module. It is put into eval mode and frozen.
    items
        The catalogue, or the external ids of the items in the order of the model's ids.
    score
        The model's own scoring call, on what `make_batch` makes: [B, M]. The model itself if None.
    make_batch
        Makes the call's argument from padded ids [B, L]; the ids themselves if None. Where the
        model `reads` columns, it takes each of them too, [B, L], padded as the ids are.
    reads
        Columns of histories that the model reads beside items: ``["time"]``, or with what pads
        them where that is not 0, ``{"time": -1}``.
    max_length
        How many of a history's latest items the model reads. If None, the model has to be one of a
        library that steerrec knows (`steerrec.adapters`), which says everything else too.
    site
        Where the user vector is, or the path of its layer.
    item_head
        How items are scored from it, or a function that makes that from the weights as they are.
    first_id, pad_id
        The model's id of the first item, and of padding.
    padding
        On which side histories are padded.
    fixed_length
        Whether the model wants batches as wide as `max_length`, because its scores depend on the
        padding; if None, that is tried where batches of any width do not conform.
    example
        A few real histories with the columns that the model reads, to try it on. Only for `time`
        can that be left out.
    source
        What an artifact records as the place that the model came from.

    Raises
    ------
    ModelError
        If no combination gives the model's own scores; the message says how near the nearest came
        and what the usual reasons are.

    Examples
    --------
    >>> class Mean(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.items = nn.Embedding(8, 4, padding_idx=0)
    ...         self.body = nn.Linear(4, 4)
    ...     def forward(self, ids):
    ...         states = self.body(self.items(ids).cumsum(dim=1))
    ...         last = (ids != 0).sum(dim=1) - 1
    ...         return states[torch.arange(len(ids)), last] @ self.items.weight.T
    >>> rec = wrap(Mean(), list("abcdefg"), max_length=5)
    >>> rec.site.path, rec.scheme.padding
    ('body', 'right')
    """
    if max_length is None:
        told = (score, make_batch, site, item_head, first_id, pad_id, padding, fixed_length)
        if reads or any(setting is not None for setting in told):
            raise ModelError(
                "wrap was told how to score, but not how many items the model reads; expected "
                "max_length (a model of a library takes its settings by from_model of its adapter)"
            )
        return _of_a_library(model, items, source)
    catalogue = as_catalogue(items)
    columns = as_reads(reads, make_batch)
    if isinstance(site, str):
        get_module(model, site)  # an unknown name is no matter of trying
    model.eval().requires_grad_(False)
    attempts: list[str] = []
    found: list[WrappedRecommender] = []
    for fixed in (False, True) if fixed_length is None else (fixed_length,):
        if found:
            break
        for scheme in _schemes(model, len(catalogue), first_id, pad_id, padding, max_length, fixed):
            rec = WrappedRecommender(
                model,
                catalogue,
                site if isinstance(site, Site) else Site("", layout="BH"),
                scheme,
                model if score is None else score,
                item_head or ItemHead(torch.zeros(len(catalogue), 1)),
                make_batch,
                record={"source": source},
                reads=columns,
                example=None if example is None else examples(example, max_length),
            )
            try:
                found += _conforming(rec, site, item_head, attempts)
            except (ModelError, SiteError) as error:
                attempts.append(f"with {_described(scheme)}: {error}")
            except FAILURES as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                attempts.append(f"with {_described(scheme)}: the scoring call fails ({reason})")
    schemes = {(rec.scheme.padding, rec.scheme.first_id) for rec in found}
    if len(schemes) > 1:
        options = " or ".join(_described(rec.scheme) for rec in found[:2])
        raise ModelError(
            f"{type(model).__name__} gives its own scores with {options}; say which it was trained "
            "with: padding='left' or 'right', first_id"
        )
    if not found:
        tried = "; ".join(dict.fromkeys(attempts)) or "no embedding with a row for each item"
        raise ModelError(
            f"{type(model).__name__} cannot be wrapped by what can be inferred ({tried}); give "
            "site, item_head, first_id, pad_id or padding"
        )
    return found[0]


def _of_a_library(
    model: nn.Module, items: Catalogue | Sequence[int | str], source: str | None
) -> WrappedRecommender:
    """A live model of a library, by the adapter that recognises it."""
    for family in LIBRARIES:
        adapter = import_module(f"steerrec.adapters.{family}")
        if adapter.recognises(model):
            found: WrappedRecommender = adapter.from_model(model, items, source=source)
            return found
    raise ModelError(
        f"{type(model).__name__} is no model of a library that steerrec knows "
        f"({', '.join(LIBRARIES)}); expected max_length, and what else its own scores need"
    )


def _described(scheme: TokenScheme) -> str:
    return f"padding={scheme.padding!r}, pad_id={scheme.pad_id} and first_id={scheme.first_id}"


def _schemes(
    model: nn.Module,
    items: int,
    first_id: int | None,
    pad_id: int | None,
    padding: Side | None,
    max_length: int,
    fixed_length: bool,
) -> Iterator[TokenScheme]:
    """Every way in which ids may stand for items that the embeddings and the caller allow."""
    pairs: list[tuple[int, int]] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and items <= module.num_embeddings <= items + 8:
            extra, pad = module.num_embeddings - items, module.padding_idx
            if pad is not None:
                pairs.append((1, 0) if pad == 0 else (0, pad))
            elif extra:
                pairs += [(1, 0), (0, items)]
            else:
                pairs.append((0, 0))
    if first_id is not None:
        pairs = [(first_id, 0 if first_id else items)]
    if pad_id is not None:
        pairs = [(first, pad_id) for first, _ in pairs or [(0, pad_id), (1, pad_id)]]
    sides: tuple[Side, ...] = ("right", "left") if padding is None else (padding,)
    for first, pad in dict.fromkeys(pairs or [(1, 0)]):
        for side in sides:
            yield TokenScheme(first, pad, side, max_length, fixed_length)


def _conforming(
    rec: WrappedRecommender,
    site: Site | str | None,
    item_head: ItemHead | Callable[[], ItemHead] | None,
    attempts: list[str],
) -> list[WrappedRecommender]:
    """The recommender with the site and the item head that conform, if there are any."""
    lists = [[row % len(rec.catalogue) for row in range(n)] for n in (5, 3, 4, 2, 1)]
    trial = probe(rec, lists)
    batch = rec.make_batch(trial)
    scores = rec.scorer(batch)
    if scores.ndim != 2:
        raise ModelError(
            f"the scoring call gives {tuple(scores.shape)}; expected [histories, items]: pass "
            "score=... that picks the user's position"
        )
    columns = rec.scheme.first_id if scores.shape[1] > len(rec.catalogue) else 0
    rec = replace(rec, columns=columns)
    ids = rec.scheme.encode(trial)
    places = [site] if isinstance(site, Site) else _places(rec, site, batch, ids)
    nearest: tuple[float, str] | None = None
    for place, vectors in read_each(rec.model, places, lambda: rec.scorer(batch)):
        given = [item_head] if item_head is not None else _heads(rec, vectors, scores[:, columns:])
        for head in given:
            candidate = replace(rec, site=place, head=head)
            found = conformance(candidate)
            if found.ok:
                return [candidate]
            error = float("inf") if found.max_error is None else found.max_error
            if nearest is None or error < nearest[0]:
                nearest = error, found.problems[0]
    if nearest is not None:
        attempts.append(f"with {_described(rec.scheme)}: {nearest[1]}")
    else:
        attempts.append(
            f"with {_described(rec.scheme)}: no layer's vector times a weight with a row for each "
            "item gives the model's scores"
        )
    return []


def _places(rec: WrappedRecommender, path: str | None, batch: Any, ids: Tensor) -> list[Site]:
    """Sites that could hold the scored vector: layers, the last one first, and then methods."""
    takers: dict[str, SelectPath] = {}  # modules that are given what could be token ids
    certain: dict[str, SelectPath] = {}  # that are given these very ids, and where
    root = get_module(rec.model, "")
    made: dict[str, Any] = {}  # what methods return

    def watch_input(name: str) -> Callable[..., None]:
        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            whole = (found for found in tensors_in((args, kwargs)) if not _is_real(found[1]))
            given = [(place, t) for place, t in whole if t.ndim == 2]
            # what is the same in every row are positions
            if any(t.dtype == torch.int64 and bool((t != t[:1]).any()) for _, t in given):
                takers.setdefault(name, ())
            for place, tensor in given:
                if torch.equal(tensor, ids.to(tensor.device)):
                    certain.setdefault(name, place[1:] if len(given) > 1 else ())

        return look

    def watch_method(name: str) -> Callable[..., None]:
        return lambda _, __, output: made.update({name: output})

    handles: list[Any] = []
    try:
        for name, module in root.named_modules():
            handles.append(module.register_forward_pre_hook(watch_input(name), with_kwargs=True))
        handles += [hook_method(root, name, after=watch_method(name)) for name in _methods(root)]
        layers = layer_report(rec.model, lambda: rec.scorer(batch))
    finally:
        for handle in handles:
            handle.remove()
    sources: list[PositionsFrom | None] = ["last" if rec.scheme.padding == "left" else None]
    if takers:
        firsts = (next((name for name in names if name), "") for names in (certain, takers))
        inner = [name for name in dict.fromkeys(firsts) if name] or [""]
        known = {**takers, **certain}
        sources = [TokenIds(name, rec.scheme.pad_id, known[name]) for name in inner]
    if path is not None:
        wanted = get_module(root, path)
        layers = [layer for layer in layers if get_module(root, layer.path) is wanted]
        if layers and not layers[0].usable:
            raise SiteError(f"site {path!r}: {layers[0].reason}")
        made = made if wanted is root else {}
    found = [_place(layer, source) for source in sources for layer in reversed(layers)]
    for name, output in made.items():
        vectors = next((t for t in tensors_in(output) if t[1].is_floating_point()), None)
        if vectors is None or vectors[1].ndim not in (2, 3):
            continue
        layout: Layout = "BH" if vectors[1].ndim == 2 else "BLH"
        report = LayerReport("", "", 1, select=vectors[0], layout=layout, usable=True)
        for source in sources:
            place = _place(report, source)
            found.append(None if place is None else replace(place, method=name))
    return [place for place in found if place is not None]


def _is_real(tensor: Tensor) -> bool:
    """Whether a tensor holds real numbers or truth values, and so no ids."""
    return tensor.is_floating_point() or tensor.dtype == torch.bool


def _methods(root: nn.Module) -> list[str]:
    """Names of the methods that the root's own classes define, `forward` among them."""
    own = type(root).__mro__[: type(root).__mro__.index(nn.Module)]
    names = {name for c in own for name, v in vars(c).items() if isinstance(v, FunctionType)}
    return sorted(name for name in names if not name.startswith("__"))


def _place(layer: LayerReport, source: PositionsFrom | None) -> Site | None:
    if not layer.usable or layer.layout is None or layer.layout == "jagged":
        return None
    if layer.layout != "BH" and source is None:
        return None
    return Site(
        layer.path,
        select=layer.select,
        layout=layer.layout,
        positions_from=source,
        call="last" if layer.firings > 1 else "only",
    )


def _heads(
    rec: WrappedRecommender, vectors: Tensor, scores: Tensor
) -> Iterator[Callable[[], ItemHead]]:
    """Item heads made of the model's weights that give its scores from these vectors.

    A matrix with a row for each item, as it is or by cosine; a factor; and a bias, if any.
    """
    items, first = len(rec.catalogue), rec.scheme.first_id
    weights = {**dict(rec.model.named_parameters()), **dict(rec.model.named_buffers())}
    scores = scores[:, :items]
    close = 1e-4 * max(1.0, float(scores.abs().max()))

    def rows(name: str) -> Tensor:
        tensor = weights[name]
        start = 0 if len(tensor) == items else min(first, len(tensor) - items)
        return tensor[start : start + items]

    def maker(matrix: str, bias: str | None, unit: bool, **settings: Any) -> Callable[[], ItemHead]:
        def make() -> ItemHead:
            weight = F.normalize(rows(matrix), dim=-1) if unit else rows(matrix)
            return ItemHead(weight, None if bias is None else rows(bias).flatten(), **settings)

        return make

    sized = [n for n, t in weights.items() if t.ndim and items <= len(t) <= items + 8]
    biases = [None, *(n for n in sized if weights[n].ndim == 1 or weights[n].shape[1:] == (1,))]
    for matrix in reversed([n for n in sized if weights[n].ndim == 2]):
        if rows(matrix).shape[1] != vectors.shape[-1] or len(vectors) != len(scores):
            continue
        # as it is; items of unit length, for vectors that are; both made so
        for unit, normalize in ((False, False), (True, False), (False, True)):
            plain = maker(matrix, None, unit, normalize=normalize)().scores(vectors)
            for bias in biases:
                rest = scores if bias is None else scores - rows(bias).flatten()
                factor = float((plain * rest).sum() / plain.square().sum().clamp_min(1e-12))
                scale = 1.0 if abs(factor - 1) < 1e-5 else factor
                if float((plain * scale - rest).abs().max()) <= close:
                    yield maker(matrix, bias, unit, normalize=normalize, scale=scale)
