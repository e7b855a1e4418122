"""Steering recipes of every kind as safetensors files, with what they are as JSON in the metadata.

A recipe that holds others (a sum, a gate) is one file too: the JSON nests, and a tensor of the
second term is called `1.shift`. Everything is checked before it is used: operations and gates that
are not known, shapes, strengths, how deep it goes, and what the recipes themselves refuse.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerrec.artifact_parts import IN_HEADER, make_metadata, part_file, read_metadata, without
from steerrec.errors import ArtifactError
from steerrec.files import atomic_file
from steerrec.gates import Gate, GatedSteering, NeuronGate, TasteGate
from steerrec.operations import LatentSteering, ResponseSteering
from steerrec.recipes import Recipe
from steerrec.steering import Steering
from steerrec.sums import SteeringSum
from steerrec.tensor_files import TensorFile, write_tensors
from steerrec.untrusted import shown

RECIPES = "steering"
MAX_DEPTH = 8
"""Recipes in recipes: a sum of gated sums of …"""
_MAX_TERMS = 100
_MAX_ALPHA = 1e6  # torch refuses what single precision does not hold
_LARGEST = float(torch.finfo(torch.float32).max)
_COMMON = {"operation", "alpha", "name", "provenance"}
_OPERATIONS = ("shift", "response", "latents", "sum", "gated")
_KNOWN = {  # keys beside the common ones
    "shift": {"splice"},
    "response": set(),
    "latents": set(),
    "sum": {"terms"},
    "gated": {"recipe", "gate"},
}
_GATES = {
    "neuron": {"kind", "neuron", "threshold", "fires"},
    "taste": {"kind", "bias", "low", "high"},
}

Shapes = dict[str, tuple[int, ...]]


def write_recipe(folder: Path, recipe: Recipe, d_in: int) -> Path:
    """Write a recipe into the folder of a site whose vectors have width `d_in`.

    Raises
    ------
    ArtifactError
        If what would be written could not be read again.
    """
    file = part_file(folder, RECIPES, recipe.name)
    tensors: dict[str, Tensor] = {}
    made = _described(recipe, "", tensors, MAX_DEPTH)
    header = {key: recipe.unknown[key] for key in (IN_HEADER,) if key in recipe.unknown}
    with atomic_file(file) as temporary:
        write_tensors(temporary, tensors, make_metadata("steering", made, header))
        try:
            read_recipe(temporary, temporary.parent, recipe.latents, d_in, name=recipe.name)
        except ArtifactError as error:
            raise ArtifactError(str(error).replace(str(temporary), str(file))) from error
    return file


def read_recipe(
    file: Path, root: Path, d_sae: int, d_in: int, *, name: str | None = None
) -> Recipe:
    """Read and check a recipe for an SAE of these sizes; its name is that of the file."""
    with TensorFile(file, root) as opened:
        made, metadata = read_metadata(opened, "steering")
        reader = _Reader(opened, d_sae, d_in)
        reader.check(made, "", MAX_DEPTH)
        opened.require(reader.shapes, torch.float32)
        try:
            return reader.built(made, "", name or file.stem, metadata)
        except ArtifactError as error:
            if str(file) in str(error):
                raise
            raise ArtifactError(f"{file} is not a steering recipe: {error}") from error


def unknown_keys(recipe: Recipe) -> Iterator[str]:
    """What a newer steerrec stored with a recipe and with those in it."""
    yield from recipe.unknown
    inner: tuple[Recipe, ...] = ()
    if isinstance(recipe, SteeringSum):
        inner = recipe.terms
    elif isinstance(recipe, GatedSteering):
        inner = (recipe.recipe,)
    for term in inner:
        yield from unknown_keys(term)


# --- writing


def _described(
    recipe: Recipe, prefix: str, tensors: dict[str, Tensor], depth: int
) -> dict[str, Any]:
    """The JSON of a recipe, its tensors put among `tensors`."""
    if depth == 0:
        raise ArtifactError(
            f"steering {recipe.name!r} goes deeper than {MAX_DEPTH} recipes in one another; "
            "expected a simpler one"
        )
    made: dict[str, Any] = {
        "operation": recipe.operation,
        "alpha": recipe.alpha,
        "name": recipe.name,
        "provenance": dict(recipe.provenance),
    }
    match recipe:
        case Steering():
            made["splice"] = recipe.splice
            names: tuple[str, ...] = ("shift",)
        case ResponseSteering():
            names = ("vectors", "constant")
        case LatentSteering():
            names = ("gain", "low", "high")
        case SteeringSum():
            names = ()
            made["terms"] = [
                _inner(term, f"{prefix}{i}.", tensors, depth) for i, term in enumerate(recipe.terms)
            ]
        case GatedSteering():
            names = ()
            made["recipe"] = _inner(recipe.recipe, f"{prefix}recipe.", tensors, depth)
            made["gate"] = {
                **recipe.unknown.get("gate", {}),
                **_described_gate(recipe.gate, f"{prefix}gate.", tensors),
            }
        case _:
            raise ArtifactError(
                f"a recipe of class {type(recipe).__name__} cannot be saved; expected one of "
                "steerrec's own"
            )
    for name in names:
        tensors[f"{prefix}{name}"] = getattr(recipe, name).float()
    return without(recipe.unknown, {IN_HEADER, *made}) | made


def _inner(recipe: Recipe, prefix: str, tensors: dict[str, Tensor], depth: int) -> dict[str, Any]:
    return _described(recipe, prefix, tensors, depth - 1)


def _described_gate(gate: Gate, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    match gate:
        case NeuronGate(neuron, threshold, fires):
            return {"kind": gate.kind, "neuron": neuron, "threshold": threshold, "fires": fires}
        case TasteGate():
            tensors[f"{prefix}weights"] = gate.weights.float()
            return {"kind": gate.kind, "bias": gate.bias, "low": gate.low, "high": gate.high}
    raise ArtifactError(f"a gate of class {type(gate).__name__} cannot be saved")


# --- reading


class _Reader:
    """One file: first all that it says is checked, then its tensors are read."""

    def __init__(self, opened: TensorFile, d_sae: int, d_in: int) -> None:
        self.opened, self.d_sae, self.d_in = opened, d_sae, d_in
        self.shapes: Shapes = {}

    def check(self, made: Any, prefix: str, depth: int) -> None:
        """Refuse what is not understood, and note the tensors that there have to be."""
        if depth == 0:
            raise self.refused(f"it goes deeper than {MAX_DEPTH} recipes in one another")
        operation = made.get("operation") if isinstance(made, dict) else None
        if operation not in _OPERATIONS:
            raise ArtifactError(
                f"{self.opened.path} uses operation {shown(operation)}, which this steerrec does "
                "not know: upgrade steerrec"
            )
        if not _is_number(made.get("alpha"), _MAX_ALPHA):
            raise self.refused(f"expected an alpha of {_MAX_ALPHA:g} at most")
        if not isinstance(made.get("provenance"), dict):
            raise self.refused("expected a provenance")
        if prefix and not isinstance(made.get("name"), str):
            raise self.refused("expected a name of each recipe in it")
        match operation:
            case "shift":
                if made.get("splice") not in ("delta", "reconstruct"):
                    raise self.refused("expected splice 'delta' or 'reconstruct'")
                self.shapes[f"{prefix}shift"] = (self.d_sae,)
            case "response":
                self.shapes[f"{prefix}vectors"] = (self.d_sae, self.d_in)
                self.shapes[f"{prefix}constant"] = (self.d_in,)
            case "latents":
                self.shapes |= {
                    f"{prefix}{name}": (self.d_sae,) for name in ("gain", "low", "high")
                }
            case "sum":
                terms = made.get("terms")
                if not isinstance(terms, list) or not 0 < len(terms) <= _MAX_TERMS:
                    raise self.refused(f"expected 1 to {_MAX_TERMS} terms")
                for i, term in enumerate(terms):
                    self.check(term, f"{prefix}{i}.", depth - 1)
            case _:
                self.check(made.get("recipe"), f"{prefix}recipe.", depth - 1)
                self.check_gate(made.get("gate"), f"{prefix}gate.")

    def check_gate(self, gate: Any, prefix: str) -> None:
        """The same for a gate."""
        kind = gate.get("kind") if isinstance(gate, dict) else None
        match kind:
            case "neuron":
                neuron, threshold = gate.get("neuron"), gate.get("threshold")
                if type(neuron) is not int or not 0 <= neuron < self.d_sae:
                    raise self.refused(f"its gate reads neuron {shown(neuron)} of {self.d_sae}")
                if not _is_number(threshold, _LARGEST) or type(gate.get("fires")) is not bool:
                    raise self.refused("expected a threshold, and true or false for `fires`")
            case "taste":
                if not all(_is_number(gate.get(key), _LARGEST) for key in ("bias", "low", "high")):
                    raise self.refused("expected numbers bias, low and high of a rule of taste")
                self.shapes[f"{prefix}weights"] = (self.d_in,)
            case _:
                raise ArtifactError(
                    f"{self.opened.path} uses a gate {shown(kind)}, which this steerrec does not "
                    "know: upgrade steerrec"
                )

    def built(
        self, made: dict[str, Any], prefix: str, name: str, metadata: Mapping[str, Any]
    ) -> Recipe:
        """The recipe, of what has been checked."""
        operation = made["operation"]
        unknown = without(made, _COMMON | _KNOWN[operation]) | dict(metadata)
        common = {
            "alpha": float(made["alpha"]),
            "name": name,
            "provenance": made["provenance"],
            "unknown": unknown,
        }

        def tensor(part: str) -> Tensor:
            return self.opened.read(f"{prefix}{part}")

        def inner(made: dict[str, Any], part: str) -> Recipe:
            return self.built(made, f"{prefix}{part}.", made["name"], {})

        match operation:
            case "shift":
                return Steering(tensor("shift"), splice=made["splice"], **common)
            case "response":
                return ResponseSteering(tensor("vectors"), tensor("constant"), **common)
            case "latents":
                return LatentSteering(tensor("gain"), tensor("low"), tensor("high"), **common)
            case "sum":
                terms = tuple(inner(term, str(i)) for i, term in enumerate(made["terms"]))
                return SteeringSum(terms, **common)
        told = made["gate"]
        if rest := without(told, _GATES[told["kind"]]):
            unknown["gate"] = rest
        if told["kind"] == "neuron":
            gate: Gate = NeuronGate(told["neuron"], float(told["threshold"]), told["fires"])
        else:
            numbers = (float(told[key]) for key in ("bias", "low", "high"))
            gate = TasteGate(tensor("gate.weights"), *numbers)
        return GatedSteering(inner(made["recipe"], "recipe"), gate, **common)

    def refused(self, why: str) -> ArtifactError:
        return ArtifactError(f"{self.opened.path} is not a steering recipe; {why}")


def _is_number(value: Any, largest: float) -> bool:
    return type(value) in (int, float) and abs(value) <= largest
