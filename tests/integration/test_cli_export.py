"""`steerrec export`: files for serving from an ARTIFACT."""

import shutil

import pytest
import torch

import steerrec
from steerrec.exporting import read_metadata


def test_export_gives_the_steered_vectors(cli, world, tmp_path):
    file = tmp_path / "steer.pt2"
    found = cli("export", world.artifact, "-o", file, "--alpha", 1.5, "--neurons", 9, "--json")
    assert found.json["alpha"] == 1.5
    assert found.json["steering"]["neurons"] == 9
    assert read_metadata(file) == {k: v for k, v in found.json.items() if k != "file"}
    assert "the model scores by inner product" in found.err
    here = steerrec.load_artifact(world.artifact).at()
    recipe = steerrec.Steering.popsteer(here.table("popularity"), neurons=9)
    x = torch.randn(5, here.sae.d_in, generator=torch.Generator().manual_seed(0))
    steered = torch.export.load(file).module()(x, torch.full((5,), 1.5))
    torch.testing.assert_close(steered, steerrec.SteerTransform(here.sae, recipe)(x, 1.5))


def test_a_file_that_is_there_is_not_replaced_unasked(cli, world, tmp_path):
    (tmp_path / "steer.pt2").write_text("mine")
    found = cli("export", world.artifact, "-o", tmp_path / "steer.pt2")
    assert found.code == 1
    assert "--force" in found.err
    assert (tmp_path / "steer.pt2").read_text() == "mine"
    assert cli("export", world.artifact, "-o", tmp_path / "steer.pt2", "--force").code == 0


@pytest.fixture
def inside(cli, world, tmp_path):
    """The world's artifact with an SAE inside the model too."""
    artifact = shutil.copytree(world.artifact, tmp_path / "artifact")
    small = ("--latents", "32", "--k", "4", "--batch-size", "256", "--epochs", "1")
    attach = ("attach", world.model, "--data", world.data, "-o", artifact, *small)
    assert cli(*attach, "--layer", "layers.0.attention").code == 0
    score = ("score", artifact, "--model", world.model, "--data", world.data, "--users", "100")
    assert cli(*score, "--site", "layers.0.attention").code == 0
    return artifact


def test_a_layer_inside_the_model_is_refused(cli, inside, tmp_path):
    file = tmp_path / "steer.pt2"
    found = cli("export", inside, "-o", file, "--site", "layers.0.attention")
    assert found.code == 1
    assert "cannot be served on user vectors" in found.err
    assert not file.exists()
    assert cli("export", inside, "-o", file, "--site", "final_norm").code == 0


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("-o", "steer.bin"), 1, "expected .onnx, or .pt2"),
        (("-o", "steer.pt2", "--recipe", "nobody"), 1, "nobody"),
        (("-o", "steer.pt2", "--recipe", "a", "--neurons", "3"), 2, "--recipe says itself"),
    ],
)
def test_what_cannot_work(cli, world, options, code, message):
    found = cli("export", world.artifact, *options)
    assert found.code == code
    assert message in found.err
