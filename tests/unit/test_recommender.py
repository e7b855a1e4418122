"""What steerrec asks of a recommender: an item head, user vectors, a fingerprint."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from steerrec.adapters.sasrec import SASRecRecommender
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.data import Histories
from steerrec.errors import ModelError
from steerrec.recommender import ItemHead, Recommender, fingerprint, user_vectors
from steerrec.sites import Site, TokenIds

from .toy_models import hooked, tiny_sasrec

HISTORIES = Histories.from_lists([[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10], [11, 11]])


# --- the item head ------------------------------------------------------------------------------

USERS = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
ITEMS = torch.tensor([[1.0, 0.0], [0.0, 5.0], [3.0, -4.0]])


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (ItemHead(ITEMS), [[3.0, 20.0, -7.0], [0.0, 10.0, -8.0]]),
        (ItemHead(ITEMS, torch.tensor([1.0, 2.0, 3.0])), [[4.0, 22.0, -4.0], [1.0, 12.0, -5.0]]),
        (
            ItemHead(ITEMS, torch.tensor([1.0, 2.0, 3.0]), scale=10.0),
            [[31.0, 202.0, -67.0], [1.0, 102.0, -77.0]],
        ),
        (ItemHead(ITEMS, normalize=True), [[0.6, 0.8, -0.28], [0.0, 1.0, -0.8]]),
        (ItemHead(ITEMS, scale=5.0, normalize=True), [[3.0, 4.0, -1.4], [0.0, 5.0, -4.0]]),
    ],
    ids=["dot", "bias", "scale before bias", "cosine", "cosine with temperature"],
)
def test_scores_worked_by_hand(head, expected):
    torch.testing.assert_close(head.scores(USERS), torch.tensor(expected))
    assert (len(head), head.width) == (3, 2)
    parts = [head.chunk(0, 1).scores(USERS), head.chunk(1, 3).scores(USERS)]
    torch.testing.assert_close(torch.cat(parts, dim=1), torch.tensor(expected))


def test_a_chunk_is_a_view_of_a_few_rows():
    head = ItemHead(ITEMS, torch.arange(3.0), scale=2.0, normalize=True)
    part = head.chunk(1, 10)
    assert part.weight.data_ptr() == ITEMS[1:].data_ptr()
    assert part.bias.tolist() == [1.0, 2.0]
    assert (part.scale, part.normalize) == (2.0, True)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(3), None, r"item matrix has shape \(3,\); expected \[items, width\]"),
        (torch.zeros(3, 2), torch.zeros(2), r"item bias has shape \(2,\); expected \[3\]"),
        (torch.zeros(3, 2), torch.zeros(3, 1), r"item bias has shape \(3, 1\)"),
    ],
)
def test_a_head_whose_parts_do_not_fit_is_refused(weight, bias, message):
    with pytest.raises(ModelError, match=message):
        ItemHead(weight, bias)


# --- user vectors -------------------------------------------------------------------------------


@pytest.fixture(
    params=[{}, {"norm_first": False}, {"tie_word_embeddings": False}],
    ids=["pre-norm", "post-norm", "untied"],
)
def rec(request):
    return tiny_sasrec(**request.param)


def test_sasrec_is_a_recommender_and_its_model_is_none(rec):
    assert isinstance(rec, Recommender)
    assert not isinstance(rec.model, Recommender)


def test_user_vectors_times_the_item_head_are_the_models_own_scores(rec):
    """What every adapter promises: the site is the scored vector, the head the way to score."""
    scores = rec.score(rec.make_batch(HISTORIES))
    vectors = user_vectors(rec, HISTORIES)
    assert scores.shape == (4, 12)
    torch.testing.assert_close(rec.item_head.scores(vectors), scores)
    assert scores.std() > 0.1  # an untrained model that says the same of everything would pass


def test_user_vectors_do_not_depend_on_the_company(rec):
    together = user_vectors(rec, HISTORIES)
    for user in range(len(HISTORIES)):
        alone = user_vectors(rec, HISTORIES.select([user]))
        torch.testing.assert_close(alone[0], together[user])


def test_only_the_window_of_a_history_counts(rec):
    last = HISTORIES.truncate(rec.max_length)
    assert max(last.lengths) < max(HISTORIES.lengths)
    assert torch.equal(user_vectors(rec, last), user_vectors(rec, HISTORIES))


def test_the_forward_pass_stops_at_the_site_and_nothing_is_scored():
    class Watched(SASRecRecommender):
        scored = 0

        def score(self, batch):
            scores = super().score(batch)
            self.scored += 1
            return scores

    plain = tiny_sasrec()
    rec = Watched(plain.model, plain.catalogue)
    later = []
    rec.model.layers[1].register_forward_hook(lambda *_: later.append("layer 1"))
    user_vectors(rec, HISTORIES)
    assert (rec.scored, later) == (0, ["layer 1"])
    user_vectors(rec, HISTORIES, replace(rec.site, path="layers.0"))
    assert (rec.scored, later) == (0, ["layer 1"])
    rec.score(rec.make_batch(HISTORIES))
    assert rec.scored == 1


def test_user_vectors_keep_no_graph_and_leave_no_hook(rec):
    rec.model.requires_grad_(True)
    states = []
    handle = rec.model.layers[1].register_forward_hook(lambda _, __, x: states.append(x))
    assert not user_vectors(rec, HISTORIES).requires_grad
    handle.remove()
    assert not states[0].requires_grad
    assert hooked(rec.model) == []


def test_a_model_in_training_mode_is_refused(rec):
    rec.model.layers[1].train()  # a single part is enough: its dropout would act
    with pytest.raises(ModelError, match="SASRecModel is in training mode"):
        user_vectors(rec, HISTORIES)


def test_a_site_with_more_than_one_vector_a_user_is_refused(rec):
    site = Site("layers.0", positions="real", positions_from=TokenIds("item_embedding"))
    with pytest.raises(ModelError, match="gave 12 user vectors for 4 histories"):
        user_vectors(rec, HISTORIES, site)
    assert hooked(rec.model) == []


# --- fingerprint --------------------------------------------------------------------------------


def test_the_fingerprint_is_one_of_weights_not_of_objects():
    rec, twin, other = tiny_sasrec(seed=0), tiny_sasrec(seed=0), tiny_sasrec(seed=1)
    assert fingerprint(rec, rec.site) == fingerprint(twin, twin.site)
    changed = differing(fingerprint(rec, rec.site), fingerprint(other, other.site))
    assert changed == {"item_matrix_sha256", "model_sha256", "site_sha256"}


def differing(one, other):
    return {key for key in one if one[key] != other[key]}


@pytest.mark.parametrize(
    ("parameter", "changed"),
    [
        ("item_embedding.weight", {"item_matrix_sha256", "model_sha256"}),
        ("layers.0.attention.qkv.weight", {"model_sha256"}),
        ("final_norm.bias", {"site_sha256", "model_sha256"}),
    ],
)
def test_a_fingerprint_tells_where_a_single_weight_differs(parameter, changed):
    rec = tiny_sasrec()
    before = fingerprint(rec, rec.site)
    weight = rec.model.get_parameter(parameter).data
    weight.view(-1)[-1] = weight.view(-1)[-1].nextafter(torch.tensor(torch.inf))
    assert differing(before, fingerprint(rec, rec.site)) == changed


def test_a_fingerprint_is_json_and_says_what_it_is_of():
    rec = tiny_sasrec()
    mark = fingerprint(rec, rec.site)
    assert json.loads(json.dumps(mark)) == mark
    size = sum(p.numel() for p in rec.model.parameters())
    expected = {"class": "SASRecModel", "site": "final_norm", "width": 8, "items": 12}
    assert mark.items() >= (expected | {"parameters": size}).items()


def test_a_fingerprint_tells_dtypes_apart():
    """Zeros in two dtypes of one size: the same bytes."""
    one, other = tiny_sasrec(), tiny_sasrec()
    for rec, dtype in ((one, torch.float16), (other, torch.bfloat16)):
        for parameter in rec.model.to(dtype).parameters():
            nn.init.zeros_(parameter)
    changed = differing(fingerprint(one, one.site), fingerprint(other, other.site))
    assert changed == {"item_matrix_sha256", "model_sha256", "site_sha256"}


def test_an_attachment_does_not_change_the_fingerprint():
    rec = tiny_sasrec()
    before = fingerprint(rec, rec.site)
    with attach(rec, SparseAutoencoder(8, 16, k=2)):
        assert fingerprint(rec, rec.site) == before


def test_threads_that_read_user_vectors_of_one_model_do_not_mix():
    rec = tiny_sasrec()
    lists = [[[item] * length for item in range(3)] for length in (1, 2, 4)]
    probes = [Histories.from_lists(rows) for rows in lists]
    expected = [user_vectors(rec, probe) for probe in probes]

    def read(number):
        return all(
            torch.equal(user_vectors(rec, probes[number]), expected[number]) for _ in range(60)
        )

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(read, range(3)))
    assert hooked(rec.model) == []
