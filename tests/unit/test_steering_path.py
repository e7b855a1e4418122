"""Paths of learned recipes: positions by hand, what they do, and as a method of a comparison."""

from dataclasses import replace

import pytest
import torch

from steerrec.comparison import compare
from steerrec.errors import ArtifactError, MethodError, TrainingError
from steerrec.evaluation import capture_held_out, measure
from steerrec.learning import SteeringTraining, learn_path, learn_steering
from steerrec.operations import ResponseSteering
from steerrec.rerank.learned import Learned
from steerrec.steering import SteerTransform
from steerrec.steering_path import SteeringPath

from .learning_cases import QUICK, popular_model, small_sae, tasteful_split

K = 5


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
def path(rec, sae, split):
    return learn_path(rec, sae, split, reach=0.3, k=K, training=QUICK)


@pytest.fixture(scope="module")
def compared(rec, sae, split, path):
    methods = {"learned": Learned(path.transform(sae))}
    return compare(rec, split, methods, reference="learned", k=K, pool=20, replicates=10)


def constants(*values):
    """A path of recipes that add a constant to everyone, and twice as much for each neuron."""
    recipes = [
        ResponseSteering(
            torch.full((3, 2), 2 * v),
            torch.tensor([v, -v]),
            provenance={"price": v, "rule": "learned"},
        )
        for v in values
    ]
    return SteeringPath(tuple(recipes))


# --- positions


def test_positions_by_hand():
    path = constants(0.0, 1.0, 4.0)
    for position, want in ((0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 2.5), (1, 4.0)):
        recipe = path.at(position)
        assert recipe.constant.tolist() == [want, -want]
        assert recipe.vectors.tolist() == [[2 * want, 2 * want]] * 3
        assert recipe.provenance["price"] == want
    assert constants(2.0).at(0.7).constant.tolist() == [2.0, -2.0]


def test_positions_off_the_path_are_refused():
    for position in (-0.1, 1.1, float("nan")):
        with pytest.raises(ArtifactError, match="position is"):
            constants(0.0, 1.0).at(position)
    with pytest.raises(ArtifactError, match="one recipe at least"):
        SteeringPath(())


def test_a_transform_is_the_recipe_at_each_position(path, sae):
    x = torch.randn(9, sae.d_in, generator=torch.Generator().manual_seed(0))
    transform = path.transform(sae)
    with torch.no_grad():
        for position in (0.3, 1.0, 0.3):
            want = SteerTransform(sae, path.at(position))(x)
            assert torch.equal(transform(x, position), want)
        assert torch.equal(transform(x, 0.0), x)


# --- what is learned


def test_the_path_begins_with_nothing_and_prices_grow(path):
    first = path.recipes[0]
    assert not bool(first.vectors.any() or first.constant.any())
    prices = [recipe.provenance["price"] for recipe in path.recipes]
    assert prices[0] == 0.0
    assert prices == sorted(set(prices))
    assert len(prices) > 2
    assert path.describe()["objective"] == "gini"
    assert path.describe()["recipes"] == len(prices)


def test_the_end_of_the_path_is_admitted_on_validation(rec, sae, split, path):
    users = capture_held_out(rec, split, "valid")
    before = measure(rec, users, k=K).metrics
    after = measure(rec, users, k=K, transform=SteerTransform(sae, path.recipes[-1])).metrics
    assert after["ndcg@5"] >= 0.7 * before["ndcg@5"]
    assert after["ndcg_tail@5"] >= before["ndcg_tail@5"]
    assert after["gini@5"] < before["gini@5"]
    assert path.recipes[-1].provenance["valid"]["gini"] == pytest.approx(after["gini@5"])


def test_the_recipe_for_a_budget_is_on_the_same_path(rec, sae, split, path):
    """Same seed, same settings: what is learned does not depend on who asks."""
    steering = learn_steering(rec, sae, split, budget=0.15, k=K, training=QUICK)
    same = [recipe for recipe in path.recipes if torch.equal(recipe.vectors, steering.vectors)]
    assert len(same) == 1
    assert same[0].provenance["steps"] == steering.provenance["steps"]


def test_same_seed_same_path(rec, sae, split, path):
    assert learn_path(rec, sae, split, reach=0.3, k=K, training=QUICK).digest() == path.digest()
    other = SteeringTraining(**{**vars(QUICK), "seed": 1, "users": 64})
    assert learn_path(rec, sae, split, reach=0.3, k=K, training=other).digest() != path.digest()
    turned = replace(path.recipes[-1], constant=path.recipes[-1].constant + 1e-6)
    assert SteeringPath((*path.recipes[:-1], turned)).digest() != path.digest()


@pytest.mark.parametrize("objective", ["entropy", "ltc", "even"])
def test_each_objective_is_lowered_on_validation(rec, sae, split, objective):
    found = learn_path(rec, sae, split, objective=objective, reach=0.3, k=K, training=QUICK)
    first, last = (found.recipes[i].provenance["valid"][objective] for i in (0, -1))
    assert last < first


def test_few_neurons_along_the_whole_path(rec, sae, split):
    few = SteeringTraining(**{**vars(QUICK), "neurons": 5})
    found = learn_path(rec, sae, split, reach=0.3, k=K, training=few)
    assert all(len(recipe.neurons) <= 5 for recipe in found.recipes)


def test_what_makes_no_sense_is_said(rec, sae, split):
    for reach in (0.0, 1.0):
        with pytest.raises(TrainingError, match="reach is"):
            learn_path(rec, sae, split, reach=reach)
    with pytest.raises(ValueError, match="no objective 'fame'"):
        learn_path(rec, sae, split, objective="fame")


# --- as a method


def test_twenty_settings_of_which_the_first_changes_nothing(rec, sae, split, path, compared):
    method = compared.methods[0]
    assert len(method.settings) == 20
    assert method.settings[0].test == pytest.approx(compared.base["test"], nan_ok=True)
    for place in (7, 19):
        setting = method.settings[place]
        transform = SteerTransform(sae, path.at(setting.value))
        alone = measure(rec, capture_held_out(rec, split, "test"), k=K, transform=transform)
        assert setting.test == pytest.approx(alone.metrics, nan_ok=True)


def test_how_it_was_learned_is_told(path, compared):
    found = compared.methods[0].description
    assert found["strength"] == "position"
    assert found["learning"]["objective"] == "gini"
    assert found["learning"]["training"] == vars(QUICK)
    assert found["digest"] == path.digest()


def test_a_position_off_the_path_is_no_method(path, sae):
    with pytest.raises(MethodError, match="position is 2"):
        Learned(path.transform(sae), position=2)
