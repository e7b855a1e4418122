"""`steerrec score`: which neurons carry a contrast."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerrec.cli import options as opt

if TYPE_CHECKING:
    from steerrec.attribution import AttributionTable


def score(
    artifact: opt.ArtifactArgument,
    data: opt.DataOption,
    model: opt.ModelOption = None,
    contrast: Annotated[
        str, typer.Option("--contrast", help="What to look for: popularity.")
    ] = "popularity",
    users: Annotated[
        int, typer.Option("--users", min=2, help="Synthetic users of each group.")
    ] = 8192,
    top: Annotated[int, typer.Option("--top", min=1, help="Neurons to show.")] = 10,
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
    """Tell by synthetic users which neurons carry a contrast; the table goes into ARTIFACT."""
    from steerrec.artifacts import save_result, save_table
    from steerrec.attribution import score_neurons
    from steerrec.card import NEURONS
    from steerrec.errors import DataError
    from steerrec.explaining import table_in_words
    from steerrec.profiles import popularity_contrast
    from steerrec.recommender import fingerprint

    if contrast != "popularity":
        raise DataError(f"unknown contrast {contrast!r}; expected popularity")

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
    here = opened.at(site)
    split = opt.split_for(rec, interactions)
    table = score_neurons(
        rec,
        here.sae.to(device),
        popularity_contrast(rec.catalogue),
        split.train,
        site=here.site,
        users=users,
        seed=seed,
    )
    described = None
    if here.site == rec.site:
        described = table_in_words(table, here.sae, rec)
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
        opened.save(output)
        file = str(output)
    if json_output:
        opt.print_json({"table": file, "contrast": table.contrast, "top": _strongest(table, top)})
        return
    label = {1: table.contrast["group_a"]["label"], -1: table.contrast["group_b"]["label"]}
    rows = [
        [
            str(row["neuron"]),
            f"{row['cohens_d']:+.2f} ± {row['cohens_d_se']:.2f}",
            label[1 if row["cohens_d"] > 0 else -1],
            f"{row['firing_rate_a']:.1%}",
            f"{row['firing_rate_b']:.1%}",
        ]
        for row in _strongest(table, top)
    ]
    columns = ["neuron", "Cohen's d", "group", f"fires for {label[1]}", f"fires for {label[-1]}"]
    title = f"{contrast}: strongest of {len(table):,} neurons, {users:,} synthetic users a group"
    opt.print_table(title, columns, rows)


def _strongest(table: AttributionTable, n: int) -> list[dict[str, float]]:
    rows = []
    for neuron in table.strongest(n).tolist():
        values = {name: float(column[neuron]) for name, column in table.columns.items()}
        rows.append({"neuron": neuron, **values})
    return rows
