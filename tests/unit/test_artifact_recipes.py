"""Recipes of every kind on disk: they come back as they were, and nothing else is let in."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from steerrec.artifacts import Artifact, load_artifact, save_steering
from steerrec.errors import ArtifactError, ArtifactWarning
from steerrec.gates import GatedSteering, NeuronGate, gated
from steerrec.operations import ResponseSteering
from steerrec.recipes import Recipe
from steerrec.steering import Steering, SteerTransform
from steerrec.sums import SteeringSum

from .recipe_cases import D_IN, D_SAE, all_kinds, latents, random_sae, shift, users
from .tiny import random_recommender

KINDS = sorted(all_kinds())


@pytest.fixture(scope="module")
def rec():
    return random_recommender(width=D_IN)


@pytest.fixture
def saved(rec, tmp_path):
    """An artifact on disk with a recipe of each kind."""
    made = Artifact.create(rec, random_sae())
    for name, recipe in all_kinds(0.8).items():
        made.at().steerings[name] = recipe.named(name)
    made.save(tmp_path / "artifact")
    return tmp_path / "artifact"


def file_of(saved, rec, name):
    return saved / rec.site.folder / "steering" / f"{name}.safetensors"


def rewritten(file, change, tensors=None):
    """The file again, its JSON (and its tensors) changed."""
    with safe_open(file, framework="pt") as opened:
        made = json.loads(opened.metadata()["steering"])
    change(made)
    held = load_file(file)
    save_file(held | (tensors or {}), file, {"steering": json.dumps(made)})


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_comes_back_and_does_the_same(saved, kind):
    before, artifact = all_kinds(0.8)[kind], load_artifact(saved)
    after = artifact.at().recipe(kind)
    assert type(after) is type(before)
    assert (after.name, after.alpha, after.provenance) == (kind, before.alpha, before.provenance)
    x = users()
    want = SteerTransform(random_sae(), before)(x)
    assert torch.equal(artifact.transform(kind)(x), want)
    assert torch.equal(artifact.transform(after)(x), want)


def test_saving_again_gives_the_same_bytes(saved, rec, tmp_path):
    load_artifact(saved).save(tmp_path / "again")
    for kind in KINDS:
        one, other = (file_of(folder, rec, kind) for folder in (saved, tmp_path / "again"))
        assert one.read_bytes() == other.read_bytes()


def test_one_recipe_is_added_to_an_artifact_on_disk(saved, rec):
    recipe = (shift() + latents()).named("both")
    assert save_steering(saved, rec.site, recipe) == file_of(saved, rec, "both")
    assert isinstance(load_artifact(saved).at().recipe("both"), SteeringSum)


def test_what_could_not_be_read_again_is_not_written(saved, rec):
    deep: Recipe = shift()
    for _ in range(8):
        deep = gated(deep, NeuronGate(0))

    class Mine(Steering):
        operation = "mine"

    class Other(NeuronGate):
        kind = "other"

    wide = ResponseSteering(torch.zeros(D_SAE, 3), torch.zeros(3))
    for recipe, message in (
        (deep.named("new"), "deeper than 8 recipes"),
        (wide.named("new"), "'vectors' is .*shape \\(32, 3\\); expected .* \\(32, 8\\)"),
        (shift(float("nan")).named("new"), "expected an alpha"),
        (shift(1e7).named("new"), "expected an alpha of 1e"),
        (gated(shift(), NeuronGate(99)).named("new"), "reads neuron 99 of 32"),
        (Mine(torch.zeros(D_SAE), name="new"), "uses operation 'mine'"),
        (gated(shift(), Other(0)).named("new"), "uses a gate 'other'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            save_steering(saved, rec.site, recipe)
        assert not file_of(saved, rec, "new").exists()


def change(*path, to):
    """A function that sets one value in nested JSON."""

    def changed(made):
        for key in path[:-1]:
            made = made[key]
        made[path[-1]] = to

    return changed


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("latents", change("operation", to="scale"), "uses operation 'scale'.*upgrade steerrec"),
        ("sum", change("terms", 1, "operation", to="new"), "uses operation 'new'.*upgrade"),
        ("gated", change("recipe", to=None), "uses operation None"),
        ("gated", change("gate", "kind", to="moon"), "uses a gate 'moon'.*upgrade steerrec"),
        ("gated", change("gate", to=[]), "uses a gate None"),
        ("sum", change("terms", to=[]), "expected 1 to 100 terms"),
        ("sum", change("terms", to={}), "expected 1 to 100 terms"),
        ("sum", change("terms", 0, "alpha", to=1e7), "expected an alpha of 1e"),
        ("sum", change("terms", 0, "alpha", to=True), "expected an alpha"),
        ("sum", change("terms", 0, "name", to=3), "expected a name"),
        ("sum", change("terms", 0, "splice", to="reconstruct"), "nothing can be added"),
        ("response", change("provenance", to=None), "expected a provenance"),
        ("gated", change("gate", "neuron", to=32), "reads neuron 32 of 32"),
        ("gated", change("gate", "neuron", to=True), "reads neuron True"),
        ("gated", change("gate", "threshold", to=-1), "a threshold from 0"),
        ("gated", change("gate", "fires", to=1), "true or false"),
        ("taste", change("gate", "bias", to="much"), "numbers bias, low and high"),
        ("taste", change("gate", "low", to=5), "low <= high"),
    ],
)
def test_what_is_not_understood_is_refused(saved, rec, kind, changes, message):
    file = file_of(saved, rec, kind)
    rewritten(file, changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(saved)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "tensors", "message"),
    [
        ("latents", {"low": torch.zeros(5)}, "'low' is float32 of shape \\(5,\\)"),
        ("latents", {"low": torch.full((D_SAE,), -1.0)}, "0 <= low <= high"),
        ("response", {"vectors": torch.full((D_SAE, D_IN), torch.nan)}, "not finite"),
        ("sum", {"3.shift": torch.zeros(D_SAE)}, "expected no such tensor"),
        ("taste", {"gate.weights": torch.zeros(D_IN, dtype=torch.float64)}, "gate.weights"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(saved, rec, kind, tensors, message):
    rewritten(file_of(saved, rec, kind), lambda made: None, tensors)
    with pytest.raises(ArtifactError, match=message):
        load_artifact(saved)


def test_a_file_that_goes_too_deep_is_refused(saved, rec):
    file = file_of(saved, rec, "nested")

    def deeper(made):
        for _ in range(9):
            gate = {"kind": "neuron", "neuron": 0, "threshold": 0.0, "fires": True}
            made["terms"] = [dict(made), dict(made) | {"operation": "gated", "gate": gate}]

    rewritten(file, deeper)
    with pytest.raises(ArtifactError, match=r"deeper than 8|too deeply nested|more than"):
        load_artifact(saved)


def test_what_a_newer_steerrec_stored_is_told_and_kept_at_every_depth(saved, rec, tmp_path):
    def newer(made):
        made["mood"] = "good"
        made["recipe"]["colour"] = "red"
        made["gate"]["season"] = "spring"

    rewritten(file_of(saved, rec, "gated"), newer)
    with pytest.warns(ArtifactWarning) as caught:
        artifact = load_artifact(saved)
    for key in ("mood", "colour", "gate"):
        assert f"'{key}' in steering/gated" in str(caught[0].message)
    artifact.save(tmp_path / "again")
    with safe_open(file_of(tmp_path / "again", rec, "gated"), framework="pt") as opened:
        made = json.loads(opened.metadata()["steering"])
    assert made["mood"] == "good"
    assert made["recipe"]["colour"] == "red"
    assert made["gate"]["season"] == "spring"
    assert made["gate"]["kind"] == "neuron"


def test_a_gate_that_came_from_disk_can_be_exchanged(saved):
    found = load_artifact(saved).at().recipe("gated")
    assert isinstance(found, GatedSteering)
    assert replace(found, gate=NeuronGate(1)).gate.neuron == 1
