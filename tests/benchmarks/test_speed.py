"""What the fast ways gain over the plain ones; compare within a group, in the same run.

`make benchmark` prints the groups. Nothing here asserts a time, only that both ways agree: where
and when this runs decides the times.
"""

import pytest
import torch

from steerrec.attribution import AttributionTable
from steerrec.autoencoder import SparseAutoencoder
from steerrec.ranking import top_k
from steerrec.recommender import ItemHead
from steerrec.steering import Steering, SteerTransform

WIDTH, LATENTS, K = 64, 4096, 32  # the SAE of the ML-1M experiment
ALPHA = 1.5


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(WIDTH, LATENTS, K, generator=generator)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def users():
    return randn(1024, WIDTH, seed=1)


@pytest.fixture(scope="module")
def table():
    columns = {"cohens_d": randn(LATENTS, seed=2)}
    columns |= {name: randn(LATENTS, seed=3).abs() + 0.1 for name in ("std_a", "std_b")}
    return AttributionTable(columns, {"name": "popularity"})


# --- decode: 32 of 4,096 latents are not zero


@pytest.fixture(scope="module")
def latents(sae, users):
    return sae.encode(users)


@pytest.fixture(scope="module")
def decoded(sae, latents):
    return sae.decode(latents)


@pytest.mark.benchmark(group="decode 1,024 users")
def test_decode_by_embedding_bag(benchmark, sae, latents, decoded):
    assert torch.equal(benchmark(sae.decode, latents), decoded)


@pytest.mark.benchmark(group="decode 1,024 users")
def test_decode_dense(benchmark, sae, latents, decoded):
    found = benchmark(lambda: latents.dense(LATENTS) @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(found, decoded)


# --- the PopSteer rule and the step that it leads to


def steer_neuron_by_neuron(sae, table, x):
    """The rule as it is written down: weight, direction and spread of one neuron after another."""
    size = table["cohens_d"].abs()
    low, high = float(size.min()), float(size.max())
    pre_acts = sae.pre_acts(x)
    edited = pre_acts.clone()
    for j in range(LATENTS):
        d = float(table["cohens_d"][j])
        step = ALPHA * (abs(d) - low) / (high - low)
        if d > 0:
            edited[:, j] -= step * float(table["std_a"][j])
        elif d < 0:
            edited[:, j] += step * float(table["std_b"][j])
    return x + sae.decode(sae.activate(edited)) - sae.decode(sae.activate(pre_acts))


@pytest.fixture(scope="module")
def steered(sae, table, users):
    return SteerTransform(sae, Steering.popsteer(table, alpha=ALPHA))(users)


@pytest.mark.benchmark(group="PopSteer for 1,024 users, recipe included")
def test_popsteer_vectorised(benchmark, sae, table, users, steered):
    found = benchmark(lambda: SteerTransform(sae, Steering.popsteer(table, alpha=ALPHA))(users))
    assert torch.equal(found, steered)


@pytest.mark.benchmark(group="PopSteer for 1,024 users, recipe included")
def test_popsteer_neuron_by_neuron(benchmark, sae, table, users, steered):
    found = benchmark.pedantic(steer_neuron_by_neuron, (sae, table, users), rounds=3)
    torch.testing.assert_close(found, steered, atol=1e-4, rtol=1e-4)


# --- ranking a big catalogue

ITEMS = 50_000


@pytest.fixture(scope="module")
def head():
    return ItemHead(randn(ITEMS, WIDTH, seed=4))


@pytest.fixture(scope="module")
def best(users, head):
    return top_k(users[:256], head, 10).ids


@pytest.mark.benchmark(group="10 best of 50,000 items for 256 users")
def test_top_k_in_chunks(benchmark, users, head, best):
    assert torch.equal(benchmark(top_k, users[:256], head, 10).ids, best)


@pytest.mark.benchmark(group="10 best of 50,000 items for 256 users")
def test_full_sort(benchmark, users, head, best):
    found = benchmark.pedantic(
        lambda: head.scores(users[:256]).sort(dim=1, descending=True).indices[:, :10], rounds=3
    )
    assert (found == best).double().mean() > 0.999  # the matrix product may round another way


# --- what steering adds to scoring

SPLICES = ("delta", "reconstruct")


@pytest.fixture(scope="module")
def catalogue_head():
    return ItemHead(randn(3_416, WIDTH, seed=5))


@pytest.mark.benchmark(group="score 1,024 users over 3,416 items")
def test_scoring_unsteered(benchmark, users, catalogue_head):
    assert len(benchmark(top_k, users, catalogue_head, 10).ids) == len(users)


@pytest.mark.benchmark(group="score 1,024 users over 3,416 items")
@pytest.mark.parametrize("splice", SPLICES)
def test_scoring_steered(benchmark, sae, table, users, catalogue_head, splice):
    transform = SteerTransform(sae, Steering.popsteer(table, alpha=ALPHA, splice=splice))
    found = benchmark(lambda: top_k(transform(users), catalogue_head, 10))
    assert len(found.ids) == len(users)


@pytest.mark.benchmark(group="steer 1,024 user vectors")
@pytest.mark.parametrize("splice", SPLICES)
def test_splice(benchmark, sae, table, users, splice):
    transform = SteerTransform(sae, Steering.popsteer(table, alpha=ALPHA, splice=splice))
    assert benchmark(transform, users).shape == users.shape


@pytest.mark.benchmark(group="steer 1,024 user vectors")
def test_splice_with_dense_latents(benchmark, sae, table, users, steered):
    """The same `delta` step, with all 4,096 latents of every user written out."""
    shift = ALPHA * Steering.popsteer(table).shift

    def splice():
        pre_acts = sae.pre_acts(users)
        before, after = (sae.activate(z).dense(LATENTS) for z in (pre_acts, pre_acts + shift))
        return users + (after - before) @ sae.W_dec

    torch.testing.assert_close(benchmark(splice), steered, atol=1e-4, rtol=1e-4)
