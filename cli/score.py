"""`steerrec score`: which neurons carry a contrast."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.agreement import AttributionStudy
    from steerrec.attribution import AttributionTable

_STUDIED = ("study.json", "study.png")


def score(
    artifact: opt.ArtifactArgument,
    data: opt.DataOption,
    model: opt.ModelOption = None,
    contrasts: opt.Contrasts = None,
    users: Annotated[
        int, typer.Option("--users", min=2, help="Synthetic users of each group.")
    ] = 8192,
    top: Annotated[int, typer.Option("--top", min=1, help="Neurons to show.")] = 10,
    by: Annotated[
        str | None,
        typer.Option("--by", help="Column that says which are the strongest; see docs."),
    ] = None,
    columns: Annotated[
        str,
        typer.Option(
            "--columns",
            help="Columns of real users and of scores to add: all, none, or names with commas.",
        ),
    ] = "all",
    causal: Annotated[
        str | None,
        typer.Option(
            "--causal", help="Switch off the strongest N neurons, or all, and see what lists lose."
        ),
    ] = None,
    causal_users: Annotated[
        int, typer.Option("--causal-users", min=1, help="Real users at most for --causal.")
    ] = 2000,
    study: Annotated[
        Path | None,
        typer.Option(
            "--study",
            help="Folder for study.json and study.png: which column says best what switching off "
            "does. Implies --causal all.",
        ),
    ] = None,
    least_active: Annotated[
        float,
        typer.Option(
            "--least-active",
            min=0,
            max=1,
            help="Only neurons active in more than this share of users are in the study.",
        ),
    ] = 0.0,
    k: opt.K = 10,
    mask_seen: opt.MaskSeen = False,
    site: opt.SiteName = None,
    strict: opt.Strict = True,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write ARTIFACT with the table there instead."),
    ] = None,
    revision: opt.Revision = None,
    seed: opt.Seed = 0,
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
    """Tell which neurons carry a contrast; the table goes into ARTIFACT."""
    from steerrec.agreement import attribution_study
    from steerrec.artifacts import save_result, save_table
    from steerrec.attribution import score_neurons
    from steerrec.attribution_columns import add_columns, checked_columns, columns_of
    from steerrec.card import NEURONS
    from steerrec.contrasts import item_contrast
    from steerrec.errors import ArtifactError
    from steerrec.explaining import table_in_words
    from steerrec.recommender import fingerprint

    neurons = _count(causal)
    if study is not None:
        causal = causal or "all"
        for name in _STUDIED:
            opt.refuse_existing(study / name, force)
    names = None if columns == "all" else [] if columns == "none" else columns.split(",")
    if output is not None:
        opt.refuse_existing(output, force, kind="ARTIFACT folder")
    elif opt.is_on_hub(artifact):
        raise opt.not_on_hub(artifact, "the table goes into it, or into another with --output")

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
        artifact, model, read, item_map, device, site=site, strict=strict, revision=revision
    )
    opt.check_k(k, rec)
    here = opened.at(site)
    wanted = checked_columns(names, scored=here.site == rec.site)
    if causal is not None:
        wanted.append("causal_effect")
    if by is not None and by not in (there := columns_of(wanted)):
        raise ArtifactError(
            f"--by: the table will have no column {by!r}; it will have {', '.join(sorted(there))}"
        )
    split = opt.split_for(rec, interactions)
    sae, catalogue = here.sae.to(device), opt.catalogue_for(rec, interactions)
    # every contrast is understood before the first is scored
    asked = [item_contrast(catalogue, text) for text in contrasts or ["popularity"]]
    if study is not None and len(asked) > 1:
        raise typer.BadParameter("--study is of one contrast")
    documents: list[dict[str, Any]] = []
    for groups in asked:
        table = score_neurons(rec, sae, groups, split.train, site=here.site, users=users, seed=seed)
        if wanted:
            table = add_columns(
                table,
                rec,
                sae,
                groups,
                split.train,
                columns=wanted,
                site=here.site,
                users=users,
                causal_users=causal_users,
                neurons=neurons,
                k=k,
                mask_seen=mask_seen,
                seed=seed,
            )
        column = by or table.ranking
        found = None if study is None else attribution_study(table, least_active=least_active)
        described = None
        if here.site == rec.site:
            described = table_in_words(table, here.sae, rec, by=column)
        if not strict:
            table.provenance["model_sha256"] = fingerprint(rec)["model_sha256"]
        if output is None:
            file = str(save_table(artifact, here.site, table))
            if described is not None:
                save_result(artifact, here.site, f"{NEURONS}{table.name}", described)
        else:
            here.tables[table.name] = table
            if described is not None:
                here.results[f"{NEURONS}{table.name}"] = described
            opened.save(output)  # after each: what is done is not lost
            file = str(output)
        if study is not None and found is not None:
            _write_study(table, found, study)
        if json_output:
            shown = {"table": file, "contrast": table.contrast, "by": column}
            told = {} if found is None else {"study": found.to_dict()}
            documents.append({**shown, "top": _strongest(table, top, column), **told})
            continue
        label = {1: table.contrast["group_a"]["label"], -1: table.contrast["group_b"]["label"]}
        effects = {name: title for name, title in _EFFECTS.items() if name in table.columns}
        extra = [column] if column not in _SHOWN else []
        rows = [
            [
                str(row["neuron"]),
                f"{row['cohens_d']:+.2f} ± {row['cohens_d_se']:.2f}",
                *(opt.number(row.get(name), ".3g") for name in (*extra, "auroc", *effects)),
                label[1 if table.signed(column)[int(row["neuron"])] > 0 else -1],
                f"{row['firing_rate_a']:.1%}",
                f"{row['firing_rate_b']:.1%}",
            ]
            for row in _strongest(table, top, column)
        ]
        titles = ["neuron", "Cohen's d", *extra, "AUROC", *effects.values(), "group"]
        titles += [f"fires for {label[1]}", f"fires for {label[-1]}"]
        title = (
            f"{table.name}: strongest of {len(table):,} neurons by {column}, {users:,} synthetic "
            "users a group"
        )
        opt.print_table(title, titles, rows)
        if found is not None:
            _print_study(found)
    if json_output:
        opt.print_json(documents[0] if len(asked) == 1 else {"tables": documents})


_EFFECTS = {
    "logit_attribution": "logits",
    "grad_attribution": "gradient",
    "causal_effect": "causal",
}
_SHOWN = ("cohens_d", "auroc", *_EFFECTS)


def _count(causal: str | None) -> int | None:
    """How many neurons to switch off; None for all."""
    if causal in (None, "all"):
        return None
    if not causal.isdecimal() or int(causal) < 1:
        raise typer.BadParameter(f"--causal is {causal!r}; expected a number of neurons, or all")
    return int(causal)


def _strongest(table: AttributionTable, n: int, by: str) -> list[dict[str, float]]:
    rows = []
    for neuron in table.strongest(n, by=by).tolist():
        values = {name: float(column[neuron]) for name, column in table.columns.items()}
        rows.append({"neuron": neuron, **values})
    return rows


def _write_study(table: AttributionTable, found: AttributionStudy, folder: Path) -> None:
    """study.json and study.png into a folder."""
    from steerrec.files import write_json
    from steerrec.study_plot import plot_attribution_study

    plot_attribution_study(table, found, folder / "study.png", title=f"Attribution: {table.name}")
    write_json(folder / "study.json", found.to_dict())
    opt.note(f"{folder / 'study.json'} and {folder / 'study.png'} written")


def _print_study(found: AttributionStudy) -> None:
    title = (
        f"rank correlation with {found.target} over {found.neurons:,} neurons (95 % interval), and "
        f"the share of the {found.strongest} strongest that a column finds"
    )
    rows = [
        [
            row.column,
            f"{row.correlation:+.3f} ({row.interval[0]:+.3f} to {row.interval[1]:+.3f})",
            f"{row.magnitude:+.3f} ({row.magnitude_interval[0]:+.3f} to "
            f"{row.magnitude_interval[1]:+.3f})",
            f"{row.found:.0%}",
        ]
        for row in found.rows
    ]
    opt.print_table(title, ["column", "signed", "size", "found"], rows)
