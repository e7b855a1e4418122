"""Gates and rules of taste: who is steered, and how much."""

import numpy as np
import pytest
import torch

from steerrec.data import Histories
from steerrec.errors import ArtifactError, DataError
from steerrec.gates import GatedSteering, NeuronGate, TasteGate, fit_taste, gated
from steerrec.operations import ResponseSteering
from steerrec.recommender import user_vectors
from steerrec.steering import Steering

from .test_operations import axis_sae
from .tiny import TinyRecommender

ONE = ResponseSteering(torch.zeros(3, 3), torch.tensor([1.0, 10.0, 100.0]), 1.0, "constant")
X = torch.tensor([[3.0, 2.0, 1.0], [-1.0, 2.0, 5.0], [0.5, -3.0, -1.0]])  # active 0 1; 1 2; 0


def factors(recipe, x=X):
    """By how much each user was steered: `ONE` adds (1, 10, 100)."""
    added = recipe.transform(axis_sae())(x) - x
    torch.testing.assert_close(added, added[:, :1] * torch.tensor([1.0, 10.0, 100.0]))
    return [pytest.approx(value, abs=1e-6) for value in added[:, 0].tolist()]


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (NeuronGate(0), [1, 0, 1]),
        (NeuronGate(2), [0, 1, 0]),  # active in one, though its pre-activation is positive in two
        (NeuronGate(0, fires=False), [0, 1, 0]),
        (NeuronGate(0, threshold=1.0), [1, 0, 0]),
        (NeuronGate(0, threshold=3.0), [0, 0, 0]),
        (NeuronGate(1, threshold=1.9, fires=False), [0, 0, 1]),
    ],
)
def test_a_neuron_gate_is_open_where_the_neuron_fires(gate, expected):
    assert factors(gated(ONE, gate)) == expected


def test_a_rule_of_taste_is_linear_within_bounds():
    gate = TasteGate(torch.tensor([0.5, 0.0, 0.1]), 0.2, 0.3, 1.5)
    # 0.5 * 3 + 0.1 + 0.2 = 1.8, cut to 1.5; -0.5 + 0.5 + 0.2 = 0.2, raised to 0.3; 0.25 - 0.1 + 0.2
    assert factors(gated(ONE, gate)) == [1.5, 0.3, 0.35]


def test_strengths_multiply():
    recipe = gated(ONE * 0.5, NeuronGate(0)) * 3
    assert (recipe.alpha, recipe.recipe.alpha, recipe.name) == (3.0, 0.5, "constant")
    assert factors(recipe) == [1.5, 0, 1.5]
    out = recipe.transform(axis_sae())(X, torch.tensor([2.0, 2.0, -1.0])) - X
    torch.testing.assert_close(out[:, 0], torch.tensor([1.0, 0.0, -0.5]))


def test_gates_nest():
    inner = gated(ONE, NeuronGate(1))
    assert factors(gated(inner, NeuronGate(0))) == [1, 0, 0]


def test_users_whom_the_gate_leaves_out_keep_every_bit():
    shift = Steering(torch.tensor([1.0, -2.0, 0.5]))
    out = gated(shift, NeuronGate(2)).transform(axis_sae())(X)
    assert torch.equal(out[[0, 2]], X[[0, 2]])
    assert not torch.equal(out[1], X[1])


def test_gates_that_make_no_sense_are_refused():
    for wrong in (
        {"neuron": -1},
        {"neuron": 0, "threshold": -0.5},
        {"neuron": 0, "threshold": np.inf},
        {"neuron": 0, "threshold": np.nan},
    ):
        with pytest.raises(ArtifactError, match="a gate has a neuron from 0 and a threshold"):
            NeuronGate(**wrong)
    with pytest.raises(ArtifactError, match="reads neuron 3; the SAE has 3"):
        gated(ONE, NeuronGate(3)).transform(axis_sae())
    with pytest.raises(ArtifactError, match="finite weights"):
        TasteGate(torch.tensor([np.nan]), 0.0)
    with pytest.raises(ArtifactError, match="finite weights"):
        TasteGate(torch.zeros(2, 2), 0.0)
    for wrong in ((np.nan, 0.0, 1.0), (0.0, 2.0, 1.0), (0.0, 0.0, np.inf), (0.0, np.nan, 1.0)):
        with pytest.raises(ArtifactError, match="finite bias, and bounds"):
            TasteGate(torch.zeros(3), *wrong)
    with pytest.raises(ArtifactError, match="vectors of width 4, the SAE 3"):
        gated(ONE, TasteGate(torch.zeros(4), 0.0)).transform(axis_sae())
    with pytest.raises(ArtifactError, match="puts the reconstruction in place"):
        GatedSteering(Steering(torch.zeros(3), splice="reconstruct"), NeuronGate(0))


# --- taste that is learned


@pytest.fixture(scope="module")
def rec():
    """The first dimension of a user vector is the mean log popularity of the history."""
    counts = [2**i for i in range(10)]
    embedding = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    embedding[:, 0] = torch.tensor(counts).double().log1p().float()
    return TinyRecommender(embedding, embedding.clone(), counts, max_length=6)


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    return Histories.from_lists([rng.integers(0, 10, 5).tolist() for _ in range(200)] + [[]])


def test_taste_is_one_plus_slope_times_standard_deviations(rec, train):
    people = train.select(range(200))
    x = user_vectors(rec, people)
    taste = x[:, 0].double()
    want = 1 + 0.5 * (taste - taste.mean()) / taste.std(correction=0)
    gate = fit_taste(rec, train, slope=0.5, ridge=1e-9)
    found = (x @ gate.weights + gate.bias).clamp(gate.low, gate.high)
    torch.testing.assert_close(found, want.float().clamp(0, 2), atol=2e-3, rtol=0)
    other = fit_taste(rec, train, slope=-0.5, ridge=1e-9)
    torch.testing.assert_close(other.weights, -gate.weights)


def test_taste_is_seeded_and_of_no_more_users_than_asked_for(rec, train):
    one, same = (fit_taste(rec, train, users=50, seed=1) for _ in range(2))
    other = fit_taste(rec, train, users=50, seed=2)
    assert torch.equal(one.weights, same.weights)
    assert not torch.equal(one.weights, other.weights)


def test_users_of_equal_taste_have_a_factor_of_1(rec):
    gate = fit_taste(rec, Histories.from_lists([[3, 3]] * 5))
    x = user_vectors(rec, Histories.from_lists([[3], [9]]))
    torch.testing.assert_close(x @ gate.weights + gate.bias, torch.ones(2), atol=1e-3, rtol=0)


def test_taste_wants_histories(rec):
    with pytest.raises(DataError, match="1 training histories; expected at least 2"):
        fit_taste(rec, Histories.from_lists([[1, 2], []]))
