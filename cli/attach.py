"""`steerrec attach`: train an SAE on a layer of a frozen model."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import engine_options as eng
from steerrec.cli import options as opt


class SAEArchitecture(StrEnum):
    """How latents become active in training."""

    topk = "topk"
    batchtopk = "batchtopk"
    jumprelu = "jumprelu"


def attach(
    model: Annotated[str, typer.Argument(help=opt.MODEL_HELP)],
    data: opt.DataOption,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="ARTIFACT folder to write.", show_default=False)
    ],
    layer: opt.Layer = None,
    call: Annotated[
        str,
        typer.Option("--call", help="Which firing of --layer: only, first, last, all or a number."),
    ] = "only",
    warm_start: Annotated[
        Path | None,
        typer.Option(
            "--warm-start",
            help="ARTIFACT of this model before it was retrained: go on from its SAE.",
            show_default=False,
        ),
    ] = None,
    latents: Annotated[
        int | None, typer.Option("--latents", min=1, help="Latents of the SAE; 4096.")
    ] = None,
    k: Annotated[int | None, typer.Option("--k", min=1, help="Latents active at once; 32.")] = None,
    architecture: Annotated[
        SAEArchitecture | None,
        typer.Option(
            "--architecture",
            help="What is active: the k largest latents of a user (topk, the default) or of a "
            "batch (batchtopk), or those above learned thresholds (jumprelu).",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Passes over the rows; 30, or 5 from a warm start."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows in a step.")] = 1024,
    learning_rate: Annotated[
        float | None,
        typer.Option("--learning-rate", min=1e-9, help="Peak learning rate; 0.005."),
    ] = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Training prefixes to learn from, at most.")
    ] = 200_000,
    max_users: opt.MaxUsers = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    revision: opt.Revision = None,
    item_map: opt.ItemMap = None,
    user_col: opt.UserCol = None,
    item_col: opt.ItemCol = None,
    time_col: opt.TimeCol = None,
    k_core: opt.KCore = None,
    dedup: opt.Dedup = None,
    format: opt.Format = None,
    engine: eng.EngineOption = None,
    address: eng.Address = None,
    workers: eng.Workers = None,
    threads: eng.Threads = None,
    keep_activations: Annotated[
        bool, typer.Option("--keep-activations", help="Leave the captured shards on disk.")
    ] = False,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Capture activations of a layer of MODEL, train an SAE on them, and save an ARTIFACT.

    An ARTIFACT that is there gets one more site. After an interruption the same command goes on
    where it stopped. With --engine activations are captured shard by shard on an engine. Under
    torchrun (`torchrun --nproc-per-node 2 -m steerrec.cli attach ...`) all processes train the SAE.
    """
    from steerrec import distributed
    from steerrec.activations import ActivationSampling
    from steerrec.artifacts import Artifact, load_artifact, save_site
    from steerrec.evaluation import reconstruction_cost
    from steerrec.layers import site_at
    from steerrec.loading import holds_no_items
    from steerrec.training import SAETraining, fit_autoencoder

    if warm_start is not None and (latents, k, architecture, call) != (
        *[None] * 3,
        "only",
    ):
        raise typer.BadParameter(
            "--warm-start says itself which site, how many latents, which architecture, and k"
        )
    adding = opt.adds_to(output, force)
    before = None if warm_start is None else load_artifact(warm_start)
    start = None if before is None else before.at(layer)
    if engine is None:
        eng.refuse(**{"--address": address, "--workers": workers, "--threads": threads})
    started = time.perf_counter()
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
    rec, interactions = opt.open_model(model, read, item_map, device, revision=revision)
    opt.warn_unless_conforming(rec)
    if start is not None:
        site = start.site
    else:
        site = site_at(rec, layer, call=opt.call_of(call)) if layer else rec.site
    if adding:
        opt.refuse_held(output, rec, site)
    split = opt.split_for(rec, interactions)
    if start is None:
        chosen = SAEArchitecture.topk if architecture is None else architecture
        training = SAETraining(latents=latents or 4096, k=k or 32, architecture=chosen.value)
    else:
        training = SAETraining.going_on(start.sae)
    work = opt.partial(output)
    sampling = ActivationSampling(rows=rows, seed=seed)
    with distributed.process_group():
        if engine is not None and distributed.rank() == 0:
            from steerrec.batch_capturing import capture_on_engine

            capture_on_engine(
                rec,
                split.train,
                work / "activations",
                eng.engine_of(engine, address, workers, threads, device),
                model=model,
                revision=revision,
                site=site,
                sampling=sampling,
                device=device,
            )
        sae, summary = fit_autoencoder(
            rec,
            split.train,
            site=site,
            training=replace(
                training,
                epochs=epochs or training.epochs,
                batch_size=batch_size,
                learning_rate=learning_rate or training.learning_rate,
                seed=seed,
            ),
            sampling=sampling,
            work=work,
            device=device,
            warm_start=None if start is None else start.sae,
        )
    if distributed.launched_as():
        return  # the first process measures and writes
    summary["downstream"] = reconstruction_cost(rec, sae, split, site=site, max_users=max_users)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    if adding:
        save_site(output, rec, sae, site=site, training=summary)
    else:
        artifact = Artifact.create(
            rec,
            sae,
            site=site,
            training=summary,
            data=interactions.preparation.to_dict(),
            items=rec.catalogue if holds_no_items(model) else None,
        )
        artifact.base_model["source"] = artifact.base_model["source"] or model
        artifact.save(output)
    if keep_activations:
        opt.note(f"activations are in {work / 'activations'}")
    else:
        shutil.rmtree(work, ignore_errors=True)
    if json_output:
        opt.print_json({"artifact": str(output), "site": site.to_dict(), **summary})
        return
    found, cost = summary["reconstruction"], summary["downstream"]
    rows_out = []
    if start is not None:
        rows_out.append(["FVU of the SAE as it was", opt.number(summary["warm_start"]["fvu"])])
    rows_out += [
        ["FVU on held-out users", opt.number(found["fvu"])],
        ["L0", f"{found['l0']:.1f}"],
        ["dead latents", f"{found['dead_share']:.2%}"],
    ]
    for which, measured in cost.items():
        own, kept = measured["base"]["metrics"]["ndcg@10"], measured["ndcg_kept"]
        rows_out += [
            [f"nDCG@10 of the model, {which}", opt.number(own)],
            [f"nDCG@10 kept by the reconstruction, {which}", opt.number(kept, ".2%")],
        ]
    opt.print_table(f"{output}: {sae.d_sae} latents at {site.path}", ["", "value"], rows_out)
