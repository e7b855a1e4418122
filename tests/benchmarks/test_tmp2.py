"""What steering costs beside serving without it, in turns in one process: `pytest -s` shows ratios.

The host is the reference SASRec (width 64, two layers, 50 positions) with its fast path, the last
layer for the newest item alone, so that no ratio is flattered by a slow host. The SAE has 4,096
latents, 32 active. `STEERREC_CLOCK=process` takes the processor time of all threads instead of the
time on the wall, which other work on the machine does not change.

Nothing asserts a time, only that the ways compared agree: where this runs decides the times.
"""

import os
import time

import pytest
import torch

from steerrec.adapters.sasrec import SASRecConfig, SASRecModel
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering, SteerTransform

from .interleaved import compare, show
from .test_hook_cost import last_row_only

WIDTH, LATENTS, K, ITEMS, LENGTH = 64, 4096, 32, 3_416, 50
SITE = Site("final_norm", positions_from=TokenIds("item_embedding"))
CLOCK = time.process_time if os.environ.get("STEERREC_CLOCK") == "process" else time.perf_counter


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sae():
    return SparseAutoencoder(WIDTH, LATENTS, K).requires_grad_(False)


@pytest.fixture(scope="module")
def steering():
    return Steering(randn(LATENTS, seed=1) * 0.3)


def host(newest_only=True):
    torch.manual_seed(0)
    config = SASRecConfig(num_items=ITEMS, hidden_size=WIDTH, max_position_embeddings=LENGTH)
    model = SASRecModel(config).eval().requires_grad_(False)
    model.newest_only = newest_only
    return model


def histories(batch):
    """Histories of 1 to 50 items, one of them as long as the window."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, ITEMS + 1, (batch, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (batch, 1), generator=generator)
    lengths[0] = LENGTH
    return ids * (torch.arange(LENGTH) < lengths)


@pytest.mark.parametrize(("batch", "rounds"), [(256, 400), (1, 1000)])
@pytest.mark.parametrize("items", [ITEMS, 1_000_000], ids="{:,} items".format)
def test_forward_scores_and_lists(sae, steering, batch, rounds, items):
    """Bare and steered: forward, scores of the whole catalogue, ten best."""
    ids = histories(batch)
    # a model each, so that none is called twice in a round, with one memory of their weights
    bare, before, steered = host(), host(), host()
    for twin in (before, steered):
        twin.load_state_dict(bare.state_dict(), assign=True)
    head = ItemHead(bare.item_matrix if items == ITEMS else randn(items, WIDTH, seed=5))
    rounds = rounds if items == ITEMS else rounds // 5

    def vectors(model):
        last = -1 if batch == 1 else (ids != 0).sum(dim=1).clamp_min(1) - 1
        return model(ids, newest=last).last_hidden_state[:, 0]

    transform = SteerTransform(sae, steering)
    with attach(steered, sae, site=SITE, steering=steering) as attachment:
        named = {
            "bare": lambda: top_k(vectors(bare), head, 10),
            "steered user vectors": lambda: top_k(transform(vectors(before)), head, 10),
            "steered by the hook": lambda: top_k(vectors(steered), head, 10),
        }
        found = compare(named, rounds=rounds, clock=CLOCK)
        moved = torch.equal(vectors(steered), vectors(bare))
        torch.testing.assert_close(vectors(steered), transform(vectors(bare)))
        attachment.enabled = False
        assert not moved
        assert torch.equal(vectors(steered), vectors(bare))
    show(f"forward, scores and ten best of {items:,} items, batch {batch}", found)


@pytest.mark.parametrize(("batch", "rounds"), [(256, 400), (1, 1000)])
def test_the_host_beside_the_fastest_forward_known(batch, rounds):
    ids, fast, full = histories(batch), host(), host(newest_only=False)
    named = {
        "fastest known": lambda: last_row_only(full, ids),
        "newest_only": lambda: fast.score(ids),
        "all positions": lambda: full.score(ids),
    }
    found = compare(named, rounds=rounds, clock=CLOCK)
    torch.testing.assert_close(fast.score(ids), full.score(ids), atol=1e-5, rtol=1e-4)
    show(f"forward and scores of {ITEMS:,} items, batch {batch}", found)


@pytest.mark.parametrize(("batch", "rounds"), [(256, 300), (1, 2000)])
def test_the_transform_beside_encoder_and_topk(sae, steering, batch, rounds):
    x = randn(batch, WIDTH, seed=3)
    bias = sae.b_enc - sae.b_dec @ sae.W_enc
    transform = SteerTransform(sae, steering)
    named = {
        "encoder and torch.topk, bare": lambda: torch.addmm(bias, x, sae.W_enc).topk(K),
        "transform": lambda: transform(x),
    }
    show(f"the step on user vectors, batch {batch}", compare(named, rounds=rounds, clock=CLOCK))


def test_a_sweep_of_ten_strengths(sae, steering):
    from steerrec.many_strengths import steered_at

    x, alphas = randn(1024, WIDTH, seed=3), [0.1 * n for n in range(1, 11)]
    transform = SteerTransform(sae, steering)
    named = {
        "one strength after another": lambda: [transform(x, alpha) for alpha in alphas],
        "base selection shared": lambda: list(steered_at(x, transform, alphas)),
    }
    found = compare(named, rounds=20, clock=CLOCK)
    for one, other in zip(*(function() for function in named.values()), strict=True):
        assert torch.equal(one, other)
    show("1,024 users at ten strengths", found)
