"""What neurons stand for: against a naive computation that holds everything at once."""

import dataclasses

import numpy as np
import polars as pl
import pytest
import torch

from steerrec.activations import collect_user_vectors
from steerrec.attribution import AttributionTable, score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.contrasts import item_contrast
from steerrec.data import Catalogue
from steerrec.describing import BINS, contrast_groups, describe_neuron, describe_neurons
from steerrec.description_files import description_file, read_descriptions, write_descriptions
from steerrec.errors import ArtifactError
from steerrec.profiles import popularity_contrast
from steerrec.recommender import ItemHead
from steerrec.sites import Site, TokenIds

from .tiny import random_histories, random_recommender

ITEMS, USERS, LATENTS, K = 60, 150, 24, 3


@pytest.fixture(scope="module")
def world():
    rec = random_recommender(ITEMS, 6)
    kinds = ["Horror" if row < 12 else "Drama" for row in range(ITEMS)]
    rec.catalogue = Catalogue(rec.catalogue.frame.with_columns(pl.Series("kind", kinds)))
    sae = SparseAutoencoder(6, LATENTS, K).requires_grad_(False)
    histories = random_histories(USERS, ITEMS, shortest=2)
    contrast = popularity_contrast(rec.catalogue)
    table = score_neurons(rec, sae, contrast, histories, users=300, seed=3)
    return rec, sae, table, histories


@pytest.fixture(scope="module")
def found(world):
    return describe_neurons(*world, batch_size=17)


@pytest.fixture(scope="module")
def dense(world):
    """Latents of all users, [U, D]."""
    rec, sae, _, histories = world
    return sae.encode(collect_user_vectors(rec, histories)).dense(LATENTS)


def test_rates_and_means_are_those_of_all_latents_at_once(found, dense):
    torch.testing.assert_close(found.facts.firing_rate, (dense > 0).float().mean(dim=0))
    expected = dense.sum(dim=0) / (dense > 0).sum(dim=0).clamp_min(1)
    torch.testing.assert_close(found.facts.mean_activation, expected)


def test_histories_that_fire_most_come_first_with_their_latest_items(world, found, dense):
    histories = world[3]
    for neuron in range(LATENTS):
        values, users = dense[:, neuron].sort(descending=True)
        shown = found[neuron].fired_by
        assert len(shown) == min(4, int((values > 0).sum()))
        for place, history in enumerate(shown):
            assert history.activation == pytest.approx(float(values[place]))
            latest = histories.truncate(6)[int(users[place])].tolist()[-5:]
            assert [item.row for item in history.items] == latest


def test_items_are_those_that_the_decoder_row_moves_most(world, found):
    rec, sae, _, _ = world
    effects = sae.W_dec @ rec.item_head.weight.T  # [D, N]
    for neuron in range(LATENTS):
        usual = found.facts.mean_activation[neuron].clamp_min(1e-12)
        up = effects[neuron].sort(descending=True)
        shown = found[neuron]
        count = min(8, ITEMS // 10)
        assert [moved.item.row for moved in shown.raises] == up.indices[:count].tolist()
        assert [moved.item.row for moved in shown.lowers] == up.indices.flip(0)[:count].tolist()
        assert shown.raises[0].effect == pytest.approx(float(usual * up.values[0]), rel=1e-4)
        assert shown.lowers[0].effect == pytest.approx(float(usual * up.values[-1]), rel=1e-4)


def test_histograms_hold_every_user_of_the_table_and_its_means(world, found):
    table = world[2]
    facts = found.facts
    width = (facts.high - facts.low) / BINS
    centres = facts.low[:, None] + width[:, None] * (torch.arange(BINS) + 0.5)
    for group in "ab":
        counts = getattr(facts, f"histogram_{group}")
        assert (counts.sum(dim=1) == 300).all()
        mean = (counts * centres).sum(dim=1) / 300
        assert ((mean - table[f"mean_{group}"]).abs() < width).all()


def test_the_groups_of_a_table_are_made_again(world):
    rec, sae, table, histories = world
    groups = contrast_groups(rec, table, histories)
    pre_acts = sae.pre_acts(collect_user_vectors(rec, groups[0]))
    torch.testing.assert_close(pre_acts.mean(dim=0), table["mean_a"], atol=1e-5, rtol=1e-4)
    unknown = dataclasses.replace(table, contrast={**table.contrast, "definition": {"kind": "x"}})
    assert contrast_groups(rec, unknown, histories) is None
    assert describe_neurons(rec, sae, unknown, histories)[0].histogram is None


def test_the_groups_of_an_attribute_are_made_again_and_no_file_is_opened(world):
    rec, sae, _table, histories = world
    contrast = item_contrast(rec.catalogue, "kind=Horror")
    horror = score_neurons(rec, sae, contrast, histories, users=50, seed=3)
    groups = contrast_groups(rec, horror, histories)
    assert set(groups[0].items.tolist()) <= set(range(12))
    assert set(groups[1].items.tolist()) <= set(range(12, ITEMS))
    told = describe_neurons(rec, sae, horror, histories)[0].histogram
    assert sum(told.group_a) == sum(told.group_b) == 50

    def claims(**changes):
        return dataclasses.replace(horror, contrast={**horror.contrast, **changes})

    files = {"kind": "items", "text": "items:/etc/passwd vs kind=Horror"}
    assert contrast_groups(rec, claims(definition=files), histories) is None
    gone = {"kind": "items", "text": "brand=Acme"}
    assert contrast_groups(rec, claims(definition=gone), histories) is None
    others = {"label": "Horror", "items": 13}
    assert contrast_groups(rec, claims(group_a=others), histories) is None


def test_like_neurons_have_the_largest_cosines(world, found):
    rows = torch.nn.functional.normalize(world[1].W_dec, dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    for neuron in range(LATENTS):
        best = cosines[neuron].sort(descending=True)
        assert [each.neuron for each in found[neuron].similar] == best.indices[:6].tolist()
        assert found[neuron].similar[0].cosine == pytest.approx(float(best.values[0]), abs=1e-6)


def test_batches_and_their_order_change_nothing(world, found):
    again = describe_neurons(*world, batch_size=64)
    for name, value in vars(found.facts).items():
        torch.testing.assert_close(getattr(again.facts, name), value, msg=name)


def test_a_neuron_that_raises_horror_is_called_so(world):
    rec, _, _, histories = world
    # one neuron for each axis of width 2: items 0 to 11 (Horror) lie on the first, others apart
    embedding = torch.randn(ITEMS, 2, generator=torch.Generator().manual_seed(0)) * 0.01
    embedding[:12, 0] += 1
    embedding[12:, 1] += 1
    planted = random_recommender(ITEMS, 2)
    planted.model.item_embedding.weight[1:] = embedding
    planted.model.item_matrix.copy_(embedding)
    planted.catalogue = rec.catalogue
    sae = SparseAutoencoder.from_weights(
        {
            "W_enc": torch.eye(2),
            "b_enc": torch.zeros(2),
            "W_dec": torch.eye(2),
            "b_dec": torch.zeros(2),
        },
        1,
    )
    columns = {name: torch.ones(2) for name in ("cohens_d", "std_a", "std_b", "mean_a", "mean_b")}
    table = AttributionTable(columns, popularity_contrast(rec.catalogue).describe())
    found = describe_neuron(planted, sae, table, histories, 0)
    assert "Horror" in found.label
    assert found.evidence in ("both", "items")
    [horror] = [note for note in found.raises_attributes if note.name == "Horror"]
    assert (horror.hits, horror.drawn) == (6, 6)  # a tenth of the items
    assert horror.ratio == pytest.approx(60 / 12)
    assert found.histogram is None  # the table does not say how its users were made


def test_a_silent_neuron_says_so_and_has_no_meaning(world):
    rec, sae, table, histories = world
    silent = SparseAutoencoder.from_weights(
        {
            **{n: p.clone() for n, p in sae.state_dict().items()},
            "b_enc": sae.b_enc - 1e6 * (torch.arange(LATENTS) == 5),
        },
        K,
    )
    found = describe_neurons(rec, silent, table, histories)[5]
    assert (found.label, found.evidence) == ("never fires on real histories", "none")
    assert found.fired_by == ()
    assert found.raises_attributes == ()


def test_elsewhere_than_at_the_scored_vector_nothing_is_said_of_items(world):
    rec, sae, table, histories = world
    inner = Site("item_embedding", positions_from=TokenIds("item_embedding", pad_id=0))
    found = describe_neurons(rec, sae, table, histories, site=inner)
    last = rec.model.item_embedding.weight[
        torch.from_numpy(histories.items[histories.offsets[1:] - 1]) + 1
    ]
    torch.testing.assert_close(
        found.facts.firing_rate, (sae.encode(last).dense(LATENTS) > 0).float().mean(dim=0)
    )
    assert not any(found[j].raises or found[j].raises_attributes for j in range(LATENTS))
    assert any(found[j].fired_by for j in range(LATENTS))


def test_what_is_asked_wrongly_is_said(world, found):
    rec, sae, table, histories = world
    with pytest.raises(ArtifactError, match="no neuron 24; expected one of 0 to 23"):
        found[LATENTS]
    with pytest.raises(ArtifactError, match="no neuron -1"):
        describe_neuron(rec, sae, table, histories, -1)
    with pytest.raises(ArtifactError, match="no column 'x'; expected one of cohens_d"):
        found.strongest(3, "x")
    with pytest.raises(ArtifactError, match="of 24 neurons, the SAE has 8"):
        describe_neurons(rec, SparseAutoencoder(6, 8, 2), table, histories)


def test_a_head_with_cosines_is_explained_by_directions(world):
    rec, sae, table, histories = world

    class Cosine(type(rec)):
        item_head = property(lambda self: ItemHead(self.model.item_matrix * 7, normalize=True))

    twin = random_recommender(ITEMS, 6)
    twin.__class__, twin.catalogue = Cosine, rec.catalogue
    weight = torch.nn.functional.normalize(rec.item_head.weight, dim=1)
    found = describe_neurons(twin, sae, table, histories)
    best = (sae.W_dec @ weight.T).argmax(dim=1)
    assert [found[j].raises[0].item.row for j in range(LATENTS)] == best.tolist()


# --- kept on disk


def test_what_is_kept_reads_back_alike(tmp_path, world, found):
    write_descriptions(tmp_path, found)
    again = read_descriptions(tmp_path, tmp_path, world[2])
    assert again.protocol == found.protocol
    assert [again[j] for j in range(LATENTS)] == [found[j] for j in range(LATENTS)]


def test_nothing_kept_is_none(tmp_path, world):
    assert read_descriptions(tmp_path, tmp_path, world[2]) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raises": lambda t: t + 1000}, "speaks of items that it does not describe"),
        ({"similar": lambda t: t + LATENTS}, "neurons that there are not"),
        ({"fired_attributes": lambda t: t + 1000}, "attributes that it does not name"),
        ({"low": lambda t: t[:-1]}, "'low' of shape"),
        ({"cosines": lambda t: t[:, :2]}, "another shape than 'similar'"),
        ({"firing_rate": lambda t: t.double()}, "'firing_rate' is float64"),
        ({"raise_effects": lambda t: t / 0}, "not finite"),
    ],
)
def test_what_is_damaged_is_refused(tmp_path, world, found, change, message):
    changed = {name: make(getattr(found.facts, name)) for name, make in change.items()}
    facts = dataclasses.replace(found.facts, **changed)
    write_descriptions(tmp_path, dataclasses.replace(found, facts=facts))
    with pytest.raises(ArtifactError, match=message):
        read_descriptions(tmp_path, tmp_path, world[2])


def test_no_byte_can_be_changed_without_an_error_or_other_facts(tmp_path, world, found):
    file = write_descriptions(tmp_path, found)
    assert file == description_file(tmp_path, "popularity")
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.choice(len(data), 60, replace=False):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            again = read_descriptions(tmp_path, tmp_path, world[2])
        except ArtifactError:
            continue
        for neuron in range(LATENTS):
            again[neuron].to_dict()  # nothing else is raised
