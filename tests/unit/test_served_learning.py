"""Steering learned for the users who are served: its parts against oracles, its guard, its use."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch

from steerrec import served_fitting
from steerrec.autoencoder import Latents
from steerrec.comparison import compare
from steerrec.data import Catalogue, Histories
from steerrec.errors import ArtifactError, DataError, MethodError, TrainingError
from steerrec.evaluation import capture_held_out, capture_users, measure, rank
from steerrec.fitting import MASKED
from steerrec.item_dtypes import with_item_dtype
from steerrec.metrics import gini
from steerrec.objectives import coverage, even_exposure, named_objective
from steerrec.recommender import ItemHead
from steerrec.rerank.learned_served import LearnedServed
from steerrec.served_fitting import Projection, ServedFit, ServedTraining
from steerrec.served_learning import learn_for_users
from steerrec.served_steering import ServedSteering, learn_served_path
from steerrec.steering import SteerTransform

from .learning_cases import ITEMS, WIDTH, popular_model, small_sae, tasteful_split

K = 5
QUICK = ServedTraining(growth=0.25, learning_rate=0.1, near=20, fresh=10, look_every=4)


@pytest.fixture(scope="module")
def rec():
    return popular_model()


@pytest.fixture(scope="module")
def split():
    return tasteful_split()


@pytest.fixture(scope="module")
def sae():
    return small_sae()


@pytest.fixture(scope="module")
def users(rec, split):
    return capture_held_out(rec, split, "test")


@pytest.fixture(scope="module")
def path(rec, sae, users):
    goal = even_exposure()
    return learn_served_path(
        rec.item_head, sae, users.vectors, goal, price=6.0, k=K, training=QUICK
    )


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_latents(users, d_sae, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(users, d_sae, generator=generator).topk(k).indices
    values = torch.rand(users, k, generator=generator)
    values[:, -1] *= values[:, -1] > 0.5  # some are not active at all
    return Latents(values, indices)


# --- what responses can do of a change


@pytest.mark.parametrize("users", [12, 200])
@pytest.mark.parametrize("without_loops", [False, True])
def test_a_projection_is_ridge_regression(users, without_loops, monkeypatch):
    """12 users are fewer than the latents, 200 are more: either system, one solution."""
    if without_loops:
        monkeypatch.setattr(served_fitting, "served_kernels", lambda: None)
    latents, change = some_latents(users, 40, 4), randn(users, 6, seed=1)
    f = latents.dense(40).double()
    penalty = 0.1 * float(f.square().sum()) / 40
    want = torch.linalg.solve(f.T @ f + penalty * torch.eye(40).double(), f.T @ change.double())
    project = Projection(latents, 40, ridge=0.1)
    assert project.is_dual == (users == 12)
    torch.testing.assert_close(project(change).double(), want, atol=1e-5, rtol=1e-4)


def test_neurons_that_are_in_nobody_respond_with_nothing():
    latents = Latents(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[3, 1], [5, 1]]))
    responses = Projection(latents, 8, ridge=1e-9)(torch.tensor([[4.0], [6.0]]))
    assert responses.flatten().tolist() == pytest.approx([0, 0, 0, 4, 0, 3, 0, 0])


# --- gradients


def heads():
    weight = randn(30, WIDTH, seed=2)
    return {
        "dot product": ItemHead(weight),
        "bias and scale": ItemHead(weight, randn(30, seed=3), scale=0.5),
        "cosine": ItemHead(weight, scale=4.0, normalize=True),
    }


@pytest.mark.parametrize("kind", heads())
@pytest.mark.parametrize("without_loops", [False, True])
def test_gradients_are_those_of_the_loss_over_all_items(kind, without_loops, monkeypatch):
    """All items are in question here, so that the loss can be written down in full."""
    if without_loops:
        monkeypatch.setattr(served_fitting, "served_kernels", lambda: None)
    head, sae, x = heads()[kind], small_sae(), randn(9, WIDTH, seed=4)
    training = ServedTraining(near=20, fresh=10)
    fit = ServedFit(head, sae, x, even_exposure(), k=3, seen=None, training=training)
    change, prices = 0.3 * randn(9, WIDTH, seed=5), randn(30, seed=6)
    items, base = fit._in_question(change)
    found, slots = fit._gradient(items, base, change, prices)

    moved = (x + change).requires_grad_()
    wanted = ((head.scores(x) - prices) / fit.heat).softmax(dim=1)
    log_shares = (head.scores(moved) / fit.heat).log_softmax(dim=1)
    loss = (fit.heat * (wanted * (wanted.log() - log_shares))).sum()
    (want,) = torch.autograd.grad(loss, moved)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)
    listed = head.scores(moved).topk(3).indices
    assert torch.equal(slots, torch.bincount(listed.flatten(), minlength=30).float())


def test_items_in_question_are_the_best_before_and_the_best_of_the_others_now():
    head, x, change = ItemHead(randn(30, WIDTH, seed=2)), randn(9, WIDTH, seed=4), 3.0
    seen = Histories.from_lists([[i, i + 10] for i in range(9)])
    training = ServedTraining(near=6, fresh=5)
    fit = ServedFit(head, small_sae(), x, even_exposure(), k=3, seen=seen, training=training)
    items, base = fit._in_question(torch.full_like(x, change))
    for user in range(9):
        allowed = [i for i in range(30) if i not in (user, user + 10)]
        before, now = (head.scores(v[user]).tolist() for v in (x, x + change))
        near = sorted(allowed, key=lambda i: -before[i])[:6]
        fresh = sorted((i for i in allowed if i not in near), key=lambda i: -now[i])[:5]
        assert sorted(items[user, :6].tolist()) == sorted(near)
        assert sorted(items[user, 6:].tolist()) == sorted(fresh)
        assert base[user].tolist() == pytest.approx([before[i] for i in items[user]], abs=1e-5)


@pytest.mark.parametrize("without_loops", [False, True])
def test_seen_items_get_no_slot_and_pull_nobody(without_loops, monkeypatch):
    """In a catalogue this small they are among the items in question."""
    if without_loops:
        monkeypatch.setattr(served_fitting, "served_kernels", lambda: None)
    head, x = ItemHead(randn(12, WIDTH, seed=2)), randn(5, WIDTH, seed=4)
    best = head.scores(x).topk(3).indices
    seen = Histories.from_lists(best.tolist())
    fit = ServedFit(head, small_sae(), x, even_exposure(), k=3, seen=seen, training=QUICK)
    change, prices = 0.3 * randn(5, WIDTH, seed=5), randn(12, seed=6)
    items, base = fit._in_question(change)
    assert items.shape == (5, 12)
    assert int((base == MASKED).sum()) == 15
    gradient, slots = fit._gradient(items, base, change, prices)

    moved = (x + change).requires_grad_()
    left = torch.ones(5, 12, dtype=torch.bool).scatter(1, best, False)
    before = head.scores(x).masked_fill(~left, -torch.inf)
    wanted = ((before - prices) / fit.heat).softmax(dim=1)
    log_shares = (head.scores(moved).masked_fill(~left, -1e9) / fit.heat).log_softmax(dim=1)
    loss = -(fit.heat * wanted * log_shares).sum()
    (want,) = torch.autograd.grad(loss, moved)
    torch.testing.assert_close(gradient, want, atol=1e-5, rtol=1e-4)
    assert float(want.abs().max()) > 0.1
    listed = head.scores(moved).scatter(1, best, -torch.inf).topk(3).indices
    assert torch.equal(slots, torch.bincount(listed.flatten(), minlength=12).float())


def test_a_user_with_hardly_an_item_left_is_no_measure_of_the_others():
    """The perplexity of the scores cannot be reached there, however high the temperature."""
    head, x = ItemHead(randn(12, WIDTH, seed=2)), randn(40, WIDTH, seed=4)

    def fit(lists):
        seen = Histories.from_lists(lists)
        return ServedFit(head, small_sae(), x, even_exposure(), k=3, seen=seen, training=QUICK)

    plain, odd = fit([[]] * 40), fit([list(range(10))] + [[]] * 39)
    assert odd.unit == pytest.approx(plain.unit, rel=0.1)
    assert float(odd.heat.max()) < 10 * plain.unit
    _, slots = odd._gradient(odd.near, odd.base, torch.zeros_like(x), torch.zeros(12))
    assert int(slots.sum()) == 2 + 39 * 3  # two are left for the first


def test_a_user_of_enormous_scores_is_no_measure_of_the_others_either():
    head, x = ItemHead(randn(12, WIDTH, seed=2)), randn(41, WIDTH, seed=4)
    longer = torch.cat([x[:40], 1000 * x[40:]])
    plain, odd = (
        ServedFit(head, small_sae(), v, even_exposure(), k=3, seen=None, training=QUICK)
        for v in (x, longer)
    )
    assert odd.unit == pytest.approx(plain.unit, rel=0.1)


# --- what it must not depend on


def test_the_same_model_in_other_units_is_steered_alike(rec, sae, users):
    """User vectors ten times as long, item rows a tenth: the scores are the same."""
    sae = type(sae).from_weights({n: p.detach().clone() for n, p in sae.named_parameters()}, sae.k)
    found = []
    for scale in (1.0, 10.0):
        head = ItemHead(rec.item_head.weight / scale)
        longer = sae.fold_normalisation(torch.zeros(WIDTH), scale)
        path = learn_served_path(
            head, longer, scale * users.vectors, even_exposure(), price=3.0, k=K, training=QUICK
        )
        moved = path.recipes[-1].transform(longer)(scale * users.vectors)
        found.append(head.scores(moved))
    torch.testing.assert_close(*found, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("of_head", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of_sae", [torch.float32, torch.float64])
def test_head_and_sae_may_have_any_dtype(rec, sae, users, of_head, of_sae):
    head = ItemHead(rec.item_head.weight.to(of_head))
    own = type(sae).from_weights(
        {n: p.detach().to(of_sae) for n, p in sae.named_parameters()}, sae.k
    )
    path = learn_served_path(
        head, own, users.vectors, even_exposure(), price=3.0, k=K, training=QUICK
    )
    moved = path.at(0.7).transform(own)(users.vectors)
    before, after = (
        torch.bincount(head.scores(head.cast(v)).topk(K).indices.flatten(), minlength=ITEMS)
        for v in (users.vectors, moved)
    )
    assert gini(after) < gini(before) - 0.02


def test_rounded_items_are_refused(rec, sae, split, users):
    rounded = with_item_dtype(rec, "int8")
    with pytest.raises(TrainingError, match="the item matrix is rounded"):
        learn_served_path(rounded.item_head, sae, users.vectors, even_exposure())
    with pytest.raises(TrainingError, match="the item matrix is rounded"):
        learn_for_users(rounded, sae, split, users)


# --- the path


def test_prices_grow_evenly_from_the_identity_to_the_last(path):
    assert not bool(path.recipes[0].vectors.any())
    prices = [recipe.provenance["price"] for recipe in path.recipes]
    assert prices == pytest.approx(list(range(7)))
    assert path.at(0.5).provenance["price"] == pytest.approx(3.0)
    assert path.recipes[-1].provenance["learned_on"] == "served"
    assert not any(bool(recipe.constant.any()) for recipe in path.recipes)


def test_exposure_of_these_users_lists_becomes_more_even_as_the_price_grows(rec, users, sae, path):
    found = [
        measure(rec, users, k=K, transform=path.at(position).transform(sae)).metrics["gini@5"]
        for position in (0.0, 0.3, 0.6, 1.0)
    ]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] - 0.1


def test_more_of_the_catalogue_is_covered_than_by_a_path_of_other_users(rec, sae, users):
    """What it is for: the lists at hand are known, so that each missing item can be placed."""
    reached = {"own": 0.0, "others": 0.0}
    groups = [users.vectors[i : i + 20] for i in range(0, 200, 20)]
    for own, others in pairwise(groups):
        for name, vectors in (("own", own), ("others", others)):
            path = learn_served_path(
                rec.item_head, sae, vectors, coverage(ITEMS, 20), price=6.0, k=K, training=QUICK
            )
            moved = path.recipes[-1].transform(sae)(own)
            listed = rec.item_head.scores(moved).topk(K).indices
            reached[name] += len(listed.unique()) / ITEMS / 9
    assert reached["own"] > reached["others"] + 0.05


def test_same_seed_same_path(rec, sae, users, path):
    def learned(**changes):
        training = replace(QUICK, **changes)
        goal = even_exposure()
        return learn_served_path(
            rec.item_head, sae, users.vectors, goal, price=6.0, k=K, training=training
        ).digest()

    assert learned() == path.digest()
    assert learned(seed=1) == path.digest()  # nothing is drawn where all users are learned from
    assert learned(users=100) == learned(users=100)
    assert learned(users=100) != learned(users=100, seed=1)


def test_a_price_between_two_looks_is_reached_in_equal_steps(rec, sae, users):
    path = learn_served_path(
        rec.item_head, sae, users.vectors, even_exposure(), price=1.1, k=K, training=QUICK
    )
    found = [(recipe.provenance["steps"], recipe.provenance["price"]) for recipe in path.recipes]
    assert found == [(0, 0.0), (4, pytest.approx(0.55)), (8, pytest.approx(1.1))]
    assert path.at(0.25).provenance["price"] == pytest.approx(0.275)


# --- at a budget


@pytest.fixture(scope="module")
def chosen(rec, sae, split, users):
    return learn_for_users(
        rec, sae, split, users, objective="gini", budget=0.2, k=K, training=QUICK
    )


def test_the_price_is_chosen_on_validation(rec, sae, split, users, chosen):
    """The same is learned for validation users up to that price, and measured by other means."""
    found, valid = chosen.provenance, capture_held_out(rec, split, "valid")
    path = learn_served_path(
        rec.item_head,
        sae,
        valid.vectors,
        even_exposure(),
        price=16.0,
        k=K,
        training=QUICK,
    )
    before = measure(rec, valid, k=K).metrics
    admitted = {}
    for recipe in path.recipes:
        after = measure(rec, valid, k=K, transform=SteerTransform(sae, recipe)).metrics
        keeps = after["ndcg@5"] >= 0.8 * before["ndcg@5"]
        if keeps and after["ndcg_tail@5"] >= before["ndcg_tail@5"]:
            admitted[recipe.provenance["price"]] = after["gini@5"]
    best = min(admitted, key=admitted.get)
    assert 0 < best < 16
    assert found["price"] == pytest.approx(best)
    assert found["valid"]["gini"] == pytest.approx(admitted[best])
    assert found["budget"] == 0.2
    assert (found["split"], found["users"], found["learned_from"]) == ("test", 300, 300)
    alone = learn_served_path(
        rec.item_head, sae, users.vectors, even_exposure(), price=best, k=K, training=QUICK
    )
    assert torch.equal(alone.recipes[-1].vectors, chosen.vectors)
    assert chosen.name == "learned-served-gini"


def test_a_budget_of_0_is_the_identity(rec, sae, split, users):
    steering = learn_for_users(rec, sae, split, users, budget=0.0, k=K, training=QUICK)
    assert torch.equal(SteerTransform(sae, steering)(users.vectors), users.vectors)
    assert torch.equal(SteerTransform(sae, steering)(users.vectors, 1.0), users.vectors)
    assert (steering.provenance["users"], steering.provenance["k"]) == (300, K)
    assert (steering.provenance["price"], steering.alpha) == (0.0, 0.0)


def test_whole_histories_and_masked_items(rec, sae, split):
    """What production does: nobody's next item is known."""
    users, options = capture_users(rec, split.train), {"budget": 0.3, "k": K, "mask_seen": True}
    options |= {"objective": "gini", "training": QUICK}
    steering = learn_for_users(rec, sae, split, split.train, **options)
    again = learn_for_users(rec, sae, split, users, **options)
    assert torch.equal(again.vectors, steering.vectors)
    assert steering.provenance["mask_seen"] is True
    assert steering.provenance["users"] == len(split.train)
    transform = SteerTransform(sae, steering)
    lists = rank(rec, users, k=K, mask_seen=True, transform=transform).ids
    base = rank(rec, users, k=K, mask_seen=True).ids
    exposures = [torch.bincount(found[found >= 0], minlength=ITEMS) for found in (base, lists)]
    assert steering.alpha == 1.0
    assert gini(exposures[1]) < gini(exposures[0]) - 0.02
    unmasked = learn_for_users(rec, sae, split, users, **options | {"mask_seen": False})
    assert not torch.equal(unmasked.vectors, steering.vectors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"growth": 0}, "growth is 0; expected a number of at least 1e-12"),
        ({"near": 20.5}, "near is 20.5; expected an integer of at least 1"),
        ({"near": 0}, "near is 0; expected an integer of at least 1"),
        ({"users": -1}, "users is -1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
    ],
)
def test_settings_that_make_no_sense_are_said(changes, said):
    with pytest.raises(TrainingError, match=said):
        ServedTraining(**changes)


def test_what_cannot_be_learned_is_said(rec, sae, split, users):
    with pytest.raises(TrainingError, match="budget is 1"):
        learn_for_users(rec, sae, split, users, budget=1.0)
    with pytest.raises(TrainingError, match="no users to learn steering for"):
        learn_served_path(rec.item_head, sae, users.vectors[:0], even_exposure())
    with pytest.raises(TrainingError, match="price is"):
        learn_served_path(rec.item_head, sae, users.vectors, even_exposure(), price=0.0)
    with pytest.raises(DataError, match="k is 61 but the catalogue has 60 items"):
        learn_served_path(rec.item_head, sae, users.vectors, even_exposure(), k=61)
    with pytest.raises(DataError, match="seen holds 1 histories for 300 user vectors"):
        learn_served_path(
            rec.item_head,
            sae,
            users.vectors,
            even_exposure(),
            seen=Histories.from_lists([[1]]),
        )
    with pytest.raises(TrainingError, match="a user vector is not finite"):
        learn_served_path(rec.item_head, sae, users.vectors / 0, even_exposure())
    silent = type(sae)(WIDTH, 32, k=4)
    torch.nn.init.constant_(silent.b_enc, -1e6)
    with pytest.raises(TrainingError, match="no neuron of this SAE fires"):
        learn_served_path(rec.item_head, silent, users.vectors, even_exposure(), training=QUICK)
    with pytest.raises(ArtifactError, match="reads vectors of width 4"):
        learn_for_users(rec, type(sae)(4, 8, k=2), split, users)
    with pytest.raises(TrainingError, match="became infinite in step"):
        learn_served_path(
            rec.item_head,
            sae,
            users.vectors,
            even_exposure(),
            training=replace(QUICK, learning_rate=1e38),
        )


# --- as a method of a comparison


def test_validation_and_test_users_are_steered_by_recipes_of_their_own(rec, sae, split, users):
    steering = ServedSteering(sae, "gini", price=6.0, training=QUICK)
    methods = {"learned-served": LearnedServed(steering)}
    compared = compare(rec, split, methods, reference="learned-served", k=K, pool=20, replicates=5)
    method = compared.methods[0]
    assert len(method.settings) == 20
    assert method.settings[0].test == pytest.approx(compared.base["test"], nan_ok=True)
    for which in ("valid", "test"):
        part = capture_held_out(rec, split, which)
        path = learn_served_path(
            rec.item_head, sae, part.vectors, even_exposure(), price=6.0, k=K, training=QUICK
        )
        setting = method.settings[13]
        transform = path.at(setting.value).transform(sae)
        alone = measure(rec, part, k=K, transform=transform).metrics
        assert getattr(setting, which) == pytest.approx(alone, nan_ok=True)
    assert steering.seconds > 0
    assert method.fit_seconds == pytest.approx(steering.seconds)
    assert method.description["learning"]["objective"] == "gini"


def test_a_comparison_that_masks_seen_items_learns_for_such_lists(rec, sae, split, users):
    steering = ServedSteering(sae, "gini", price=3.0, training=QUICK)
    methods = {"learned-served": LearnedServed(steering)}
    options = {"reference": "learned-served", "k": K, "pool": 20, "replicates": 5}
    found = compare(rec, split, methods, mask_seen=True, **options).methods[0].settings[-1].test
    goal, seen = even_exposure(), users.histories
    path = learn_served_path(
        rec.item_head, sae, users.vectors, goal, price=3.0, k=K, seen=seen, training=QUICK
    )
    transform = path.recipes[-1].transform(sae)
    alone = measure(rec, users, k=K, mask_seen=True, transform=transform).metrics
    assert found == pytest.approx(alone, nan_ok=True)


def test_what_learning_took_is_kept_with_the_result(rec, sae, split, tmp_path):
    def run():
        steering = ServedSteering(sae, "gini", price=2.0, training=QUICK)
        methods = {"learned-served": LearnedServed(steering)}
        options = {"reference": "learned-served", "k": K, "pool": 20, "replicates": 5}
        found = compare(rec, split, methods, folder=tmp_path, **options)
        return found.methods[0].fit_seconds, steering.seconds

    first, again = run(), run()
    assert first[0] == pytest.approx(first[1])
    assert again == (pytest.approx(first[0]), 0.0)  # read, not learned anew


def test_an_objective_of_attributes_that_only_the_data_have(rec, sae, split, users):
    frame = rec.catalogue.frame.with_columns(genres=pl.Series(["odd", "even"] * (ITEMS // 2)))
    catalogue = Catalogue(frame)
    options = {"objective": "genres=even", "budget": 0.5, "k": K, "training": QUICK}
    steering = learn_for_users(rec, sae, split, users, catalogue=catalogue, **options)
    base, lists = (
        rank(rec, users, k=K, transform=t).ids for t in (None, SteerTransform(sae, steering))
    )
    assert float((lists % 2).float().mean()) > float((base % 2).float().mean()) + 0.05
    with pytest.raises(DataError, match="genres"):
        learn_for_users(rec, sae, split, users, **options)


def test_a_position_off_the_path_is_no_method(sae):
    with pytest.raises(MethodError, match="position is 2"):
        LearnedServed(ServedSteering(sae), position=2)


# --- objectives


def test_coverage_and_broad_prices_by_hand():
    exposure = torch.tensor([0.0, 0.5, 3.0])
    want = 0.5 - np.exp(-np.array([0, 5, 30]) / 1.5)
    assert coverage(3, 10).prices(exposure).numpy() == pytest.approx(want)
    assert coverage(3, 10).value(exposure) == pytest.approx(-2 / 3)
    counts, groups = torch.tensor([9, 5, 1]), torch.tensor([0, 1, 2])
    one = {name: named_objective(name, counts, groups, users=10) for name in ("ltc", "entropy")}
    broad = named_objective("broad", counts, groups, users=10)
    mixed = (
        0.5 * one["ltc"].prices(exposure).double()
        + 0.5 * coverage(3, 10).prices(exposure).double()
        + 0.2 * one["entropy"].prices(exposure).double()
    )
    torch.testing.assert_close(broad.prices(exposure), mixed)
