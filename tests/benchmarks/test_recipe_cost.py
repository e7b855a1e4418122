"""What a recipe of each kind costs beside the PopSteer rule: rounds in turn, in one run.

A number of the group is comparable with the others of the group only. `test_ratios` measures all
kinds in turn, by the CPU time of this process, and prints how many times the rule's each takes.
"""

import time

import pytest
import torch

from steerrec.autoencoder import SparseAutoencoder
from steerrec.gates import NeuronGate, TasteGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.steering import Steering

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


def cpu_seconds(transforms, x, rounds):
    """The least CPU time of each, of rounds in turn."""
    best = dict.fromkeys(transforms, float("inf"))
    for _ in range(rounds):
        for name, transform in transforms.items():
            started = time.process_time()
            transform(x)
            best[name] = min(best[name], time.process_time() - started)
    return best


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
    transforms = {name: recipe.transform(SAE) for name, recipe in RECIPES.items()}
    x = randn(users, WIDTH, seed=4)
    with torch.no_grad():
        cpu_seconds(transforms, x, 3)
        found = cpu_seconds(transforms, x, {1: 2000, 128: 150, 1024: 25}[users])
    torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\n{users} user vectors, CPU time as a multiple of the rule's:")  # noqa: T201
        for name, seconds in found.items():
            print(f"  {name:36} {seconds / found['rule']:.2f}  ({1e6 * seconds:,.0f} us)")  # noqa: T201
    if users > 1:
        assert max(found.values()) < 2 * found["rule"]
