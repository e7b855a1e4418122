"""`steerrec card`: the README.md of an ARTIFACT, made from what the artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt


def card(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="ARTIFACT folder.", show_default=False)
    ],
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", help="Name of the data, on the Hub if it is there; repeatable."),
    ] = None,
    license: Annotated[
        str | None, typer.Option("--license", help="Licence, such as apache-2.0.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a card that was edited by hand.")
    ] = False,
) -> None:
    """Make the card of ARTIFACT anew: model, data, SAE, before and after, neurons, how to load.

    Commands that add to ARTIFACT do so by themselves, and leave a card alone that was edited.
    """
    from steerrec.artifacts import CARD, save_card
    from steerrec.errors import StorageError

    if not save_card(artifact, datasets=dataset, license=license, overwrite=force):
        raise StorageError(
            f"{artifact / CARD} was edited by hand; --force replaces it, and its text is lost"
        )
    opt.note(f"{artifact / CARD} written")
