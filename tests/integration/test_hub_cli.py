"""`steerrec push` and `pull`, and the other commands on what is on the Hub."""

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from safetensors.torch import load_file

from .conftest import OTHER, SMALL_SAE, TOKEN


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(world):
    return Path(shutil.copytree(world.model, "model"))


@pytest.fixture
def artifact(world):
    return Path(shutil.copytree(world.artifact, "artifact"))


@pytest.fixture
def shared(hub, cli, model, artifact):
    """Both are on the Hub, and no longer here."""
    for command in (
        ("push", model, "acme/sasrec", "--tag", "v1"),
        ("push", artifact, "acme/popsteer", "--tag", "v1", "--model", model),
    ):
        found = cli(*command)
        assert found.code == 0, found.err
    shutil.rmtree(model)
    shutil.rmtree(artifact)
    return hub


def recommended(path):
    return pl.read_parquet(path).select("user_id", "rank", "item_id", "score")


# --- push ---------------------------------------------------------------------------------------


def test_a_dry_run_lists_files_and_sizes(hub, cli, artifact):
    found = cli("push", artifact, "acme/popsteer", "--dry-run")
    assert found.code == 0
    sizes = {
        path.relative_to(artifact).as_posix(): path.stat().st_size
        for path in artifact.rglob("*.*")
        if path.is_file()
    }
    for name, size in sizes.items():
        if name.endswith(".safetensors"):  # text files lose the paths of this machine
            assert f"{name} {size:,}" in " ".join(found.out.split())
        assert name in found.out
    assert "nothing was sent" in found.err
    assert "others have to give --model" in found.err
    assert hub.seen == []
    document = cli("push", artifact, "acme/popsteer", "--dry-run", "--json").json
    assert (document["kind"], document["revision"], document["dry_run"]) == ("ARTIFACT", None, True)
    assert set(document["files"]) == set(sizes)


def test_push_says_what_and_where(hub, cli, model, artifact):
    found = cli("push", model, "acme/sasrec", "--tag", "v1", "--message", "first", "--json").json
    repo = hub.repository("acme/sasrec")
    assert found["revision"] == repo.tags["v1"] == repo.branches["main"]
    assert found["url"] == f"{hub.url}/acme/sasrec"
    assert repo.commit_at("v1").message == "first"
    base = {"repo_id": "acme/sasrec", "revision": found["revision"]}
    for where in (model, "acme/sasrec"):
        pushed = cli("push", artifact, "acme/popsteer", "--model", where, "--json")
        assert pushed.json["base_model"] == base
        assert "give --model" not in pushed.err
    cli("push", artifact, "acme/secret", "--private")
    assert hub.repository("acme/secret").private
    assert cli("push", model, "acme/sasrec", "--revision", "dev").code == 0
    assert "dev" in repo.branches


def test_a_pull_request(hub, cli, shared, monkeypatch):
    assert cli("pull", "acme/popsteer", "-o", "mine").code == 0
    card = Path("mine/README.md")
    card.write_text(card.read_text() + "\nBetter.\n")
    monkeypatch.setenv("HF_TOKEN", OTHER)
    refused = cli("push", "mine", "acme/popsteer")
    assert (refused.code, refused.out) == (1, "")
    assert "does not let this login write to acme/popsteer" in refused.err
    found = cli("push", "mine", "acme/popsteer", "--create-pr", "--json").json
    assert found["url"] == f"{hub.url}/acme/popsteer/discussions/1"


def test_a_model_that_is_another_is_not_recorded(hub, cli, artifact, model):
    assert cli("push", model, "acme/sasrec").code == 0
    file = artifact / "steerrec.json"
    record = json.loads(file.read_text())
    for entry in record["base_model"]["fingerprint"].values():
        entry["model_sha256"] = "0" * 64
    file.write_text(json.dumps(record))
    found = cli("push", artifact, "acme/popsteer", "--model", "acme/sasrec")
    assert found.code == 1
    assert "other weights" in found.err
    assert list(hub.store.repositories) == ["acme/sasrec"]


# --- what is on the Hub as ARTIFACT and MODEL ---------------------------------------------------


@pytest.mark.usefixtures("shared")
def test_steering_needs_no_model(cli, world):
    found = cli(
        "steer", "acme/popsteer", "--revision", "v1", "--data", world.data, "-o", "a.parquet"
    )
    assert found.code == 0, found.err
    assert cli(*world.steer, "-o", "b.parquet").code == 0
    assert recommended("a.parquet").equals(recommended("b.parquet"))


@pytest.mark.usefixtures("shared")
def test_models_on_the_hub(cli, world):
    """With the data read as the model recorded."""
    hub, local = (
        cli("evaluate", model, "--data", world.data, "--json").json
        for model in ("acme/sasrec", world.model)
    )
    assert hub["metrics"] == local["metrics"]
    assert cli("layers", "acme/sasrec", "--revision", "v1", "--json").json["layers"]
    attach = ("attach", "acme/sasrec", "--data", world.data, *SMALL_SAE)
    found = cli(*attach, "--revision", "v1", "--epochs", "1", "-o", "new", "--json")
    assert found.code == 0, found.err
    base = json.loads(Path("new/steerrec.json").read_text())["base_model"]
    assert (base["repo_id"], len(base["revision"])) == ("acme/sasrec", 40)
    pushed = cli("push", "new", "acme/new", "--json").json
    assert pushed["base_model"]["revision"] == base["revision"]


@pytest.mark.usefixtures("shared")
def test_an_imported_sae_and_a_comparison_for_a_model_on_the_hub(cli, world):
    sae = next(world.artifact.glob("*/cfg.json")).parent
    command = ("import-sae", sae, "acme/sasrec", "--revision", "v1", "--data", world.data)
    found = cli(*command, "-o", "new")
    assert found.code == 0, found.err
    base = json.loads(Path("new/steerrec.json").read_text())["base_model"]
    assert (base["repo_id"], len(base["revision"])) == ("acme/sasrec", 40)
    compare = ("compare", "acme/popsteer", "--revision", "v1", "--data", world.data)
    found = cli(*compare, "--methods", "popsteer", "--bootstrap", "5", "-o", "results", "--json")
    assert found.code == 0, found.err
    assert [method["name"] for method in found.json["methods"]] == ["popsteer"]


@pytest.mark.usefixtures("shared")
def test_scoring_goes_into_a_folder_here(cli, world):
    score = ("score", "acme/popsteer", "--data", world.data, "--users", "512")
    refused = cli(*score)
    assert refused.code == 1
    assert "`steerrec pull acme/popsteer -o DIR`" in refused.err
    assert "--output" in refused.err
    assert cli(*score, "-o", "scored", "--json").json["table"] == "scored"
    one, other = (next(Path(p).rglob("popularity.*")) for p in ("scored", world.artifact))
    assert one.read_bytes() == other.read_bytes()
    assert "scored exists" in cli(*score, "-o", "scored").err
    assert cli(*score, "-o", "scored", "--force").code == 0


@pytest.mark.usefixtures("shared")
def test_recipes_are_saved_here(cli, world):
    steer = ("steer", "acme/popsteer", "--data", world.data, "--save", "mine")
    refused = cli(*steer)
    assert refused.code == 1
    assert "--save and --learn write a recipe into it: get it with `steerrec pull" in refused.err


def test_offline(cli, shared, world, monkeypatch):
    steer = ("steer", "acme/popsteer", "--data", world.data, "--json")
    online = cli(*steer).json
    shared.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli(*steer).json == online


@pytest.mark.parametrize(
    "command",
    [
        "evaluate model",
        "attach model -o new",
        "layers model",
        "score artifact",
        "compare artifact -o results",
    ],
)
def test_what_is_here_has_no_revision(cli, model, artifact, world, command):
    name, folder, *options = command.split()
    if name != "layers":
        options += ["--data", str(world.data)]
    found = cli(name, folder, *options, "--revision", "v1")
    assert found.code == 1
    assert f"{folder} is" in found.err
    assert "it has no revision 'v1'" in found.err


# --- pull ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shared")
def test_pull_writes_a_folder(cli, world):
    found = cli("pull", "acme/popsteer", "--revision", "v1", "-o", "mine", "--json").json
    assert (found["kind"], found["output"], len(found["revision"])) == ("ARTIFACT", "mine", 40)
    assert not any(path.is_symlink() for path in Path("mine").rglob("*"))
    for name, size in found["files"].items():
        assert (Path("mine") / name).stat().st_size == size
        if name.endswith(".safetensors"):
            one, other = load_file(Path("mine") / name), load_file(world.artifact / name)
            assert all((one[key] == other[key]).all() for key in other)
    steer = ("steer", "mine", "--data", world.data, "--save", "own", "--json")
    assert cli(*steer).code == 0


@pytest.mark.usefixtures("shared")
def test_a_pulled_model_remembers_where_it_is_from(cli, world):
    revision = cli("pull", "acme/sasrec", "-o", "model", "--json").json["revision"]
    attach = ("attach", "model", "--data", world.data, *SMALL_SAE, "--epochs", "1", "-o", "new")
    assert cli(*attach).code == 0
    base = json.loads(Path("new/steerrec.json").read_text())["base_model"]
    assert (base["source"], base["repo_id"], base["revision"]) == ("model", "acme/sasrec", revision)


@pytest.mark.usefixtures("shared")
def test_pull_replaces_its_own_kind_alone(cli):
    pull = ("pull", "acme/popsteer", "-o")
    assert cli(*pull, "mine").code == 0
    before = {path: path.read_bytes() for path in Path("mine").rglob("*.*") if path.is_file()}
    assert "mine exists; choose another name, or replace it" in cli(*pull, "mine").err
    assert cli(*pull, "mine", "--force").code == 0
    assert {p: p.read_bytes() for p in Path("mine").rglob("*.*") if p.is_file()} == before
    assert cli("pull", "acme/sasrec", "-o", "model").code == 0
    found = cli(*pull, "model", "--force")
    assert found.code == 1
    assert "model is not a ARTIFACT folder: --force does not replace it" in found.err


def test_a_pull_that_is_damaged_leaves_what_is_here(cli, shared):
    pull = ("pull", "acme/popsteer", "-o", "mine", "--force")
    assert cli(*pull).code == 0
    before = {path: path.read_bytes() for path in Path("mine").rglob("*.*") if path.is_file()}
    shutil.rmtree("../cache")
    shared.fail("GET /storage", "flip")
    found = cli(*pull)
    assert (found.code, found.out) == (1, "")
    assert found.err.count("\n") == 1
    assert "arrived damaged" in found.err
    assert {p: p.read_bytes() for p in Path("mine").rglob("*.*") if p.is_file()} == before
    assert cli(*pull).code == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("pull", "acme/nothing", "-o", "x"), "has no repository acme/nothing"),
        (("pull", "acme/popsteer", "--revision", "v9", "-o", "x"), "has no revision 'v9'"),
        (("pull", "acme/popsteer", "--revision", "../x", "-o", "x"), "is not a revision"),
        (("pull", "popsteer", "-o", "x"), "expected org/name"),
        (("push", "nowhere", "acme/x"), "nowhere is neither a MODEL nor an ARTIFACT"),
        (("steer", "acme/nothing", "--data", "d"), "acme/nothing is no folder here, and cannot be"),
    ],
)
def test_refusals_in_one_line(cli, shared, here, arguments, complaint):
    found = cli(*arguments)
    assert (found.code, found.out) == (1, "")
    assert complaint in found.err
    assert found.err.startswith("steerrec: error: ")
    assert found.err.count("\n") == 1
    assert TOKEN not in found.err
    assert list(here.iterdir()) == []


def test_no_bars_where_stderr_is_no_terminal(cli, shared):
    there = shared.repository("acme/popsteer").commit_at("main").files
    files = [name for name in there if not name.startswith(".")]
    found = cli("pull", "acme/popsteer", "-o", "mine")
    told = f"mine: ARTIFACT acme/popsteer at {sha(shared)}, {len(files)} files\n"
    assert found.err == told


def sha(hub):
    return hub.repository("acme/popsteer").branches["main"]
