"""RecTools networks that read times: what they are given, on a stand-in with their interface."""

import pytest
import torch
from torch import Tensor, nn

from steerrec.adapters.rectools import from_model
from steerrec.conformance import check_conformance
from steerrec.data import Histories
from steerrec.errors import ColumnError, DataError

from .clones import H, L, N, rectools_sasrec
from .toy_models import tiny_catalogue

LISTS = [[0, 5, 3], [7]]
TIMES = [[100, 160, 400], [9_000]]


class TimedLayers(nn.Module):
    """Each position takes from those before, the less the longer before the next one they are."""

    relative_time_attention = True

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(H, H)

    def forward(self, seqs: Tensor, mask: Tensor, times: Tensor) -> Tensor:
        gaps = times[:, 1:].unsqueeze(2) - times[:, :-1].unsqueeze(1)  # [B, L, L]
        weights = (-gaps / 100).exp().clamp(max=1) * mask.mT
        return self.out(weights.tril() @ (seqs * mask))


@pytest.fixture
def rec():
    torch.manual_seed(0)
    model = rectools_sasrec().eval()
    model.transformer_layers = TimedLayers()

    def encode_sessions(batch: dict[str, Tensor], item_embs: Tensor) -> Tensor:
        seqs = model.pos_encoding_layer(item_embs[batch["x"]])
        real = (batch["x"] != 0).float().unsqueeze(-1)
        return model.transformer_layers(seqs, real, batch["unix_ts"])

    model.encode_sessions = encode_sessions
    return from_model(model, tiny_catalogue(N))


@pytest.mark.parametrize("number", [int, float])
def test_the_request_comes_with_the_latest_interaction_and_padding_with_the_oldest(rec, number):
    times = [[number(time) for time in row] for row in TIMES]
    batch = rec.make_batch(Histories.from_lists(LISTS, columns={"time": times}))

    assert batch["x"].tolist() == [[0] * (L - 3) + [1, 6, 4], [0] * (L - 1) + [8]]
    assert batch["unix_ts"].dtype == torch.int64
    assert batch["unix_ts"].tolist() == [
        [100] * (L - 3) + [100, 160, 400, 400],
        [9_000] * (L - 1) + [9_000, 9_000],
    ]


def test_a_window_takes_the_latest_times(rec):
    rows = [row % N for row in range(L + 3)]
    long = Histories.from_lists([rows], columns={"time": [list(range(L + 3))]})

    assert rec.make_batch(long)["unix_ts"].tolist() == [[*range(3, L + 3), L + 2]]


def test_it_conforms_and_reads_the_time(rec):
    check_conformance(rec)
    assert rec.reads == {"time": 0}
    one, other = (
        rec.score(rec.make_batch(Histories.from_lists(LISTS, columns={"time": times})))
        for times in (TIMES, [[100, 390, 400], [0]])
    )
    moved = (one - other).abs().amax(dim=1) > 1e-3
    assert moved.tolist() == [True, False]
    with pytest.raises(ColumnError, match="no column 'time'"):
        rec.make_batch(Histories.from_lists(LISTS))


@pytest.mark.parametrize("unit", [1e3, 1e6])
def test_times_that_cannot_be_seconds_are_refused(rec, unit):
    times = [[1_700_000_000 * unit] * 3, [0]]

    with pytest.raises(DataError, match=r"time goes up to 1\.7e\+1[25]; RecTools reads seconds"):
        rec.make_batch(Histories.from_lists(LISTS, columns={"time": times}))
