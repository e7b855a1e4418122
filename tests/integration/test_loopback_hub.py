"""The loopback Hub itself, by the plain client: what the tests of pushing and pulling rest on."""

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from .conftest import OTHER, TOKEN


@pytest.fixture
def api(hub):
    return HfApi(hub.url)


@pytest.fixture
def commit(api):
    def commit(files=None, *, gone=(), message="files", **options):
        added = [CommitOperationAdd(path, content) for path, content in (files or {}).items()]
        deleted = [CommitOperationDelete(path) for path in gone]
        return api.create_commit("acme/x", added + deleted, commit_message=message, **options)

    return commit


@pytest.fixture
def repo(api):
    api.create_repo("acme/x")
    return "acme/x"


@pytest.fixture
def fetch(hub):
    def fetch(path, **options):
        options = {"endpoint": hub.url} | options
        return Path(hf_hub_download("acme/x", path, **options)).read_bytes()

    return fetch


def listed(api, **options):
    return {f.path: f for f in api.list_repo_tree("acme/x", recursive=True, **options)}


# --- commits ------------------------------------------------------------------------------------


def test_who_am_i(hub, api):
    assert api.whoami()["name"] == "acme"
    with pytest.raises(HfHubHTTPError):
        HfApi(hub.url, token="hf_nonsense").whoami()


def test_a_new_repository_has_one_commit(api, repo):
    assert list(listed(api)) == [".gitattributes"]
    assert [c.title for c in api.list_repo_commits(repo)] == ["initial commit"]
    api.create_repo(repo, exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(repo)


def test_small_files_travel_in_the_commit_and_large_ones_by_lfs(hub, api, repo, commit, fetch):
    large = b"0123456789abcdef" * (11_000_000 // 16)
    files = {"a.json": b"{}", "d/e/w.safetensors": b"weights", "large.dat": large, "empty": b""}
    made = commit(files)
    tree = listed(api)
    assert [path for path, f in tree.items() if getattr(f, "lfs", None)] == [
        "d/e/w.safetensors",  # by .gitattributes
        "large.dat",  # by its size
    ]
    assert tree["large.dat"].lfs.sha256 == hashlib.sha256(large).hexdigest()
    assert tree["a.json"].blob_id == hashlib.sha1(b"blob 2\0{}").hexdigest()
    assert {"d", "d/e"} <= set(tree)  # folders
    for path, content in files.items():
        assert fetch(path) == content
    assert api.model_info(repo).sha == made.oid == hub.repository(repo).branches["main"]
    asked = [seen.method for seen in hub.asked("storage")]
    assert asked == ["PUT", "PUT", "GET", "GET"]


def test_the_storage_is_another_host_and_gets_no_token(hub, repo, commit, fetch):
    commit({"w.safetensors": b"weights"})
    fetch("w.safetensors")
    at_storage = hub.asked("storage")
    assert {seen.host.partition(":")[0] for seen in at_storage} == {"localhost"}
    assert {seen.token for seen in at_storage} == {None}
    assert {seen.token for seen in hub.asked("(resolve|preupload|batch|verify|commit)")} == {TOKEN}


def test_a_commit_replaces_and_deletes(api, repo, commit, fetch):
    first = commit({"a": b"1", "b": b"2", "d/c": b"3", "d/e": b"4"})
    commit({"a": b"new"}, gone=["b", "d/"])
    assert list(listed(api)) == [".gitattributes", "a"]
    assert fetch("a") == b"new"
    assert fetch("a", revision=first.oid) == b"1"
    assert [c.title for c in api.list_repo_commits(repo)] == ["files", "files", "initial commit"]


def test_a_commit_onto_what_is_no_longer_the_latest_is_refused(api, repo, commit):
    first = commit({"a": b"1"})
    commit({"a": b"2"})
    with pytest.raises(HfHubHTTPError, match="412"):
        commit({"a": b"3"}, parent_commit=first.oid)


def test_what_is_stored_already_is_not_sent_again(hub, api, repo, commit):
    commit({"w.safetensors": b"weights", "a": b"1"})
    before = len(hub.asked("^PUT"))
    head = api.model_info(repo).sha
    commit({"copy.safetensors": b"weights"})
    assert len(hub.asked("^PUT")) == before == 1
    again = commit({"w.safetensors": b"weights", "a": b"1"})  # nothing to commit
    assert api.model_info(repo).sha == again.oid != head


# --- revisions ----------------------------------------------------------------------------------


def test_tags_and_branches(api, repo, commit, fetch):
    first = commit({"a": b"1"})
    api.create_tag(repo, tag="v1", revision=first.oid)
    api.create_branch(repo, branch="dev/x", revision="v1")
    commit({"a": b"2"}, revision="dev/x")
    assert (fetch("a"), fetch("a", revision="v1"), fetch("a", revision="dev/x")) == (
        b"1",
        b"1",
        b"2",
    )
    refs = api.list_repo_refs(repo)
    assert {b.name for b in refs.branches} == {"main", "dev/x"}
    assert [(t.name, t.target_commit) for t in refs.tags] == [("v1", first.oid)]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(repo, tag="v1")
    api.delete_tag(repo, tag="v1")
    api.delete_branch(repo, branch="dev/x")
    with pytest.raises(RevisionNotFoundError):
        fetch("a", revision="v1")


def test_anybody_may_propose(hub, api, repo, commit, fetch):
    commit({"a": b"1"})
    proposed = HfApi(hub.url, token=OTHER).create_commit(
        repo, [CommitOperationAdd("a", b"2")], commit_message="better", create_pr=True
    )
    assert proposed.pr_revision == "refs/pr/1"
    assert fetch("a") == b"1"
    assert fetch("a", revision="refs/pr/1") == b"2"


def test_a_listing_comes_in_pages(hub, api, repo, commit):
    commit({f"d/{number}": b"x" for number in range(7)})
    hub.page = 3
    assert len(listed(api)) == 9
    assert len(hub.asked("GET /api/models/acme/x/tree")) == 3


# --- who may do what ----------------------------------------------------------------------------


def test_a_private_repository_does_not_exist_for_others(hub, api, repo, commit, fetch):
    commit({"a": b"1"})
    hub.repository(repo).private = True
    assert fetch("a") == b"1"
    for token in (OTHER, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(hub.url, token=token).model_info(repo)
    hub.repository(repo).readers.add("other")
    assert HfApi(hub.url, token=OTHER).model_info(repo).private


@pytest.mark.parametrize(("token", "status"), [(OTHER, 403), (False, 401)])
def test_a_gated_repository_shows_its_names_and_not_its_files(
    hub, api, repo, commit, fetch, token, status
):
    commit({"a": b"1"})
    hub.repository(repo).gated = True
    assert "a" in {f.path for f in HfApi(hub.url, token=token).list_repo_tree(repo)}
    with pytest.raises(GatedRepoError) as error:
        fetch("a", token=token)
    assert error.value.response.status_code == status
    assert fetch("a") == b"1"


def test_others_may_not_write(hub, api, repo):
    for token, status in ((OTHER, "403"), (False, "401")):
        stranger = HfApi(hub.url, token=token)
        with pytest.raises(HfHubHTTPError, match=status):
            stranger.create_commit(repo, [CommitOperationAdd("a", b"1")], commit_message="mine")
        with pytest.raises(HfHubHTTPError, match=status):
            stranger.create_repo("acme/y")
    assert list(listed(api)) == [".gitattributes"]


def test_what_is_not_there(api, repo, fetch):
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/nothing")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        fetch("nothing.json")


# --- ranges and faults --------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["a.txt", "w.safetensors"])
def test_a_range(hub, repo, commit, path):
    commit({path: b"0123456789"})
    url = f"{hub.url}/{repo}/resolve/main/{path}"
    for asked, content in (("bytes=2-4", b"234"), ("bytes=7-", b"789"), ("bytes=8-99", b"89")):
        part = get_session().get(url, headers={"Range": asked})
        assert (part.status_code, part.content) == (206, content)
    assert get_session().get(url, headers={"Range": "bytes=10-"}).status_code == 416
    head = get_session().head(url)
    assert (head.headers["content-length"], head.content) == ("10", b"")


@pytest.mark.parametrize("kind", ["truncate", "hang up"])
def test_a_download_that_breaks_off_is_resumed(hub, repo, commit, fetch, monkeypatch, kind):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 64)
    commit({"w.safetensors": bytes(range(200))})
    hub.fail("GET /storage", kind)
    assert fetch("w.safetensors") == bytes(range(200))
    assert [seen.status for seen in hub.asked("GET /storage")] == [200, 206]


def test_one_byte_can_be_changed(hub, repo, commit, fetch):
    commit({"w.safetensors": bytes(100)})
    hub.fail("GET /storage", "flip")
    assert [byte for byte in fetch("w.safetensors") if byte] == [0x10]


def test_a_status_as_often_as_set(hub, api, repo):
    hub.fail("GET /api/models", "status", times=2, value=503)
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="503"):
            api.model_info(repo)
    assert api.model_info(repo).id == repo


@pytest.mark.usefixtures("repo")
def test_an_upload_that_breaks_off_is_sent_again(hub, commit):
    hub.fail("PUT", "hang up")
    commit({"w.safetensors": bytes(range(200)) * 1000})
    assert len(hub.store.objects) == 1


@pytest.mark.usefixtures("repo")
def test_a_stall(hub, commit, fetch, monkeypatch):
    commit({"w.safetensors": bytes(range(200))})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fail("GET /storage", "stall", value=1)
    assert fetch("w.safetensors") == bytes(range(200))
    assert len(hub.asked("GET /storage")) == 2


def test_a_dead_server_can_be_started_again_with_all_it_held(hub, api, repo, commit):
    commit({"a": b"1"})
    url = hub.url
    hub.fail("GET /api/models", "die")
    with pytest.raises(Exception, match=r"peer closed|disconnected"):
        api.model_info(repo)
    with pytest.raises(Exception, match="refused"):
        api.model_info(repo)
    hub.start()
    assert hub.url == url
    assert "a" in listed(api)
