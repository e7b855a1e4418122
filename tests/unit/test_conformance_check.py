"""The conformance check: nothing to say of a right wrapper, a hint of its own for each mistake."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steerrec.conformance import check_conformance, conformance
from steerrec.data import Histories
from steerrec.errors import ModelError
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds
from steerrec.wrapping import TokenScheme, WrappedRecommender, as_catalogue

from .tiny import random_recommender
from .toy_models import tiny_sasrec

N, H = 10, 6


class Model(nn.Module):
    """A GRU over right-padded ids 1..N; what follows it is chosen."""

    def __init__(self, *, bias=False, cosine=False, temperature=1.0):
        super().__init__()
        self.items = nn.Embedding(N + 1, H, padding_idx=0)
        self.gru = nn.GRU(H, H, batch_first=True)
        self.out = nn.Linear(H, H)
        self.bias = nn.Parameter(torch.randn(N + 1)) if bias else None
        self.cosine, self.temperature = cosine, temperature

    def forward(self, ids):
        states = self.out(self.gru(self.items(ids))[0])
        users = states[torch.arange(len(ids)), (ids != 0).sum(dim=1) - 1]
        items = self.items.weight
        if self.cosine:
            users, items = F.normalize(users, dim=-1), F.normalize(items, dim=-1)
        scores = users @ items.T / self.temperature
        return scores if self.bias is None else scores + self.bias


def right(**settings):
    """A right wrapper of a model."""
    torch.manual_seed(0)
    model = Model(**settings)

    def head():
        return ItemHead(
            model.items.weight[1:],
            None if model.bias is None else model.bias[1:],
            scale=1 / model.temperature,
            normalize=model.cosine,
        )

    site = Site("out", positions_from=TokenIds("items"))
    scheme = TokenScheme(1, 0, "right", 8)
    return WrappedRecommender(model, as_catalogue(range(N)), site, scheme, model, head, columns=1)


def with_head(rec, **changes):
    return replace(rec, head=replace(rec.item_head, **changes))


def hints(rec):
    found = conformance(rec)
    assert not found.ok
    with pytest.raises(ModelError, match="is not wrapped right") as refused:
        check_conformance(rec)
    assert "\n" not in str(refused.value)
    return "; ".join(found.problems)


KINDS = [{}, {"bias": True}, {"cosine": True}, {"temperature": 0.1}]


@pytest.mark.parametrize("settings", [*KINDS, {"cosine": True, "temperature": 0.07, "bias": True}])
def test_a_right_wrapper_has_no_problems(settings):
    found = conformance(right(**settings))
    assert found.problems == []
    assert found.ok
    assert found.max_error is not None
    assert found.max_error <= found.tolerance
    check_conformance(right(**settings))


def test_other_recommenders_than_wrapped_ones_can_be_checked():
    for rec in (tiny_sasrec(), random_recommender()):
        assert conformance(rec).problems == []


# --- the item head --------------------------------------------------------------------------------


def test_a_missing_bias():
    assert "a bias per item in the item head would mend it" in hints(
        with_head(right(bias=True), bias=None)
    )


def test_a_missing_temperature():
    assert "scale=10 and no bias in the item head would mend it" in hints(
        with_head(right(temperature=0.1), scale=1.0)
    )


@pytest.mark.parametrize("cosine", [True, False])
def test_normalisation_where_there_is_none_and_none_where_there_is(cosine):
    assert f"normalize={cosine} in the item head would mend it" in hints(
        with_head(right(cosine=cosine), normalize=not cosine)
    )


def test_a_missing_cosine_with_temperature():
    assert "normalize=True and scale=14.2857 and no bias" in hints(
        with_head(right(cosine=True, temperature=0.07), normalize=False, scale=1.0)
    )


@pytest.mark.parametrize("rows", [slice(0, N), slice(2, N + 2)])
def test_item_rows_off_by_one(rows):
    rec = right(bias=True)
    rows_of = torch.cat([rec.model.items.weight, torch.randn(1, H)])
    bias_of = torch.cat([rec.model.bias, torch.randn(1)])
    assert "the items are off by one" in hints(
        with_head(rec, weight=rows_of[rows], bias=bias_of[rows])
    )


def test_a_normalisation_after_the_site_that_only_an_edit_shows():
    class Unit(nn.Module):
        def forward(self, x):
            return F.normalize(x, dim=-1)

    class UnitModel(Model):
        def __init__(self):
            super().__init__()
            self.out = nn.Sequential(nn.Linear(H, H), Unit())

    torch.manual_seed(0)
    model = UnitModel()
    model.items.weight.data = F.normalize(model.items.weight.data, dim=-1)
    rec = replace(right(), model=model, scorer=model)
    assert conformance(replace(rec, head=ItemHead(model.items.weight[1:]))).ok
    cosine = replace(rec, head=ItemHead(model.items.weight[1:], normalize=True))
    assert "the model does not normalise user vectors after the site" in hints(cosine)


def test_a_site_that_feeds_something_else_too():
    class Twice(Model):
        """What follows `out` is used twice, which nobody sees until it changes."""

        def forward(self, ids):
            states = self.gru(self.items(ids))[0]
            states = 2 * self.out(states) - states
            return states[torch.arange(len(ids)), (ids != 0).sum(dim=1) - 1] @ self.items.weight.T

    torch.manual_seed(0)
    model = Twice()
    model.out = nn.Identity()
    rec = replace(right(), model=model, scorer=model, head=ItemHead(model.items.weight[1:]))
    found = hints(rec)
    assert found.startswith("with other vectors put in at 'out'")
    assert "does the site feed something else too" in found


# --- positions ------------------------------------------------------------------------------------


def test_the_wrong_position():
    rec = right()
    found = hints(replace(rec, site=Site("out", positions_from="last")))
    assert "is the padding on the right side" in found
    last = replace(
        rec,
        scorer=lambda ids: (
            rec.model.out(rec.model.gru(rec.model.items(ids))[0])[:, -1] @ rec.model.items.weight.T
        ),
    )
    assert "the scored vector is at the last position, padding or not" in hints(last)


def test_histories_newest_first():
    rec = right()
    found = hints(replace(rec, make_inputs=lambda ids: turned(ids)))
    assert "histories enter newest first; expected oldest first" in found


def turned(ids):
    """Right-padded ids in reverse."""
    out = torch.zeros_like(ids)
    for row, source in zip(out, ids, strict=True):
        real = source[source != 0]
        row[: len(real)] = real.flip(0)
    return out


def test_padding_on_the_wrong_side():
    rec = right()
    found = conformance(replace(rec, scheme=replace(rec.scheme, padding="left")))
    assert found.problems[0] == "padding='right' would mend it"


def test_padding_that_changes_scores():
    rec = right()

    def sums(ids):
        return rec.model(ids) + ids.shape[1]

    found = hints(with_head(replace(rec, scorer=sums), bias=torch.full((N,), 8.0)))
    assert "a history scores differently in a batch than alone" in found
    assert "does the model want batches of a fixed length?" in found
    fixed = replace(rec.scheme, fixed_length=True)
    assert conformance(
        with_head(replace(rec, scorer=sums, scheme=fixed), bias=torch.full((N,), 8.0))
    ).ok


# --- ids ------------------------------------------------------------------------------------------


def test_an_item_with_the_id_of_the_padding():
    rec = right()
    found = conformance(replace(rec, scheme=replace(rec.scheme, first_id=0))).problems
    assert found[0] == "first_id=1 would mend it"
    shared = replace(rec, make_inputs=lambda ids: torch.where(ids == N, 0, ids))
    assert "catalogue row 9 enters as 0, the id of the padding" in hints(shared)


def test_ids_that_enter_as_others_than_they_are_scored():
    rec = right()
    found = hints(replace(rec, make_inputs=lambda ids: torch.where(ids > 0, ids % N + 1, 0)))
    assert "catalogue row 0 enters as id 2, but is scored by row 1 of a table of 11" in found


def test_ids_beyond_the_table():
    rec = right()
    found = conformance(replace(rec, scheme=replace(rec.scheme, first_id=2))).problems
    assert found[0] == "first_id=1 would mend it"
    assert (
        "the model cannot score what make_batch gives (IndexError: index out of range" in found[1]
    )


def test_an_item_with_the_id_of_the_mask():
    class Masked(nn.Module):
        """Reads the last position, where the mask N + 1 stands; left-padded."""

        def __init__(self):
            super().__init__()
            self.items = nn.Embedding(N + 2, H, padding_idx=0)
            self.mix = nn.Linear(H, H)
            self.head = nn.Linear(H, N)

        def forward(self, ids):
            return self.head(self.mix(self.items(ids).cumsum(dim=1))[:, -1])

    torch.manual_seed(0)
    model = Masked()
    rec = WrappedRecommender(
        model,
        as_catalogue(range(N)),
        Site("mix", positions_from=TokenIds("items")),
        TokenScheme(1, 0, "left", 5, fixed_length=True),
        model,
        lambda: ItemHead(model.head.weight, model.head.bias),
        lambda ids: F.pad(ids, (0, 1), value=N + 1),
    )
    assert conformance(rec).ok
    off = replace(rec, scheme=replace(rec.scheme, first_id=2))
    assert "catalogue row 9 enters as 11, the id of the mask" in hints(off)


def test_make_batch_that_loses_items():
    rec = right()
    lost = replace(rec, make_inputs=lambda ids: ids.clamp_max(3))
    assert "differ in the newest item alone" in hints(lost)


# --- what cannot be read --------------------------------------------------------------------------


def test_a_site_that_never_fires():
    rec = right()
    found = conformance(replace(rec, site=Site("", method="extra_repr", layout="BH")))
    assert found.max_error is None
    assert "never fired" in found.problems[0]


def test_shapes_that_do_not_fit():
    rec = right()
    assert "width 6" in hints(replace(rec, head=ItemHead(rec.model.items.weight[1:-1])))
    assert "expected [histories, at least 11]" in hints(
        replace(rec, scorer=lambda ids: rec.model(ids)[:, :5])
    )


def test_scores_that_are_not_finite():
    rec = right()
    found = hints(replace(rec, scorer=lambda ids: rec.model(ids) * float("nan")))
    assert "not all finite" in found


def test_given_histories_and_tolerance():
    rec = with_head(right(), scale=1.0001)
    histories = Histories.from_lists([[1, 2], [3]])
    assert not conformance(rec, histories=histories).ok
    assert conformance(rec, histories=histories, tolerance=1e-2).ok
