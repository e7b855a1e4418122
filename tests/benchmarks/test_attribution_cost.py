"""Of the time of `score_neurons`, how much is the recommender's own forward; `pytest -s` shows it.

The host is the reference SASRec of the ML-1M experiment (width 64, two layers, 50 positions, 3,416
items), as `steerrec score` runs it, and with the last layer for the newest item alone, the fastest
that it has. The SAE has 4,096 latents, 32 active; two groups of 8,192 synthetic users, most of them
with a full window, as on ML-1M. The forward is timed around the model's own, within the very run.

On one thread it is the processor's time of this process that counts, which other work on the
machine changes least; on all threads, time on the wall. Nothing asserts a time.
"""

import time

import numpy as np
import pytest
import torch

from steerrec.adapters.sasrec import SASRecConfig, SASRecModel, SASRecRecommender
from steerrec.attribution import score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.profiles import popularity_contrast

from ..unit.tiny import catalogue

WIDTH, LATENTS, K, ITEMS, LENGTH = 64, 4096, 32, 3_416, 50
USERS, ROUNDS = 8192, 3


def recommender(newest_only):
    torch.manual_seed(0)
    config = SASRecConfig(num_items=ITEMS, hidden_size=WIDTH, max_position_embeddings=LENGTH)
    counts = np.sort(np.random.default_rng(0).zipf(1.3, ITEMS) % 3000)[::-1]
    rec = SASRecRecommender(SASRecModel(config), catalogue(counts.tolist()))
    rec.model.newest_only = newest_only
    return rec


def timed_forward(model, clock, spent):
    """Make `model` add what each of its forwards takes to `spent`."""
    forward = model.forward

    def timed(*args, **options):
        start = clock()
        try:
            return forward(*args, **options)
        finally:  # a capture ends the forward with an exception
            spent.append(clock() - start)

    model.forward = timed


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, None], ids=["one thread", "all threads"])
@pytest.mark.parametrize("newest_only", [False, True], ids=["every position", "newest_only"])
def test_share_of_the_forward(newest_only, threads):
    rng = np.random.default_rng(1)
    lengths = np.minimum(rng.geometric(1 / 163, 6_000) + 20, 2_000)  # ML-1M has 163 a user
    train = Histories.from_lists([rng.integers(0, ITEMS, n).tolist() for n in lengths])
    sae = SparseAutoencoder(WIDTH, LATENTS, K).requires_grad_(False)
    rec = recommender(newest_only)
    contrast = popularity_contrast(rec.catalogue)
    clock, spent, found = time.process_time if threads else time.perf_counter, [], []
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        score_neurons(rec, sae, contrast, train, users=512)
        timed_forward(rec.model, clock, spent)
        for _ in range(ROUNDS):
            spent.clear()
            start = clock()
            table = score_neurons(rec, sae, contrast, train, users=USERS)
            found.append((clock() - start, sum(spent)))
    finally:
        torch.set_num_threads(before)
    whole, forward = min(found)
    host = "newest item alone" if newest_only else "every position"
    print(  # noqa: T201
        f"\nattribution of 2 x {USERS:,} users, last layer for {host}, "
        f"{threads or before} threads: {whole:.2f} s, forward {forward:.2f} s, "
        f"{100 * forward / whole:.1f} % (of the rounds "
        f"{', '.join(f'{100 * f / w:.1f}' for w, f in found)} %)"
    )
    assert table.provenance["n_a"] == USERS
    assert 0 < forward < whole
