"""`steerrec ablate`: what steering owes to each of its parts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt

_FILES = ("ablate.json", "ablate.png")


def ablate(
    artifact: opt.ArtifactArgument,
    data: opt.DataOption,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the results.", show_default=False)
    ],
    model: opt.ModelOption = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            help="Only these, of neurons,k,latents,fvu,site,splice,contrast,controls,seeds.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option("--layers", help="Modules for the study of sites; the model's blocks."),
    ] = None,
    users: Annotated[
        int, typer.Option("--users", min=2, help="Synthetic users of each group.")
    ] = 8192,
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Passes over the rows, for SAEs trained here.")
    ] = 30,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Training prefixes that they learn from, at most.")
    ] = 200_000,
    max_users: Annotated[
        int | None,
        typer.Option("--max-users", min=1, help="Held-out users to rank, drawn by the seed; all."),
    ] = None,
    k: opt.K = 10,
    mask_seen: opt.MaskSeen = False,
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
    """Vary one part of steering at a time: neurons, SAE, layer, splice, contrast, controls, seeds.

    An interrupted run goes on where it stopped: what is done is kept in DIR/variants.
    """
    from steerrec.ablations import STUDIES
    from steerrec.ablations import ablate as run
    from steerrec.activations import ActivationSampling
    from steerrec.choosing import BUDGETS
    from steerrec.errors import StorageError
    from steerrec.files import write_json
    from steerrec.report import plot_ablations
    from steerrec.training import SAETraining

    if output.exists() and not output.is_dir():
        raise StorageError(f"{output} is no folder; ablate writes {', '.join(_FILES)} into one")
    for name in _FILES:
        opt.refuse_existing(output / name, force)
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
    found = run(
        rec,
        opt.split_for(rec, interactions),
        here.sae,
        site=here.site,
        studies=STUDIES if only is None else _names(only),
        layers=None if layers is None else _names(layers),
        training=SAETraining(epochs=epochs),
        sampling=ActivationSampling(rows=rows, seed=seed),
        users=users,
        max_users=max_users,
        k=k,
        mask_seen=mask_seen,
        seed=seed,
        folder=output,
        device=device,
    )
    plot_ablations(found, output / "ablate.png", title="What steering owes to its parts")
    write_json(output / "ablate.json", found.to_dict())
    if json_output:
        opt.print_json(found.to_dict())
        return
    columns = ["study", "", "FVU"]
    for budget in BUDGETS:
        columns += [f"nDCG {budget:.0%}", f"LTC {budget:.0%}", f"Gini {budget:.0%}"]
    table = []
    for row in found.rows:
        shown = [row.study, row.label, opt.number(row.facts.get("fvu"))]
        for budget in BUDGETS:
            chosen = row.at(budget)
            shown += [opt.number(chosen[f"{name}@{k}"]) for name in ("ndcg", "ltc", "gini")]
        volumes = row.hypervolume
        table.append([*shown, *(opt.number(volumes[by], ".3f") for by in ("gini", "ltc"))])
    seen = "seen items masked" if mask_seen else "seen items not masked"
    protocol = found.protocol
    title = (
        f"test split, {seen}, k = {k}, {protocol['users']:,} users, {protocol['items']:,} items; "
        "lowest Gini within 1, 5 and 10 % of nDCG"
    )
    opt.print_table(title, [*columns, "HV Gini", "HV LTC"], table)
    opt.note(f"{' and '.join(str(output / name) for name in _FILES)} written")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
