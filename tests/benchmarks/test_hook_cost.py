"""What an attachment adds to a model's own forward and scoring; compare within a group.

The host is the reference SASRec as it is (width 64, two layers, 50 positions, 3,416 items). Beside
it stands the fastest forward known for it, which runs the last layer for the user's row only: a
ratio to that one cannot be flattered by a slow host.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from steerrec.adapters.sasrec import SASRecConfig, SASRecModel
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering, SteerTransform

WIDTH, LATENTS, K, ITEMS, LENGTH = 64, 4096, 32, 3_416, 50
SITE = Site("final_norm", positions_from=TokenIds("item_embedding"))


@pytest.fixture(scope="module", autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = SASRecConfig(num_items=ITEMS, hidden_size=WIDTH, max_position_embeddings=LENGTH)
    return SASRecModel(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    generator = torch.Generator().manual_seed(0)
    return SparseAutoencoder(WIDTH, LATENTS, K, generator=generator).requires_grad_(False)


@pytest.fixture(scope="module")
def steering():
    generator = torch.Generator().manual_seed(1)
    return Steering(torch.randn(LATENTS, generator=generator) * 0.3)


@pytest.fixture(scope="module", params=[256, 1], ids=lambda batch: f"batch {batch}")
def ids(request):
    """Histories of 1 to 50 items, at least one of them as long as the window."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, ITEMS + 1, (request.param, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (request.param, 1), generator=generator)
    lengths[0] = LENGTH
    return ids * (torch.arange(LENGTH) < lengths)


def last_row_only(model, ids):
    """The model's scores, with the last layer computed for the user's row alone."""
    batch, length = ids.shape
    rows = torch.arange(batch)
    last = (ids != 0).sum(dim=1) - 1
    x = model.item_embedding(ids) + model.position_embedding.weight[:length]
    for layer in model.layers[:-1]:
        x = layer(x)
    layer = model.layers[-1]
    heads = layer.attention.heads
    normed, user = layer.attention_norm(x), x[rows, last]
    weight, bias = layer.attention.qkv.weight, layer.attention.qkv.bias
    q = F.linear(normed[rows, last], weight[:WIDTH], bias[:WIDTH])
    k, v = F.linear(normed, weight[WIDTH:], bias[WIDTH:]).split(WIDTH, dim=-1)
    q = q.view(batch, heads, 1, -1)
    k, v = (t.view(batch, length, heads, -1).transpose(1, 2) for t in (k, v))
    seen = (torch.arange(length) <= last[:, None])[:, None, None]
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    user = user + layer.attention.out(mixed.reshape(batch, WIDTH))
    user = user + layer.feed_forward(layer.feed_forward_norm(user))
    return model.final_norm(user) @ model.item_matrix.T


def benchmark_scoring(benchmark, model, ids):
    benchmark.group = f"forward and scores of {ITEMS:,} items, batch {len(ids)}"
    return benchmark(model.score, ids)


def test_bare(benchmark, model, ids):
    benchmark_scoring(benchmark, model, ids)


def test_bare_last_row_only(benchmark, model, ids):
    benchmark.group = f"forward and scores of {ITEMS:,} items, batch {len(ids)}"
    found = benchmark(last_row_only, model, ids)
    torch.testing.assert_close(found, model.score(ids), atol=1e-5, rtol=1e-4)


def test_observing(benchmark, model, sae, ids):
    host = copy.deepcopy(model)
    with attach(host, sae, site=SITE):
        found = benchmark_scoring(benchmark, host, ids)
    assert torch.equal(found, model.score(ids))


def test_steering(benchmark, model, sae, steering, ids):
    host = copy.deepcopy(model)
    with attach(host, sae, site=SITE, steering=steering):
        found = benchmark_scoring(benchmark, host, ids)
    assert not torch.equal(found, model.score(ids))


# --- the step itself, beside the three kernels that any SAE needs once


@pytest.fixture(scope="module", params=[256, 1], ids=lambda batch: f"batch {batch}")
def vectors(request):
    """Fresh vectors for every call: repeating one row flatters `topk`."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(64, request.param, WIDTH, generator=generator)


def benchmark_step(benchmark, step, vectors):
    benchmark.group = f"the step on user vectors, batch {vectors.shape[1]}"
    rounds = [vectors[i % len(vectors)] for i in range(2_000 if vectors.shape[1] == 1 else 100)]
    given = iter(rounds)
    benchmark.pedantic(step, setup=lambda: ((next(given),), {}), rounds=len(rounds))


def test_encoder_topk_and_decode_bare(benchmark, sae, vectors):
    bias = sae.b_enc - sae.b_dec @ sae.W_enc

    def bare(x):
        values, indices = torch.addmm(bias, x, sae.W_enc).topk(K)
        weights = values.relu()
        return F.embedding_bag(indices, sae.W_dec, per_sample_weights=weights, mode="sum")

    benchmark_step(benchmark, bare, vectors)


@pytest.mark.parametrize("splice", ["delta", "reconstruct"])
def test_transform(benchmark, sae, steering, vectors, splice):
    recipe = Steering(steering.shift, splice=splice)
    benchmark_step(benchmark, SteerTransform(sae, recipe), vectors)
