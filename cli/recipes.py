"""What `steerrec steer` steers by: a rule, an expression, a gate, a strength found, or learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.autoencoder import SparseAutoencoder
    from steerrec.data import Catalogue, Split
    from steerrec.evaluation import CapturedUsers
    from steerrec.objectives import Objective
    from steerrec.operations import ResponseSteering
    from steerrec.recipes import Recipe
    from steerrec.recommender import Recommender
    from steerrec.strengths import ChosenStrength

SHOWN_NEURONS = 20
BUDGET = 0.05


def gated_by(recipe: Recipe, text: str | None, rec: Recommender, split: Split) -> Recipe:
    """The recipe behind a gate in words: `neuron:812`, `not neuron:812`, `taste:0.5`."""
    from steerrec.expressions import neuron_gate
    from steerrec.gates import fit_taste, gated

    if text is None:
        return recipe
    gate: Any = neuron_gate(text)
    kind, _, slope = text.partition(":")
    if gate is None and kind.strip() == "taste":
        try:
            gate = fit_taste(rec, split.train, slope=float(slope))
        except ValueError:
            gate = None
    if gate is None:
        raise typer.BadParameter(
            f"--gate is {text!r}; expected neuron:NUMBER, neuron:NUMBER>VALUE, not neuron:NUMBER, "
            "or taste:SLOPE"
        )
    return gated(recipe, gate)


def at_budget(
    recipe: Recipe,
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    objective: Objective,
    budget: float,
    **options: Any,
) -> tuple[Recipe, ChosenStrength]:
    """The recipe at the strength that is best for an objective within a budget, on validation."""
    from steerrec.strengths import choose_strength

    found = choose_strength(rec, sae, recipe, split, objective=objective, budget=budget, **options)
    opt.note(
        f"strength {found.alpha:g}: best for {found.objective} of {len(found.tried)} tried, within "
        f"{budget:.0%} of validation nDCG"
    )
    if found.alpha == 0:
        opt.note("no strength keeps to the budget and does better than the model itself")
    return recipe.with_alpha(found.alpha), found


def learned(
    rec: Recommender,
    sae: SparseAutoencoder,
    split: Split,
    objective: Objective | str,
    budget: float,
    neurons: int | None,
    *,
    users: CapturedUsers | None = None,
    catalogue: Catalogue | None = None,
    seed: int = 0,
    **options: Any,
) -> ResponseSteering:
    """Steering that is learned for an objective, on training histories or for these users."""
    options |= {"objective": objective, "budget": budget}
    if users is not None:
        from steerrec.served_fitting import ServedTraining
        from steerrec.served_learning import learn_for_users

        training = ServedTraining(seed=seed)
        return learn_for_users(
            rec, sae, split, users, training=training, catalogue=catalogue, **options
        )
    from steerrec.learning import SteeringTraining, learn_steering

    learning = SteeringTraining(neurons=neurons, seed=seed)
    return learn_steering(rec, sae, split, training=learning, **options)


def effects(
    recipe: ResponseSteering, rec: Recommender, sae: SparseAutoencoder, users: CapturedUsers
) -> list[dict[str, Any]]:
    """The neurons that change most, with the titles of the items that each moves, JSON-able."""
    from steerrec.explaining import neuron_effects

    vectors = users.vectors[:20_000]
    titles = rec.catalogue.titles
    return [
        {
            "neuron": effect.neuron,
            "share": effect.share,
            "firing_rate": effect.firing_rate,
            "raises": [titles[row] for row in effect.raises.tolist()],
            "lowers": [titles[row] for row in effect.lowers.tolist()],
        }
        for effect in neuron_effects(
            recipe, sae, rec.item_head, vectors, neurons=SHOWN_NEURONS, items=3
        )
    ]


def print_effects(found: list[dict[str, Any]]) -> None:
    """Which neurons, how much of the change, and which items they promote."""
    rows = [
        [
            str(effect["neuron"]),
            f"{effect['share']:.1%}",
            f"{effect['firing_rate']:.1%}",
            "; ".join(effect["raises"]),
        ]
        for effect in found
    ]
    columns = ["neuron", "of the change", "fires for", "promotes most"]
    opt.print_table("what the steering does, by neuron", columns, rows)


def print_shares(column: str, found: dict[str, dict[str, float]]) -> None:
    """Share of the list slots by value of an attribute, the largest change first."""
    before, after = found["unsteered"], found["steered"]
    order = sorted(before, key=lambda value: -abs(after[value] - before[value]))
    rows = [
        [
            value,
            f"{before[value]:.2%}",
            f"{after[value]:.2%}",
            opt.number(after[value] / before[value] if before[value] else None, ".2f"),
        ]
        for value in order
    ]
    title = f"share of the list slots by {column}"
    opt.print_table(title, [column, "unsteered", "steered", "times"], rows)
