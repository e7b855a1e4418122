"""What a recipe of each kind costs beside the PopSteer rule: rounds in turn, in one run.

A number of the group is comparable with the others of the group only. `test_ratios` measures all
kinds in turn, by the CPU time of this process on one thread, and prints how many times the rule's
each takes.
"""

import time
from functools import partial

import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.gates import NeuronGate, TasteGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead
from steerrec.steering import Steering

from .interleaved import compare, show
from .test_serving_cost import histories, host

WIDTH, LATENTS, K = 64, 4096, 32  # the SAE of the ML-1M experiment


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SAE = SparseAutoencoder(WIDTH, LATENTS, K).requires_grad_(False)
RULE = Steering(0.1 * randn(LATENTS, seed=1), alpha=1.5)
SCALE = LatentSteering.scale(SAE, range(100), 0.5)
RESPONSE = ResponseSteering(0.1 * randn(LATENTS, WIDTH, seed=2), torch.zeros(WIDTH))
RECIPES = {
    "rule": RULE,
    "sum of two shifts": RULE * 0.5 - RULE * 0.2,
    "responses": RESPONSE,
    "latents scaled": SCALE,
    "rule + responses": RULE + RESPONSE,
    "rule + responses + latents scaled": RULE + RESPONSE + SCALE,
    "rule, gated by a neuron": gated(RULE, NeuronGate(3)),
    "rule, gated by taste": gated(RULE, TasteGate(0.1 * randn(WIDTH, seed=3), 1.0)),
}


@pytest.mark.benchmark(group="steer 1,024 user vectors by any recipe")
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(benchmark, name):
    transform, x = RECIPES[name].transform(SAE), randn(1024, WIDTH, seed=4)
    with torch.no_grad():
        assert benchmark(transform, x).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("users", [1, 128, 1024])
def test_ratios(users, capsys):
    """No time is asserted but what even a busy machine cannot hide: twice the rule's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, named = randn(users, WIDTH, seed=4), {}
    for name, recipe in RECIPES.items():
        named[name] = partial(recipe.transform(SAE), x)
    with torch.no_grad():
        rounds = {1: 4000, 128: 400, 1024: 60}[users]
        found = compare(named, rounds=rounds, clock=time.process_time, before=2)
    torch.set_num_threads(threads)
    with capsys.disabled():
        show(f"{users} user vectors, CPU time as a multiple of the rule's", found)
    if users > 1:
        assert max(timing.ratio for timing in found.values()) < 2


@pytest.mark.parametrize(("batch", "rounds"), [(256, 60), (1, 500)])
def test_in_serving(batch, rounds):
    """Forward of the reference SASRec, the recipe, scores of 3,416 items and the ten best."""
    ids, model = histories(batch), host()
    last = (ids != 0).sum(dim=1).clamp_min(1) - 1
    head, named = ItemHead(model.item_matrix), {}
    rule = RULE.transform(SAE)

    def lists(transform):
        vectors = model(ids, newest=last).last_hidden_state[:, 0]
        return top_k(transform(vectors), head, 10)

    for name, recipe in RECIPES.items():
        named[name] = partial(lists, rule.with_steering(recipe))  # of one SAE
    with torch.no_grad():
        found = compare(named, rounds=rounds)
        assert not torch.equal(named["rule"]().ids, named["responses"]().ids)
    show(f"forward, recipe, scores and ten best, batch {batch}", found)
