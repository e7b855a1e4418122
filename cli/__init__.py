"""The command line: thin commands over the SDK. Nothing heavy is imported until one runs."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `steerrec` command."""
    from steerrec.cli.app import run

    run()
