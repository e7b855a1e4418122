"""The typer application: its commands, and what happens when one fails."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from steerrec.cli.ablate import ablate
from steerrec.cli.attach import attach
from steerrec.cli.card import card
from steerrec.cli.compare import compare
from steerrec.cli.convert import convert
from steerrec.cli.demo import demo
from steerrec.cli.evaluate import evaluate
from steerrec.cli.export import export
from steerrec.cli.import_sae import import_sae
from steerrec.cli.layers import layers
from steerrec.cli.neurons import neuron, neurons
from steerrec.cli.pull import pull
from steerrec.cli.push import push
from steerrec.cli.report import report
from steerrec.cli.score import score
from steerrec.cli.steer import steer
from steerrec.cli.train import train
from steerrec.errors import SteerrecError

_RESUMED = ("train", "attach", "compare", "ablate")


class _Commands(TyperGroup):
    """Says what an interruption means before typer turns it into a bare exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            again = "to go on where it stopped" if ctx.invoked_subcommand in _RESUMED else "afresh"
            _say(f"interrupted; run the same command again {again}")
            raise SystemExit(130) from None


app = typer.Typer(
    name="steerrec",
    cls=_Commands,
    help="Attach sparse autoencoders to sequential recommenders, and steer what they recommend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    *(demo, train, convert, evaluate, layers, attach, import_sae, score, steer, compare, ablate),
    *(report, neurons, neuron, export, card, push, pull),
):
    app.command()(command)


def _version(value: bool) -> None:
    if value:
        import steerrec

        print(steerrec.__version__)
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set up logging."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)


def run() -> NoReturn:
    """Run the command line; errors become one line on stderr and the exit status."""
    warnings.showwarning = _show_warning
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("STEERREC_DEBUG") == "1":
            traceback.print_exc()
        else:
            foreseen = isinstance(error, SteerrecError)
            name = "" if foreseen else f"{type(error).__name__}: "
            notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
            where = "" if foreseen else " (STEERREC_DEBUG=1 shows where)"
            _say(f"error: {name}{error}{notes}{where}")
        raise SystemExit(1) from None
    raise SystemExit(0)


def _say(text: str) -> None:
    line = " ".join(text.split())
    sys.stderr.write(f"steerrec: {line}\n")


def _show_warning(
    message: Warning | str, category: type[Warning], *where: object, **more: object
) -> None:
    if category.__module__.startswith("steerrec") or os.environ.get("STEERREC_DEBUG") == "1":
        _say(f"warning: {message}")
