"""The k largest of a row: the same as a full sort gives, wherever the shortcut is taken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerrec.selection import largest


def by_sorting(values, k):
    """The k largest of each row, one row after the other in plain Python."""
    rows = values.tolist()
    return [sorted(range(len(row)), key=lambda j: -row[j])[:k] for row in rows]


@pytest.mark.parametrize("width", [512, 1024, 2048, 1000, 528])
@pytest.mark.parametrize("rows", [1, 63, 64, 65])
def test_indices_are_those_of_a_full_sort(rows, width):
    k = 7
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width))
    entries, indices = largest(values, k)
    assert [sorted(row) for row in indices.tolist()] == [
        sorted(row) for row in by_sorting(values, k)
    ]
    assert torch.equal(entries, values.gather(1, indices))


@pytest.mark.parametrize("threads", [2, 3])
def test_rows_are_shared_among_threads(monkeypatch, threads):
    values = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    values[7] = 1.0  # ties
    alone = largest(values, 9)
    monkeypatch.setattr("steerrec.selection._SHARE", 3000)
    monkeypatch.setattr("steerrec.beside._MOST", threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = largest(values, 9)
        values[49, 0] = torch.nan  # of the last share: torch's own order, NaN first
        assert (largest(values, 9)[1][49] == 0).any()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 40), levels=st.integers(1, 4))
def test_entries_are_right_among_ties_and_infinities(seed, k, levels):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (64, 80 * 4**levels), generator=generator).float()
    values[values == -3] = -torch.inf
    values[values == 3] = torch.inf
    entries, indices = largest(values, k)
    expected = values.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(entries.sort(dim=1, descending=True).values, expected)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert torch.equal(entries, values.gather(1, indices))


def test_gradients_reach_the_chosen_entries_only():
    values = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0), requires_grad=True)
    entries, indices = largest(values, 5)
    (entries * 2).sum().backward()
    assert torch.equal(values.grad, torch.zeros(64, 1024).scatter(1, indices, 2.0))


def test_equal_rows_give_the_same_order():
    """So that two decodes of one row cancel to the last bit."""
    row = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    _, indices = largest(row.repeat(100, 1), 32)
    assert (indices == indices[0]).all()
