"""Streaming moments against numpy in float64, however the rows are cut into batches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerrec.moments import RunningMoments


def streamed(rows, sizes):
    moments = RunningMoments(rows.shape[1])
    for batch in torch.from_numpy(rows).split(sizes):
        moments.update(batch)
    return moments


@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=8).filter(any),
    width=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_any_chunking_agrees_with_numpy(sizes, width, seed, dtype):
    rows = np.random.default_rng(seed).normal(3, 2, (sum(sizes), width)).astype(dtype)
    moments = streamed(rows, sizes)
    assert moments.n == len(rows)
    assert moments.mean.dtype == moments.variance.dtype == torch.float64
    wide = rows.astype(np.float64)
    # rows are centred in their own dtype, so a float32 variance is good to float32
    tolerance = 1e-12 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(moments.mean.numpy(), wide.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        moments.variance.numpy(), wide.var(axis=0), rtol=tolerance, atol=1e-12
    )


def test_a_spread_far_below_the_mean_is_not_cancelled():
    """Sums of squares of float32 rows around 10,000 would lose a spread of 0.01 altogether."""
    rng = np.random.default_rng(0)
    rows = (10_000 + 0.01 * rng.normal(size=(5000, 3))).astype(np.float32)
    moments = streamed(rows, 512)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(moments.mean.numpy(), exact.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance.numpy(), exact.var(axis=0), rtol=1e-5)


def test_batches_with_different_means_add_up():
    moments = streamed(np.array([[0.0], [2.0], [10.0], [12.0]]), 2)
    assert moments.mean.tolist() == [6.0]
    assert moments.variance.tolist() == [26.0]  # 36 + 16 + 16 + 36 over 4


def test_equal_rows_have_no_variance():
    moments = streamed(np.full((100, 2), 0.1, dtype=np.float32), 7)
    assert moments.variance.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_for_a_variance_give_zero(rows):
    moments = RunningMoments(2)
    moments.update(torch.ones(rows, 2))
    assert moments.n == rows
    assert moments.mean.tolist() == [float(rows)] * 2
    assert moments.variance.tolist() == [0.0, 0.0]


def test_the_rows_are_not_written_to():
    rows = torch.arange(6.0).view(3, 2)
    RunningMoments(2).update(rows)
    assert torch.equal(rows, torch.arange(6.0).view(3, 2))
