"""Artifacts on disk: what is written, what comes back, and everything that is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steerrec import artifact_recipes, artifact_site
from steerrec.activations import collect_user_vectors, sample_prefixes
from steerrec.artifacts import (
    Artifact,
    Fit,
    SiteArtifact,
    load_artifact,
    save_site,
    save_steering,
    save_table,
)
from steerrec.attribution import AttributionTable, score_neurons
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError, ArtifactWarning, StorageError
from steerrec.profiles import popularity_contrast
from steerrec.recommender import fingerprint
from steerrec.sites import Site
from steerrec.steering import Steering, SteerTransform
from steerrec.tensor_files import write_tensors

from .tiny import random_histories, random_recommender

D_IN, D_SAE, K = 4, 12, 3
DATA = {"format": "csv", "user_col": "user", "k_core": 5, "dedup": False}
TRAINING = {"log": [{"epoch": 1, "fvu": 0.125}], "reconstruction": {"fvu": 0.02, "l0": 2.5}}


@pytest.fixture
def rec():
    return random_recommender(width=D_IN)


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(0)
    sae = SparseAutoencoder(D_IN, D_SAE, K, generator=generator).requires_grad_(False)
    return sae.fold_normalisation(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2.0)


@pytest.fixture
def table(rec, sae):
    return score_neurons(rec, sae, popularity_contrast(rec.catalogue), random_histories(), users=50)


@pytest.fixture
def artifact(rec, sae, table):
    """One with everything in it."""
    made = Artifact.create(rec, sae, training=TRAINING, data=DATA)
    here = made.at()
    here.tables[table.name] = table
    recipe = Steering.popsteer(table, alpha=1.5, neurons=4, splice="reconstruct")
    here.steerings[recipe.name] = recipe
    return made


@pytest.fixture
def saved(artifact, tmp_path):
    """The same on disk, alone in a folder."""
    artifact.save(tmp_path / "home" / "artifact")
    return tmp_path / "home" / "artifact"


@pytest.fixture
def here(rec, saved):
    """The site's folder in it."""
    return saved / rec.site.folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(path, **changes):
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


# --- round trip


def test_everything_comes_back(artifact, saved, rec):
    loaded = load_artifact(saved, rec=rec)
    assert loaded.base_model == artifact.base_model
    assert loaded.data == DATA
    assert list(loaded.sites) == [rec.site.folder]
    one, other = artifact.at(), loaded.at()
    assert other.site == rec.site
    assert other.training == TRAINING
    assert (other.sae.d_in, other.sae.d_sae, other.sae.k) == (D_IN, D_SAE, K)
    for name, tensor in one.sae.state_dict().items():
        assert torch.equal(other.sae.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in other.sae.parameters())


def test_tables_come_back(artifact, saved):
    one, other = artifact.at().table("popularity"), load_artifact(saved).at().table("popularity")
    assert set(other.columns) == set(one.columns)
    assert all(torch.equal(other[name], one[name]) for name in one.columns)
    assert other.contrast == one.contrast
    assert other.provenance == one.provenance


def test_steerings_come_back(artifact, saved):
    one = artifact.at().steerings["popsteer"]
    other = load_artifact(saved).at().steerings["popsteer"]
    assert torch.equal(other.shift, one.shift)
    assert (other.alpha, other.splice, other.name) == (1.5, "reconstruct", "popsteer")
    assert other.provenance == one.provenance


def test_saving_again_what_was_loaded_gives_the_same_files(saved, tmp_path):
    load_artifact(saved).save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_sites_of_token_ids_and_nested_outputs_come_back(rec, sae, tmp_path):
    site = Site("item_embedding", select=(0, "hidden"), positions_from="last")
    Artifact.create(rec, sae, site=site).save(tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact").at().site == site


def test_a_transform_needs_nothing_but_the_artifact(artifact, saved):
    vectors = torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))
    here, loaded = artifact.at(), load_artifact(saved)
    recipe = here.steerings["popsteer"]
    expected = SteerTransform(here.sae, recipe)(vectors)
    assert torch.equal(loaded.transform(recipe)(vectors), expected)
    rule = SteerTransform(here.sae, Steering.popsteer(here.table("popularity")))(vectors)
    assert torch.equal(loaded.transform()(vectors), rule)
    assert not torch.equal(rule, expected)


# --- layout


def test_the_layout_on_disk(saved, rec):
    site = rec.site.folder
    assert set(contents(saved)) == {
        "README.md",
        "steerrec.json",
        f"{site}/cfg.json",
        f"{site}/sae_weights.safetensors",
        f"{site}/attribution/popularity.safetensors",
        f"{site}/steering/popsteer.safetensors",
    }


def test_the_record_names_model_data_sites_and_versions(saved, rec):
    record = json.loads((saved / "steerrec.json").read_text())
    assert record["format_version"] == "1.0"
    assert record["base_model"]["adapter"] == "tiny"
    assert record["base_model"]["source"] == "tests/unit/tiny.py"
    assert record["base_model"]["fingerprint"][rec.site.folder]["class"] == "MeanModel"
    assert record["data"] == DATA
    assert record["sites"] == {
        rec.site.folder: {"site": rec.site.to_dict(), "training": TRAINING},
    }
    assert record["versions"]["torch"] == torch.__version__


def test_the_configuration_is_one_that_saelens_opens(here):
    config = json.loads((here / "cfg.json").read_text())
    assert config.pop("metadata") == {
        "model_name": "tests/unit/tiny.py",
        "hook_name": "mean",
        "sae_lens_version": "6.0.0",  # whose layout this is
    }
    assert config == {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }


def test_weights_are_float32_and_the_decoder_is_not_renormalised(here, sae):
    weights = load_file(here / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.full((D_SAE,), 2.0))


def test_tables_and_recipes_carry_their_definitions_as_json(here):
    with safe_open(here / "attribution" / "popularity.safetensors", framework="pt") as file:
        made = json.loads(file.metadata()["table"])
    assert made["contrast"]["name"] == "popularity"
    assert made["provenance"]["n_a"] == 50
    with safe_open(here / "steering" / "popsteer.safetensors", framework="pt") as file:
        recipe = json.loads(file.metadata()["steering"])
    assert (recipe["operation"], recipe["alpha"]) == ("shift", 1.5)


def test_nothing_written_is_a_pickle(saved):
    """JSON, text, or safetensors: a length, and a JSON header of that length."""
    for name, data in contents(saved).items():
        if name.endswith(".safetensors"):
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        else:
            assert name.endswith((".json", ".md"))
            data.decode("utf-8")


def test_the_card_has_the_numbers(saved):
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: steerrec\n")
    assert "## `mean`" in card
    for row in (f"| latents | {D_SAE} |", f"| active at once | {K} |", "| L0 | 2.5 |"):
        assert row in card


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_an_sae_comes_back_in_its_own_dtype_bit_for_bit(rec, sae, tmp_path, dtype):
    Artifact.create(rec, sae.to(dtype)).save(tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact").at().sae
    for name, tensor in sae.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == dtype
        assert torch.equal(found, tensor)
    assert loaded.config() == sae.config()
    config = json.loads((tmp_path / "artifact" / rec.site.folder / "cfg.json").read_text())
    assert f"torch.{config['dtype']}" == str(dtype)


def test_an_sae_of_another_dtype_cannot_be_saved(rec, sae, tmp_path):
    whole = {name: tensor.int() for name, tensor in sae.state_dict().items()}
    made = Artifact.create(rec, SparseAutoencoder.from_weights(whole, K))
    with pytest.raises(ArtifactError, match="the SAE is int32; expected one of float32"):
        made.save(tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_tables_and_recipes_are_written_as_float32(rec, sae, tmp_path):
    made = Artifact.create(rec, sae)
    made.at().steerings["mine"] = Steering(torch.ones(D_SAE, dtype=torch.float64), name="mine")
    made.save(tmp_path / "artifact")
    assert torch.equal(
        load_artifact(tmp_path / "artifact").at().steerings["mine"].shift, torch.ones(D_SAE)
    )


def test_two_saves_are_equal_byte_for_byte(artifact, tmp_path):
    for name in ("one", "other"):
        artifact.save(tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_what_is_undefined_is_null_on_disk_and_what_cannot_be_read_is_not_written(
    rec, sae, tmp_path
):
    training = {"log": ({"fvu": float("nan")},), "reconstruction": {"fvu": None}}
    Artifact.create(rec, sae, training=training).save(tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact").at().training
    assert loaded == {"log": [{"fvu": None}], "reconstruction": {"fvu": None}}
    for bad, reason in ({"a": object()}, "cannot be saved"), ({"a": 10**30}, "an integer of 31"):
        with pytest.raises(ArtifactError, match=reason):
            Artifact.create(rec, sae, training=bad).save(tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact").at().training == loaded


# --- several sites


ITEMS = Site("item_embedding", positions_from="last")


@pytest.fixture
def two(artifact, rec):
    """The same with an SAE of another size on the item embedding."""
    artifact.add(rec, SparseAutoencoder(D_IN, 8, 2), site=ITEMS, training={"log": []})
    return artifact


def test_several_sites_come_back_each_with_its_own(two, rec, table, tmp_path):
    short = AttributionTable({n: torch.ones(8) for n in table.columns}, {"name": "horror"})
    two.at("item_embedding").tables["horror"] = short
    two.save(tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact", rec=rec)
    assert list(loaded.sites) == [rec.site.folder, ITEMS.folder]
    mean, items = loaded.at("mean"), loaded.at(ITEMS.folder)
    assert (mean.sae.d_sae, list(mean.tables), list(mean.steerings)) == (
        D_SAE,
        ["popularity"],
        ["popsteer"],
    )
    assert (items.sae.d_sae, list(items.tables), list(items.steerings)) == (8, ["horror"], [])
    assert items.site == ITEMS
    loaded.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "artifact")


def test_two_sites_on_one_module_do_not_collide(rec, sae, tmp_path):
    made = Artifact.create(rec, sae, site=ITEMS)
    first = Site("item_embedding", positions="all")
    made.add(rec, SparseAutoencoder(D_IN, 8, 2), site=first)
    made.save(tmp_path / "artifact")
    loaded = load_artifact(tmp_path / "artifact")
    message = rf"2 sites at 'item_embedding'; .*{ITEMS.folder}.*{first.folder}"
    with pytest.raises(ArtifactError, match=message):
        loaded.at("item_embedding")
    assert loaded.at(ITEMS.folder).sae.d_sae == D_SAE
    assert loaded.at(first.folder).sae.d_sae == 8


def test_a_site_is_added_once_and_only_for_the_same_model(two, rec, sae):
    with pytest.raises(ArtifactError, match="already holds an SAE at 'item_embedding'"):
        two.add(rec, sae, site=ITEMS)
    other = random_recommender(width=D_IN, seed=1)
    with pytest.raises(ArtifactError, match="other weights"):
        two.add(other, sae, site=Site("item_embedding", positions="all"))
    assert len(two.sites) == 2


def test_a_site_is_added_to_an_artifact_on_disk_and_all_else_stays(saved, rec):
    (saved / "notes.txt").write_text("mine")
    before = contents(saved)
    save_site(saved, rec, SparseAutoencoder(D_IN, 8, 2), site=ITEMS, training={"log": [1]})
    after = contents(saved)
    kept = before.keys() - {"steerrec.json", "README.md"}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after.keys() - before.keys() == {
        f"{ITEMS.folder}/cfg.json",
        f"{ITEMS.folder}/sae_weights.safetensors",
    }
    assert "## `item_embedding`" in (saved / "README.md").read_text()
    loaded = load_artifact(saved, rec=rec)
    assert loaded.at("item_embedding").training == {"log": [1]}
    assert [path.name for path in saved.parent.iterdir()] == ["artifact"]


def test_a_card_that_was_edited_stays_as_it_is(saved, rec):
    (saved / "README.md").write_text("by hand")
    save_site(saved, rec, SparseAutoencoder(D_IN, 8, 2), site=ITEMS)
    assert (saved / "README.md").read_text() == "by hand"


def test_the_folder_of_a_deep_module_keeps_a_usable_name(rec, sae, tmp_path):
    """However long its path; before, one could be saved that could not be loaded."""
    deep = Site(".".join(["layers"] * 30), layout="BH")
    rec.model.average = rec.model._modules.pop("mean")
    made = Artifact({"fingerprint": {deep.folder: {}}}, {deep.folder: SiteArtifact(deep, sae)})
    made.save(tmp_path / "artifact")
    assert load_artifact(tmp_path / "artifact").at().site == deep


# --- written by a newer steerrec


def newer(saved, here):
    """Unknown keys in every file that has any."""
    record = json.loads((saved / "steerrec.json").read_text())
    record |= {"licence": "MIT", "format_version": "1.7"}
    record["base_model"]["revision"] = "main"
    for entry in record["sites"].values():
        entry["quality"] = {"stars": 5}
    (saved / "steerrec.json").write_text(json.dumps(record))
    config = json.loads((here / "cfg.json").read_text())
    config["metadata"]["dataset_path"] = "visits"
    change_json(here / "cfg.json", colour=["red"], metadata=config["metadata"])
    for kind, name, key in (
        ("attribution", "popularity", "table"),
        ("steering", "popsteer", "steering"),
    ):
        file = here / kind / f"{name}.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        made = json.loads(metadata[key]) | {"mood": "good"}
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        write_tensors(file, tensors, {key: json.dumps(made), "beside": "it", "z": "y"})


def test_what_a_newer_minor_version_wrote_is_warned_about_and_kept(saved, here, tmp_path):
    newer(saved, here)
    with pytest.warns(ArtifactWarning) as caught:
        loaded = load_artifact(saved)
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith(f"{saved}: its format 1.7 is newer than 1.0; not known here")
    for key in (
        "'licence' in steerrec.json",
        "'quality' in steerrec.json",
        "'colour' in cfg.json",
        "'mood' in attribution/popularity",
        "'mood' in steering/popsteer",
    ):
        assert key in message
    again = tmp_path / "again"
    loaded.save(again)
    record = json.loads((again / "steerrec.json").read_text())
    assert (record["licence"], record["format_version"]) == ("MIT", "1.0")
    assert record["base_model"]["revision"] == "main"
    assert record["sites"][here.name]["quality"] == {"stars": 5}
    config = json.loads((again / here.name / "cfg.json").read_text())
    assert (config["colour"], config["metadata"]["dataset_path"]) == (["red"], "visits")
    for kind in ("attribution/popularity", "steering/popsteer"):
        with safe_open(again / here.name / f"{kind}.safetensors", framework="pt") as opened:
            metadata = opened.metadata()
        assert (metadata.pop("beside"), metadata.pop("z")) == ("it", "y")
        assert json.loads(*metadata.values())["mood"] == "good"
    with pytest.warns(ArtifactWarning, match="not known here") as caught:
        load_artifact(again).save(tmp_path / "third")
    assert "newer than" not in str(caught[0].message)
    assert contents(tmp_path / "third") == contents(again)


def test_a_newer_table_is_kept_only_as_long_as_the_table(saved, here, rec, table):
    newer(saved, here)
    with pytest.warns(ArtifactWarning):
        loaded = load_artifact(saved)
    loaded.at().tables["popularity"] = table
    loaded.save(saved)
    with pytest.warns(ArtifactWarning) as caught:
        load_artifact(saved)
    assert "attribution" not in str(caught[0].message)


def test_a_newer_minor_version_alone_is_said(saved):
    change_json(saved / "steerrec.json", format_version="1.1")
    with pytest.warns(ArtifactWarning, match=r"its format 1\.1 is newer than 1\.0$"):
        load_artifact(saved)


def test_an_older_minor_version_is_read_in_silence(saved, monkeypatch):
    monkeypatch.setattr("steerrec.artifacts.FORMAT_VERSION", "1.3")
    load_artifact(saved)


# --- whose artifact it is


def test_the_same_weights_pass_silently(saved):
    load_artifact(saved, rec=random_recommender(width=D_IN))


def test_other_weights_are_refused_by_an_error_that_names_both(saved, rec):
    other = random_recommender(width=D_IN, seed=1)
    digests = [fingerprint(m)["model_sha256"][:12] for m in (rec, other)]
    message = (
        rf"made for a MeanModel of width 4 with 20 items and weights {digests[0]}, this is a "
        rf"MeanModel .* {digests[1]}: other weights;.*strict=False"
    )
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved, rec=other)
    assert load_artifact(saved, rec=other, strict=False).at().sae.d_sae == D_SAE


def test_the_same_weights_in_another_configuration_are_refused(saved, rec):
    """Heads and norms do not show in the weights, and other user vectors come out."""
    rec.describe = lambda: {"adapter": "tiny", "source": None, "config": {"heads": 4}}
    with pytest.raises(ArtifactError, match="other configuration"):
        load_artifact(saved, rec=rec)
    record = json.loads((saved / "steerrec.json").read_text())
    del record["base_model"]["fingerprint"][rec.site.folder]["config_sha256"]
    (saved / "steerrec.json").write_text(json.dumps(record))
    load_artifact(saved, rec=rec)  # one from before configurations were recorded


def test_a_model_of_another_width_is_refused_even_so(saved):
    wide = random_recommender(width=D_IN + 1)
    with pytest.raises(ArtifactError, match="other width and weights"):
        load_artifact(saved, rec=wide)
    with pytest.raises(ArtifactError, match="'mean' gives vectors of width 5, the SAE reads 4"):
        load_artifact(saved, rec=wide, strict=False)


def test_a_model_without_the_site_is_refused(saved, rec):
    rec.model.average = rec.model._modules.pop("mean")
    for strict in (True, False):
        with pytest.raises(ArtifactError, match=r"made for a MeanModel.*no module 'mean'"):
            load_artifact(saved, rec=rec, strict=strict)


def test_versions_of_packages_are_recorded_and_not_compared(saved, rec):
    change_json(saved / "steerrec.json", versions={"torch": "0.1"})
    load_artifact(saved, rec=rec)


def test_other_item_counts_and_classes_are_named(saved, rec):
    class Other(type(rec.model)):
        pass

    more = random_recommender(items=21, width=D_IN)
    with pytest.raises(
        ArtifactError, match=r"with 21 items .*: other number of items and weights;"
    ):
        load_artifact(saved, rec=more)
    rec.model.__class__ = Other
    with pytest.raises(ArtifactError, match=r"this is a Other .*: other class;"):
        load_artifact(saved, rec=rec)


# --- another model: does the SAE still fit?


def fitted(rec, fvu):
    """An artifact of a model, with an SAE that reconstructs its vectors to about this FVU."""
    identity, lost = torch.eye(D_IN), fvu**0.5
    weights = {
        "W_enc": torch.cat([identity, -identity], dim=1),
        "b_enc": torch.zeros(2 * D_IN),
        "W_dec": torch.cat([identity, -identity]) * (1 - lost),
        "b_dec": torch.zeros(D_IN),
    }
    sae = SparseAutoencoder.from_weights(weights, D_IN)
    return Artifact.create(rec, sae, training={"reconstruction": {"fvu": fvu}})


def test_the_fit_is_the_fvu_on_this_model_against_twice_that_on_its_own(rec):
    """An SAE that gives back 1 - sqrt(.2) of each vector loses .2 of the variance, or a little more
    where the vectors have a mean."""
    histories = random_histories(users=300, shortest=4)
    artifact = fitted(rec, 0.2)
    fit = artifact.measure_fit(rec, histories)
    vectors = collect_user_vectors(
        rec, histories.prefixes(*sample(histories, fit.rows), rec.max_length)
    )
    lost = artifact.at().sae(vectors).x_hat - vectors
    expected = lost.square().sum() / (vectors - vectors.mean(dim=0)).square().sum()
    assert fit.fvu == pytest.approx(float(expected), rel=1e-5)
    assert (fit.recorded, fit.limit, fit.fits) == (0.2, 0.4, True)
    assert fit.l0 == pytest.approx(4.0)
    assert Fit(0.41, 0.2, 10, 4.0).fits is False
    assert Fit(0.1, 0.01, 10, 4.0).fits is True  # nine tenths are explained all the same
    assert (Fit(0.11, 0.01, 10, 4.0).fits, Fit(0.11, None, 10, 4.0).fits) == (False, False)


def sample(histories, rows):
    return sample_prefixes(histories, rows, np.random.default_rng(0))


def test_on_another_model_the_fit_is_measured_and_a_bad_one_is_warned_about(rec, tmp_path):
    histories, other = random_histories(), random_recommender(width=D_IN, seed=1)
    fitted(rec, 0.01).save(tmp_path / "good")
    load_artifact(tmp_path / "good", rec=other, strict=False, histories=histories)
    artifact = fitted(rec, 0.01)
    with torch.no_grad():
        artifact.at().sae.W_dec.zero_()
    artifact.save(tmp_path / "bad")
    with pytest.warns(ArtifactWarning, match=r"at 'mean': FVU 1\.\d+ \(0\.0100 .* no longer fits"):
        load_artifact(tmp_path / "bad", rec=other, strict=False, histories=histories)
    load_artifact(tmp_path / "bad", rec=rec, strict=False, histories=histories)  # its own model


# --- refused


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere.steerrec\.json does not exist; expected an"):
        load_artifact(tmp_path / "nowhere")


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", 1, 1.0, "1", "1.0.0", "1.x", None])
def test_another_major_format_version_is_refused(saved, version):
    change_json(saved / "steerrec.json", format_version=version)
    with pytest.raises(ArtifactError, match=rf"has format version {version!r}; .* reads 1\.x"):
        load_artifact(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {"sites": {}},
        {"sites": None},
        {"sites": []},
        {"base_model": None},
        {"base_model": {"fingerprint": {}}},
        {"data": []},
        {"data": {"user_col": 5}},
        {"data": {"format": ["csv"]}},
        {"data": {"k_core": "5"}},
        {"data": {"dedup": None}},
    ],
)
def test_an_incomplete_record_is_refused(saved, changes):
    change_json(saved / "steerrec.json", **changes)
    with pytest.raises(ArtifactError, match=r"steerrec\.json"):
        load_artifact(saved)


@pytest.mark.parametrize(
    "entry", [{}, {"site": {}}, {"site": {"path": "mean", "colour": 1}}, {"site": None}, "mean"]
)
def test_a_record_without_a_proper_site_is_refused(saved, rec, entry):
    change_json(saved / "steerrec.json", sites={rec.site.folder: entry})
    with pytest.raises(
        ArtifactError, match=r"steerrec\.json is not complete: what it says of mean-\w+ "
    ):
        load_artifact(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_damaged_record_is_refused(saved, text):
    (saved / "steerrec.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ArtifactError, match=r"steerrec\.json"):
        load_artifact(saved)


@pytest.mark.parametrize("name", ["../artifact2", "..", "/tmp", "a/b", ".hidden", ""])
def test_a_site_folder_outside_the_artifact_is_refused(saved, rec, name):
    shutil.copytree(saved / rec.site.folder, saved.with_name("artifact2"))
    record = json.loads((saved / "steerrec.json").read_text())
    record["sites"][name] = record["sites"].pop(rec.site.folder)
    (saved / "steerrec.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=f"site folder {name!r}"):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "gated"},
            "an SAE 'gated' of 'float32'; expected 'topk' or 'jumprelu' of",
        ),
        ({"architecture": "jumprelu"}, "threshold"),
        ({"dtype": "int8"}, "'topk' of 'int8'; expected 'topk' or 'jumprelu' of float32, float64"),
        ({"dtype": ["float32"]}, r"of \['float32'\]; expected 'topk' or 'jumprelu' of float32"),
        ({"apply_b_dec_to_input": False}, "says apply_b_dec_to_input False; .* has True"),
        ({"normalize_activations": "layer_norm"}, "says normalize_activations 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, "says reshape_activations 'hook_z'"),
        ({"rescale_acts_by_decoder_norm": True}, "says rescale_acts_by_decoder_norm True"),
        ({"k": 13}, "k is 13, more than the 12 latents"),
        ({"k": 0}, "k is 0; expected a positive integer"),
        ({"k": "3"}, "k is '3'; expected a positive integer"),
        ({"d_sae": 10**9}, "expected float32 of shape"),
        ({"d_in": None}, "d_in is None; expected a positive integer"),
    ],
)
def test_a_configuration_that_is_not_of_this_sae_is_refused(saved, here, changes, message):
    change_json(here / "cfg.json", **changes)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_enc": None}, "'b_enc' is missing"),
        (
            {"W_enc": torch.zeros(D_SAE, D_IN)},
            r"'W_enc' is float32 of shape \(12, 4\); expected .* \(4, 12\)",
        ),
        ({"W_dec": torch.zeros(D_SAE, D_IN).double()}, "'W_dec' is float64 of shape"),
        ({"b_dec": torch.zeros(D_IN).half()}, "'b_dec' is float16 of shape"),
        ({"extra": torch.zeros(1)}, r"'extra' is float32 of shape \(1,\); expected no such tensor"),
        ({"b_enc": torch.full((D_SAE,), torch.nan)}, "'b_enc' has values that are not finite"),
        ({"b_dec": torch.full((D_IN,), torch.inf)}, "'b_dec' has values that are not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved, here, changes, message):
    change_weights(here / "sae_weights.safetensors", **changes)
    with pytest.raises(ArtifactError, match=rf"sae_weights\.safetensors: tensor {message}"):
        load_artifact(saved)


@pytest.mark.parametrize("part", ["sae_weights", "attribution/popularity", "steering/popsteer"])
@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_a_truncated_file_is_refused(saved, here, part, size):
    file = here / f"{part}.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=rf"{part}\.safetensors cannot be read"):
        load_artifact(saved)


def test_a_header_too_large_to_be_honest_is_refused_unread(saved, here):
    (here / "sae_weights.safetensors").write_bytes((10**12).to_bytes(8, "little"))
    with pytest.raises(ArtifactError, match="its header claims 1000000000000"):
        load_artifact(saved)


def test_missing_files_are_refused(saved, here):
    (here / "sae_weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"sae_weights\.safetensors does not exist"):
        load_artifact(saved)
    (here / "cfg.json").unlink()
    with pytest.raises(ArtifactError, match=r"cfg\.json does not exist"):
        load_artifact(saved)


@pytest.mark.parametrize("column", ["cohens_d", "std_a", "std_b"])
def test_a_table_without_what_the_rule_needs_is_refused(saved, here, table, column):
    columns = {name: values for name, values in table.columns.items() if name != column}
    metadata = {"table": json.dumps({"contrast": table.contrast, "provenance": {}})}
    save_file(columns, here / "attribution" / "popularity.safetensors", metadata)
    with pytest.raises(ArtifactError, match=f"'{column}' is missing"):
        load_artifact(saved)


@pytest.mark.parametrize(
    "made",
    [
        None,
        "{",
        "[]",
        "{}",
        '{"contrast": {}, "provenance": {}}',
        '{"contrast": [], "provenance": {}}',
        '{"contrast": {"name": "genre"}, "provenance": {}}',
    ],
)
def test_a_table_that_is_not_of_its_contrast_is_refused(saved, here, table, made):
    metadata = None if made is None else {"table": made}
    save_file(dict(table.columns), here / "attribution" / "popularity.safetensors", metadata)
    with pytest.raises(ArtifactError, match=r"popularity\.safetensors"):
        load_artifact(saved)


RECIPE = {"operation": "shift", "alpha": 1.0, "splice": "delta", "provenance": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operation": "scale"}, "uses operation 'scale'.*upgrade"),
        ({"splice": "replace"}, "is not a steering recipe"),
        ({"alpha": "much"}, "is not a steering recipe"),
        ({"alpha": None}, "is not a steering recipe"),
        ({"alpha": True}, "is not a steering recipe"),
        ({"alpha": -1e300}, "is not a steering recipe; expected an alpha of 1e"),
        ({"operation": None}, "uses operation None"),
    ],
)
def test_a_recipe_that_is_not_understood_is_refused(saved, here, changes, message):
    metadata = {"steering": json.dumps({**RECIPE, **changes})}
    save_file({"shift": torch.zeros(D_SAE)}, here / "steering" / "popsteer.safetensors", metadata)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)


def test_a_contrast_that_is_not_there_lists_those_that_are(saved):
    with pytest.raises(ArtifactError, match=r"no .* 'genre' \(there: popularity\)"):
        load_artifact(saved).at().table("genre")


def test_a_site_that_is_not_there_or_not_the_only_one_is_refused(rec, sae):
    one = Artifact.create(rec, sae)
    message = rf"no site 'layers\.1'; it has 'mean' \({rec.site.folder}\)"
    with pytest.raises(ArtifactError, match=message):
        one.at("layers.1")
    other = Artifact.create(rec, sae, site=Site("item_embedding", positions_from="last"))
    both = Artifact(one.base_model, {**one.sites, **other.sites})
    with pytest.raises(ArtifactError, match=r"2 sites; choose one .*'mean' .*'item_embedding'"):
        both.at()
    assert both.at("mean").site == rec.site


# --- saving


def test_saving_replaces_an_old_artifact_whole(saved, rec, sae):
    Artifact.create(rec, sae).save(saved)
    assert not load_artifact(saved).at().tables
    assert [path.name for path in saved.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("writes", [0, 2])
def test_a_save_that_fails_leaves_the_old_artifact_and_nothing_else(
    artifact, saved, monkeypatch, error, writes
):
    """Of the three tensor files the first or the last cannot be written."""
    before, left = contents(saved), iter(range(writes))

    def failing(path, tensors, metadata):
        write_tensors(path, tensors, metadata)
        if next(left, None) is None:
            raise error

    artifact.data["k_core"] = 99
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        for module in (artifact_site, artifact_recipes):
            patch.setattr(module, "write_tensors", failing)
        with pytest.raises(expected):
            artifact.save(saved)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["artifact"]
    load_artifact(saved)
    artifact.save(saved)
    assert load_artifact(saved).data["k_core"] == 99


def killed_at(call, save):
    """Save in a process that dies without a word before its so-and-so-manieth change on disk.

    Returns whether there were so many.
    """
    child = os.fork()
    if child == 0:
        left = iter(range(call))
        for name in ("fsync", "replace", "mkdir", "chmod"):
            do = getattr(os, name)

            def dying(*arguments, do=do, **options):
                if next(left, None) is None:
                    os._exit(9)
                return do(*arguments, **options)

            setattr(os, name, dying)
        save()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that dies is forked")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("kind", ["save", "save_site", "save_table"])
def test_a_crash_at_any_moment_leaves_the_old_artifact_or_the_new_one(
    artifact, saved, rec, table, kind
):
    columns = {**table.columns, "cohens_d": torch.zeros(D_SAE)}
    other = AttributionTable(columns, table.contrast, table.provenance)
    old = contents(saved)
    artifact.data["k_core"] = 99
    save = {
        "save": lambda: artifact.save(saved),
        "save_site": lambda: save_site(saved, rec, SparseAutoencoder(D_IN, 8, 2), site=ITEMS),
        "save_table": lambda: save_table(saved, rec.site, other),
    }[kind]
    found, call = [], 0
    while killed_at(call, save):
        load_artifact(saved)
        now = {name: data for name, data in contents(saved).items() if "/." not in f"/{name}"}
        found.append(now)
        shutil.rmtree(saved)
        restore(saved, old)
        call += 1
    new = contents(saved)
    assert new != old
    assert call >= 3
    assert found[0] == old
    if kind == "save_table":  # the card comes after it, and tells of it
        for state in (old, new, *found):
            del state["README.md"]
    assert all(state in (old, new) for state in found)


def restore(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def test_tables_and_recipes_are_added_to_an_artifact_on_disk(rec, sae, table, tmp_path):
    Artifact.create(rec, sae, training=TRAINING).save(tmp_path)
    before = contents(tmp_path)
    file = save_table(tmp_path, rec.site, table)
    assert file == tmp_path / rec.site.folder / "attribution" / "popularity.safetensors"
    save_steering(tmp_path, rec.site, Steering(torch.ones(D_SAE), name="mine-1.0"))
    after = contents(tmp_path)
    assert b"`mine-1.0`" in after["README.md"]
    del before["README.md"]
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 3
    loaded = load_artifact(tmp_path).at()
    assert torch.equal(loaded.table("popularity")["cohens_d"], table["cohens_d"])
    assert torch.equal(loaded.steerings["mine-1.0"].shift, torch.ones(D_SAE))


def test_a_table_replaces_the_one_of_its_contrast(saved, rec, table):
    columns = {**table.columns, "cohens_d": torch.zeros(D_SAE)}
    save_table(saved, rec.site, AttributionTable(columns, table.contrast, table.provenance))
    tables = load_artifact(saved).at().tables
    assert list(tables) == ["popularity"]
    assert not tables["popularity"]["cohens_d"].any()


def test_nothing_is_added_where_no_artifact_is(rec, table, tmp_path):
    with pytest.raises(ArtifactError, match=r"steerrec\.json does not exist"):
        save_table(tmp_path / "nowhere", rec.site, table)
    with pytest.raises(ArtifactError, match=r"steerrec\.json does not exist"):
        save_steering(tmp_path / "nowhere", rec.site, Steering(torch.ones(D_SAE)))
    assert not (tmp_path / "nowhere").exists()


def test_what_is_for_another_sae_is_not_added(saved, rec):
    before = contents(saved)
    short = AttributionTable({"cohens_d": torch.zeros(5)}, {"name": "popularity"})
    with pytest.raises(ArtifactError, match=r"an SAE of 12 latents; what is to be added is for 5"):
        save_table(saved, rec.site, short)
    with pytest.raises(ArtifactError, match=r"an SAE of 12 latents; what is to be added is for 5"):
        save_steering(saved, rec.site, Steering(torch.zeros(5)))
    assert contents(saved) == before


def test_a_folder_with_links_out_of_it_is_refused_unless_they_may_lead_there(saved, here):
    """As in the Hub's cache, where every file of a snapshot is a link to a blob."""
    blobs = saved.parent / "blobs"
    blobs.mkdir()
    files = [file for file in saved.rglob("*.*") if file.is_file() and file.name != "README.md"]
    assert len(files) == 5
    for number, file in enumerate(files):
        blob = file.rename(blobs / str(number))
        file.symlink_to(blob)
        with pytest.raises(ArtifactError, match=f"{file.name} is a link that leads out of"):
            load_artifact(saved)
        file.unlink()
        shutil.copy(blob, file)
    for number, file in enumerate(files):
        file.unlink()
        file.symlink_to(blobs / str(number))
    assert list(load_artifact(saved, root=saved.parent).at().steerings) == ["popsteer"]


def test_a_site_folder_that_is_a_link_out_is_refused(saved, here):
    here.rename(saved.parent / "elsewhere")
    here.symlink_to("../elsewhere")
    with pytest.raises(ArtifactError, match="is a link that leads out of"):
        load_artifact(saved)


def test_a_fingerprint_of_another_layer_is_refused(saved, rec):
    record = json.loads((saved / "steerrec.json").read_text())
    record["base_model"]["fingerprint"][rec.site.folder]["site"] = "layers.3"
    (saved / "steerrec.json").write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"is at 'mean', its fingerprint at 'layers\.3'"):
        load_artifact(saved)


def test_a_file_in_a_part_of_a_site_needs_a_plain_name(saved, here):
    file = here / "steering" / "popsteer.safetensors"
    shutil.copy(file, here / "steering" / "a\n\x1b[31mb.safetensors")
    with pytest.raises(ArtifactError, match=r"file 'a\\n\\x1b\[31mb' cannot be a file name"):
        load_artifact(saved)


@pytest.mark.parametrize("name", ["", "../genre", "a/b", ".hidden", "a b", "é", "x" * 101])
def test_names_that_cannot_be_file_names_are_refused(saved, rec, table, name):
    before = contents(saved)
    named = AttributionTable(table.columns, {**table.contrast, "name": name})
    with pytest.raises(ArtifactError, match="cannot be a file name"):
        save_table(saved, rec.site, named)
    with pytest.raises(ArtifactError, match="cannot be a file name"):
        save_steering(saved, rec.site, Steering(torch.ones(D_SAE), name=name))
    assert contents(saved) == before
