"""The strength for a budget: the best admissible of those tried, on validation alone."""

import numpy as np
import polars as pl
import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Catalogue, Histories, leave_one_out
from steerrec.errors import DataError
from steerrec.evaluation import evaluate
from steerrec.objectives import Objective
from steerrec.operations import ResponseSteering
from steerrec.strengths import choose_strength, objective_of

from .tiny import TinyRecommender

ITEMS, WIDTH = 60, 8


@pytest.fixture(scope="module")
def rec():
    """One direction of the scores is popularity."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.randn(ITEMS, WIDTH, generator=generator)
    embedding, matrix = taste.clone(), taste.clone()
    embedding[:, 0], matrix[:, 0] = 1.0, torch.linspace(1.5, -1.5, ITEMS)
    return TinyRecommender(embedding, matrix, (1000 / (1 + torch.arange(ITEMS))).int().tolist())


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    weights = 1 / (1 + np.arange(ITEMS))
    users = [rng.choice(ITEMS, 6, p=weights / weights.sum()).tolist() for _ in range(300)]
    return leave_one_out(Histories.from_lists(users), num_items=ITEMS)


@pytest.fixture(scope="module")
def sae():
    return SparseAutoencoder(WIDTH, 32, 4).requires_grad_(False)


def less_popular(alpha=1.0):
    constant = torch.zeros(WIDTH)
    constant[0] = -1.0
    return ResponseSteering(torch.zeros(32, WIDTH), constant, alpha)


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("unit", [1.0, 0.3, -2.0])
def test_the_strength_is_the_best_that_keeps_the_budget(rec, sae, split, budget, unit):
    recipe = less_popular(unit)
    found = choose_strength(rec, sae, recipe, split, budget=budget, k=5)
    base = found.tried[0.0]
    kept = {
        alpha: metrics["objective gini"]
        for alpha, metrics in found.tried.items()
        if metrics["ndcg@5"] >= (1 - budget) * base["ndcg@5"]
        and not metrics["ndcg_tail@5"] < base["ndcg_tail@5"]
    }
    assert found.alpha in kept
    assert found.tried[found.alpha]["objective gini"] == min(kept.values())
    if budget and unit > 0:
        assert found.alpha > 0
    transform = recipe.with_alpha(found.alpha).transform(sae)
    again = evaluate(rec, split, which="valid", k=5, transform=transform).metrics
    assert again["gini@5"] == found.tried[found.alpha]["objective gini"]


def test_finer_strengths_are_between_the_neighbours_of_the_best(rec, sae, split):
    found = choose_strength(rec, sae, less_popular(), split, budget=0.3, k=5)
    powers = [a for a in found.tried if a and np.log2(a) == round(np.log2(a))]
    finer = [alpha for alpha in found.tried if alpha not in (0.0, *powers)]
    below, above = (
        max(a for a in [0, *powers] if a < min(finer)),
        [a for a in powers if a > max(finer)],
    )
    assert len(finer) >= 6
    assert above
    assert not [a for a in powers if below < a < min(above) and a not in (found.alpha,)][1:]


def test_a_recipe_that_only_harms_gets_strength_0(rec, sae, split):
    worse = less_popular() * -1
    assert choose_strength(rec, sae, worse, split, budget=0.05, k=5).alpha == 0


@pytest.mark.parametrize(
    ("name", "metric", "sign"), [("popularity", "arp@5", 1), ("tail_share", "tail_share@5", -1)]
)
def test_other_objectives(rec, sae, split, name, metric, sign):
    found = choose_strength(rec, sae, less_popular(), split, objective=name, budget=0.3, k=5)
    assert found.alpha > 0
    assert sign * found.tried[found.alpha][metric] < sign * found.tried[0.0][metric]


def test_users_are_drawn_by_the_seed(rec, sae, split):
    some = [
        choose_strength(rec, sae, less_popular(), split, k=5, max_users=50, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert some[0] == some[1]
    assert some[0].tried[0.0] != some[2].tried[0.0]


def test_budgets_that_make_no_sense(rec, sae, split):
    for budget in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="expected a share of nDCG"):
            choose_strength(rec, sae, less_popular(), split, budget=budget)


# --- objectives in words


@pytest.fixture(scope="module")
def genres():
    return Catalogue(
        pl.DataFrame(
            {
                "row": [0, 1, 2, 3],
                "item_id": [0, 1, 2, 3],
                "title": ["a", "b", "c", "d"],
                "count": [4, 3, 2, 1],
                "genre": ["x", "y", "x", "y"],
            }
        )
    )


def made(text, catalogue) -> Objective:
    split = leave_one_out(Histories.from_lists([[0, 1, 2], [3, 2, 1]]), num_items=len(catalogue))
    return objective_of(text, catalogue, split)


def test_the_share_of_a_group_is_raised(genres):
    goal = made("genre=x", genres)
    assert goal.name == "share-genre-x"
    assert goal.value(torch.tensor([3, 1, 0, 0])) == -0.75
    assert goal.prices(torch.tensor([3.0, 1, 0, 0])).tolist() == [-0.5, 0.5, -0.5, 0.5]


def test_a_share_is_brought_to_a_number(genres):
    goal = made("genre=x@0.25", genres)
    assert goal.value(torch.tensor([1, 3, 0, 0])) == pytest.approx(0.0)
    assert goal.value(torch.tensor([3, 1, 0, 0])) == pytest.approx(0.5)


def test_named_objectives(genres):
    assert made("gini", genres).name == "gini"
    for text, message in (
        ("fame", "no objective 'fame'; expected one of gini.*or a group of items"),
        ("genre=x@2", "'2' is no share between 0 and 1"),
        ("genre=x@much", "'much' is no share"),
        ("genre=z", "no item has genre 'z'"),
    ):
        with pytest.raises(DataError, match=message):
            made(text, genres)
