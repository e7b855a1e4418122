"""`steerrec train`: fit the reference SASRec."""

from __future__ import annotations

import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from steerrec.cli import options as opt


class LossName(StrEnum):
    """Losses of the reference SASRec."""

    softmax = "softmax"
    bce = "bce"
    gbce = "gbce"


def _tuning(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel="Model and training", **more)


def train(
    data: Annotated[Path, typer.Argument(help=opt.DATA_HELP, show_default=False)],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="MODEL folder to write.", show_default=False)
    ],
    hidden_size: Annotated[int, _tuning("--hidden-size", "Width of the user vector.", min=1)] = 64,
    layers: Annotated[int, _tuning("--layers", "Transformer layers.", min=1)] = 2,
    heads: Annotated[int, _tuning("--heads", "Attention heads.", min=1)] = 2,
    max_length: Annotated[
        int, _tuning("--max-length", "Latest items that the model reads.", min=1)
    ] = 200,
    dropout: Annotated[float, _tuning("--dropout", "Dropout.", min=0, max=0.95)] = 0.2,
    loss: Annotated[
        LossName, _tuning("--loss", "Full softmax, or sampled: bce, gbce.")
    ] = LossName.softmax,
    negatives: Annotated[
        int, _tuning("--negatives", "Sampled negatives, for bce and gbce.", min=1)
    ] = 256,
    epochs: Annotated[
        int | None,
        _tuning(
            "--epochs", "At most this many; by default what 7,000 steps take, at least 30.", min=1
        ),
    ] = None,
    batch_size: Annotated[int, _tuning("--batch-size", "Histories in a step.", min=1)] = 32,
    learning_rate: Annotated[
        float, _tuning("--learning-rate", "Peak learning rate.", min=1e-9)
    ] = 1e-3,
    patience: Annotated[
        int, _tuning("--patience", "Stop after this many validations without a better nDCG.", min=1)
    ] = 6,
    mask_seen: opt.MaskSeen = False,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    user_col: opt.UserCol = None,
    item_col: opt.ItemCol = None,
    time_col: opt.TimeCol = None,
    k_core: opt.KCore = None,
    dedup: opt.Dedup = None,
    format: opt.Format = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Train the reference SASRec on DATA and write a MODEL folder.

    Stops early on validation nDCG@10 (--mask-seen says how that is measured).

    After an interruption the same command goes on from the last epoch.
    """
    from steerrec.adapters.sasrec import SASRecConfig, save
    from steerrec.adapters.sasrec_training import SASRecTraining, fit_sasrec
    from steerrec.data import Catalogue, build_histories, leave_one_out
    from steerrec.evaluation import capture_held_out, measure
    from steerrec.files import atomic_folder, write_json

    opt.refuse_existing(output, force, kind="MODEL folder")
    started = time.perf_counter()
    interactions = opt.read_data(
        data,
        user_col=user_col,
        item_col=item_col,
        time_col=time_col,
        k_core=k_core,
        dedup=dedup,
        format=format,
    )
    catalogue = Catalogue.from_interactions(interactions)
    split = leave_one_out(build_histories(interactions, catalogue), len(catalogue))
    opt.note(
        f"{len(split.histories):,} users, {len(catalogue):,} items, "
        f"{len(split.histories.items):,} interactions"
    )
    work = opt.partial(output)
    rec, summary = fit_sasrec(
        split,
        catalogue,
        config=SASRecConfig(
            num_items=len(catalogue),
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden_size,
            max_position_embeddings=max_length,
            hidden_dropout_prob=dropout,
        ),
        training=SASRecTraining(
            loss=loss.value,
            negatives=negatives,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            patience=patience,
            mask_seen=mask_seen,
            seed=seed,
        ),
        work=work,
        device=device,
    )
    held_out = capture_held_out(rec, split, "test")
    results = {
        "unmasked": measure(rec, held_out),
        "masked": measure(rec, held_out, mask_seen=True),
    }
    summary["test"] = [found.to_dict() for found in results.values()]
    summary["seconds"] = round(time.perf_counter() - started, 1)
    with atomic_folder(output) as folder:
        save(rec, folder)
        record = {
            "data": interactions.preparation.to_dict(),
            "training": summary,
        }
        write_json(folder / "steerrec.json", record)
    shutil.rmtree(work, ignore_errors=True)
    if json_output:
        opt.print_json({"model": str(output), **record})
        return
    opt.print_evaluations(results)
    opt.note(
        f"{output}: {summary['epochs']} epochs in {summary['seconds']:.0f} s, best validation "
        f"nDCG@10 {summary['best_valid_ndcg@10']:.4f}"
    )
