"""The package as a whole: what it exports, and what importing it costs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import steerrec

HEAVY = ("torch", "transformers", "polars", "numpy", "matplotlib", "safetensors", "huggingface_hub")


def loaded_by(code, packages=HEAVY):
    """Which of these packages are loaded after `code` has run in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('loaded:', *(p for p in {packages!r} if p in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1].split()[1:]


def typed_names():
    """Name and module of each import that type checkers see."""
    tree = ast.parse(Path(steerrec.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    names = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # re-exported
            names[alias.name] = node.module
    return names


def test_the_exports_are_those_that_type_checkers_see():
    assert sorted(steerrec.__all__) == sorted(["__version__", *typed_names()])
    assert dir(steerrec) == sorted(steerrec.__all__)


@pytest.mark.parametrize("name", sorted(typed_names()))
def test_every_export_is_the_thing_itself(name):
    module = typed_names()[name]
    assert getattr(steerrec, name) is getattr(sys.modules[module], name)


def test_what_is_not_exported_is_missing():
    with pytest.raises(AttributeError, match="module 'steerrec' has no attribute 'nothing'"):
        steerrec.nothing  # noqa: B018


def test_a_version():
    assert steerrec.__version__[0].isdigit()


def test_import_steerrec_imports_nothing_heavy():
    assert loaded_by("import steerrec; dir(steerrec); steerrec.__version__") == []


def test_errors_import_nothing_heavy():
    assert loaded_by("from steerrec import SteerrecError") == []


def test_data_needs_no_torch():
    loaded = loaded_by("import steerrec; steerrec.read_interactions, steerrec.Catalogue")
    assert "polars" in loaded
    assert "torch" not in loaded


def test_a_folder_is_loaded_without_the_client_of_the_hub():
    code = "import steerrec; steerrec.load_artifact, steerrec.load_recommender, steerrec.attach"
    assert loaded_by(code, ("torch", "huggingface_hub")) == ["torch"]


def test_help_imports_nothing_heavy():
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        code = f"""
sys.argv = ["steerrec", *{arguments!r}]
from steerrec.cli import main
try:
    main()
except SystemExit as exit:
    assert exit.code == 0
"""
        assert loaded_by(code) == []


def test_only_adapters_know_transformers():
    """All of the SDK in one interpreter."""
    names = sorted(path.stem for path in Path(steerrec.__file__).parent.glob("*.py"))
    modules = [f"steerrec.{name}" for name in names if name != "__init__"]
    assert "steerrec.training" in modules
    code = f"import steerrec.data, steerrec.rerank, {', '.join(modules)}"
    assert loaded_by(code, ("torch", "transformers")) == ["torch"]
