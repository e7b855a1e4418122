"""What recipes of all kinds have in common: the formula, strengths, arithmetic, and graphs."""

import copy
import pickle

import pytest
import torch
from torch.export import Dim, export

from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError, SiteError
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.recipes import Recipe
from steerrec.sites import Site
from steerrec.steering import Steering
from steerrec.sums import SteeringSum

from .recipe_cases import all_kinds, change, latents, randn, random_sae, response, shift, users

KINDS = sorted(all_kinds())
GRAPHED = ("gated", "nested")  # between them they have a step of each kind
SAE = random_sae()


def transform(recipe):
    return recipe.transform(SAE)


def strengths(value, x):
    return torch.full((len(x), 1), float(value))


# --- every kind against its formula


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [1.0, -0.6, 2.5])
@pytest.mark.parametrize("rows", [1, 50, 300])
def test_each_kind_is_its_formula(kind, alpha, rows):
    x, recipe = users(rows), all_kinds(alpha)[kind]
    want = x + change(recipe, SAE, x, strengths(recipe.alpha, x))
    torch.testing.assert_close(transform(recipe)(x), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_loops_torch_gives_the_same(kind, monkeypatch):
    x = users()
    step = transform(all_kinds(0.8)[kind])
    looped = step(x)
    monkeypatch.setattr("steerrec.plans.step_kernels", lambda: None)
    for module in ("operations", "selection"):
        monkeypatch.setattr(f"steerrec.{module}.kernels", lambda: None)
    torch.testing.assert_close(step(x), looped, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_strength_0_returns_x_bit_for_bit(kind, dtype):
    x = users().to(dtype)
    kept = x.clone()
    recipe = all_kinds()[kind]
    assert torch.equal(transform(recipe * 0.0)(x), x)
    assert torch.equal(transform(recipe)(x, torch.zeros(len(x))), x)
    assert torch.equal(x, kept)  # and nothing is written in place
    assert transform(recipe)(x).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_per_user_are_each_user_alone(kind):
    """With batches of the same size not a bit differs: each user is in a batch of its own twin."""
    x = users(6)
    alpha = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, -1.0])
    step = transform(all_kinds()[kind])
    together = step(x, alpha)
    for i, strength in enumerate(alpha.tolist()):
        assert torch.equal(step(x, strength)[i], together[i])
        alone = step(x[i : i + 1], strength)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_strengths_per_user_are_kept_apart_in_chunks(kind):
    x = users(300)
    alpha = randn(300, seed=11)
    want = x + change(all_kinds()[kind], SAE, x, alpha.unsqueeze(1))
    found = transform(all_kinds()[kind])(x, alpha)
    torch.testing.assert_close(found, want, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_users_at_all(kind):
    assert transform(all_kinds()[kind])(users(0)).shape == (0, 8)


# --- arithmetic


def test_a_factor_is_one_on_the_strength():
    recipe = shift(0.5)
    assert [(recipe * 3).alpha, (3 * recipe).alpha, (-recipe).alpha] == [1.5, 1.5, -0.5]
    assert (recipe * 3).shift is recipe.shift
    assert recipe.named("other").name == "other"


def test_shifts_add_up_to_one_shift():
    total = shift(0.5, seed=1) - shift(2.0, seed=2) * 0.25
    assert isinstance(total, Steering)
    assert total.alpha == 1.0
    torch.testing.assert_close(total.shift, 0.5 * randn(32, seed=1) - 0.5 * randn(32, seed=2))
    assert [term["alpha"] for term in total.provenance["terms"]] == [0.5, -0.5]


def test_responses_add_up_to_one_response():
    one, other = response(0.5), response(-2.0, seed=20)
    total = one + other
    assert isinstance(total, ResponseSteering)
    x = users()
    want = x + change(one, SAE, x, 0.5) + change(other, SAE, x, -2.0)
    torch.testing.assert_close(transform(total)(x), want, atol=2e-5, rtol=1e-5)


def test_other_kinds_become_terms_of_a_sum():
    total = (shift(0.5) + latents(2.0)) * 0.5
    assert isinstance(total, SteeringSum)
    x = users()
    want = x + change(shift(), SAE, x, 0.25) + change(latents(), SAE, x, 1.0)
    torch.testing.assert_close(transform(total)(x), want, atol=2e-5, rtol=1e-5)


def test_sums_of_sums_are_flat_with_one_term_a_kind_in_any_order():
    a, b, c, d = shift(0.5, seed=1), shift(1.0, seed=2), response(0.3), latents()
    x = users()
    orders = [((a + c) * 2 + b) + d, (d + (b + (a + c) * 2)), (a * 2 + b) + (c * 2 + d)]
    for total in orders:
        assert isinstance(total, SteeringSum)
        assert sorted(term.operation for term in total.terms) == ["latents", "response", "shift"]
    first, *others = (transform(total)(x) for total in orders)
    for other in others:
        torch.testing.assert_close(other, first, atol=2e-5, rtol=1e-5)


def test_what_is_subtracted_from_itself_is_nothing():
    x = users()
    for recipe in (shift(), response(), latents()):
        torch.testing.assert_close(transform(recipe - recipe)(x), x, atol=1e-5, rtol=0)


def test_a_sum_says_what_it_is_made_of():
    total = (shift(0.5) + latents(2.0)) * 3 + response(0.1)
    assert total.name == "shift-and-latents-and-response"
    found = [(term["name"], term["alpha"]) for term in total.provenance["terms"]]
    assert found == [("shift", 1.5), ("latents", 6.0), ("response", 0.1)]
    assert total.describe()["operation"] == "sum"
    long = shift().named("x" * 90) + latents().named("y" * 90)
    assert len(long.name) == 100


def test_sums_that_make_no_sense_are_refused():
    with pytest.raises(TypeError):
        shift() + 1
    with pytest.raises(TypeError):
        shift() - "popularity"
    with pytest.raises(ArtifactError, match="'shift' is for 32 latents, 'steering' for 5"):
        shift() + Steering(torch.zeros(5))
    with pytest.raises(ArtifactError, match="puts the reconstruction in place of the vector"):
        shift() + Steering(torch.zeros(32), splice="reconstruct")
    with pytest.raises(ArtifactError, match="of equal numbers of latents"):
        SteeringSum((shift(), Steering(torch.zeros(5))))
    with pytest.raises(ArtifactError, match="of equal numbers of latents"):
        SteeringSum(())


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_for_another_sae_is_refused(kind):
    with pytest.raises(ArtifactError, match="use the SAE that it was made with"):
        all_kinds()[kind].transform(SparseAutoencoder(5, 16, 2))


# --- where Python may not look at the numbers


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_user_vectors(kind):
    x = users(20).requires_grad_(True)
    step = transform(all_kinds()[kind])
    step(x).square().sum().backward()
    eps, direction = 1e-3, randn(20, 8, seed=5)
    with torch.no_grad():  # x is random: no selection changes within so small a step but for few
        ends = [step(x + sign * eps * direction).square().sum(dim=1) for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * eps)
    found = (x.grad * direction).sum(dim=1)
    close = (found - slope).abs() <= 0.02 * (1 + slope.abs())
    assert close.double().mean() >= 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind):
    x = users(12)
    step = transform(all_kinds()[kind])
    mapped = torch.func.vmap(step)(x.view(3, 4, 8))
    torch.testing.assert_close(mapped.view(12, 8), step(x), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GRAPHED)
def test_compiled_is_eager(kind):
    torch.compiler.reset()
    x = users(12)
    step = transform(all_kinds()[kind])
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), step(x), atol=2e-5, rtol=1e-5)
    alpha = torch.linspace(0, 1, 12)
    torch.testing.assert_close(compiled(x, alpha), step(x, alpha), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GRAPHED)
def test_exported_is_eager_for_batches_of_any_size(kind):
    step = transform(all_kinds()[kind])
    rows = Dim("rows", min=2)
    shapes = {"x": {0: rows}, "alpha": {0: rows}}
    program = export(step, (users(5), torch.ones(5)), dynamic_shapes=shapes).module()
    x, alpha = users(9), torch.linspace(-1, 1, 9)
    torch.testing.assert_close(program(x, alpha), step(x, alpha), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_takes_over_another_recipe_of_its_kind(kind):
    here, there = transform(all_kinds()[kind]), transform(all_kinds(0.5)[kind])
    for buffer in there.step.buffers():
        buffer.mul_(0.5)
    here.copy_from(there)
    x = users()
    assert torch.equal(here(x), there(x))
    other = transform(all_kinds()["shift" if kind != "shift" else "response"])
    with pytest.raises(SiteError, match="the compiled model steers by"):
        here.copy_from(other)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_devices(kind):
    step = transform(all_kinds()[kind])
    x = users()
    assert torch.equal(copy.deepcopy(step)(x), step(x))
    assert torch.equal(pickle.loads(pickle.dumps(step))(x), step(x))
    double = copy.deepcopy(step).double()(x.double())
    assert double.dtype == torch.float64
    close = (double.float() - step(x)).abs().amax(dim=1) < 1e-3  # a tie may be broken otherwise
    assert close.double().mean() > 0.95


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_on_a_live_model(kind):
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(8, 5)).requires_grad_(False)
    recipe, x = all_kinds(0.7)[kind], users()
    with attach(model, SAE, site=Site("0", layout="BH"), steering=recipe) as attachment:
        found = model(x)
        attachment.steering = recipe * 0.0
        assert torch.equal(model(x), model[1](x))
    torch.testing.assert_close(found, model[1](transform(recipe)(x)), atol=1e-5, rtol=1e-5)


def test_every_kind_describes_itself():
    for recipe in all_kinds().values():
        assert isinstance(recipe, Recipe)
        assert {"name", "operation"} <= set(recipe.describe())
    assert LatentSteering.operation == "latents"
