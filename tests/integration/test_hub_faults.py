"""A Hub that dies, breaks off, is busy, stalls, or sends other bytes: what was there stays."""

import pytest
import torch

from steerrec.adapters.sasrec import load
from steerrec.artifacts import load_artifact
from steerrec.errors import HubError
from steerrec.hub import push
from steerrec.loading import load_recommender

from ..hub.folders import scores, write_artifact, write_model

# every request of a push with a tag and of a first pull
OF_A_PUSH = [
    "GET /api/models/acme/x$",
    "POST /api/repos/create",
    "POST /api/validate-yaml",
    r"GET /api/models/acme/x/revision/main",
    r"GET /api/models/acme/x/tree/",
    r"GET /api/models/acme/x/refs",
    r"POST /api/models/acme/x/preupload/main",
    r"POST /acme/x\.git/info/lfs/objects/batch",
    r"PUT /storage/",
    r"POST /acme/x\.git/info/lfs/verify",
    r"POST /api/models/acme/x/commit/main",
    r"POST /api/models/acme/x/tag/",
]
OF_A_PULL = [
    r"GET /api/models/acme/x/revision/",
    r"GET /api/models/acme/x/tree/",
    r"HEAD /acme/x/resolve/.*safetensors",
    r"HEAD /acme/x/resolve/.*json",
    r"GET /api/resolve-cache/models/acme/x/.*steerrec\.json",
    r"GET /storage/",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("folders")


@pytest.fixture(scope="module")
def rec(folder):
    return load(write_model(folder / "model"))


@pytest.fixture(scope="module")
def old(folder, rec):
    return write_artifact(folder / "old", rec, seed=0)


@pytest.fixture(scope="module")
def new(folder, rec):
    return write_artifact(folder / "new", rec, seed=1)


def vectors():
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


def steered(artifact):
    return artifact.transform("popsteer")(vectors())


def attempt(call, *arguments, **options):
    """What comes back, or None and one line of complaint."""
    try:
        return call(*arguments, **options), ""
    except HubError as error:
        return None, str(error)


def same(one, other):
    return torch.equal(steered(load_artifact(one)), steered(other))


@pytest.fixture
def pushed(hub, old):
    """The old artifact is on the Hub and in the cache."""
    push(old, "acme/x", tag="v1")
    assert same(old, load_artifact("acme/x"))
    hub.seen.clear()


# --- pushing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", OF_A_PUSH)
def test_three_times_503_does_not_stop_a_push(hub, new, request_):
    fault = hub.fail(request_, "status", times=3, value=503)
    push(new, "acme/x", tag="v1")
    assert fault.times == 0
    assert same(new, load_artifact("acme/x", revision="v1"))
    assert len(hub.repository("acme/x").commits) == 2


@pytest.mark.usefixtures("pushed")
@pytest.mark.parametrize("request_", OF_A_PUSH[6:11])
@pytest.mark.parametrize("kind", ["hang up", "die", "truncate"])
def test_a_push_that_breaks_off_leaves_the_old_and_can_be_repeated(hub, old, new, request_, kind):
    fault = hub.fail(request_, kind, times=100 if kind == "hang up" else 1)
    _, complaint = attempt(push, new, "acme/x", tag="v2")
    assert "\n" not in complaint
    assert complaint or kind == "truncate"  # some requests are repeated whose answer broke off
    hub.faults.clear()
    hub.running or hub.start()
    lost = request_.endswith("commit/main") and kind == "truncate"  # made, but not heard of
    if complaint and not lost:
        assert same(old, load_artifact("acme/x"))
        assert "v2" not in hub.repository("acme/x").tags
    push(new, "acme/x", tag="v2")
    assert fault.times < 100
    assert same(new, load_artifact("acme/x", revision="v2"))
    assert same(old, load_artifact("acme/x", revision="v1"))
    assert len(hub.repository("acme/x").commits) == 3  # the first, the old, the new


@pytest.mark.usefixtures("pushed")
def test_a_hub_that_stays_busy_is_told_of_in_one_line(hub, old, new):
    hub.fail("POST /api/models/acme/x/commit", "status", times=100, value=503)
    with pytest.raises(HubError, match=f"{hub.url} answers 503, several tries in a row") as error:
        push(new, "acme/x")
    assert "\n" not in str(error.value)
    assert len(hub.asked("POST /api/models/acme/x/commit")) == 4
    assert same(old, load_artifact("acme/x"))


def test_a_model_that_was_not_pushed_does_not_remember_it(hub, tmp_path):
    folder = write_model(tmp_path / "m")
    before = (folder / "steerrec.json").read_bytes()
    hub.fail("POST /api/models/acme/x/commit", "die")
    with pytest.raises(HubError):
        push(folder, "acme/x")
    assert (folder / "steerrec.json").read_bytes() == before
    assert load(folder).repo_id is None


# --- pulling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", OF_A_PULL)
def test_three_times_503_does_not_stop_a_pull(hub, new, request_):
    push(new, "acme/x", tag="v1")
    fault = hub.fail(request_, "status", times=3, value=503)
    assert same(new, load_artifact("acme/x", revision="v1"))
    assert fault.times == 0


BREAKS = [
    *((request, kind) for request in OF_A_PULL[1:] for kind in ("hang up", "die")),
    *((request, kind) for request in OF_A_PULL[4:] for kind in ("truncate", "flip", "stall")),
]


@pytest.mark.usefixtures("pushed")
@pytest.mark.parametrize(("request_", "kind"), BREAKS)
def test_a_pull_that_breaks_off_leaves_the_old_and_can_be_repeated(
    hub, old, new, request_, kind, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    pushed = push(new, "acme/x", tag="v2")
    always = kind in ("hang up", "flip")
    fault = hub.fail(request_, kind, times=100 if always else 1, value=0.6)
    found, complaint = attempt(load_artifact, "acme/x", revision="v2")
    assert fault.times < 100
    assert "\n" not in complaint
    if found is not None:  # once broken off, and gone on by the client
        assert not always
        assert same(new, found)
    else:
        for revision in ("v2", pushed.revision):  # nothing half is taken for whole
            with pytest.raises(HubError, match="not in the cache, or not all of it"):
                load_artifact("acme/x", revision=revision, local_files_only=True)
    hub.faults.clear()
    hub.running or hub.start()
    assert same(old, load_artifact("acme/x", revision="v1"))
    assert same(new, load_artifact("acme/x", revision="v2"))


def test_a_first_pull_that_dies_leaves_nothing_that_loads(hub, rec, tmp_path):
    push(write_model(tmp_path / "m"), "acme/x")
    hub.fail("GET /storage", "die")
    with pytest.raises(HubError, match="cannot be reached"):
        load_recommender("acme/x")
    with pytest.raises(HubError, match="not in the cache, or not all of it"):
        load_recommender("acme/x", local_files_only=True)
    hub.start()
    assert torch.equal(scores(load_recommender("acme/x")), scores(rec))


def test_a_large_file_goes_on_where_it_broke_off(hub, rec, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)
    wide = write_artifact(tmp_path / "wide", rec, latents=2000)
    push(wide, "acme/x")
    fault = hub.fail("GET /storage", "truncate", times=2)
    assert same(wide, load_artifact("acme/x"))
    assert fault.times == 0
    assert {seen.status for seen in hub.asked("GET /storage")} == {200, 206}
