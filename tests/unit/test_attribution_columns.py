"""Columns added to a table: which, of whom, and that each is what its own function says."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from steerrec.activations import collect_user_vectors
from steerrec.artifacts import Artifact, load_artifact
from steerrec.attribution import AttributionTable, score_groups, score_neurons
from steerrec.attribution_columns import add_columns, checked_columns, columns_of
from steerrec.causal import causal_effects
from steerrec.data import Histories
from steerrec.effects import grad_attribution, logit_slopes, mean_latents
from steerrec.errors import ArtifactError, DataError, SiteError
from steerrec.item_properties import item_values
from steerrec.operations import LatentSteering
from steerrec.profiles import Contrast, popularity_contrast, users_by_taste
from steerrec.sites import Site
from steerrec.steering import Steering

from .small_models import random_sae
from .tiny import random_histories, random_recommender

REC, SAE, TRAIN = random_recommender(), random_sae(4, 12, 3), random_histories()
POPULARITY = popularity_contrast(REC.catalogue)
ODD = Contrast("odd", np.arange(1, 20, 2), np.arange(0, 20, 2), "odd", "even", {"kind": "items"})
INNER = Site("item_embedding", positions_from="last")
EVERY = (
    "cohens_d_users",
    "logit_attribution",
    "direct_effect",
    "grad_attribution",
    "causal_effect",
)


def scored(contrast=POPULARITY, **options):
    return score_neurons(REC, SAE, contrast, TRAIN, users=60, **options)


def added(contrast=POPULARITY, table=None, **options):
    return add_columns(table or scored(contrast), REC, SAE, contrast, TRAIN, **options)


@pytest.mark.parametrize("number", range(32))
def test_which_columns_there_will_be_is_known_before(number):
    wanted = [name for place, name in enumerate(EVERY) if number >> place & 1]
    assert set(added(columns=wanted, k=3).columns if wanted else scored().columns) == columns_of(
        wanted
    )


@pytest.mark.parametrize("contrast", [POPULARITY, ODD], ids=["popularity", "any"])
@pytest.mark.parametrize("mask_seen", [False, True])
def test_each_column_is_what_its_function_gives_for_these_users(contrast, mask_seen):
    table = added(contrast, columns=EVERY, k=3, mask_seen=mask_seen)
    items = item_values(contrast, REC.catalogue)
    x = collect_user_vectors(REC, TRAIN)
    correlation, slope = logit_slopes(SAE, REC.item_head, items)
    mean, rate = mean_latents(SAE, x)
    seen = TRAIN if mask_seen else None
    causal = causal_effects(REC, SAE, items.values, TRAIN, k=3, mask_seen=mask_seen)
    groups = users_by_taste(TRAIN, REC.catalogue, max_length=6, contrast=contrast)
    users = score_groups(REC, SAE, *groups, contrast=contrast.describe())
    expected = {
        "logit_attribution": correlation,
        "direct_effect": mean * slope,
        "mean_latent_users": mean,
        "firing_rate_users": rate,
        "grad_attribution": grad_attribution(SAE, REC.item_head, items.values, x, k=3, seen=seen),
        "cohens_d_users": users["cohens_d"],
        "cohens_d_users_se": users["cohens_d_se"],
        "causal_effect": causal.effect,
        "causal_effect_se": causal.standard_error,
        "causal_gini": causal.gini,
        "causal_active": causal.active,
        "causal_measured": torch.ones(12),
    }
    for name, values in expected.items():
        torch.testing.assert_close(table[name], values.float(), msg=name)
    assert set(table.columns) == set(scored(contrast).columns) | set(expected)
    assert table.provenance["real_users"] == table.provenance["causal_users"] == 40
    assert table.provenance["lists"] == {"k": 3, "mask_seen": mask_seen}


def test_signs_agree_on_a_neuron_that_is_all_popularity():
    """It reads, and writes, the direction in which the popular items lie."""
    values = item_values(POPULARITY, REC.catalogue).values
    rec = random_recommender()
    direction = torch.tensor([1.0, 0, 0, 0])
    along = torch.from_numpy((values - values.mean()) / values.std()).float()
    rec.model.item_matrix[:] = 0.1 * rec.model.item_matrix + along.unsqueeze(1) * direction
    rec.model.item_embedding.weight[1:] = rec.model.item_matrix
    sae = random_sae(4, 12, 3)
    sae.W_enc[:, 0] = 10 * direction
    sae.W_dec[0] = direction
    table = score_neurons(rec, sae, POPULARITY, TRAIN, users=60)
    table = add_columns(table, rec, sae, POPULARITY, TRAIN, columns=EVERY, k=3)
    for name in (*EVERY, "cohens_d", "auroc", "point_biserial"):
        assert table.signed(name)[0] > 0, name
    assert table["causal_effect"].argmax() == 0
    assert table["logit_attribution"].argmax() == 0


def test_the_default_is_whatever_is_cheap_and_possible():
    assert checked_columns(None, scored=True) == list(EVERY[:4])
    assert checked_columns(None, scored=False) == ["cohens_d_users"]
    with pytest.raises(ArtifactError, match="no column 'taste' can be added; there are cohens_d"):
        checked_columns(["taste"], scored=True)
    with pytest.raises(SiteError, match="grad_attribution needs an SAE at the vector"):
        checked_columns(["grad_attribution"], scored=False)


def test_an_sae_inside_the_model():
    table = scored(site=INNER)
    table = added(table=table, site=INNER, columns=["cohens_d_users", "causal_effect"], k=3)
    values = item_values(POPULARITY, REC.catalogue).values
    expected = causal_effects(REC, SAE, values, TRAIN, site=INNER, k=3).effect
    torch.testing.assert_close(table["causal_effect"], expected.float())
    assert table["causal_effect"].abs().max() > 0
    assert "logit_attribution" not in table.columns


def test_a_sample_of_users_is_drawn_by_the_seed():
    one, again, other = (
        added(columns=EVERY, users=20, causal_users=10, seed=seed) for seed in (0, 0, 1)
    )
    assert one.provenance["real_users"] == 20
    assert one.provenance["causal_users"] == 10
    for name in one.columns:
        assert torch.equal(one[name], again[name])
    for name in ("grad_attribution", "causal_effect"):
        assert not torch.equal(one[name], other[name])


def test_only_the_strongest_are_switched_off():
    table = added(columns=EVERY, neurons=4)
    assert table["causal_measured"].sum() == 4
    measured = table["causal_measured"].nonzero().flatten()
    assert set(measured.tolist()) == set(table.strongest(4, by="grad_attribution").tolist())
    assert torch.equal(table.strongest(4), table.strongest(4, by=table.ranking))


def test_users_without_a_history_are_left_out():
    train = Histories.from_lists([[], *(row.tolist() for row in TRAIN), []])
    table = add_columns(scored(), REC, SAE, POPULARITY, train)
    assert torch.equal(table["grad_attribution"], added()["grad_attribution"])
    with pytest.raises(DataError, match="no training histories to find real users in"):
        add_columns(scored(), REC, SAE, POPULARITY, Histories.from_lists([[]]))


def test_a_table_of_something_else_is_an_error():
    with pytest.raises(ArtifactError, match=r"of popularity and 12 neurons, .* of odd and 12"):
        added(ODD, table=scored())
    with pytest.raises(ArtifactError, match="expected those of one SAE and one contrast"):
        add_columns(scored(), REC, random_sae(4, 9, 3), POPULARITY, TRAIN)


def test_columns_survive_in_an_artifact_and_old_tables_open(tmp_path):
    table = added(columns=EVERY, neurons=4)
    old = {name: table[name] for name in ("cohens_d", "std_a", "std_b")}
    artifact = Artifact.create(REC, SAE, training={"latents": 12})
    artifact.at().tables["popularity"] = table
    artifact.at().tables["old"] = AttributionTable(old, {**table.contrast, "name": "old"})
    artifact.save(tmp_path / "artifact")
    opened = load_artifact(tmp_path / "artifact").at()
    for name, values in table.columns.items():
        assert torch.equal(opened.table("popularity")[name], values)
    assert opened.table("popularity").provenance == json.loads(json.dumps(table.provenance))
    before = opened.table("old")
    assert before.ranking == "cohens_d"
    assert torch.equal(before.strongest(5), table.strongest(5, by="cohens_d"))
    Steering.popsteer(before)
    with pytest.raises(ArtifactError, match="the table of old has no column 'auroc'; it has"):
        before.strongest(5, by="auroc")


def test_the_popsteer_rule_keeps_to_cohens_d_unless_told_otherwise():
    table = added()
    plain = Steering.popsteer(table, neurons=3)
    assert set(plain.shift.nonzero().flatten().tolist()) == set(
        table.strongest(3, by="cohens_d").tolist()
    )
    assert "by" not in plain.provenance
    other = Steering.popsteer(table, by="logit_attribution")
    assert other.provenance["by"] == "logit_attribution"
    size = table["logit_attribution"].abs()
    weight = (size - size.min()) / (size.max() - size.min())
    sign = table["logit_attribution"] > 0
    expected = torch.where(sign, -weight * table["std_a"], weight * table["std_b"])
    torch.testing.assert_close(other.shift, expected)
    # auroc is neutral at one half
    same = replace(table, columns={**table.columns, "auroc": table["logit_attribution"] + 0.5})
    torch.testing.assert_close(Steering.popsteer(same, by="auroc").shift, other.shift)


def test_latents_scaled_by_a_column():
    table = added()
    recipe = LatentSteering.from_column(table, strength=0.5)
    expected = (-0.5 * table["logit_attribution"].double()).exp()
    torch.testing.assert_close(recipe.gain, expected.float())
    assert recipe.provenance["by"] == "logit_attribution"
    x = collect_user_vectors(REC, TRAIN)
    latents = SAE.encode(x).dense(12)
    moved = x + (latents * (recipe.gain - 1)) @ SAE.W_dec
    torch.testing.assert_close(recipe.transform(SAE)(x), moved)
    still = LatentSteering.from_column(table, by="auroc", strength=0.0)
    assert torch.equal(still.transform(SAE)(x), x)


@pytest.mark.parametrize("strength", [2.0, -2.0])
def test_scaling_by_direct_logits_moves_scores_along_popularity_in_every_user(strength):
    """Down for all, or up for all, since each latent moves them that way."""
    values = torch.from_numpy(item_values(POPULARITY, REC.catalogue).values)
    x = collect_user_vectors(REC, TRAIN)
    recipe = LatentSteering.from_column(added(), strength=strength)
    change = REC.item_head.scores(recipe.transform(SAE)(x)) - REC.item_head.scores(x)
    along = change.double() @ (values - values.mean())  # [U]
    assert bool((along * strength < 0).all())
