"""`steerrec pull`: a MODEL or ARTIFACT from the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerrec.cli import options as opt


def pull(
    repo_id: Annotated[
        str,
        typer.Argument(metavar="REPO_ID", help="Hub id, such as org/name.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write.", show_default=False)
    ],
    revision: opt.Revision = None,
    force: opt.Force = False,
    json_output: opt.Json = False,
) -> None:
    """Fetch a MODEL or ARTIFACT from the Hugging Face Hub, verify it, and write it to a folder.

    Nothing in it is executed. What is in the cache already is not fetched again.
    """
    from steerrec import hub
    from steerrec.published import files_of, kind_of

    if not force:
        opt.refuse_existing(output, force)
    snapshot = hub.pull(repo_id, revision=revision)
    kind = kind_of(snapshot.path)
    opt.refuse_existing(
        output, force, kind="MODEL folder" if kind == "MODEL" else "ARTIFACT folder"
    )
    snapshot.copy_to(output)
    files = {name: file.stat().st_size for name, file in files_of(output, kind).items()}
    if json_output:
        found = {"repo_id": repo_id, "revision": snapshot.revision, "kind": kind, "files": files}
        opt.print_json({"output": str(output), **found})
        return
    opt.note(f"{output}: {kind} {repo_id} at {snapshot.revision}, {len(files)} files")
