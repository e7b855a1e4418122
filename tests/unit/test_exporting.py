"""What is exported gives what the hook gives, for every kind of recipe, batch and strength."""

import json

import pytest
import torch

from steerrec.artifacts import Artifact, load_artifact
from steerrec.attachment import attach
from steerrec.autoencoder import SparseAutoencoder
from steerrec.errors import ArtifactError, SiteError, StorageError
from steerrec.exporting import export_artifact, export_transform, read_metadata
from steerrec.gates import NeuronGate, TasteGate, gated
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.serving import Querying
from steerrec.sites import Site, TokenIds
from steerrec.steering import Steering, SteerTransform

from .tiny import random_recommender

WIDTH, LATENTS = 16, 96


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sae():
    return SparseAutoencoder(WIDTH, LATENTS, 8).requires_grad_(False)


def recipes(sae):
    shift = Steering(randn(LATENTS, seed=1), alpha=0.7)
    response = ResponseSteering(randn(LATENTS, WIDTH, seed=2), randn(WIDTH, seed=3))
    return {
        "delta": shift,
        "reconstruct": Steering(shift.shift, splice="reconstruct"),
        "responses": response,
        "latents": LatentSteering.set_to(sae, [3, 5, 7], 0.5),
        "sum": shift * 0.4 + response,
        "neuron gate": gated(response, NeuronGate(7)),
        "taste": gated(shift, TasteGate(randn(WIDTH, seed=4), 0.5)),
    }


def run_onnx(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(path, options)

    def run(vectors, alpha):
        given = {"user_vectors": vectors.numpy(), "alpha": alpha.numpy()}
        return torch.from_numpy(session.run(["steered"], given)[0])

    return run


def run_pt2(path):
    return torch.export.load(path).module()


def check(run, transform):
    """Batches and strengths of every size against the transform itself."""
    for batch in (1, 2, 257):
        x = randn(batch, WIDTH, seed=batch)
        for alpha in (torch.tensor([1.3]), torch.linspace(-1, 2, batch)):
            expected = transform(x, alpha if len(alpha) == batch else float(alpha))
            torch.testing.assert_close(run(x, alpha), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["delta", "taste"])
def test_onnx(sae, tmp_path, kind):
    pytest.importorskip("onnxscript")
    transform = SteerTransform(sae, recipes(sae)[kind])
    export_transform(transform, tmp_path / "steer.onnx")
    run = run_onnx(tmp_path / "steer.onnx")
    check(run, transform)
    x = randn(3, WIDTH, seed=5)
    if kind == "delta":  # at strength 0 no bit changes
        assert torch.equal(run(x, torch.zeros(1)), x)
    for wrong in (2, 4):
        with pytest.raises(Exception, match="index"):
            run(x, torch.ones(wrong))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["reconstruct", "responses", "latents", "sum", "neuron gate"])
def test_onnx_of_every_kind(sae, tmp_path, kind):
    pytest.importorskip("onnxscript")
    transform = SteerTransform(sae, recipes(sae)[kind])
    export_transform(transform, tmp_path / "steer.onnx")
    check(run_onnx(tmp_path / "steer.onnx"), transform)


@pytest.mark.parametrize(
    "kind", ["delta", "reconstruct", "responses", "latents", "sum", "neuron gate", "taste"]
)
def test_torch_export(sae, tmp_path, kind):
    transform = SteerTransform(sae, recipes(sae)[kind])
    export_transform(transform, tmp_path / "steer.pt2")
    check(run_pt2(tmp_path / "steer.pt2"), transform)


def test_a_wrong_number_of_strengths_is_an_error_of_the_program(sae, tmp_path):
    export_transform(SteerTransform(sae, recipes(sae)["delta"]), tmp_path / "steer.pt2")
    run = run_pt2(tmp_path / "steer.pt2")
    for wrong in (2, 4):
        with pytest.raises(IndexError):
            run(randn(3, WIDTH, seed=5), torch.ones(wrong))


def test_queries_of_a_model_with_cosine_and_bias(sae, tmp_path):
    transform = SteerTransform(sae, recipes(sae)["delta"])
    querying = Querying(normalize=True, constant=True)
    found = export_transform(transform, tmp_path / "steer.pt2", querying=querying)
    x = randn(5, WIDTH, seed=6)
    queries = run_pt2(tmp_path / "steer.pt2")(x, torch.ones(1))
    torch.testing.assert_close(queries, querying(transform(x, 1.0)))
    assert found["output"] == "queries"


def test_the_metadata_travels_inside(sae, tmp_path):
    transform = SteerTransform(sae, recipes(sae)["delta"])
    found = export_transform(transform, tmp_path / "steer.pt2", about={"who": "me"})
    assert read_metadata(tmp_path / "steer.pt2") == json.loads(json.dumps(found))
    assert found["alpha"] == 0.7
    assert found["who"] == "me"
    assert found["steering"]["operation"] == "shift"


def test_the_transform_is_left_alone(sae, tmp_path):
    transform = SteerTransform(sae.to(torch.float64), recipes(sae)["delta"])
    export_transform(transform, tmp_path / "steer.pt2")
    assert transform.sae.W_enc.dtype == torch.float64
    sae.to(torch.float32)


# --- artifacts


@pytest.fixture
def rec():
    return random_recommender(width=WIDTH)


@pytest.fixture
def artifact(rec, sae):
    artifact = Artifact.create(rec, sae)
    artifact.at().steerings["mine"] = Steering(randn(LATENTS, seed=1), name="mine", alpha=0.7)
    return artifact


def test_an_artifact_is_exported_without_its_model_and_equals_the_hook(rec, artifact, tmp_path):
    artifact.save(tmp_path / "artifact")
    opened = load_artifact(tmp_path / "artifact")
    found = export_artifact(opened, tmp_path / "steer.pt2", steering="mine", alpha=1.1)
    assert found["alpha"] == 1.1
    assert found["fingerprint"]["class"] == "MeanModel"
    ids = torch.randint(1, 21, (9, 6), generator=torch.Generator().manual_seed(0))
    batch, head = {"input_ids": ids}, rec.item_head
    vectors = rec.model.item_embedding(ids).mean(dim=1)
    steered = run_pt2(tmp_path / "steer.pt2")(vectors, torch.tensor([found["alpha"]]))
    recipe = artifact.at().recipe("mine").with_alpha(1.1)
    with attach(rec, artifact.at().sae, steering=recipe):
        torch.testing.assert_close(head.scores(steered), rec.score(batch), atol=1e-5, rtol=1e-5)


def test_a_site_inside_the_model_is_refused(rec, sae, tmp_path):
    inside = Site("item_embedding", positions="real", positions_from=TokenIds("item_embedding"))
    artifact = Artifact.create(rec, sae, site=inside)
    with pytest.raises(SiteError, match="cannot be served on user vectors"):
        export_artifact(artifact, tmp_path / "steer.pt2", steering=Steering(randn(LATENTS, seed=1)))
    assert not (tmp_path / "steer.pt2").exists()


def test_an_artifact_that_does_not_know_where_its_model_scores_takes_the_model(
    rec, artifact, tmp_path
):
    del artifact.base_model["scoring"]
    with pytest.raises(ArtifactError, match="give the model"):
        export_artifact(artifact, tmp_path / "steer.pt2", steering="mine")
    export_artifact(artifact, tmp_path / "steer.pt2", steering="mine", rec=rec)
    assert (tmp_path / "steer.pt2").is_file()


def test_an_unknown_suffix(artifact, tmp_path):
    with pytest.raises(StorageError, match=r"expected \.onnx, or \.pt2"):
        export_artifact(artifact, tmp_path / "steer.txt")
