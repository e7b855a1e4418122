"""Sites, capture, edit and attach on clones of the recommenders that people have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerrec import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.capturing import capture
from steerrec.errors import SiteError
from steerrec.hooks import edit
from steerrec.sites import Lengths, Site, TokenIds, get_module

from .clones import CLONES, Clone, H, L

HISTORIES = [[0, 5, 3, 1], [7], [2, 2, 9, 4, 11, 6], [8, 0, 10]]
USERS = len(HISTORIES)

Tool = Callable[..., AbstractContextManager[Any]]


def name(value: object) -> str:
    """How a clone, a site or a silent path is called in the name of a test."""
    if isinstance(value, Clone):
        return value.name
    if isinstance(value, Site):
        picked = ".".join(map(str, value.select))
        return f"{value.path}.{value.method or value.at}[{picked}]({value.call})"
    return str(value) or "root"


def each(values: Any) -> pytest.MarkDecorator:
    names = {1: "clone", 2: "clone, site"}[len(values[0]) if isinstance(values[0], tuple) else 1]
    return pytest.mark.parametrize(names, values, ids=name)


each_clone = each(CLONES)


def options(clone: Clone) -> dict[str, Any]:
    """What capture, edit and attach are told about the fast path."""
    return {"mha_fast_path": False} if clone.needs_slow_attention else {}


def plain_scores(clone: Clone, model: nn.Module) -> Tensor:
    """The scores of the model as it is, without the fast path where that gives NaN."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and not clone.needs_slow_attention)
    try:
        return clone.score(model, HISTORIES)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def user_vectors(clone: Clone, model: nn.Module) -> Tensor:
    """What is captured at the recommended site; of the last step where there are several."""
    with capture(model, clone.site, **options(clone)) as captured:
        clone.score(model, HISTORIES)
    return captured[clone.site][-USERS:]


def push(rows: Tensor) -> Tensor:
    """The rows, each number moved by another amount."""
    return rows + torch.linspace(0.5, 1.5, rows.shape[-1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- the recommended site ------------------------------------------------------------------------


@each_clone
def test_scores_of_captured_user_vectors_are_the_scores_of_the_library(clone: Clone) -> None:
    model = clone.build()
    users = user_vectors(clone, model)
    assert users.shape == (USERS, H)
    close(clone.head(model, users), plain_scores(clone, model))


@each_clone
def test_observing_leaves_the_scores_as_they_are(clone: Clone) -> None:
    model = clone.build()
    sae = SparseAutoencoder(H, 32, k=4)
    with attach(model, sae, site=clone.site, **options(clone)) as attachment:
        observed = clone.score(model, HISTORIES)
    assert attachment.firings > 0
    assert torch.equal(observed, plain_scores(clone, model))


@each_clone
def test_an_edit_gives_the_scores_of_the_edited_user_vectors(clone: Clone) -> None:
    model = clone.build()
    users = user_vectors(clone, model)
    with edit(model, clone.site, push, **options(clone)):
        edited = clone.score(model, HISTORIES)
    close(edited, clone.head(model, push(users)))
    assert not torch.allclose(edited, plain_scores(clone, model), atol=1e-2)


SLOW = [clone for clone in CLONES if clone.needs_slow_attention]


@each(SLOW)
def test_nan_of_the_fast_path_is_refused(clone: Clone) -> None:
    model = clone.build()
    assert torch.backends.mha.get_fastpath_enabled()
    assert clone.score(model, HISTORIES).isnan().any()
    assert plain_scores(clone, model).isfinite().all()
    with pytest.raises(SiteError, match="fast path"), capture(model, clone.site):
        clone.score(model, HISTORIES)


# --- positions -----------------------------------------------------------------------------------


def oriented(site: Site, tensor: Tensor) -> Tensor:
    """As [B, L, H], or [R, H] where there is no length."""
    axes = {"LBH": (1, 0, 2), "BHL": (0, 2, 1)}.get(site.layout)
    return tensor if axes is None else tensor.permute(axes)


@contextmanager
def watched(model: nn.Module, site: Site) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What a plain torch hook finds at a site: the tensor itself, and a copy made at once."""
    found: list[tuple[Tensor, Tensor]] = []
    module = get_module(model, site.path)

    def find(value: Any) -> None:
        for key in site.select:
            value = value[key]
        found.append((value, value.clone()))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = site.select and isinstance(site.select[0], str)
        find(kwargs if by_name else args if site.select else args[0])

    if site.at == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(lambda _, __, output: find(output))
    with handle:
        yield found


def emitted(clone: Clone, model: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """What a site's module gives when it counts, all users together, and all that came before."""
    with watched(model, site) as found:
        plain_scores(clone, model)
    firings = [oriented(site, copy) for _, copy in found]
    if site.call == "only":  # once for each user, where the library takes them one by one
        return torch.cat(firings), torch.empty(0)
    call = 0 if site.call == "first" else int(site.call)
    return firings[call], torch.cat([torch.empty(0), *map(torch.flatten, firings[:call])])


def chosen(clone: Clone, site: Site) -> Tensor:
    """Which positions a site means: [B, L], or [R] where it is jagged."""
    wanted = real = clone.real(HISTORIES)
    if site.positions == "user":
        wanted = torch.arange(L) == (real * torch.arange(L)).amax(dim=1, keepdim=True)
    return wanted[real] if site.layout == "jagged" else wanted


def in_layers(clone: Clone) -> list[Site]:
    """The clone's sites where a plain hook sees positions too."""
    sites = (clone.site, *clone.others)
    return [s for s in sites if s.method is None and s.layout != "BH" and s.call != "all"]


def knows_padding(site: Site) -> bool:
    source = site.positions_from
    return isinstance(source, Lengths) or (isinstance(source, TokenIds) and source.pad_id >= 0)


LAYERS = [(clone, site) for clone in CLONES for site in in_layers(clone)]
REAL = [(clone, replace(site, positions="real")) for clone, site in LAYERS if knows_padding(site)]


@each(LAYERS + REAL)
def test_only_the_positions_of_the_site_change(clone: Clone, site: Site) -> None:
    model = clone.build()
    before, earlier = emitted(clone, model, site)
    with edit(model, site, push, **options(clone)):
        after, earlier_too = emitted(clone, model, site)
    positions = chosen(clone, site)
    assert torch.equal(after[~positions], before[~positions])
    close(after[positions], push(before[positions]))
    assert torch.equal(earlier_too, earlier)


# --- nothing stays behind ------------------------------------------------------------------------


def left_on(model: nn.Module) -> dict[str, Any]:
    """Hooks and attributes of every module."""
    return {
        path: (
            list(module._forward_hooks.values()),
            list(module._forward_pre_hooks.values()),
            list(vars(module)),
        )
        for path, module in model.named_modules()
    }


def fail_after(_: Tensor) -> None:
    raise ZeroDivisionError


TOOLS: dict[str, Tool] = {
    "capture": capture,
    "edit": lambda model, site, **settings: edit(model, site, push, **settings),
    "attach": lambda model, site, **settings: attach(
        model, SparseAutoencoder(H, 32, k=4), site=site, **settings
    ),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
@each_clone
def test_nothing_stays_on_the_model(clone: Clone, tool: Tool) -> None:
    model = clone.build()
    scores = plain_scores(clone, model)
    found = left_on(model)  # after a forward: Hugging Face adds hooks of its own
    with tool(model, clone.site, **options(clone)):
        clone.score(model, HISTORIES)
        assert left_on(model) != found
    assert left_on(model) == found
    assert torch.equal(plain_scores(clone, model), scores)

    with pytest.raises(ZeroDivisionError), tool(model, clone.site, **options(clone)):
        fail_after(clone.score(model, HISTORIES))
    assert left_on(model) == found
    assert torch.equal(plain_scores(clone, model), scores)
    assert torch.backends.mha.get_fastpath_enabled()


# --- places that never fire ----------------------------------------------------------------------


SILENT = [(clone, Site(path, layout="BH")) for clone in CLONES for path in clone.silent]


@each(SILENT)
def test_a_silent_module_is_refused_with_the_reason(clone: Clone, site: Site) -> None:
    model = clone.build()
    with pytest.raises(SiteError) as refused, capture(model, site, **options(clone)):
        clone.score(model, HISTORIES)
    message = str(refused.value).replace(f"site {site}", "")
    assert clone.silent[site.path] in message


# --- further sites -------------------------------------------------------------------------------


OTHERS = [(clone, site) for clone in CLONES for site in clone.others]


@each(OTHERS)
def test_other_sites_give_one_row_a_user(clone: Clone, site: Site) -> None:
    model = clone.build()
    with capture(model, site, **options(clone)) as captured:
        scores = clone.score(model, HISTORIES)
    assert torch.equal(scores, plain_scores(clone, model))
    rows = captured[site]
    assert rows.ndim == 2
    assert rows.shape[1] in (H, scores.shape[1])  # scores are vectors too
    assert len(rows) == USERS or (len(rows) % USERS == 0 and site.call in ("only", "all"))


@each(OTHERS)
def test_other_sites_can_be_replaced_by_what_they_are(clone: Clone, site: Site) -> None:
    model = clone.build()
    with edit(model, site, torch.clone, **options(clone)) as hook:
        scores = clone.score(model, HISTORIES)
    assert hook.firings > 0
    assert torch.equal(scores, plain_scores(clone, model))


# --- tensors that the library writes into --------------------------------------------------------


WRITTEN_LATER = [(clone, site) for clone in CLONES for site in clone.written_later]


@each(WRITTEN_LATER)
def test_a_capture_is_not_changed_by_the_library_afterwards(clone: Clone, site: Site) -> None:
    model = clone.build()
    with (
        watched(model, site) as found,
        capture(model, site, **options(clone)) as captured,
    ):
        clone.score(model, HISTORIES)
    assert any(not torch.equal(tensor, copy) for tensor, copy in found)
    counted = found[:1] if site.call == "first" else found
    rows = [oriented(site, copy).flatten(0, -2) for _, copy in counted]
    assert torch.equal(captured[site], torch.cat(rows))


@each(WRITTEN_LATER)
def test_latents_are_those_of_the_moment_of_the_hook(clone: Clone, site: Site) -> None:
    model, sae = clone.build(), SparseAutoencoder(H, 32, k=4)
    with capture(model, site) as captured, attach(model, sae, site=site) as attachment:
        clone.score(model, HISTORIES)
    latents = attachment.latents.dense(32)
    close(latents, sae.encode(captured[site][-len(latents) :]).dense(32))


@each(WRITTEN_LATER)
def test_the_library_does_not_write_into_a_replacement(clone: Clone, site: Site) -> None:
    model = clone.build()
    kept: list[Tensor] = []

    def keep(rows: Tensor) -> Tensor:
        kept.append(torch.ones_like(rows))
        return kept[-1]

    with edit(model, site, keep):
        clone.score(model, HISTORIES)
    assert all(torch.equal(rows, torch.ones_like(rows)) for rows in kept)
