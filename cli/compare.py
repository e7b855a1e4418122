"""`steerrec compare`: steering and every baseline at equal budgets of accuracy."""

from __future__ import annotations

import time
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from collections.abc import Callable

    from steerrec.artifacts import SiteArtifact
    from steerrec.autoencoder import SparseAutoencoder
    from steerrec.comparison_results import Comparison, MethodResult, Row
    from steerrec.data import Histories, Split
    from steerrec.recipes import Recipe
    from steerrec.recommender import Recommender
    from steerrec.rerank import Reranker

LEARNED = {"learned": "even", "learned-gini": "gini", "learned-ltc": "ltc"}
"""Methods that are learned first, and their objectives."""

SERVED = {"learned-served": "broad"}
"""The same, learned for the users of the comparison themselves."""

_FILES = ("compare.json", "compare.csv", "compare.png", "compare-users.png")


def compare(
    artifact: opt.ArtifactArgument,
    data: opt.DataOption,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the results.", show_default=False)
    ],
    model: opt.ModelOption = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Only these, such as popsteer,ipr; all by default."),
    ] = None,
    contrast: opt.ContrastName = "popularity",
    k: opt.K = 10,
    mask_seen: opt.MaskSeen = False,
    pool: Annotated[
        int, typer.Option("--pool", min=1, help="A user's best items that re-rankers choose from.")
    ] = 200,
    max_users: Annotated[
        int | None,
        typer.Option("--max-users", min=1, help="Held-out users to rank, drawn by the seed; all."),
    ] = None,
    bootstrap: Annotated[
        int, typer.Option("--bootstrap", min=1, help="Replicates for intervals and p-values.")
    ] = 500,
    seed: opt.Seed = 0,
    site: opt.SiteName = None,
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
    """Compare steering with re-ranking: each swept, chosen on validation, measured on test.

    An interrupted run goes on where it stopped: methods that are done are kept in DIR/methods.
    """
    from steerrec.comparison import compare as run
    from steerrec.errors import SiteError, StorageError

    if output.exists() and not output.is_dir():
        raise StorageError(f"{output} is no folder; compare writes {', '.join(_FILES)} into one")
    for name in _FILES:
        opt.refuse_existing(output / name, force)
    names = None if methods is None else [name.strip() for name in methods.split(",")]
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
    opened, rec, interactions = opt.open_artifact(
        artifact, model, read, item_map, device, site=site, revision=revision
    )
    opt.check_k(k, rec)
    here = opened.at(site)
    if here.site != rec.site:
        raise SiteError(
            f"the SAE is at {here.site.name}, not at the scored vector ({rec.site.name}): there "
            "the model would have to run for each setting; compare an SAE of the scored vector"
        )
    split = opt.split_for(rec, interactions)
    learn = partial(_learned, rec, here, split, k=k, mask_seen=mask_seen, seed=seed, device=device)
    chosen, seconds = _methods(here, rec, split.train, contrast, names, seed, device, learn)
    result = run(
        rec,
        split,
        chosen,
        reference="popsteer" if "popsteer" in chosen else next(iter(chosen)),
        k=k,
        mask_seen=mask_seen,
        pool=pool,
        max_users=max_users,
        replicates=bootstrap,
        seed=seed,
        fit_seconds=seconds,
        folder=output,
    )
    _write(result, output)
    opt.record_result(artifact, here.site, "compare", result.to_dict(), output / "compare.png")
    if json_output:
        opt.print_json(result.to_dict())
    else:
        _print(result)
        opt.note(f"{', '.join(str(output / name) for name in _FILES)} written")


def _methods(
    here: SiteArtifact,
    rec: Recommender,
    train: Histories,
    contrast: str,
    names: list[str] | None,
    seed: int,
    device: str,
    learn: Callable[[str], Reranker],
) -> tuple[dict[str, Reranker], dict[str, float]]:
    """The methods that were asked for, and how long each took to make."""
    from steerrec.contrasts import contrast_name
    from steerrec.errors import MethodError
    from steerrec.profiles import popularity_contrast
    from steerrec.rerank import METHODS, reranker, score_dimensions
    from steerrec.steering import Steering, SteerTransform

    sae, contrast = here.sae.to(device), contrast_name(contrast)
    steerings: dict[str, Callable[[], Recipe]] = {
        "popsteer": lambda: Steering.popsteer(here.table(contrast)),
        "popsteer-compat": lambda: Steering.popsteer(here.table(contrast), popsteer_compat=True),
        **{name: partial(here.recipe, name) for name in here.steerings},
    }
    learned = {name: value for name, value in LEARNED.items() if name not in steerings}
    served = {name: value for name, value in SERVED.items() if name not in steerings}
    others = (name for name in METHODS if name not in steerings)
    known = [*steerings, *learned, *served, *others]
    made: dict[str, Reranker] = {}
    seconds: dict[str, float] = {}
    dimensions: Any = None
    for name in known if names is None else names:
        started = time.perf_counter()
        if name in steerings:
            transform = SteerTransform(sae, steerings[name]())
            made[name] = reranker("popsteer", transform=transform)
        elif name in learned:
            made[name] = learn(learned[name])
        elif name in served:
            made[name] = _served(sae, served[name], seed)
        elif name in METHODS:
            if "dimensions" in METHODS[name].needs:
                if dimensions is None:
                    popularity = popularity_contrast(rec.catalogue)
                    dimensions = score_dimensions(rec, popularity, train, seed=seed)
                made[name] = reranker(name, dimensions=dimensions)
            else:
                made[name] = reranker(name)
        else:
            near = get_close_matches(name.lower(), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? " if near else ""
            raise MethodError(f"no method {name!r}; {hint}there are {', '.join(known)}")
        seconds[name] = time.perf_counter() - started
    return made, seconds


def _learned(
    rec: Recommender,
    here: SiteArtifact,
    split: Split,
    objective: str,
    *,
    k: int,
    mask_seen: bool,
    seed: int,
    device: str,
) -> Reranker:
    from steerrec.learning import SteeringTraining, learn_path
    from steerrec.rerank.learned import Learned

    sae, training = here.sae.to(device), SteeringTraining(seed=seed)
    path = learn_path(
        rec, sae, split, objective=objective, k=k, mask_seen=mask_seen, training=training
    )
    return Learned(path.transform(sae))


def _served(sae: SparseAutoencoder, objective: str, seed: int) -> Reranker:
    from steerrec.rerank.learned_served import LearnedServed
    from steerrec.served_fitting import ServedTraining
    from steerrec.served_steering import ServedSteering

    return LearnedServed(ServedSteering(sae, objective, training=ServedTraining(seed=seed)))


def _write(result: Comparison, folder: Path) -> None:
    import polars as pl

    from steerrec.comparison_plots import plot_frontiers, plot_who_loses
    from steerrec.files import atomic_file, write_json

    write_json(folder / "compare.json", result.to_dict())
    rows = [_record(method.name, row) for method in result.methods for row in method.rows]
    with atomic_file(folder / "compare.csv") as temporary:
        pl.DataFrame(rows, infer_schema_length=None).write_csv(temporary)
    plot_frontiers(result, folder / "compare.png", title="Accuracy against exposure")
    plot_who_loses(result, folder / "compare-users.png", title="Who gains, and who loses")


def _record(method: str, row: Row) -> dict[str, Any]:
    from steerrec.comparison_results import TASTES

    record: dict[str, Any] = {
        "method": method,
        "budget": row.budget,
        "chosen_by": row.by,
        "strength": row.value,
        **row.metrics,
        "outside": row.outside,
    }
    for name, (low, high) in row.interval.items():
        record |= {f"{name}_low": low, f"{name}_high": high}
    for name in ("ndcg", "ltc", "gini"):
        record[f"{name}_p"] = row.against.get(name, {}).get("p")
    for i, taste in enumerate(TASTES):
        for part, values in row.by_taste.items():
            record[f"{part}_{taste}_taste"] = values[i]
    return record


def _print(result: Comparison) -> None:
    k, protocol = result.protocol["k"], result.protocol
    seen = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    title = (
        f"test split, {seen}, k = {k}, {protocol['users']['test']:,} users, "
        f"{protocol['items']:,} items; "
    )
    base = result.base["test"]
    columns = ["method", "strength", "nDCG", "change", "p", "tail nDCG", "LTC", "Gini", "outside"]
    columns += ["HV Gini", "HV LTC", "ms/user"]
    unsteered = [base[f"{name}@{k}"] for name in ("ndcg", "ndcg_tail", "ltc", "gini")]
    first, tail, ltc, gini = map(opt.number, unsteered)
    for budget in protocol["budgets"]:
        rows = [["unsteered", "", first, "", "", tail, ltc, gini, "", "", "", ""]]
        for method in result.methods:
            row = method.row(budget)
            metrics = row.metrics
            own = base[f"ndcg@{k}"]
            rows.append(
                [
                    _named(method),
                    f"{row.value:g}",
                    opt.number(metrics[f"ndcg@{k}"]),
                    opt.number(metrics[f"ndcg@{k}"] / own - 1 if own else None, "+.1%"),
                    opt.number(row.against.get("ndcg", {}).get("p"), ".3f"),
                    opt.number(metrics[f"ndcg_tail@{k}"]),
                    opt.number(metrics[f"ltc@{k}"]),
                    opt.number(metrics[f"gini@{k}"]),
                    opt.number(row.outside, ".1%"),
                    opt.number(method.hypervolume["gini"], ".3f"),
                    opt.number(method.hypervolume["ltc"], ".3f"),
                    opt.number(method.milliseconds, ".3f"),
                ]
            )
        opt.print_table(f"{title}lowest Gini within {budget:.0%} of nDCG", columns, rows)
    _print_who_loses(result, title, _shown(protocol["budgets"]))


def _print_who_loses(result: Comparison, title: str, budget: float) -> None:
    from steerrec.comparison_results import TASTES

    columns = ["method", "head items", "mid", "tail"]
    columns += [f"{TASTES[0]} taste", *TASTES[1:], "users worse", "better"]
    rows = []
    for method in result.methods:
        changes, by_taste = result.changes(method, budget), method.row(budget).by_taste
        worse, better = (
            [value for value in by_taste[part] if value is not None] for part in ("worse", "better")
        )
        rows.append(
            [
                _named(method),
                *(opt.number(value, "+.1%") for value in (*changes["targets"], *changes["tastes"])),
                *(opt.number(sum(part) / len(part), ".1%") for part in (worse, better)),
            ]
        )
    opt.print_table(
        f"{title}at {budget:.0%}: change of nDCG by the group of the item that was taken next, and "
        "by the users' own taste, three equal parts; users with lower and higher nDCG",
        columns,
        rows,
    )


def _shown(budgets: list[float]) -> float:
    """The budget at which it is told who loses: 5 %, or the one in the middle."""
    return 0.05 if 0.05 in budgets else sorted(budgets)[len(budgets) // 2]


def _named(method: MethodResult) -> str:
    return method.name + (" (control)" if method.control else "")
