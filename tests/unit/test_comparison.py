"""Comparisons: each row by hand from its parts, resumed, the same again."""

import json
from dataclasses import replace

import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.choosing import choose
from steerrec.comparison import compare
from steerrec.data import leave_one_out
from steerrec.errors import DataError
from steerrec.evaluation import capture_held_out, measure
from steerrec.rerank import reranker
from steerrec.steering import Steering, SteerTransform

from .tiny import random_histories, random_recommender

ITEMS = 60
OPTIONS = {"k": 5, "pool": 20, "replicates": 40}


@pytest.fixture(scope="module")
def rec():
    return random_recommender(items=ITEMS, width=6)


@pytest.fixture(scope="module")
def split():
    return leave_one_out(random_histories(300, ITEMS, shortest=3), num_items=ITEMS)


@pytest.fixture(scope="module")
def transform():
    sae = SparseAutoencoder(6, 24, k=4, generator=torch.Generator().manual_seed(1))
    shift = torch.randn(24, generator=torch.Generator().manual_seed(2))
    return SteerTransform(sae.requires_grad_(False), Steering(shift, name="random"))


@pytest.fixture(scope="module")
def methods(transform):
    return {
        "popsteer": reranker("popsteer", transform=transform),
        "logit-adjustment": reranker("logit-adjustment"),
        "random": reranker("random"),
    }


@pytest.fixture(scope="module")
def found(rec, split, methods):
    return compare(rec, split, methods, **OPTIONS)


def test_settings_are_measured_one_by_one(rec, split, transform, found):
    method = found.methods[0]
    assert [setting.value for setting in method.settings] == list(
        reranker("popsteer", transform=transform).settings
    )
    for which in ("valid", "test"):
        users = capture_held_out(rec, split, which)
        for setting in (method.settings[0], method.settings[7]):
            alone = measure(rec, users, k=5, transform=lambda x, s=setting: transform(x, s.value))
            assert getattr(setting, which) == pytest.approx(alone.metrics, nan_ok=True)
    assert found.base["test"] == pytest.approx(method.settings[0].test, nan_ok=True)


def test_rows_are_chosen_on_validation_and_told_on_test(found):
    for method in found.methods:
        assert len(method.rows) == 2 * 3
        valid = [setting.valid for setting in method.settings]
        for row in method.rows:
            chosen = method.settings[choose(valid, row.budget, row.by)]
            assert row.value == chosen.value
            assert row.metrics == pytest.approx(chosen.test, nan_ok=True)
            low, high = row.interval["ndcg"]
            assert low <= row.metrics["ndcg@5"] <= high


def test_only_the_others_are_compared_with_the_reference(found):
    reference, other, control = found.methods
    assert not any(row.against for row in reference.rows)
    row = other.row(0.1)
    expected = row.metrics["ndcg@5"] - reference.row(0.1).metrics["ndcg@5"]
    assert row.against["ndcg"]["difference"] == pytest.approx(expected, abs=0.02)
    assert control.control
    assert not other.control


def test_what_is_outside_and_who_loses(rec, split, methods, found):
    unchanged = compare(rec, split, {"popsteer": methods["popsteer"]}, budgets=[0.0], **OPTIONS)
    row = unchanged.methods[0].row(0.0)
    if row.value == 0:
        assert row.outside == 0
        assert row.by_taste["unsteered"] == row.by_taste["method"]
    for method in found.methods:
        for row in method.rows:
            assert 0 <= row.outside <= 1
            parts = row.by_taste["method"]  # three equal parts: their mean is the whole
            assert sum(parts) / 3 == pytest.approx(row.metrics["ndcg@5"], abs=1e-6)


def test_a_second_run_is_the_same_but_for_its_times(rec, split, methods, found):
    again = compare(rec, split, methods, **OPTIONS)
    for one, other in zip(found.methods, again.methods, strict=True):
        timeless = replace(other, milliseconds=one.milliseconds, fit_seconds=one.fit_seconds)
        assert json.dumps(plain(one)) == json.dumps(plain(timeless))


def plain(method):
    from dataclasses import asdict

    from steerrec.comparison_results import plain

    return plain(asdict(method))


def test_a_run_goes_on_where_it_stopped(rec, split, methods, found, tmp_path, monkeypatch):
    two = {name: methods[name] for name in ("popsteer", "random")}
    compare(rec, split, two, folder=tmp_path, **OPTIONS)
    made = []
    for method in methods.values():
        kind = type(method)
        lists = kind.lists

        def counted(self, candidates, lists=lists):
            made.append(self.name)
            return lists(self, candidates)

        monkeypatch.setattr(kind, "lists", counted)
    resumed = compare(rec, split, methods, folder=tmp_path, **OPTIONS)
    assert set(made) == {"logit-adjustment"}
    for one, other in zip(found.methods, resumed.methods, strict=True):
        timeless = replace(other, milliseconds=one.milliseconds)
        assert json.dumps(plain(one)) == json.dumps(plain(timeless))
    made.clear()
    compare(rec, split, methods, folder=tmp_path, **{**OPTIONS, "k": 4})
    assert set(made) == {"popsteer", "logit-adjustment", "random"}  # another protocol
    made.clear()
    (tmp_path / "methods" / "random.json").write_text("{")
    compare(rec, split, methods, folder=tmp_path, **{**OPTIONS, "k": 4})
    assert set(made) == {"random"}


def test_another_recipe_of_the_same_name_is_measured_anew(rec, split, transform, tmp_path):
    first = {"popsteer": reranker("popsteer", transform=transform)}
    one = compare(rec, split, first, folder=tmp_path, **OPTIONS)
    other = transform.with_steering(replace(transform.steering, shift=-transform.steering.shift))
    two = compare(
        rec, split, {"popsteer": reranker("popsteer", transform=other)}, folder=tmp_path, **OPTIONS
    )
    assert one.methods[0].settings[9].test != two.methods[0].settings[9].test


def test_what_cannot_be_compared(rec, split, methods):
    with pytest.raises(DataError, match="no method"):
        compare(rec, split, {})
    with pytest.raises(DataError, match="reference 'popsteer' is not among"):
        compare(rec, split, {"random": methods["random"]})


def test_json_has_null_for_what_is_undefined(found):
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["protocol"]["k"] == 5
