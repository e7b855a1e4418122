"""`wrap` of models that read times and features: these reach the model, or are asked for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import steerrec
from steerrec.conformance import check_conformance, conformance
from steerrec.data import Histories, simulate
from steerrec.errors import ColumnError, DataError, ModelError
from steerrec.layers import site_at, site_report
from steerrec.recommender import ItemHead, columns_read
from steerrec.sites import Site, TokenIds

from .time_aware import HOUR, EventAware, TimeAware
from .toy_models import tiny_catalogue

N, L = 12, 8
ITEMS = [[0, 5, 3], [7], [2, 2, 9, 4, 11, 6]]
TIMES = [[0, 50 * HOUR, 51 * HOUR], [9], [HOUR * 2**n for n in range(6)]]
TIMED = Histories.from_lists(ITEMS, columns={"time": TIMES})


def wrapped(**settings):
    return steerrec.wrap(
        TimeAware(N),
        tiny_catalogue(N),
        make_batch=lambda ids, time: {"ids": ids, "times": time},
        max_length=L,
        **{"reads": ["time"], "padding": "right", **settings},
    )


def scores(rec, histories):
    with torch.no_grad():
        return rec.score(rec.make_batch(histories))


# --- a model that reads the time ------------------------------------------------------------------


def test_a_time_aware_model_from_wrapping_to_steering():
    data = simulate(users=120, items=40, seed=0)
    catalogue = steerrec.Catalogue.from_interactions(data)

    rec = steerrec.wrap(
        TimeAware(len(catalogue)),
        catalogue,
        reads=["time"],
        make_batch=lambda ids, time: {"ids": ids, "times": time},
        padding="right",  # the model takes either
        max_length=20,
    )

    check_conformance(rec)
    assert isinstance(rec, steerrec.Recommender)
    assert rec.site.path == "norm"
    histories = steerrec.build_histories(data, catalogue, columns=rec.reads)
    split = steerrec.leave_one_out(histories, len(catalogue))
    sae, _ = steerrec.fit_autoencoder(
        rec, split.train, training=steerrec.SAETraining(latents=64, k=8, epochs=3, batch_size=128)
    )
    contrast = steerrec.popularity_contrast(catalogue)
    table = steerrec.score_neurons(rec, sae, contrast, split.train, users=200)
    base = steerrec.recommend(rec, histories)
    with steerrec.attach(rec, sae, steering=steerrec.Steering.popsteer(table, alpha=2.0)):
        lists = steerrec.recommend(rec, histories)
    counts = catalogue.counts
    assert not np.array_equal(lists.ids, base.ids)
    assert counts[lists.ids].mean() < counts[base.ids].mean()
    assert steerrec.evaluate(rec, split).metrics["ndcg@10"] >= 0
    # the attribution is of users with these times, not of any
    still = replace(split.train, columns={"time": np.zeros_like(split.train.items)})
    other = steerrec.score_neurons(rec, sae, contrast, still, users=200)
    assert not torch.allclose(table["cohens_d"], other["cohens_d"])


def test_the_batch_holds_the_times_beside_the_items():
    batch = wrapped(reads={"time": -1}).make_batch(TIMED)

    assert batch["ids"].tolist() == [[1, 6, 4, 0, 0, 0], [8, 0, 0, 0, 0, 0], [3, 3, 10, 5, 12, 7]]
    assert batch["times"].tolist() == [row + [-1] * (6 - len(row)) for row in TIMES]


def test_left_padded_and_at_full_length_and_windowed():
    rec = wrapped(padding="left", fixed_length=True)
    long = Histories.from_lists([list(range(10))], columns={"time": [list(range(100, 110))]})

    assert rec.make_batch(TIMED)["times"].tolist() == [[0] * (L - len(row)) + row for row in TIMES]
    assert rec.make_batch(long)["times"].tolist() == [list(range(102, 110))]
    torch.testing.assert_close(scores(rec, TIMED), scores(wrapped(), TIMED))


def test_the_times_reach_the_model():
    rec = wrapped()
    base = scores(rec, TIMED)
    shifted = replace(TIMED, columns={"time": TIMED.column("time") + 1000 * HOUR})
    torch.testing.assert_close(scores(rec, shifted), base)  # it reads differences

    times = [[0, 50 * HOUR, 1000 * HOUR], TIMES[1], [times * 9 for times in TIMES[2]]]
    later = scores(rec, Histories.from_lists(ITEMS, columns={"time": times}))
    turned = Histories.from_lists(ITEMS, columns={"time": [[50 * HOUR, 0, 51 * HOUR], *TIMES[1:]]})
    for other, same in ((later, [1]), (scores(rec, turned), [1, 2])):
        moved = (other - base).abs().amax(dim=1) > 1e-3
        assert moved.tolist() == [user not in same for user in range(3)]


def test_missing_times_are_one_error_that_says_how_to_provide_them():
    rec, plain = wrapped(), Histories.from_lists(ITEMS)

    for call in (
        lambda: rec.make_batch(plain),
        lambda: steerrec.recommend(rec, plain, k=3),
        lambda: conformance(rec, histories=plain),
    ):
        with pytest.raises(ColumnError, match=r"no column 'time', which the model reads") as caught:
            call()
        assert "build_histories(..., columns=['time'])" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_layers_and_sites_are_found_without_any_histories():
    rec = wrapped()

    assert site_report(rec).recommended == rec.site
    assert site_at(rec, "norm") == rec.site
    assert columns_read(rec) == ("time",)


# --- a model that reads a feature, and takes several integer tensors ------------------------------

EVENTS = [[1, 2, 1], [3], [1, 1, 2, 3, 3, 1]]
WITH_EVENTS = Histories.from_lists(ITEMS, columns={"event": EVENTS})


def event_aware(**settings):
    return steerrec.wrap(
        EventAware(N, events=4),
        tiny_catalogue(N),
        reads=["event"],
        make_batch=lambda ids, event: {"ids": ids, "events": event},
        max_length=L,
        **{"example": WITH_EVENTS, **settings},
    )


def test_a_feature_is_tried_with_the_values_of_an_example():
    rec = event_aware()

    check_conformance(rec)
    # several integer tensors enter the encoder: the one that holds the ids is found
    assert rec.site.positions_from == TokenIds("encoder", pad_id=0, select=(1,))
    base = scores(rec, WITH_EVENTS)
    other = [[1, 2, 2], [3], [1, 1, 2, 3, 3, 1]]
    moved = scores(rec, Histories.from_lists(ITEMS, columns={"event": other})) - base
    assert (moved.abs().amax(dim=1) > 1e-3).tolist() == [True, False, False]
    torch.testing.assert_close(
        rec.item_head.scores(steerrec.user_vectors(rec, WITH_EVENTS)), base, atol=1e-5, rtol=0
    )


def test_a_feature_without_an_example():
    with pytest.raises(ColumnError, match="reads column 'event', of which nothing is known yet"):
        event_aware(example=None)
    with pytest.raises(ColumnError, match="reads column 'event'"):
        event_aware(example=TIMED)
    with pytest.raises(DataError, match="the example histories are empty"):
        event_aware(example=Histories.from_lists([[]], columns={"event": [[]]}))


def test_only_a_few_examples_are_held():
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, 4, n).tolist() for n in rng.integers(1, 40, 500)]

    held = event_aware(example=Histories.from_lists(lists, columns={"event": lists})).example

    assert len(held) == 16
    assert (held.lengths == L).all()


class WithCategories(nn.Module):
    """Categories of items, 0 among them, enter before the items do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.categories, self.items = nn.Embedding(3, 8), nn.Embedding(N + 1, 8, padding_idx=0)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, batch):
        states, _ = self.gru(self.categories(batch["category"]) + self.items(batch["ids"]))
        last = (batch["ids"] != 0).sum(dim=1) - 1
        return states[torch.arange(len(states)), last] @ self.items.weight[1:].T


def test_features_of_items_are_looked_up_by_id_and_not_taken_for_ids():
    codes = torch.tensor([0, *[row % 3 for row in range(N)]])  # by id; 0 is the padding

    rec = steerrec.wrap(
        WithCategories(),
        tiny_catalogue(N),
        make_batch=lambda ids: {"category": codes[ids], "ids": ids},
        max_length=L,
    )

    assert rec.site.positions_from == TokenIds("items", pad_id=0)
    assert rec.make_batch(TIMED)["category"].tolist()[0] == [0, 2, 0, 0, 0, 0]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reads", "make_batch", "message"),
    [
        (["time"], lambda ids: ids, r"cannot be called as make_batch\(ids, time\)"),
        ((), lambda ids, time: ids, r"cannot be called as make_batch\(ids\) \(missing a required"),
        (["time"], None, r"nothing takes the columns .*; expected make_batch\(ids, time\)"),
        ("time", lambda ids, time: ids, r"reads is 'time'; expected a list of columns"),
    ],
)
def test_columns_and_make_batch_have_to_fit(reads, make_batch, message):
    with pytest.raises(ModelError, match=message):
        steerrec.wrap(
            TimeAware(N), tiny_catalogue(N), reads=reads, make_batch=make_batch, max_length=L
        )


def test_columns_without_a_window():
    with pytest.raises(ModelError, match="expected max_length"):
        steerrec.wrap(TimeAware(N), tiny_catalogue(N), reads=["time"])


class HandWritten:
    """A recommender of one's own; times are padded on the side that is said."""

    max_length = L

    def __init__(self, side="right"):
        self.model = TimeAware(N).eval().requires_grad_(False)
        self.catalogue, self.side = tiny_catalogue(N), side
        self.site = Site("norm", layout="BH")

    @property
    def item_head(self):
        return ItemHead(self.model.items.weight[1:])

    def make_batch(self, histories):
        width = min(int(histories.lengths.max(initial=1)), L)
        times = histories.padded(width, 0, self.side, column="time")
        ids = histories.padded(width, -1) + 1
        return {"ids": torch.from_numpy(ids), "times": torch.from_numpy(times)}

    def score(self, batch):
        return self.model(batch)

    def describe(self):
        return {"adapter": "hand-written", "source": None}


def test_a_recommender_of_ones_own_is_tried_with_times():
    rec = HandWritten()

    check_conformance(rec)
    assert columns_read(rec) == ()
    assert steerrec.attach(rec, steerrec.SparseAutoencoder(8, 16, k=4)).remove() is None


def test_times_that_do_not_lie_beside_their_items():
    found = conformance(HandWritten(side="left"))

    assert not found.ok
    assert "scores differently in a batch than alone" in found.problems[0]


def test_ids_are_told_from_times_whatever_comes_first():
    class Swapped(HandWritten):
        def make_batch(self, histories):
            batch = super().make_batch(histories)
            return {"times": batch["times"], "ids": batch["ids"]}

    assert conformance(Swapped()).ok
