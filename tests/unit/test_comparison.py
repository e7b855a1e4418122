"""Comparisons: each row by hand from its parts, resumed, the same again."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.choosing import choose
from steerrec.comparison import compare
from steerrec.comparison_plots import plot_frontiers, plot_who_loses
from steerrec.data import Histories, leave_one_out
from steerrec.errors import DataError, ModelError
from steerrec.evaluation import capture_held_out, measure
from steerrec.metrics import GROUP_NAMES
from steerrec.rerank import METHODS, gather_candidates, reranker
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


def test_who_is_worse_and_who_better_by_hand(rec, split, methods, found):
    """Users by the mean log count of their items, a third each; nDCG of each compared."""
    users = capture_held_out(rec, split, "test")
    counts = rec.catalogue.counts
    taste = [np.log1p(counts[h]).mean() for h in users.histories]
    thirds = np.array_split(np.argsort(taste, kind="stable"), 3)
    assert [len(third) for third in thirds] == [100, 100, 100]
    method, row = methods["logit-adjustment"], found.methods[1].row(0.1, "ltc")
    lists = method.at(row.value).lists(
        gather_candidates(
            users.vectors, rec.item_head, users.histories, rec.catalogue, k=5, pool=60
        )
    )
    own = measure(rec, users, k=5).user_ndcg.numpy()
    new = np.zeros(len(own))
    for user, (items, target) in enumerate(
        zip(lists.tolist(), users.targets.tolist(), strict=True)
    ):
        if target in items:
            new[user] = 1 / np.log2(items.index(target) + 2)
    assert (new != own).any()
    for part, third in enumerate(thirds):
        for name, value in (
            ("unsteered", own[third].mean()),
            ("method", new[third].mean()),
            ("worse", (new[third] < own[third] - 1e-6).mean()),
            ("better", (new[third] > own[third] + 1e-6).mean()),
        ):
            assert row.by_taste[name][part] == pytest.approx(value, abs=1e-6), name


def test_changes_are_relative_and_none_where_there_was_nothing(found):
    values = dict(zip(GROUP_NAMES, (0.2, 0.0, math.nan), strict=True))
    base = {f"ndcg_{group}@5": value for group, value in values.items()}
    row = replace(
        found.methods[0].row(0.05),
        metrics={f"ndcg_{group}@5": 0.1 for group in GROUP_NAMES},
        by_taste={"unsteered": [0.4, None, 0.0], "method": [0.5, None, 0.1]},
    )
    made = replace(found, base={"test": base})
    changes = made.changes(replace(found.methods[0], rows=(row,)), 0.05)
    assert changes["targets"] == [pytest.approx(-0.5), None, None]
    assert changes["tastes"] == [pytest.approx(0.25), None, None]


def test_a_sample_of_the_users(rec, split, methods):
    few = compare(rec, split, {"popsteer": methods["popsteer"]}, max_users=40, **OPTIONS)
    assert few.protocol["users"] == {"valid": 40, "test": 40}
    users = capture_held_out(rec, split, "test", max_users=40, seed=0)
    assert few.base["test"] == pytest.approx(measure(rec, users, k=5).metrics, nan_ok=True)


def test_both_pictures_are_drawn(found, tmp_path):
    for plot in (plot_frontiers, plot_who_loses):
        path = tmp_path / f"{plot.__name__}.svg"
        plot(found, path, title="Methods")
        text = path.read_text()
        assert "<svg" in text
    unchanged = replace(found, methods=tuple(m for m in found.methods if m.control))
    plot_frontiers(unchanged, tmp_path / "controls.png", title="Controls alone")


# --- worlds that are hardly any


@pytest.fixture(scope="module")
def every():
    names = [n for n in METHODS if not {"dimensions", "transform"} & set(METHODS[n].needs)]
    return {name: reranker(name) for name in names}


def small_world(items, users=40):
    rec = random_recommender(items=items, width=4)
    return rec, leave_one_out(random_histories(users, items, shortest=3), num_items=items)


def check_all(found, names):
    assert [method.name for method in found.methods] == list(names)
    for method in found.methods:
        assert method.settings[0].test == pytest.approx(found.base["test"], nan_ok=True)
        assert all(math.isfinite(value) for value in method.hypervolume.values())
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_user(rec, every):
    """Nothing can be resampled but the one: no interval has a width."""
    splits = [
        leave_one_out(Histories.from_lists([[4, 9, 4, target, target]]), num_items=ITEMS)
        for target in range(ITEMS)
    ]
    found_by_the_model = (
        split
        for split in splits
        if measure(rec, capture_held_out(rec, split, "valid"), k=10).metrics["ndcg@10"] > 0
    )
    found = compare(rec, next(found_by_the_model), every, reference="ipr", k=10, replicates=20)
    check_all(found, every)
    row = found.methods[0].row(0.1)
    assert row.interval["ndcg"] == pytest.approx((row.metrics["ndcg@10"],) * 2)
    assert sum(value is not None for value in row.by_taste["method"]) == 1


def test_groups_without_items(every):
    """Two items: one head, one tail, nothing between."""
    rec, split = small_world(2)
    assert set(rec.catalogue.groups.labels.tolist()) == {0, 2}
    check_all(compare(rec, split, every, reference="ipr", k=1, replicates=10), every)


def test_a_list_of_the_whole_catalogue_and_one_longer_than_the_pool(every):
    rec, split = small_world(12)
    found = compare(rec, split, every, reference="ipr", k=12, pool=5, replicates=10)
    check_all(found, every)  # the pool is as long as the list has to be
    assert found.protocol["pool"] == 12
    with pytest.raises(DataError, match="k is 13 but the catalogue has 12 items"):
        compare(rec, split, every, reference="ipr", k=13)


def test_constant_scores(every):
    """Whoever is scored alike gets the first rows; what re-ranking then does is still defined."""
    rec, split = small_world(12, users=80)
    rec.model.item_matrix.zero_()
    check_all(compare(rec, split, every, reference="ipr", k=4, replicates=10), every)


def test_scores_that_are_nan(every):
    rec, split = small_world(12)
    rec.model.item_matrix[3] = math.nan
    with pytest.raises(ModelError, match="a score is NaN"):
        compare(rec, split, every, reference="ipr", k=4)


def test_no_tail_item_recommended(every):
    rec, split = small_world(30, users=80)
    rec.model.item_embedding.weight.abs_()
    rec.model.item_matrix.abs_()
    rec.model.item_matrix[torch.from_numpy(rec.catalogue.groups.labels == 2)] *= -1
    found = compare(rec, split, every, reference="ipr", k=4, replicates=10)
    assert found.base["test"]["ltc@4"] == found.base["test"]["ndcg_tail@4"] == 0
    check_all(found, every)


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
