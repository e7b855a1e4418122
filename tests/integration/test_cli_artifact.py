"""Artifacts on the command line: several sites, retrained models, SAEs of other libraries."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import steerrec
from steerrec.adapters.sasrec import save
from steerrec.recommender import fingerprint

SMALL = ("--latents", "64", "--k", "8", "--batch-size", "256", "--epochs", "2")


@pytest.fixture
def artifact(world, tmp_path):
    """A copy of the world's artifact."""
    return shutil.copytree(world.artifact, tmp_path / "artifact")


@pytest.fixture
def attached(cli, world, artifact):
    """The same with an SAE of half the size on a layer inside the model."""
    small = ("--latents", "32", "--k", "4", "--batch-size", "256", "--epochs", "1")
    attach = ("attach", world.model, "--data", world.data, "-o", artifact, *small)
    found = cli(*attach, "--layer", "layers.0.attention", "--json")
    assert found.json["site"]["path"] == "layers.0.attention"
    return artifact


@pytest.fixture
def retrained(world, tmp_path):
    """The world's model after a night: every weight a little different."""
    rec = steerrec.load_recommender(world.model)
    generator = torch.Generator().manual_seed(0)
    for parameter in rec.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.02 * parameter.data.std().nan_to_num() * noise
    folder = shutil.copytree(world.model, tmp_path / "retrained")
    save(rec, folder)
    return folder


# --- several sites


def test_attach_adds_a_site_to_an_artifact_that_is_there(world, attached, artifact):
    before = steerrec.load_artifact(world.artifact).at()
    opened = steerrec.load_artifact(artifact, rec=steerrec.load_recommender(world.model))
    assert [here.site.path for here in opened.sites.values()] == [
        "final_norm",
        "layers.0.attention",
    ]
    assert torch.equal(opened.at("final_norm").sae.W_dec, before.sae.W_dec)
    assert list(opened.at("final_norm").tables) == ["popularity"]
    assert opened.at("layers.0.attention").sae.d_sae == 32


def test_score_and_steer_want_to_know_which_of_several_sites(cli, world, attached, artifact):
    given = (artifact, "--model", world.model, "--data", world.data)
    score = ("score", *given, "--users", "64")
    for command in (score, ("steer", *given)):
        found = cli(*command)
        assert found.code == 1
        assert "has 2 sites; choose one by path or by folder (--site): 'final_norm' (" in found.err
        found = cli(*command, "--site", "layers.7")
        assert "has no site 'layers.7'; it has 'final_norm' (final-norm-" in found.err
    scored = cli(*score, "--site", "layers.0.attention", "--json").json
    assert f"{attached}/layers-0-attention-" in scored["table"]
    opened = steerrec.load_artifact(artifact)
    assert list(opened.at("layers.0.attention").tables) == ["popularity"]
    (folder,) = [name for name in opened.sites if name.startswith("layers")]
    steer = ("steer", *given, "--alpha", "2", "--json")
    by_folder = cli(*steer, "--site", folder).json
    assert by_folder == cli(*steer, "--layer", "layers.0.attention").json
    assert by_folder["steered"] != cli(*steer, "--site", "final_norm").json["steered"]


def test_a_site_is_not_attached_twice(cli, world, artifact):
    attach = ("attach", world.model, "--data", world.data, "-o", artifact, *SMALL)
    before = {file.name: file.read_bytes() for file in artifact.rglob("*.json")}
    found = cli(*attach)
    assert found.code == 1
    assert "artifact exists and holds an SAE at 'final_norm'; choose another layer" in found.err
    assert {file.name: file.read_bytes() for file in artifact.rglob("*.json")} == before
    assert not artifact.with_name("artifact.partial").exists()


def test_an_artifact_of_another_model_gets_no_site(cli, world, artifact, retrained):
    attach = ("attach", retrained, "--data", world.data, "-o", artifact, *SMALL)
    found = cli(*attach, "--layer", "layers.0")
    assert found.code == 1
    assert "other weights; use the model that it was made for" in found.err


# --- a model that was retrained


def test_another_model_is_refused_or_the_fit_is_told(cli, world, artifact, retrained):
    steer = ("steer", artifact, "--model", retrained, "--data", world.data, "--json")
    found = cli(*steer)
    assert found.code == 1
    for part in ("made for a SASRecModel", "other weights", "--no-strict", "--warm-start"):
        assert part in found.err
    found = cli(*steer, "--no-strict")
    assert found.json["steered"] != found.json["unsteered"]
    (line,) = found.err.splitlines()
    assert "was made for another model (other weights): FVU " in line
    assert "the SAE still fits" in line or "the SAE no longer fits" in line
    same = cli("steer", artifact, "--model", world.model, "--data", world.data, "--no-strict")
    assert (same.code, same.err) == (0, "")


def test_a_table_of_another_model_says_so(cli, world, artifact, retrained):
    given = ("--model", retrained, "--data", world.data, "--users", "64", "--no-strict")
    assert cli("score", artifact, *given).code == 0
    table = steerrec.load_artifact(artifact).at().table("popularity")
    rec = steerrec.load_recommender(retrained)
    assert table.provenance["model_sha256"] == fingerprint(rec)["model_sha256"]


def test_a_warm_start_goes_on_from_the_sae_of_before(cli, world, artifact, retrained, tmp_path):
    attach = ("attach", retrained, "--data", world.data, "-o", tmp_path / "new")
    found = cli(*attach, "--warm-start", artifact, "--batch-size", "256", "--json").json
    assert found["site"]["path"] == "final_norm"
    assert (found["training"]["latents"], found["training"]["k"]) == (64, 8)
    assert found["training"]["epochs"] == 5
    assert found["reconstruction"]["fvu"] < found["warm_start"]["fvu"]
    new = steerrec.load_artifact(tmp_path / "new", rec=steerrec.load_recommender(retrained))
    assert new.at().training["warm_start"] == found["warm_start"]
    assert not new.at().tables
    shown = cli(*attach, "--warm-start", artifact, "--epochs", "1", "--force")
    assert "FVU of the SAE as it was" in shown.out


def test_a_warm_start_takes_its_size_from_the_artifact(cli, world, artifact):
    attach = ("attach", world.model, "--data", world.data, "-o", "new", "--warm-start", artifact)
    for option in (("--latents", "64"), ("--k", "8"), ("--call", "last")):
        found = cli(*attach, *option)
        assert found.code == 2
        assert "--warm-start says itself which site" in " ".join(found.err.split())


# --- SAEs of other libraries


def test_an_sae_of_saelens_becomes_an_artifact_that_scores_and_steers(
    cli, world, artifact, tmp_path
):
    """The artifact's own SAE, as SAELens would have saved it with another convention."""
    here = steerrec.load_artifact(artifact).at()
    weights = {name: tensor.clone() for name, tensor in here.sae.state_dict().items()}
    weights["b_enc"] -= weights["b_dec"] @ weights["W_enc"]
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    config = {**here.sae.config(), "apply_b_dec_to_input": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    mine = tmp_path / "mine"
    given = ("--data", world.data, "-o", mine)
    found = cli("import-sae", folder, world.model, *given, "--json").json
    assert found["site"]["path"] == "final_norm"
    recorded = here.training["reconstruction"]["fvu"]
    assert found["reconstruction"]["fvu"] == pytest.approx(recorded, rel=0.3)
    assert cli("score", mine, "--model", world.model, "--data", world.data).code == 0
    imported = steerrec.load_artifact(mine, rec=steerrec.load_recommender(world.model)).at()
    torch.testing.assert_close(imported.sae.b_enc, here.sae.b_enc, rtol=1e-4, atol=1e-5)
    assert imported.training["imported"] == "theirs"
    again = cli("import-sae", folder, world.model, *given)
    assert "mine exists and holds an SAE at 'final_norm'" in again.err
    table = cli("import-sae", folder, world.model, *given, "--layer", "layers.0")
    assert f"{mine}: 64 latents at layers.0" in table.out
    assert "this SAE reconstructs badly here" in table.err
    assert len(steerrec.load_artifact(mine).sites) == 2


def test_an_sae_that_is_not_of_the_layer_is_refused(cli, world, tmp_path):
    sae = steerrec.SparseAutoencoder(5, 8, 2)
    save_file(dict(sae.state_dict()), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps(sae.config()))
    command = ("import-sae", tmp_path, world.model, "--data", world.data, "-o", tmp_path / "mine")
    found = cli(*command)
    assert found.code == 1
    assert "'final_norm' gives vectors of width 32, the SAE reads 5" in found.err
    found = cli(*command, "--sae-format", "sparsify")
    assert "sae.safetensors does not exist" in found.err
    assert not (tmp_path / "mine").exists()
