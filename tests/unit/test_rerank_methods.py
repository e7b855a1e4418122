"""What every re-ranking method has in common, tried on all of them."""

import json
import math
from dataclasses import fields

import pytest
import torch

from steerrec.attribution import AttributionTable
from steerrec.data import HEAD, MID, TAIL
from steerrec.errors import MethodError, SteerrecError
from steerrec.metrics import ranking_metrics
from steerrec.rerank import METHODS, reranker

from .rerank_cases import random_worlds, world


def table(width, seed=0):
    """An attribution table of so many dimensions."""
    generator = torch.Generator().manual_seed(seed)
    names = ("cohens_d", "mean_a", "mean_b")
    columns = {name: torch.randn(width, generator=generator) for name in names}
    columns |= {name: torch.rand(width, generator=generator) for name in ("std_a", "std_b")}
    return AttributionTable(columns, {"name": "popularity"})


def made_for(name, candidates, **parameters):
    """The method, with what it needs to work on these candidates."""
    needs = METHODS[name].needs
    if "dimensions" in needs:
        parameters["dimensions"] = table(max(candidates.vectors.shape[1], 1))
    if "transform" in needs:
        parameters["transform"] = lambda vectors, alpha: vectors + alpha * vectors.flip(1)
    return reranker(name, **parameters)


every = pytest.mark.parametrize("name", METHODS)


def check(case, lists):
    """Lists are of the right form, without repeats, and hold nothing that is left out."""
    candidates = case.candidates
    assert lists.dtype == torch.int64
    assert lists.shape == candidates.base.shape
    for user, row in enumerate(lists.tolist()):
        allowed = case.ranking(user)
        listed = [item for item in row if item != -1]
        assert len(set(listed)) == len(listed) == min(case.k, len(allowed))
        assert set(listed) <= set(allowed)


@every
def test_lists_in_all_kinds_of_worlds(name):
    kind = METHODS[name]
    for number, case in enumerate(random_worlds(40, seed=5)):
        settings = kind.settings if name != "random" else (0,)
        method = made_for(name, case.candidates).at(settings[number % len(settings)])
        before = {f.name: getattr(case.candidates, f.name) for f in fields(case.candidates)}
        copies = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
        lists = method.lists(case.candidates)
        check(case, lists)
        assert torch.equal(method.lists(case.candidates), lists)  # again
        for key, value in copies.items():
            assert torch.equal(getattr(case.candidates, key), value), key


@every
def test_twenty_settings_of_which_the_first_changes_nothing(name):
    kind = METHODS[name]
    assert len(kind.settings) == 20
    assert list(kind.settings) == sorted(set(kind.settings))
    assert kind.strength in {field.name for field in fields(kind)}
    for case in random_worlds(12, seed=6):
        first = next(iter(made_for(name, case.candidates).sweep()))
        assert getattr(first, kind.strength) == kind.settings[0]
        assert torch.equal(first.lists(case.candidates), case.candidates.base)


@every
def test_a_sweep_is_the_method_at_each_strength(name):
    case = next(random_worlds(1))
    method = made_for(name, case.candidates)
    swept = [getattr(m, method.strength) for m in method.sweep()]
    assert tuple(swept) == method.settings
    two = method.settings[2:4]
    assert tuple(getattr(m, method.strength) for m in method.sweep(two)) == two
    assert list(method.sweep(())) == []


@every
def test_descriptions_are_json(name):
    method = made_for(name, next(random_worlds(1)).candidates)
    described = json.loads(json.dumps(method.describe()))
    assert described["method"] == name
    assert described["strength"] in described["parameters"]
    known = {"pool", "groups", "counts", "histories", "vectors", "dimensions", "transform"}
    assert set(method.needs) <= known
    assert method.control == (name in ("random", "slot-filling"))


LABELS = [HEAD] * 4 + [MID] * 8 + [TAIL] * 12


def tailless(**options):
    """Users who are recommended head and mid items only."""
    scores = torch.rand(30, 24, generator=torch.Generator().manual_seed(0))
    scores[:, 12:] -= 1.0
    options = {"labels": LABELS, "k": 4, "pool": 24} | options
    histories = [[u % 24, (7 * u) % 24, 20] for u in range(30)]
    return world(scores, histories=histories, **options)


@every
def test_no_tail_item_recommended(name):
    """Nothing is divided by the nothing there is; metrics stay defined."""
    case = tailless()
    groups = {"counts": case.candidates.counts, "groups": case.candidates.labels}
    base = ranking_metrics(case.candidates.base, **groups)
    assert base["ltc@4"] == base["tail_share@4"] == 0
    strongest = 10 if name == "random" else METHODS[name].settings[-1]
    lists = made_for(name, case.candidates).at(strongest).lists(case.candidates)
    check(case, lists)
    assert all(math.isfinite(v) for v in ranking_metrics(lists, **groups).values())


@pytest.mark.parametrize(
    "name",
    ["logit-adjustment", "ipr", "fair", "pct", "pct-avg-equal", "p-mmf", "p-mmf-items", "xquad"],
)
def test_at_full_strength_methods_bring_the_tail_in(name):
    case = tailless()
    method = made_for(name, case.candidates).at(METHODS[name].settings[-1])
    assert (case.candidates.labels[method.lists(case.candidates)] == TAIL).any()


@every
def test_one_user_one_item_and_constant_scores(name):
    for case in (
        world([[1.0]], counts=[3], k=1),
        world([[1.0] * 6], labels=[HEAD, MID, TAIL] * 2, k=2),
        world([[0.0] * 6] * 4, labels=[MID] * 6, k=6),  # two groups without items
        world([[2.0, 1.0]], histories=[[0, 1]], k=2, mask_seen=True),  # nothing left
    ):
        settings = METHODS[name].settings
        for value in (settings[0], settings[1], settings[-1]):
            check(case, made_for(name, case.candidates).at(value).lists(case.candidates))


@every
def test_no_users(name):
    candidates = world(torch.empty(0, 6), k=2).candidates
    method = made_for(name, candidates).at(METHODS[name].settings[3])
    assert method.lists(candidates).shape == (0, 2)


# --- by name


def test_a_method_by_its_name():
    method = reranker("logit-adjustment", lam=0.25)
    assert type(method) is METHODS["logit-adjustment"]
    assert method.lam == 0.25
    assert method.at(1.5).lam == 1.5


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("irp", {}, "no re-ranking method 'irp'; did you mean ipr\\? there are popsteer, raw"),
        ("FA*IR", {}, "no re-ranking method 'FA\\*IR'; did you mean fair\\?"),
        ("x-quad", {}, "did you mean xquad\\?"),
        ("???", {}, "no re-ranking method '\\?\\?\\?'; there are popsteer"),
        ("ipr", {"lam": 1}, "ipr has no parameter 'lam'; it has alpha, transform"),
        ("ipr", {"alpha": -1}, "alpha is -1"),
        ("mean-difference", {}, "mean-difference needs dimensions=...; see MeanDifference"),
        ("popsteer", {"alpha": 2}, "popsteer needs transform=...; see PopSteer"),
    ],
)
def test_what_no_method_is(name, parameters, message):
    with pytest.raises(MethodError, match=message):
        reranker(name, **parameters)
    assert issubclass(MethodError, SteerrecError)


@every
def test_a_strength_that_is_no_number(name):
    method = made_for(name, next(random_worlds(1)).candidates)
    for value in (math.nan, -1):
        with pytest.raises(MethodError, match=f"{method.strength} is"):
            method.at(value)
