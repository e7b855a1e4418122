"""`wrap`: what is inferred of a model that nobody described, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.conformance import check_conformance
from steerrec.data import Histories
from steerrec.errors import ModelError, SiteError
from steerrec.recommender import ItemHead, Recommender, user_vectors
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering, SteerTransform
from steerrec.wrapping import TokenScheme, as_catalogue, with_mask, wrap

from .clones import CLONES, score_hstu
from .toy_models import tiny_catalogue

N, H, L = 12, 6, 8
HISTORIES = [[0, 5, 3], [7], [2, 2, 9, 4, 11, 6]]


class Model(nn.Module):
    """A GRU over padded ids; where items begin, what pads, and the head are chosen."""

    def __init__(self, *, pad=0, side="right", untied=False, bias=False, cosine=False, scale=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(N + 1, H, padding_idx=pad)
        self.gru = nn.GRU(H, H, batch_first=True, bias=False)
        self.body = nn.Linear(H, H)
        self.out = nn.Linear(H, N, bias=bias) if untied else None
        self.bias = nn.Parameter(torch.randn(N)) if bias and not untied else None
        self.pad, self.side, self.cosine, self.scale = pad, side, cosine, scale

    def forward(self, ids):
        states = self.body(self.gru(self.items(ids))[0])
        last = (ids != self.pad).sum(dim=1) - 1 if self.side == "right" else -1
        users = states[torch.arange(len(ids)), last]
        if self.out is not None:
            return self.out(users)
        items = self.items.weight[1:] if self.pad == 0 else self.items.weight[:-1]
        if self.cosine:
            users, items = F.normalize(users, dim=-1), F.normalize(items, dim=-1)
        scores = self.scale * (users @ items.T)
        return scores if self.bias is None else scores + self.bias


def steers(rec):
    """Steering through the hook gives the item head's scores of steered user vectors."""
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(rec.item_head.width, 32, k=4, generator=generator)
    steering = Steering(torch.randn(32, generator=generator), alpha=2.0)
    histories = Histories.from_lists(HISTORIES)
    users = user_vectors(rec, histories)
    with attach(rec, sae, steering=steering):
        scores = rec.score(rec.make_batch(histories))
    expected = rec.item_head.scores(SteerTransform(sae, steering)(users))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores, rec.item_head.scores(users), atol=1e-3)


# --- what is inferred -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pad": N},
        {"bias": True},
        {"cosine": True},
        {"cosine": True, "scale": 14.0},
        {"scale": 0.25},
        {"untied": True},
        {"untied": True, "bias": True},
        {"untied": True, "pad": N},
    ],
)
def test_the_scheme_the_site_and_the_head(settings):
    model = Model(**settings)
    rec = wrap(model, tiny_catalogue(N), max_length=L)
    assert isinstance(rec, Recommender)
    pad = settings.get("pad", 0)
    assert rec.scheme == TokenScheme(1 if pad == 0 else 0, pad, "right", L)
    assert rec.site == Site("body", positions_from=TokenIds("items", pad_id=pad))
    head = rec.item_head
    assert (head.bias is not None) == settings.get("bias", False)
    assert head.normalize == settings.get("cosine", False)
    assert head.scale == pytest.approx(settings.get("scale", 1.0), rel=1e-5)
    check_conformance(rec)
    steers(rec)


def test_left_padding():
    rec = wrap(Model(side="left"), tiny_catalogue(N), max_length=L)
    assert rec.scheme == TokenScheme(1, 0, "left", L)
    assert rec.site.path == "body"
    steers(rec)


class Positions(nn.Module):
    """Counts positions from the start of a left-padded batch, so that padding matters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(N + 1, H, padding_idx=0)
        self.positions = nn.Embedding(L, H)
        self.norm = nn.LayerNorm(H)

    def forward(self, ids):
        x = self.items(ids) + self.positions(torch.arange(ids.shape[1]).expand_as(ids))
        return self.norm((x * (ids != 0).unsqueeze(-1)).cumsum(dim=1))[:, -1] @ self.items.weight.T


def test_batches_of_a_fixed_length():
    rec = wrap(Positions(), tiny_catalogue(N), max_length=L)
    assert rec.scheme == TokenScheme(1, 0, "left", L, fixed_length=True)
    assert rec.columns == 1
    assert rec.make_batch(Histories.from_lists([[3]])).tolist() == [[0] * 7 + [4]]
    steers(rec)
    with pytest.raises(ModelError, match="than alone"):
        wrap(Positions(), tiny_catalogue(N), max_length=L, fixed_length=False)


def test_a_site_in_a_method():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.Embedding(N + 1, H, padding_idx=0)
            self.weights = nn.Parameter(torch.randn(H, H))

        def encode(self, ids):
            return torch.tanh(self.items(ids).sum(dim=1) @ self.weights)

        def forward(self, ids):
            return self.encode(ids) @ self.items.weight[1:].T

    rec = wrap(Functional(), tiny_catalogue(N), max_length=L, padding="right")
    assert (rec.site.path, rec.site.method, rec.site.layout) == ("", "encode", "BH")
    steers(rec)


def test_items_that_are_a_buffer_and_a_bias_that_is_an_embedding():
    class Buffers(nn.Module):
        def __init__(self):
            super().__init__()
            self.items = nn.Embedding(N + 1, 4, padding_idx=0)
            self.tower = nn.Linear(4, H)
            self.register_buffer("vectors", torch.randn(N, H))
            self.biases = nn.Embedding(N, 1)

        def forward(self, ids):
            users = self.tower(self.items(ids).sum(dim=1))
            return users @ self.vectors.T + self.biases.weight.T

    rec = wrap(Buffers(), tiny_catalogue(N), max_length=L, padding="right")
    assert rec.site.path == "tower"
    assert rec.item_head.bias is not None
    steers(rec)


def test_vectors_that_are_normalised_before_the_site_are_not_normalised_after_it():
    clone = next(clone for clone in CLONES if clone.name == "HSTU")
    model = clone.build()
    rec = wrap(
        model,
        tiny_catalogue(N),
        score=lambda ids: score_hstu(model, lists(ids)),
        max_length=6,
        padding="right",
    )
    assert rec.site.path == "_output_postproc"
    assert not rec.item_head.normalize
    expected = clone.score(clone.build(), HISTORIES)
    scores = rec.score(rec.make_batch(Histories.from_lists(HISTORIES)))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    steers(rec)


def lists(ids):
    """Histories of rows from padded ids."""
    return [[token - 1 for token in row if token] for row in ids.tolist()]


def test_a_model_that_takes_and_gives_dicts():
    model = Model()
    rec = wrap(
        model,
        tiny_catalogue(N),
        score=lambda batch: {"logits": model(batch["ids"])}["logits"],
        make_batch=lambda ids: {"ids": ids, "mask": ids != 0},
        max_length=L,
        source="run 3",
    )
    assert list(rec.make_batch(Histories.from_lists([[1]]))) == ["ids", "mask"]
    assert rec.describe() == {"adapter": "wrap", "source": "run 3"}
    steers(rec)


def test_what_is_given_is_taken():
    model = Model(untied=True)
    rec = wrap(
        model,
        [f"item {row}" for row in range(N)],
        max_length=5,
        site="body",
        item_head=lambda: ItemHead(model.out.weight),
        first_id=1,
        pad_id=0,
        padding="right",
        fixed_length=True,
    )
    assert rec.scheme == TokenScheme(1, 0, "right", 5, fixed_length=True)
    assert rec.catalogue.item_ids[3] == "item 3"
    steers(rec)
    given = Site("out", at="input", layout="BH")
    assert wrap(model, range(N), max_length=5, site=given, padding="right").site == given


def test_the_model_is_frozen_and_the_head_reads_its_weights():
    model = Model()
    rec = wrap(model.train(), tiny_catalogue(N), max_length=L)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.modules())
    model.items.weight.data.mul_(2.0)
    assert torch.equal(rec.item_head.weight, model.items.weight[1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "forward" not in vars(model)


# --- what is refused ------------------------------------------------------------------------------


class Mean(nn.Module):
    """The mean of a history, which no padding changes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(N + 1, H, padding_idx=0)
        self.body = nn.Linear(H, H)
        self.out = nn.Linear(H, N)

    def forward(self, ids):
        real = (ids != 0).sum(dim=1, keepdim=True)
        return self.out(self.body(self.items(ids).sum(dim=1) / real))


def test_two_padding_sides_that_both_conform_are_refused():
    with pytest.raises(ModelError, match=r"Mean gives its own scores with padding='right'.* or "):
        wrap(Mean(), range(N), max_length=L)
    assert wrap(Mean(), range(N), max_length=L, padding="left").scheme.padding == "left"


def test_two_numberings_that_both_conform_are_refused():
    class Any(nn.Module):
        """Does not say what pads, and has weights of its own for scoring."""

        def __init__(self):
            super().__init__()
            self.items = nn.Embedding(N + 1, H)
            self.gru = nn.GRU(H, H, batch_first=True)
            self.out = nn.Linear(H, N)

        def forward(self, ids):
            return self.out(self.gru(self.items(ids))[0][:, -1])

    with pytest.raises(ModelError, match=r"say which it was trained with: .*first_id"):
        wrap(Any(), range(N), max_length=L, fixed_length=True, padding="left")
    rec = wrap(Any(), range(N), max_length=L, fixed_length=True, padding="left", first_id=0)
    assert (rec.scheme.first_id, rec.scheme.pad_id) == (0, N)


def test_a_model_without_an_item_head_is_refused():
    class Distance(Mean):
        def forward(self, ids):
            users = self.body(self.items(ids).sum(dim=1))
            return -torch.cdist(users, self.items.weight[1:])

    with pytest.raises(
        ModelError, match=r"Distance cannot be wrapped .* no layer's vector"
    ) as refused:
        wrap(Distance(), range(N), max_length=L)
    assert str(refused.value).endswith("give site, item_head, first_id, pad_id or padding")
    assert "\n" not in str(refused.value)


def test_the_nearest_of_what_was_tried_is_told():
    model = Model()
    with pytest.raises(ModelError, match=r"scale=0\.5 and no bias in the item head would mend it"):
        wrap(model, range(N), max_length=L, item_head=lambda: ItemHead(2 * model.items.weight[1:]))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (
            lambda ids: torch.zeros(len(ids), 5, N),
            r"gives \(5, 5, 12\); expected \[histories, items\]",
        ),
        (lambda ids: {}["logits"], "the scoring call fails .KeyError: 'logits'"),
        (lambda ids: torch.zeros(3) @ torch.zeros(4), "the scoring call fails .RuntimeError"),
    ],
)
def test_a_scoring_call_that_cannot_be(score, message):
    with pytest.raises(ModelError, match=message):
        wrap(Model(), range(N), score=score, max_length=L)


def test_another_number_of_items_is_refused():
    with pytest.raises(ModelError, match="Model cannot be wrapped"):
        wrap(Model(), range(N + 1), max_length=L)
    with pytest.raises(ModelError, match="Model cannot be wrapped"):
        wrap(Model(), range(N - 1), max_length=L)


def test_a_site_that_is_none():
    with pytest.raises(SiteError, match="no module 'bodi' in Model; nearest: body"):
        wrap(Model(), range(N), max_length=L, site="bodi")
    with pytest.raises(ModelError, match="no layer's vector times a weight"):
        wrap(Model(), range(N), max_length=L, site="items")


def test_a_window_has_to_be_given_with_other_settings():
    with pytest.raises(ModelError, match="expected max_length"):
        wrap(Model(), range(N), padding="right")


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (TokenScheme(1, 0, "right", 3), [[1, 2, 0], [4, 5, 6]]),
        (TokenScheme(0, 9, "left", 3), [[9, 0, 1], [3, 4, 5]]),
        (TokenScheme(1, 0, "left", 5, fixed_length=True), [[0, 0, 0, 1, 2], [0, 3, 4, 5, 6]]),
    ],
)
def test_encode(scheme, expected):
    assert scheme.encode(Histories.from_lists([[0, 1], [2, 3, 4, 5]])).tolist() == expected


def test_a_mask_token_comes_after_the_last_real_one():
    ids = torch.tensor([[0, 0, 1], [0, 2, 3], [4, 0, 0], [0, 0, 0]])
    expected = [[0, 0, 1, 7], [0, 2, 3, 7], [4, 7, 0, 0], [7, 0, 0, 0]]
    assert with_mask(ids, 7, pad_id=0).tolist() == expected


def test_a_catalogue_of_bare_ids():
    catalogue = as_catalogue(["b", "a"])
    assert catalogue.item_ids.to_list() == ["b", "a"]
    assert catalogue.counts.tolist() == [0, 0]
    assert as_catalogue(catalogue) is catalogue
    with pytest.raises(ModelError, match="Linear has 3 items, but 2 ids were given"):
        as_catalogue(catalogue, of=nn.Linear(1, 1), found=3)
