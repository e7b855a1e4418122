"""The command line: thin commands over the SDK. Nothing heavy is imported until one runs."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point of the `steerrec` command."""
    # Threads that spin while they wait make torch several times slower on a machine that others
    # use too; OpenMP reads this when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from steerrec.cli.app import run

    run()
