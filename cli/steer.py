"""`steerrec steer`: steered recommendations, and what steering gains and costs."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerrec.cli import engine_options as eng
from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.data import Histories
    from steerrec.evaluation import CapturedUsers
    from steerrec.ranking import TopK
    from steerrec.recipes import Recipe
    from steerrec.recommender import Recommender
    from steerrec.tradeoff import Sweep

SWEEP = Path("sweep")
_SWEPT = ("sweep.json", "sweep.png")
_SUFFIXES = (".parquet", ".csv", ".tsv")


class SplitName(StrEnum):
    """Which histories are ranked for."""

    none = "none"
    valid = "valid"
    test = "test"


class SpliceName(StrEnum):
    """How steered latents get back into the model."""

    delta = "delta"
    reconstruct = "reconstruct"


class LearnOn(StrEnum):
    """Whose lists steering is learned on."""

    training = "training"
    served = "served"


def steer(
    artifact: opt.ArtifactArgument,
    data: opt.DataOption,
    model: opt.ModelOption = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Strength; 0 changes nothing. 1, or the recipe's own."),
    ] = None,
    neurons: Annotated[
        int | None, typer.Option("--neurons", min=1, help="Only the strongest N; all by default.")
    ] = None,
    contrast: opt.ContrastName = "popularity",
    splice: Annotated[
        SpliceName | None,
        typer.Option("--splice", help="Add the change to the vector, or replace the vector."),
    ] = None,
    popsteer_compat: Annotated[
        bool,
        typer.Option("--popsteer-compat", help="Do what the paper's published code does."),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Saved recipes and tables, added and scaled: popularity*-0.8 + genres=Horror*0.3.",
        ),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(
            "--gate",
            help="Whom to steer: neuron:812, neuron:812>0.5, not neuron:812; taste:0.5 steers fans "
            "of popular items more, taste:-0.5 less.",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="Find the strength on validation: gini, broad, ltc, popularity, … or the share of "
            "a group of items, genres=Horror or genres=Horror@0.1.",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="Share of nDCG that --objective may cost; 0.05 by default."),
    ] = None,
    learn: Annotated[
        bool,
        typer.Option("--learn", help="Learn the recipe itself for --objective, and save it."),
    ] = False,
    learn_on: Annotated[
        LearnOn,
        typer.Option(
            "--learn-on", help="Learn on training histories, or for the users who are served here."
        ),
    ] = LearnOn.training,
    save: Annotated[
        str | None, typer.Option("--save", help="Save what is steered by as a recipe in ARTIFACT.")
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option(
            "--shares",
            help="Share of the list slots of each value of an attribute, before and after.",
        ),
    ] = None,
    k: opt.K = 10,
    split: Annotated[
        SplitName,
        typer.Option("--split", help="Whole histories, or a held-out part with its metrics."),
    ] = SplitName.none,
    mask_seen: opt.MaskSeen = False,
    max_users: opt.MaxUsers = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Recommendations as .parquet, .csv or .tsv; with --sweep a folder for "
            "sweep.json and sweep.png.",
        ),
    ] = None,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Measure many strengths and draw the trade-off.")
    ] = False,
    alphas: Annotated[
        str | None, typer.Option("--alphas", help="Strengths for --sweep, such as 0.5,1,2.")
    ] = None,
    item_dtype: eng.ItemDtypeOption = eng.ItemDtypeName.float32,
    engine: eng.EngineOption = None,
    address: eng.Address = None,
    workers: eng.Workers = None,
    threads: eng.Threads = None,
    block_users: Annotated[
        int | None,
        typer.Option(
            "--block-users", min=1, help="Users in a block; 16384.", rich_help_panel=eng.PANEL
        ),
    ] = None,
    seed: opt.Seed = 0,
    site: opt.SiteName = None,
    strict: opt.Strict = True,
    revision: opt.Revision = None,
    device: opt.Device = "cpu",
    item_map: opt.ItemMap = None,
    user_col: opt.UserCol = None,
    item_col: opt.ItemCol = None,
    time_col: opt.TimeCol = None,
    k_core: opt.KCore = None,
    dedup: opt.Dedup = None,
    format: opt.Format = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Recommend with steering; with --split or --sweep say what it gains and what it costs.

    With --engine users are scored in blocks, each a Parquet file in the folder -o; DATA may then
    hold histories in Parquet, one row a user. After an interruption the same command goes on.
    """
    import torch

    from steerrec.artifacts import save_steering
    from steerrec.cli.recipes import (
        BUDGET,
        at_budget,
        effects,
        gated_by,
        learned,
        print_effects,
        print_shares,
    )
    from steerrec.contrasts import attribute_column
    from steerrec.contrasts import contrast_name as plain
    from steerrec.evaluation import (
        Which,
        capture_held_out,
        capture_users,
        measure_lists,
        rank,
        rank_steered,
    )
    from steerrec.expressions import named_recipe
    from steerrec.item_dtypes import with_item_dtype
    from steerrec.operations import ResponseSteering
    from steerrec.shares import slot_shares
    from steerrec.strengths import objective_of

    if engine is None:
        eng.refuse(
            **{"--address": address, "--workers": workers, "--threads": threads},
            **{"--block-users": block_users},
        )
        _check(output, sweep, alphas, force, splice, popsteer_compat)
    if sweep and (alpha is not None or split is not SplitName.none):
        raise typer.BadParameter("--sweep measures its own strengths on both held-out parts")
    if max_users and not sweep and split is SplitName.none:
        raise typer.BadParameter("--max-users goes with --split valid, --split test or --sweep")
    if sweep and save:
        raise typer.BadParameter("--save goes with one strength, not with --sweep")
    if recipe and (neurons or splice or popsteer_compat):
        raise typer.BadParameter("--recipe says itself which neurons to turn, and how")
    if objective is None and (learn or budget is not None):
        raise typer.BadParameter("--learn and --budget go with --objective")
    if objective is not None and (sweep or alpha is not None):
        raise typer.BadParameter("--objective finds the strength: leave out --alpha and --sweep")
    is_served = learn_on is LearnOn.served
    if is_served and (not learn or neurons):
        raise typer.BadParameter("--learn-on served goes with --learn, and without --neurons")
    if learn and (recipe or gate or splice or popsteer_compat or contrast != "popularity"):
        raise typer.BadParameter("--learn makes its own recipe: leave out what describes another")

    if (save or learn) and opt.is_on_hub(artifact):
        raise opt.not_on_hub(artifact, "--save and --learn write a recipe into it")

    read = partial(
        opt.read_data,
        data,
        user_col=user_col,
        item_col=item_col,
        time_col=time_col,
        k_core=k_core,
        dedup=dedup,
        format=format,
    )
    if engine is not None:
        from steerrec.batch_scoring import ScoringSpec
        from steerrec.cli.steer_blocks import steer_blocks

        if sweep or save or split is not SplitName.none:
            raise typer.BadParameter("--engine recommends: no --sweep, --save or --split")
        if gate or objective or shares:
            raise typer.BadParameter(
                "--engine has no --gate, --objective or --shares: save a recipe first, and steer "
                "by --recipe"
            )
        steer_blocks(
            ScoringSpec(
                artifact=artifact,
                revision=revision,
                site=site,
                model=model,
                strict=strict,
                recipe=recipe,
                contrast=contrast,
                neurons=neurons,
                splice=None if splice is None else splice.value,
                popsteer_compat=popsteer_compat,
                alpha=alpha,
                k=k,
                mask_seen=mask_seen,
                item_dtype=item_dtype.value,
                device=device,
            ),
            data,
            output,
            read,
            item_map,
            eng.engine_of(engine, address, workers, threads, device),
            block_users=block_users,
            force=force,
            json=json_output,
        )
        return
    opened, rec, interactions = opt.open_artifact(
        artifact, model, read, item_map, device, site=site, strict=strict, revision=revision
    )
    opt.check_k(k, rec)
    exact, rec = rec, with_item_dtype(rec, item_dtype.value)
    if shares is not None:  # before anything is computed
        attribute_column(opt.catalogue_for(rec, interactions), shares)
    here = opened.at(site)
    sae = here.sae.to(device)
    tuned: dict[str, Any] = {}
    goal = None
    if objective is not None:
        held_out = opt.split_for(rec, interactions)
        goal = objective_of(objective, opt.catalogue_for(rec, interactions), held_out)

    def capture() -> CapturedUsers:
        if split is SplitName.none:
            return capture_users(rec, opt.histories_for(rec, interactions))
        which: Which = "valid" if split is SplitName.valid else "test"
        return capture_held_out(rec, opt.split_for(rec, interactions), which, max_users=max_users)

    users: CapturedUsers | None = None
    if learn and goal is not None and objective is not None:
        if here.site != rec.site:
            raise opt.not_scored(here.site, rec.site, "--learn")
        users = capture() if is_served else None
        steering: Recipe = learned(
            exact,
            sae,
            opt.split_for(rec, interactions),
            objective if users is not None else goal,
            BUDGET if budget is None else budget,
            neurons,
            users=users,
            catalogue=opt.catalogue_for(rec, interactions),
            k=k,
            mask_seen=mask_seen,
            seed=seed,
        )
        save = save or plain(steering.name)
        tuned["learned"] = dict(steering.provenance)
    else:
        steering = named_recipe(
            here,
            recipe,
            contrast,
            neurons=neurons,
            splice=None if splice is None else splice.value,
            popsteer_compat=popsteer_compat,
        )
        if gate is not None:
            steering = gated_by(steering, gate, rec, opt.split_for(rec, interactions))
        if goal is not None:
            steering, found_strength = at_budget(
                steering,
                rec,
                sae,
                opt.split_for(rec, interactions),
                goal,
                BUDGET if budget is None else budget,
                site=here.site,
                k=k,
                mask_seen=mask_seen,
                seed=seed,
            )
            tuned["chosen_on_validation"] = asdict(found_strength)
            kept = {**steering.provenance, "objective": objective, "budget": found_strength.budget}
            steering = steering._with(provenance=kept)
    if alpha is not None:
        steering = steering.with_alpha(alpha)
    if sweep:
        from steerrec.tradeoff import DEFAULT_ALPHAS
        from steerrec.tradeoff import sweep as run_sweep

        strengths = DEFAULT_ALPHAS if alphas is None else _numbers(alphas)
        result = run_sweep(
            rec,
            sae,
            steering,
            opt.split_for(rec, interactions),
            site=here.site,
            alphas=strengths,
            k=k,
            mask_seen=mask_seen,
            max_users=max_users,
        )
        folder = output or SWEEP
        write_sweep(result, folder, title=f"Steering by {recipe or contrast}", json=json_output)
        opt.record_result(artifact, here.site, "sweep", result.to_dict(), folder / "sweep.png")
        return
    users = capture() if users is None else users
    error = eng.error_of(exact, rec, item_dtype, users.vectors, k)
    base = rank(rec, users, k=k, mask_seen=mask_seen)
    lists = rank_steered(
        rec, sae, steering, users, capture, site=here.site, k=k, mask_seen=mask_seen
    )
    results = {
        "unsteered": measure_lists(rec, users, base, mask_seen=mask_seen),
        "steered": measure_lists(rec, users, lists, mask_seen=mask_seen),
    }
    if learn:
        assert isinstance(steering, ResponseSteering)
        tuned["neurons"] = effects(steering, rec, sae, users)
        few = [effect["neuron"] for effect in tuned["neurons"]]
        only = steering.only(torch.tensor(few, dtype=torch.int64))
        lists_of_few = rank(rec, users, k=k, mask_seen=mask_seen, transform=only.transform(sae))
        part = f"by {len(few)} neurons alone"
        results[part] = measure_lists(rec, users, lists_of_few, mask_seen=mask_seen)
    if shares is not None:
        catalogue = opt.catalogue_for(rec, interactions)
        named_lists = {"unsteered": base, "steered": lists}
        tuned["shares"] = {
            name: slot_shares(found.ids, catalogue, shares) for name, found in named_lists.items()
        }
    if save:
        opt.note(f"{save_steering(artifact, here.site, steering.named(save))} written")
    if output is not None:
        write_recommendations(output, rec, users.histories, lists)
        opt.note(f"{output} written")
    if json_output:
        found = {name: result.to_dict() for name, result in results.items()}
        file = None if output is None else str(output)
        opt.print_json(
            {"alpha": steering.alpha, "recommendations": file, **found, **tuned, **error}
        )
    else:
        opt.print_evaluations(results)
        if error:
            opt.note(eng.describe_error(error, k))
        if shares is not None:
            print_shares(shares, tuned["shares"])
        if learn:
            print_effects(tuned["neurons"])


def _check(
    output: Path | None,
    sweep: bool,
    alphas: str | None,
    force: bool,
    splice: SpliceName | None,
    popsteer_compat: bool,
) -> None:
    """Refuse what cannot work before anything is computed."""
    from steerrec.errors import StorageError

    if alphas is not None and not sweep:
        raise typer.BadParameter("--alphas goes with --sweep")
    if popsteer_compat and splice is SpliceName.delta:
        raise typer.BadParameter("--popsteer-compat puts in the reconstruction, not --splice delta")
    if sweep:
        folder = output or SWEEP
        if folder.suffix in _SUFFIXES or (folder.exists() and not folder.is_dir()):
            raise StorageError(
                f"{folder} is no folder; --sweep writes {' and '.join(_SWEPT)} into one"
            )
        for name in _SWEPT:
            opt.refuse_existing(folder / name, force)
    elif output is not None:
        if output.suffix not in _SUFFIXES:
            raise StorageError(
                f"{output} has no suffix that says its format; expected {', '.join(_SUFFIXES)}"
            )
        opt.refuse_existing(output, force)


def write_recommendations(path: Path, rec: Recommender, histories: Histories, lists: TopK) -> None:
    """One row a recommendation: user_id, rank, item_id, title, score, with the data's own ids."""
    from steerrec.files import atomic_file
    from steerrec.recommendations import recommendation_frame

    frame = recommendation_frame(rec.catalogue, histories.user_ids, lists)
    with atomic_file(path) as temporary:
        if path.suffix == ".parquet":
            frame.write_parquet(temporary)
        else:
            frame.write_csv(temporary, separator="\t" if path.suffix == ".tsv" else ",")


def write_sweep(result: Sweep, folder: Path, *, title: str, json: bool) -> None:
    """Write sweep.json and sweep.png into a folder, and print the trade-off."""
    from steerrec.choosing import BUDGETS
    from steerrec.files import write_json
    from steerrec.report import plot_tradeoff

    plot_tradeoff(result, folder / "sweep.png", title=title)
    write_json(folder / "sweep.json", result.to_dict())
    if json:
        opt.print_json(result.to_dict())
        return
    base = result.points[0].test
    shown = [m for m in base.metrics if m.partition("@")[0] in _SHOWN]
    chosen = {budget: result.within(budget).alpha for budget in BUDGETS}
    rows = []
    for point in result.points:
        marks = ", ".join(f"{b:.0%}" for b, alpha in chosen.items() if alpha == point.alpha)
        ndcg, ndcg_base = point.test.metrics[shown[0]], base.metrics[shown[0]]
        change = ndcg / ndcg_base - 1 if ndcg_base else None
        values = [opt.number(point.test.metrics[m]) for m in shown]
        rows.append([f"{point.alpha:g}", *values, opt.number(change, "+.1%"), marks])
    columns = ["α", *shown, "nDCG change", "chosen at"]
    opt.print_table(opt.describe_protocol(base), columns, rows)
    opt.note(f"{folder / 'sweep.json'} and {folder / 'sweep.png'} written")


_SHOWN = ("ndcg", "hr", "ltc", "gini", "coverage", "ndcg_tail")


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"--alphas is {text!r}; expected numbers such as 0.5,1,2"
        raise typer.BadParameter(message) from None
