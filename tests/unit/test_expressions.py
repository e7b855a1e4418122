"""Recipes in words: what they mean, and what is no recipe."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steerrec.errors import ArtifactError
from steerrec.expressions import neuron_gate, recipe_of
from steerrec.gates import NeuronGate
from steerrec.steering import Steering
from steerrec.sums import SteeringSum

from .recipe_cases import latents, response, shift

KNOWN = {
    "popularity": lambda: Steering(torch.tensor([1.0, 0.0]), name="popularity"),
    "genres-Horror": lambda: Steering(torch.tensor([0.0, 1.0]), name="genres-Horror"),
    "genres-Sci-Fi": lambda: Steering(torch.tensor([1.0, 1.0]), alpha=0.5, name="sci"),
    "year-below-q20-vs-above-q80": lambda: Steering(torch.tensor([4.0, 4.0])),
}


def total(text):
    recipe = recipe_of(text, KNOWN)
    assert isinstance(recipe, Steering)
    return [round(value, 6) for value in (recipe.alpha * recipe.shift).tolist()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("popularity", [1, 0]),
        ("popularity*-0.8 + genres=Horror*0.3", [-0.8, 0.3]),
        ("-0.8*popularity + 0.3 * genres-Horror", [-0.8, 0.3]),
        ("popularity - genres=Horror", [1, -1]),
        ("-popularity - genres=Horror*2", [-1, -2]),
        ("- popularity", [-1, 0]),
        ("popularity + -2*genres=Horror", [1, -2]),
        ("popularity - -2*genres=Horror", [1, 2]),
        ("2*popularity*-1e-1*.5", [-0.1, 0]),
        ("genres=Sci-Fi*2", [1, 1]),  # half of it is its own strength
        ('"year<q20 vs >q80"*0.5', [2, 2]),
        ("'genres=Horror' * 3", [0, 3]),
        ("popularity\n + popularity", [2, 0]),
    ],
)
def test_what_an_expression_means(text, expected):
    assert total(text) == expected


def test_a_name_alone_is_the_recipe_itself():
    made = shift()
    assert recipe_of("mine", {"mine": lambda: made}) is made


def test_kinds_may_be_mixed():
    known = {"a": shift, "b": response, "c": latents}
    found = recipe_of("a*0.5 - b + c*2", known)
    assert isinstance(found, SteeringSum)
    assert [(term.operation, term.alpha) for term in found.terms] == [
        ("shift", 0.5),
        ("response", -1.0),
        ("latents", 2.0),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("popularty", "no steering recipe 'popularty'.*nearest: popularity"),
        ("genres=Horor*2", "nearest: genres-Horror"),
        ("", "a name at its end"),
        ("popularity +", "a name at its end"),
        ("popularity *", "a name at its end"),
        ("2", "a name in every term"),
        ("2*3", "a name in every term"),
        ("popularity * genres=Horror", "'genres=Horror' is a second one in a term"),
        ("popularity popularity", "before 'popularity', with blanks"),
        ("popularity 2", "before '2', with blanks"),
        ("popularity * * 2", "a name instead of"),
        ("popularity*1e999", "a name instead of '1e999'"),
        ('"popularity', "something else than"),
        ("(popularity)", "no steering recipe"),
        ("__import__('os')", "is not understood|no steering recipe"),
        ("x" * 3000, "a recipe of 3000 characters"),
        (" + ".join(["popularity"] * 130), "over 100 terms"),
    ],
)
def test_what_is_no_recipe_is_refused(text, message):
    with pytest.raises(ArtifactError, match=message):
        recipe_of(text, KNOWN)


def test_without_any_there_are_none():
    with pytest.raises(ArtifactError, match="there are none yet"):
        recipe_of("popularity", {})


@given(st.text(alphabet="ab *+-.\"'19e=<(", max_size=30))
def test_any_text_is_a_recipe_or_refused(text):
    try:
        recipe = recipe_of(text, {"a": shift, "b": shift})
    except ArtifactError:
        return
    assert recipe.latents == 32


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("neuron:812", NeuronGate(812)),
        ("neuron:3>0.5", NeuronGate(3, 0.5)),
        ("not neuron:3 > .5", NeuronGate(3, 0.5, fires=False)),
        ("taste:0.5", None),
        ("neuron:-1", None),
        ("neuron:x", None),
    ],
)
def test_gates_in_words(text, gate):
    assert neuron_gate(text) == gate
