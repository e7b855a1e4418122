"""Runs every fenced block of README.md and docs/*.md, so that no snippet goes stale.

Each document has a namespace and a working directory of its own, with a small `steerrec demo` in
`demo/`, and a Hub on this machine in which it is logged in as `acme`. What follows the fence says
how a block is checked:

``python``
    executed, after the blocks before it
``bash``
    `steerrec` lines, also as `torchrun … -m steerrec.cli`, are run in this process and must exit
    with 0; the targets of `make` lines must exist; the few other commands of `_LET_BE` are not run,
    and no more are allowed
``bash fails``
    `steerrec` lines must end in an error of steerrec's own
``bash not-run``
    for what takes too long: arguments and options of `steerrec` lines must parse
``text``
    printed by the block before: numbers may differ, and a line `…` stands for any lines
``LANGUAGE FILE``
    written to the file, for later blocks to use
``math``, ``bibtex``
    not checked

Anything else fails, and so does a relative link that leads nowhere.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Example, Region, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.region import Lexeme

# Read when huggingface_hub is imported: a cache of the tests' own, no login of the developer's, no
# proxy in front of this machine, and uploads as the loopback Hub takes them.
_HF_HOME = tempfile.TemporaryDirectory(prefix="steerrec-hf-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["HF_HUB_DISABLE_XET"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
for _name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)

_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})(?P<info>[^\n]*)\n"
    r"(?P<body>.*?)^[ \t]*(?P=fence)[ \t]*$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)")
_LET_BE = ("cd ", "export ", "git clone ", "pip install ", "python tests/benchmarks/")
_PRINTED = "_printed"  # by the latest block, in the document's namespace


def parse_blocks(document: Document) -> Iterator[Region]:
    """A region for every fenced block."""
    for block in _FENCE.finditer(document.text):
        source = Lexeme(textwrap.dedent(block["body"]), offset=0, line_offset=0)
        yield Region(block.start(), block.end(), source, _evaluator(block["info"].split()))


def parse_links(document: Document) -> Iterator[Region]:
    """A region for every relative link outside of the fenced blocks."""
    blocks = [block.span() for block in _FENCE.finditer(document.text)]
    for link in _LINK.finditer(document.text):
        if not any(start <= link.start() < end for start, end in blocks):
            yield Region(link.start(), link.end(), link["target"], _check_link)


def _evaluator(info: list[str]) -> Any:
    match info:
        case ["python"]:
            return _run_python
        case ["bash"]:
            return partial(_run_commands, exit_code=0)
        case ["bash", "fails"]:
            return partial(_run_commands, exit_code=1)
        case ["bash", "not-run"]:
            return _parse_commands
        case ["text"]:
            return _compare_output
        case [_, file] if re.fullmatch(r"\w+\.\w+", file):
            return partial(_write_file, name=file)
        case ["math" | "bibtex"]:
            return lambda example: None
    return lambda example: f"{' '.join(info) or 'nothing'} after the fence: see conftest.py"


def _check_link(example: Example) -> str | None:
    target = Path(example.path).parent / example.parsed
    return None if target.exists() else f"{target} does not exist"


def _run_python(example: Example) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        PythonEvaluator()(example)
    example.namespace[_PRINTED] = printed.getvalue()


def _write_file(example: Example, name: str) -> None:
    Path(name).write_text(example.parsed, encoding="utf-8")


def _commands(example: Example) -> Iterator[list[str]]:
    """The `steerrec` command lines of a block as arguments; its other lines are dealt with here."""
    for line in example.parsed.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True) or [""]
        if program == "torchrun" and "steerrec.cli" in arguments:
            program, arguments = "steerrec", arguments[arguments.index("steerrec.cli") + 1 :]
        if program == "steerrec":
            yield arguments
        elif program == "make":
            makefile = (Path(__file__).parent / "Makefile").read_text(encoding="utf-8")
            for target in (argument for argument in arguments if "=" not in argument):
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), (
                    f"the Makefile has no target {target}"
                )
        elif program and not line.startswith(_LET_BE):
            raise AssertionError(f"not a command that can be checked: {line}")


def _run_commands(example: Example, exit_code: int) -> str | None:
    from steerrec.errors import SteerrecError

    example.namespace[_PRINTED] = ""
    for arguments in _commands(example):
        output, error = _steerrec(arguments)
        example.namespace[_PRINTED] += output
        if exit_code != (0 if error is None else 1):
            return f"steerrec {shlex.join(arguments)}: {error or 'no error'}\n{output}"
        if error is not None and not isinstance(error, SteerrecError):
            return f"steerrec {shlex.join(arguments)}: {error!r}\n{output}"
    return None


def _steerrec(arguments: list[str]) -> tuple[str, BaseException | None]:
    """What a command prints, and the exception that it ends with."""
    from typer.testing import CliRunner

    from steerrec.cli.app import app

    result = CliRunner().invoke(app, arguments)
    if result.exception is None:
        return result.output, None
    return f"{result.output}steerrec: error: {result.exception}\n", result.exception


def _parse_commands(example: Example) -> None:
    from typer.main import get_command

    from steerrec.cli.app import app

    group = get_command(app)
    root = group.make_context("steerrec", [], resilient_parsing=True)
    for arguments in _commands(example):
        name, command, rest = group.resolve_command(root, arguments)
        assert command is not None, f"steerrec has no command {name}"
        command.make_context(name, list(rest))


def _compare_output(example: Example) -> str | None:
    printed = example.namespace.get(_PRINTED)
    if printed is None:
        return "a text block shows what the block before it prints; there is none"
    rest = _numberless(printed)
    for part in re.split(r"^[ \t]*…[ \t]*$", example.parsed, flags=re.MULTILINE):
        words = _numberless(part)
        if words in ("", "0"):  # rows of numbers only: nothing that could be compared
            continue
        _, found, rest = rest.partition(words)
        if not found:
            return f"this is not printed:\n{part}\nbut this is:\n{printed}"
    return None


def _numberless(text: str) -> str:
    """The words of a text, with rules left out and any numbers in a row as one 0."""
    text = re.sub(r"[-+]?\d[\d,.]*%?", "0", re.sub(r"─+", " ", text))
    return re.sub(r"0(?:,? 0)+", "0", " ".join(text.split()))


@pytest.fixture(scope="session")
def docs_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo as `steerrec demo` makes it, only smaller."""
    folder = tmp_path_factory.mktemp("docs") / "demo"
    size = ["--users", "200", "--items", "100", "--latents", "128"]
    output, error = _steerrec(["demo", "-o", str(folder), *size])
    assert error is None, output
    return folder


@pytest.fixture(scope="module")
def docs_folder(docs_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of one document; modules that it writes can be imported."""
    folder = tmp_path_factory.mktemp("document")
    shutil.copytree(docs_demo, folder / "demo")
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, _loopback_hub() as hub:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_TOKEN", hub.add_user("acme", "hf_documentation"))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        yield folder
    for name in set(sys.modules) - known:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _loopback_hub() -> Any:
    """The server of tests/hub, which is no part of any package."""
    folder = Path(__file__).parent / "tests" / "hub"
    spec = importlib.util.spec_from_file_location("loopback", folder / "__init__.py")
    assert spec is not None
    sys.modules["loopback"] = importlib.util.module_from_spec(spec)
    return importlib.import_module("loopback.server").LoopbackHub()


pytest_collect_file = Sybil(
    parsers=[parse_blocks, parse_links],
    patterns=["README.md", "docs/*.md"],
    exclude="*/README.md",  # an artifact's card, say
    fixtures=["docs_folder"],
).pytest()
