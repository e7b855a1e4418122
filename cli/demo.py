"""`steerrec demo`: the whole story on simulated data."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt
from steerrec.cli.attach import attach
from steerrec.cli.report import report
from steerrec.cli.score import score
from steerrec.cli.steer import steer
from steerrec.cli.train import train

EPOCHS = 20
MARKER = "demo.json"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("demo"),
    users: Annotated[int, typer.Option("--users", min=50, help="Simulated users.")] = 3000,
    items: Annotated[int, typer.Option("--items", min=50, help="Simulated items.")] = 1000,
    latents: Annotated[int, typer.Option("--latents", min=8, help="Latents of the SAE.")] = 1024,
    seed: opt.Seed = 0,
) -> None:
    """Simulate data, train a recommender, attach an SAE, find the popularity neurons, steer, tell.

    Nothing is downloaded. Every step is one of the other commands, and is shown as such. An
    earlier demo in the same folder is replaced.
    """
    from steerrec.data import simulate, write_csv
    from steerrec.files import write_json

    _make_way(output)
    write_json(output / MARKER, {"users": users, "items": items, "latents": latents, "seed": seed})
    started = time.perf_counter()
    data, model, artifact = output / "data", output / "model", output / "artifact"
    _say(started, f"simulate {users:,} users and {items:,} items")
    write_csv(simulate(users, items, seed=seed), data)
    _say(started, f"steerrec train {data} -o {model} --max-length 50 --epochs {EPOCHS}")
    train(data, model, max_length=50, epochs=EPOCHS, seed=seed)
    _say(started, f"steerrec attach {model} --data {data} -o {artifact} --latents {latents}")
    attach(str(model), data, artifact, latents=latents, seed=seed)
    _say(started, f"steerrec score {artifact} --model {model} --data {data}")
    score(str(artifact), data, str(model), seed=seed)
    _say(
        started,
        f"steerrec steer {artifact} --model {model} --data {data} --sweep -o {output}/sweep",
    )
    steer(str(artifact), data, str(model), sweep=True, output=output / "sweep")
    page = output / "report.html"
    _say(started, f"steerrec report {artifact} --model {model} --data {data} -o {page}")
    report(str(artifact), data, str(model), page)
    _say(started, f"done: open {page} in a browser")


def _make_way(output: Path) -> None:
    """Empty the folder of an earlier demo, known by its marker; refuse any other that is there."""
    from steerrec.errors import StorageError

    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / MARKER).is_file():
        raise StorageError(f"{output} exists and is no earlier demo; choose another folder with -o")
    for name in ("data", "model", "model.partial", "artifact", "artifact.partial", "sweep"):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / "report.html").unlink(missing_ok=True)


def _say(started: float, text: str) -> None:
    opt.note(f"[{time.perf_counter() - started:5.1f} s] {text}")
