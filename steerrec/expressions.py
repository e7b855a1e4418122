"""Recipes in words: ``popularity*-0.8 + genres=Horror*0.3``.

Names are those of saved recipes and of attribution tables; a table means more of its group A. A
name with blanks in it is quoted, and so ``+`` and ``-`` between terms have blanks around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

from steerrec.contrasts import contrast_name
from steerrec.errors import ArtifactError
from steerrec.gates import NeuronGate
from steerrec.recipes import Recipe
from steerrec.steering import Steering

if TYPE_CHECKING:
    from steerrec.artifact_site import SiteArtifact

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<sign>[+-](?=\s|$))              # between terms
      | (?P<times>\*)
      | (?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?=[\s*]|$)
      | (?P<minus>-(?=["'A-Za-z_]))       # before a name
      | "(?P<double>[^"]+)" | '(?P<single>[^']+)'
      | (?P<name>[^\s*"'+-][^\s*"']*)
    )""",
    re.VERBOSE,
)
_SHAPE = 'names of recipes and tables, such as "popularity*-0.8 + genres=Horror*0.3"'
_NEURON = re.compile(
    r"(?P<no>not\s+)?neuron:(?P<neuron>\d{1,9})(?:\s*>\s*(?P<above>\d+\.?\d*|\.\d+))?"
)
_MAX_LENGTH, _MAX_TERMS = 2000, 100


def named_recipe(
    here: SiteArtifact,
    text: str | None,
    contrast: str,
    *,
    neurons: int | None = None,
    splice: Any = None,
    popsteer_compat: bool = False,
) -> Recipe:
    """The recipe of an expression in the names of an artifact's site; see `recipe_of`.

    Without one, the PopSteer rule on the table of a contrast; see `Steering.popsteer`.
    """
    if text is None:
        table = here.table(contrast_name(contrast))
        return Steering.popsteer(
            table, neurons=neurons, splice=splice, popsteer_compat=popsteer_compat
        )
    known: dict[str, Callable[[], Recipe]] = {
        name: partial(Steering.toward, table) for name, table in here.tables.items()
    }
    known |= {name: partial(here.recipe, name) for name in here.steerings}
    return recipe_of(text, known)


def recipe_of(text: str, known: Mapping[str, Callable[[], Recipe]]) -> Recipe:
    """The recipe that an expression describes.

    Parameters
    ----------
    text
        Terms with ``+`` and ``-`` between them; a term is a name, with numbers by ``*``.
    known
        What makes the recipe of each name. A contrast is found by its words too:
        ``genres=Horror`` is `genres-Horror`.

    Raises
    ------
    ArtifactError
        If it is no such expression, or a name is not known; the nearest ones are listed.
    """
    if len(text) > _MAX_LENGTH:
        raise ArtifactError(f"a recipe of {len(text)} characters; expected {_MAX_LENGTH} at most")
    total: Recipe | None = None
    tokens = _tokens(text)
    place = terms = 0
    while place < len(tokens) or total is None:
        sign = 1.0
        if total is not None:
            sign = -1.0 if tokens[place] == ("sign", "-") else 1.0
            if tokens[place][0] != "sign":
                raise _not_understood(text, f"+ or - before {tokens[place][1]!r}, with blanks")
            place += 1
        term, place = _term(text, tokens, place, known)
        terms += 1
        if terms > _MAX_TERMS:
            raise ArtifactError(f"a recipe of over {_MAX_TERMS} terms; expected fewer")
        term = term if sign > 0 else -term
        total = term if total is None else total + term
    return total


def neuron_gate(text: str) -> NeuronGate | None:
    """The gate of ``neuron:812``, ``neuron:812>0.5`` or ``not neuron:812``; None of other text."""
    matched = _NEURON.fullmatch(text.strip())
    if matched is None:
        return None
    above = float(matched["above"] or 0)
    return NeuronGate(int(matched["neuron"]), above, fires=matched["no"] is None)


def _tokens(text: str) -> list[tuple[str, str]]:
    found, place = [], 0
    text = text.strip()
    while place < len(text):
        matched = _TOKEN.match(text, place)
        if matched is None:
            raise _not_understood(text, f"something else than {text[place : place + 20]!r}")
        kind = str(matched.lastgroup)
        found.append(("name" if kind in ("double", "single") else kind, matched[kind]))
        place = matched.end()
    return found


def _term(
    text: str,
    tokens: list[tuple[str, str]],
    place: int,
    known: Mapping[str, Callable[[], Recipe]],
) -> tuple[Recipe, int]:
    """The term that begins at a place, and where the next one does."""
    factor, recipe = 1.0, None
    while True:
        kind, word = tokens[place] if place < len(tokens) else ("end", "")
        place += 1
        if kind == "minus" or (kind, word) == ("sign", "-"):
            factor = -factor
            continue
        if kind == "number" and isfinite(float(word)):
            factor *= float(word)
        elif kind == "name" and recipe is None:
            recipe = _named(word, known)
        else:
            what = {"end": "at its end", "name": f"once; {word!r} is a second one in a term"}
            raise _not_understood(text, f"a name {what.get(kind, f'instead of {word!r}')}")
        if place >= len(tokens) or tokens[place][0] != "times":
            break
        place += 1
    if recipe is None:
        raise _not_understood(text, "a name in every term")
    return (recipe if factor == 1.0 else recipe * factor), place


def _named(name: str, known: Mapping[str, Callable[[], Recipe]]) -> Recipe:
    for key in (name, contrast_name(name)):
        if key in known:
            return known[key]()
    near = get_close_matches(contrast_name(name), list(known), n=3, cutoff=0.4) or list(known)
    there = f"nearest: {', '.join(near)}" if near else "there are none yet"
    raise ArtifactError(
        f"no steering recipe {name!r} and no attribution table of that name ({there}); save a "
        "recipe with `steerrec steer --save NAME`, or make a table with `steerrec score "
        f"--contrast {name!r}`"
    )


def _not_understood(text: str, expected: str) -> ArtifactError:
    return ArtifactError(f"recipe {text[:200]!r} is not understood: expected {expected}; {_SHAPE}")
