"""What the Hub refuses, and what is refused of it: one clear line each, and nothing left behind."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationDelete, HfApi

from steerrec.adapters.sasrec import load
from steerrec.artifacts import load_artifact
from steerrec.errors import ArtifactError, HubError, ModelError
from steerrec.hub import pull, push
from steerrec.loading import load_recommender
from steerrec.published import without_path

from ..hub.folders import write_artifact, write_model
from .conftest import OTHER

SHA = "0123456789" * 4


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def artifact(tmp_path, model):
    return write_artifact(tmp_path / "artifact", load(model))


@pytest.fixture
def repo(hub, model):
    push(model, "acme/sasrec", tag="v1")
    hub.seen.clear()
    return hub.repository("acme/sasrec")


def refusal(call, *arguments, **options):
    """The one line of complaint."""
    with pytest.raises(HubError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- who may ------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [OTHER, False])
def test_a_private_repository(hub, repo, token):
    repo.private = True
    line = refusal(pull, "acme/sasrec", token=token)
    assert f"{hub.url} has no repository acme/sasrec, or it is private" in line
    assert "`hf auth login`, or set HF_TOKEN" in line


@pytest.mark.parametrize("token", [OTHER, False])
def test_a_gated_repository(hub, repo, token):
    repo.gated = True
    line = refusal(pull, "acme/sasrec", token=token)
    assert f"acme/sasrec is gated: ask for access at {hub.url}/acme/sasrec" in line
    repo.readers.add("other")
    if token:
        assert load_recommender("acme/sasrec", token=token).repo_id == "acme/sasrec"


def test_a_token_that_is_none(hub, model):
    for call in (lambda t: pull("acme/x", token=t), lambda t: push(model, "acme/x", token=t)):
        line = refusal(call, "hf_nonsense")
        assert f"{hub.url} does not accept the token" in line
        assert "hf_nonsense" not in line


def test_pushing_without_a_login(hub, model, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    line = refusal(push, model, "acme/x")
    assert "does not accept the token, or wants one: log in with `hf auth login`" in line


@pytest.mark.usefixtures("repo")
def test_pushing_to_somebody_else(hub, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    for repo_id in ("acme/sasrec", "acme/new"):
        line = refusal(push, other, repo_id, token=OTHER)
        assert f"{hub.url} does not let this login write to {repo_id}" in line


# --- what is not there --------------------------------------------------------------------------


def test_no_such_repository(hub):
    line = refusal(pull, "acme/nothing")
    assert f"{hub.url} has no repository acme/nothing" in line


@pytest.mark.usefixtures("repo")
@pytest.mark.parametrize("revision", ["v9", SHA, "refs/pr/7"])
def test_no_such_revision(revision):
    line = refusal(pull, "acme/sasrec", revision=revision)
    assert f"acme/sasrec has no revision {revision!r}; expected a branch, a tag or a" in line


def test_a_repository_with_something_else(hub):
    HfApi(hub.url).create_repo("acme/empty")
    assert "acme/empty at 'main' holds neither a MODEL nor an ARTIFACT" in refusal(
        pull, "acme/empty"
    )


@pytest.mark.usefixtures("repo")
def test_a_model_that_lacks_a_file(hub):
    gone = [CommitOperationDelete("model.safetensors")]
    HfApi(hub.url).create_commit("acme/sasrec", gone, commit_message="gone")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_recommender("acme/sasrec")


def test_an_artifact_that_lacks_a_file(hub, artifact):
    push(artifact, "acme/popsteer")
    gone = [
        path for path in hub.repository("acme/popsteer").commit_at("main").files if "cfg" in path
    ]
    operations = [CommitOperationDelete(path) for path in gone]
    HfApi(hub.url).create_commit("acme/popsteer", operations, commit_message="gone")
    with pytest.raises(ArtifactError, match=r"cfg\.json does not exist"):
        load_artifact("acme/popsteer")


@pytest.mark.usefixtures("repo")
def test_a_model_is_no_artifact():
    with pytest.raises(ArtifactError, match="is not an artifact"):
        load_artifact("acme/sasrec")


@pytest.mark.parametrize("load", [load_artifact, load_recommender])
def test_neither_a_folder_nor_a_repository(hub, load):
    line = refusal(load, "runs/modle")
    assert "runs/modle is no folder here, and cannot be had from the Hub: " in line
    assert "has no repository runs/modle" in line


def test_no_network(hub, model):
    hub.stop()
    for call in (pull, lambda repo_id: push(model, repo_id)):
        line = refusal(call, "acme/sasrec")
        assert f"{hub.url} cannot be reached (" in line
        assert "HF_HUB_OFFLINE=1" in line


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id", ["sasrec", "a/b/c", "../x", "a/..", "a--b/c", "-a/b", "a/b.", "a/b c", "", "a/", 7]
)
def test_a_repository_of_no_such_name(hub, repo_id):
    assert "expected org/name" in refusal(pull, repo_id)
    assert "expected org/name" in refusal(push, ".", repo_id)
    assert hub.seen == []


@pytest.mark.parametrize(
    "revision",
    [
        "../../x",
        "/etc",
        "a//b",
        "a/../b",
        "a b",
        "a\nb",
        "-v1",
        "a.lock",
        "x" * 201,
        "é",
        "v1/",
        ".x",
    ],
)
def test_a_revision_that_is_no_plain_name_never_reaches_the_client(hub, model, cache, revision):
    assert "is not a revision" in refusal(pull, "acme/sasrec", revision=revision)
    assert "is not a revision" in refusal(push, model, "acme/sasrec", revision=revision)
    assert "is not a revision" in refusal(push, model, "acme/sasrec", tag=revision)
    assert hub.seen == []
    assert not cache.exists()


@pytest.mark.parametrize("subfolder", ["../x", "/x", "a/../../x", "a\\b", "."])
def test_a_subfolder_that_leads_out(hub, subfolder):
    assert "is not a plain subfolder" in refusal(pull, "acme/sasrec", subfolder=subfolder)
    assert hub.seen == []


def test_a_commit_is_no_branch(hub, model):
    assert "expected a branch to push to" in refusal(push, model, "acme/x", revision=SHA)
    assert "a tag has a plain name" in refusal(push, model, "acme/x", tag=SHA)
    assert "a pull request gets none" in refusal(push, model, "acme/x", tag="v1", create_pr=True)
    assert hub.seen == []


@pytest.mark.parametrize(
    "changes",
    [
        {"revision": "main"},
        {"revision": "../../../x"},
        {"revision": None},
        {"revision": 7},
        {"repo_id": "../x"},
        {"repo_id": ["acme", "x"]},
        {"repo_id": "/etc"},
    ],
)
def test_a_base_model_is_taken_from_a_commit_of_a_repository_alone(hub, artifact, changes):
    file = artifact / "steerrec.json"
    record = json.loads(file.read_text())
    record["base_model"] |= {"repo_id": "acme/sasrec", "revision": SHA} | changes
    file.write_text(json.dumps(record))
    with pytest.raises((ArtifactError, HubError), match="expected"):
        load_artifact(artifact).load_base_model()
    assert hub.seen == []


@pytest.mark.usefixtures("repo")
def test_a_base_model_on_the_hub_must_be_the_very_model(hub, artifact, tmp_path):
    later = push(write_model(tmp_path / "later", seed=1), "acme/sasrec")
    file = artifact / "steerrec.json"
    record = json.loads(file.read_text())
    record["base_model"] |= {"repo_id": "acme/sasrec", "revision": later.revision}
    file.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match="other weights"):
        load_artifact(artifact).load_base_model()


def test_a_commit_that_is_none(hub, repo, cache):
    """An endpoint that lies about its commits."""
    head = repo.commits[repo.branches["main"]]
    for oid in ("../../../../x", "main", "0" * 41):
        repo.commits[oid] = SimpleNamespace(oid=oid, files=head.files)
        repo.branches["main"] = oid
        assert "expected 40 hex digits" in refusal(pull, "acme/sasrec")
    assert not list(cache.rglob("x*"))


# --- folders ------------------------------------------------------------------------------------


def test_a_folder_of_no_kind(hub, tmp_path):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "weights.safetensors").touch()
    for folder in ("else", "nowhere"):
        assert "is neither a MODEL nor an ARTIFACT" in refusal(push, tmp_path / folder, "acme/x")
    assert hub.seen == []


def test_a_damaged_folder_is_not_pushed(hub, artifact, model):
    (next(artifact.glob("*/cfg.json"))).write_text("{")
    with pytest.raises(ArtifactError, match=r"cfg\.json cannot be read"):
        push(artifact, "acme/x")
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError):
        push(model, "acme/x")
    assert hub.seen == []


@pytest.mark.parametrize("name", ["README.md", "steerrec.json"])
def test_a_link_out_of_a_folder_is_not_followed_to_the_hub(hub, artifact, tmp_path, name):
    secret = tmp_path / "secret"
    shutil.copy(artifact / name, secret)
    (artifact / name).unlink()
    (artifact / name).symlink_to(secret)
    with pytest.raises((HubError, ArtifactError), match=rf"{name} is a link .*out of"):
        push(artifact, "acme/x")
    assert hub.seen == []


def test_a_linked_site_is_not_left_out_in_silence(hub, artifact, tmp_path):
    site = next(artifact.glob("*/cfg.json")).parent
    shutil.move(site, tmp_path / "site")
    site.symlink_to(tmp_path / "site")
    with pytest.raises((HubError, ArtifactError), match="is a link"):
        push(artifact, "acme/x")
    assert hub.seen == []


@pytest.mark.usefixtures("repo")
@pytest.mark.parametrize("target", ["{secret}", "../../../../secret", "../../refs/v1"])
def test_a_link_out_of_the_cache(cache, target):
    secret = cache.parent / "secret"
    secret.write_text("{}")
    snapshot = pull("acme/sasrec", revision="v1")
    file = snapshot.path / "config.json"
    file.unlink()
    file.symlink_to(target.format(secret=secret))
    assert file.exists()
    assert "expected one into" in refusal(pull, "acme/sasrec", revision=snapshot.revision)


# --- checksums ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("repo")
@pytest.mark.parametrize(
    ("requests", "names"),
    [
        ("GET /storage", ["items.parquet", "model.safetensors"]),  # SHA-256
        ("GET /api/resolve-cache", ["config.json", "steerrec.json"]),  # SHA-1 of a git blob
    ],
)
def test_files_that_were_damaged_on_the_way(hub, cache, requests, names):
    fault = hub.fail(requests, "flip", times=2)
    line = refusal(pull, "acme/sasrec")
    assert fault.times == 0
    assert re.findall(r"(\S+) \(checksum", line) == names
    assert "removed from the cache: run again to fetch it anew" in line
    hub.seen.clear()
    assert load_recommender("acme/sasrec").repo_id == "acme/sasrec"
    assert len(hub.asked(requests)) == 2  # the other files are those of before


@pytest.mark.usefixtures("repo")
def test_a_file_that_was_damaged_in_the_cache(hub, cache):
    snapshot = pull("acme/sasrec")
    blob = (snapshot.path / "model.safetensors").resolve()
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    hub.seen.clear()
    line = refusal(pull, "acme/sasrec", revision=snapshot.revision)
    assert "acme/sasrec arrived damaged: model.safetensors (checksum" in line
    assert hub.seen == []
    assert not blob.exists()
    offline = {"revision": snapshot.revision, "local_files_only": True}
    assert "not in the cache, or not all of it" in refusal(pull, "acme/sasrec", **offline)
    assert load_recommender("acme/sasrec", revision=snapshot.revision)
    assert len(hub.asked("GET /storage")) == 1


@pytest.mark.usefixtures("repo")
def test_a_cache_without_links_is_verified_too(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_SYMLINKS", True)
    hub.fail("GET /storage", "flip", times=2)
    assert "arrived damaged: items.parquet (" in refusal(pull, "acme/sasrec")
    hub.faults.clear()
    snapshot = pull("acme/sasrec")
    assert not any(path.is_symlink() for path in snapshot.path.iterdir())
    assert load_recommender(snapshot)


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/ann/model", "model"),
        ("/home/ann/model/", "model"),
        ("~/model", "model"),
        ("C:\\Users\\ann\\model", "model"),
        ("\\\\server\\share\\model", "model"),
        ("recbole:/home/ann/x.pth", "recbole:x.pth"),
        ("recbole:C:\\ann\\x.pth", "recbole:x.pth"),
        ("runs/model", "runs/model"),
        ("pkg.module:function", "pkg.module:function"),
        ("https://huggingface.co/acme/x", "https://huggingface.co/acme/x"),
        ("a / b", "a / b"),
        ("", ""),
    ],
)
def test_what_is_left_of_a_path(text, left):
    assert without_path(text) == left
