"""`steerrec push`: a MODEL or ARTIFACT onto the Hub."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt


def push(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="MODEL or ARTIFACT folder.", show_default=False),
    ],
    repo_id: Annotated[
        str,
        typer.Argument(
            metavar="REPO_ID", help="Hub id, such as org/name; made if new.", show_default=False
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="Base model of ARTIFACT on the Hub, or a folder pushed there; it is recorded.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch to push to; main if none.")
    ] = None,
    tag: Annotated[str | None, typer.Option("--tag", help="Name for what is pushed.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository a private one.")
    ] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="A line about the push.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be pushed.")
    ] = False,
    overwrite_card: Annotated[
        bool | None,
        typer.Option(
            "--overwrite-card/--keep-card",
            help="What to do with a card on the Hub that was edited by hand; asks on a terminal.",
            show_default=False,
        ),
    ] = None,
    json_output: opt.Json = False,
) -> None:
    """Publish FOLDER on the Hugging Face Hub in one commit.

    Absolute paths of this machine are left out. The login is that of `hf auth login` or HF_TOKEN.
    """
    from steerrec import hub
    from steerrec.loading import load_recommender

    pushed = hub.push(
        folder,
        repo_id,
        revision=revision,
        private=private or None,
        create_pr=create_pr,
        commit_message=message,
        tag=tag,
        dry_run=dry_run,
        rec=None if model is None else load_recommender(model),
        overwrite_card=_ask if overwrite_card is None else overwrite_card,
    )
    if pushed.base_model is None and pushed.kind == "ARTIFACT":
        opt.note(
            "the base model is not known to be on the Hub, so that others have to give --model; "
            "push it, then push this again with --model"
        )
    if pushed.card_kept:
        opt.note(
            "the card on the Hub was edited by hand and left as it is; --overwrite-card replaces it"
        )
    if json_output:
        opt.print_json({**asdict(pushed), "dry_run": dry_run})
        return
    rows = [[name, f"{size:,}"] for name, size in pushed.files.items()]
    rows.append(["", f"{sum(pushed.files.values()):,}"])
    opt.print_table(f"{pushed.kind} {folder} for {repo_id}", ["file", "bytes"], rows)
    if dry_run:
        opt.note("nothing was sent")
    else:
        opt.note(f"pushed to {pushed.url} as {pushed.revision}")


def _ask() -> bool:
    """Ask on a terminal; elsewhere nothing that was made by hand is replaced."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm("The card on the Hub was edited by hand. Replace it?", err=True)
