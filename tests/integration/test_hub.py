"""Pushing and pulling with the real client: what arrives, what stays, what is asked of the Hub."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi

from steerrec.adapters.sasrec import SASRecRecommender, load
from steerrec.artifacts import Artifact, load_artifact, save_card
from steerrec.errors import ArtifactError, HubError
from steerrec.hub import pull, push
from steerrec.layers import site_at
from steerrec.loading import load_recommender

from ..hub.folders import DATA, make_artifact, scores, write_artifact, write_model
from ..unit.small_models import random_sae
from .conftest import OTHER, TOKEN


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "here" / "model")


@pytest.fixture
def artifact(tmp_path, model):
    return write_artifact(tmp_path / "here" / "artifact", load(model))


def contents(folder):
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def published(hub, repo_id, revision="main"):
    """Contents of the files of a repository, without the one that every new repository has."""
    commit = hub.repository(repo_id).commit_at(revision)
    files = {path: hub.store.content(file) for path, file in commit.files.items()}
    del files[".gitattributes"]
    return files


def commits(hub, repo_id):
    return len(hub.repository(repo_id).commits) - 1  # the first one made the repository


# --- models -------------------------------------------------------------------------------------


def test_a_model_comes_back(hub, model):
    pushed = push(model, "acme/sasrec", tag="v1")
    assert pushed.kind == "MODEL"
    assert pushed.url == f"{hub.url}/acme/sasrec"
    assert set(pushed.files) == {
        "config.json",
        "items.parquet",
        "model.safetensors",
        "steerrec.json",
    }
    rec = load_recommender("acme/sasrec", revision="v1")
    assert torch.equal(scores(rec), scores(load(model)))
    assert rec.catalogue.frame.equals(load(model).catalogue.frame)
    assert (rec.source, rec.repo_id, rec.revision) == (
        "acme/sasrec",
        "acme/sasrec",
        pushed.revision,
    )
    assert rec.record["data"] == DATA


def test_weights_travel_by_lfs_and_text_in_the_commit(hub, model):
    push(model, "acme/sasrec")
    files = hub.repository("acme/sasrec").commit_at("main").files
    assert {path for path, file in files.items() if file.sha256} == {
        "model.safetensors",
        "items.parquet",
    }


def test_a_pushed_model_remembers_where_it_is(hub, model, tmp_path):
    pushed = push(model, "acme/sasrec")
    record = json.loads((model / "steerrec.json").read_text())
    assert record["hub"] == {"repo_id": "acme/sasrec", "revision": pushed.revision}
    made = make_artifact(load_recommender(model))
    assert made.base_model["repo_id"] == "acme/sasrec"
    assert made.base_model["revision"] == pushed.revision
    # which is not part of what is pushed: the same files are no new commit
    assert push(model, "acme/sasrec").revision == pushed.revision
    assert b"revision" not in published(hub, "acme/sasrec")["steerrec.json"]


def test_a_live_model_pushes_itself(hub, model):
    rec = SASRecRecommender.from_pretrained(model)
    pushed = rec.push_to_hub("acme/sasrec")
    assert (rec.repo_id, rec.revision) == ("acme/sasrec", pushed.revision)
    again = SASRecRecommender.from_pretrained("acme/sasrec")
    assert torch.equal(scores(again), scores(rec))
    assert again.record == rec.record


def test_a_folder_goes_before_a_repository_of_the_same_name(hub, model, tmp_path, monkeypatch):
    push(write_model(tmp_path / "other", seed=1), "here/model", token=hub.add_user("here", OTHER))
    monkeypatch.chdir(tmp_path)
    rec = load_recommender("here/model")
    assert torch.equal(scores(rec), scores(load(model)))


# --- artifacts ----------------------------------------------------------------------------------


def test_an_artifact_comes_back_with_its_base_model(hub, model, tmp_path):
    base = push(model, "acme/sasrec", tag="v1")
    push(write_model(tmp_path / "later", seed=1), "acme/sasrec")  # main moves on
    rec = load_recommender("acme/sasrec", revision="v1")
    made = make_artifact(rec)
    pushed = made.push_to_hub("acme/popsteer", tag="v1")
    assert pushed.kind == "ARTIFACT"

    found = load_artifact("acme/popsteer", revision="v1")
    assert found.base_model["repo_id"] == "acme/sasrec"
    assert found.base_model["revision"] == base.revision
    same = found.load_base_model()
    assert torch.equal(scores(same), scores(rec))
    vectors = torch.randn(5, 8)
    assert torch.equal(found.transform("popsteer")(vectors), made.transform("popsteer")(vectors))
    by_name = Artifact.from_pretrained("acme/popsteer", revision="v1")
    assert by_name.base_model == found.base_model


def test_the_base_model_is_recorded_on_the_way(hub, model, artifact, tmp_path):
    """Attached to a local model before that was pushed."""
    recorded = json.loads((artifact / "steerrec.json").read_text())["base_model"]
    assert recorded["source"] == str(model)
    assert "repo_id" not in recorded
    base = push(model, "acme/sasrec")
    for number, rec in enumerate((load(model), load_recommender("acme/sasrec"))):
        push(artifact, f"acme/popsteer{number}", rec=rec)
        found = load_artifact(f"acme/popsteer{number}").base_model
        assert (found["repo_id"], found["revision"]) == ("acme/sasrec", base.revision)
        stored = published(hub, f"acme/popsteer{number}").values()
        assert not any(str(tmp_path).encode() in content for content in stored)
        assert load_artifact(f"acme/popsteer{number}").load_base_model().repo_id == "acme/sasrec"


def test_another_base_model_is_refused(hub, artifact, tmp_path):
    other = write_model(tmp_path / "other", seed=1)
    push(other, "acme/other")
    with pytest.raises(ArtifactError, match="other weights"):
        push(artifact, "acme/popsteer", rec=load(other))
    assert list(hub.store.repositories) == ["acme/other"]


def test_a_base_model_that_is_not_on_the_hub_cannot_be_recorded(hub, model, artifact):
    with pytest.raises(HubError, match=r"is not from the Hub.*push it first"):
        push(artifact, "acme/popsteer", rec=load(model))
    assert hub.seen == []


@pytest.mark.parametrize("kind", ["model", "artifact"])
def test_no_path_of_this_machine_is_pushed(hub, model, artifact, tmp_path, kind):
    pushed = push({"model": model, "artifact": artifact}[kind], "acme/x")
    assert str(tmp_path).encode() in b"".join(contents(artifact).values())
    stored = published(hub, "acme/x")
    assert set(stored) == set(pushed.files)
    assert not any(str(tmp_path).encode() in content for content in stored.values())
    if kind == "artifact":
        assert json.loads(stored["steerrec.json"])["base_model"]["source"] == "model"
        assert b"`model`" in stored["README.md"]
        local = json.loads((artifact / "steerrec.json").read_text())
        assert local["base_model"]["source"] == str(model)  # untouched


def test_a_recorded_path_is_never_opened(hub, model, artifact, monkeypatch):
    monkeypatch.setattr("steerrec.loading.load_recommender", None)
    with pytest.raises(ArtifactError, match=f"made for the model at '{model}', which is not on"):
        load_artifact(artifact).load_base_model()


def test_items_that_an_artifact_holds_travel_with_it(hub, model):
    """Its base model may be a checkpoint that knows numbers alone."""
    rec = load(model)
    made = make_artifact(rec)
    made.items = rec.catalogue
    assert "catalogue.parquet" in made.push_to_hub("acme/popsteer").files
    found = load_artifact("acme/popsteer").items
    assert found is not None
    assert found.frame.equals(rec.catalogue.frame)


def test_all_sites_of_an_artifact_travel(hub, model):
    rec = load(model)
    made = make_artifact(rec)
    layer = site_at(rec, "layers.0")
    made.add(rec, random_sae(8, 16, seed=3), site=layer)
    made.push_to_hub("acme/popsteer")
    found = load_artifact("acme/popsteer")
    assert set(found.sites) == {rec.site.folder, layer.folder}
    assert torch.equal(found.at("layers.0").sae.W_enc, made.at("layers.0").sae.W_enc)


def test_links_of_a_pulled_artifact_may_lead_into_the_cache_alone(hub, artifact, cache):
    push(artifact, "acme/popsteer")
    snapshot = pull("acme/popsteer")
    assert (snapshot.path / "steerrec.json").is_symlink()
    assert load_artifact(snapshot).at().table("popularity")
    assert load_artifact(snapshot.path, root=cache).at().table("popularity")
    with pytest.raises(ArtifactError, match="is a link that leads out of"):
        load_artifact(snapshot.path)
    outside = cache.parent / "elsewhere"
    outside.write_bytes((snapshot.path / "steerrec.json").read_bytes())
    (snapshot.path / "steerrec.json").unlink()
    (snapshot.path / "steerrec.json").symlink_to(outside)
    with pytest.raises(ArtifactError, match="is a link that leads out of"):
        load_artifact(snapshot)


def test_an_option_that_the_hub_does_not_have_is_refused(hub, model):
    for call in (load_recommender, load_artifact):
        with pytest.raises(HubError, match="cannot be had with 'heads'; expected revision, token"):
            call("acme/sasrec", heads=2)
    assert hub.seen == []


# --- commits, branches, tags --------------------------------------------------------------------


def test_a_push_is_one_commit_and_replaces_all_of_the_format(hub, model, artifact):
    made = load_artifact(artifact)
    first = push(artifact, "acme/popsteer")
    assert commits(hub, "acme/popsteer") == 1
    notes = [CommitOperationAdd("notes.txt", b"by hand")]
    HfApi(hub.url).create_commit("acme/popsteer", notes, commit_message="notes")
    made.at().tables.clear()
    made.save(artifact)
    second = push(artifact, "acme/popsteer", commit_message="without the table")
    assert commits(hub, "acme/popsteer") == 3
    site = made.at().site.folder
    before, after = published(hub, "acme/popsteer", first.revision), published(hub, "acme/popsteer")
    assert set(before) - set(after) == {f"{site}/attribution/popularity.safetensors"}
    assert set(after) - set(before) == {"notes.txt"}
    assert hub.repository("acme/popsteer").commit_at("main").message == "without the table"
    assert list(load_artifact("acme/popsteer").at().tables) == []
    assert list(load_artifact("acme/popsteer", revision=first.revision).at().tables) == [
        "popularity"
    ]
    assert second.revision == hub.repository("acme/popsteer").branches["main"]


def test_the_same_again_is_no_commit(hub, artifact):
    pushed = push(artifact, "acme/popsteer", tag="v1")
    uploads = len(hub.asked("^PUT"))
    again = push(artifact, "acme/popsteer", tag="v1")
    assert again == pushed
    assert commits(hub, "acme/popsteer") == 1
    assert len(hub.asked("^PUT")) == uploads


def test_a_tag_is_not_moved(hub, model, tmp_path):
    first = push(model, "acme/sasrec", tag="v1")
    with pytest.raises(HubError, match="has a tag 'v1' already, of another commit"):
        push(write_model(tmp_path / "other", seed=1), "acme/sasrec", tag="v1")
    assert commits(hub, "acme/sasrec") == 1
    assert hub.repository("acme/sasrec").tags == {"v1": first.revision}


def test_a_branch_is_made(hub, model, tmp_path):
    push(model, "acme/sasrec")
    other = write_model(tmp_path / "other", seed=1)
    pushed = push(other, "acme/sasrec", revision="dev")
    assert hub.repository("acme/sasrec").branches["dev"] == pushed.revision
    assert torch.equal(scores(load_recommender("acme/sasrec")), scores(load(model)))
    on_branch = load_recommender("acme/sasrec", revision="dev")
    assert torch.equal(scores(on_branch), scores(load(other)))


def test_a_pull_request(hub, model, tmp_path):
    push(model, "acme/sasrec")
    other = write_model(tmp_path / "other", seed=1)
    proposed = push(other, "acme/sasrec", create_pr=True, token=OTHER)
    assert proposed.url == f"{hub.url}/acme/sasrec/discussions/1"
    assert "hub" not in json.loads((other / "steerrec.json").read_text())
    assert torch.equal(scores(load_recommender("acme/sasrec")), scores(load(model)))
    found = load_recommender("acme/sasrec", revision="refs/pr/1")
    assert torch.equal(scores(found), scores(load(other)))
    with pytest.raises(HubError, match="nothing to propose"):
        push(model, "acme/sasrec", create_pr=True)


def test_somebody_else_pushing_in_between_is_noticed(hub, model, tmp_path, monkeypatch):
    push(model, "acme/sasrec")
    own = HfApi.list_repo_refs

    def meanwhile(api, repo_id):
        repo = hub.repository(repo_id)
        head = repo.commit_at("main")
        repo.branches["main"] = repo.add("theirs", head.files, head.oid).oid
        return own(api, repo_id)

    monkeypatch.setattr(HfApi, "list_repo_refs", meanwhile)
    with pytest.raises(HubError, match="somebody else pushed to acme/sasrec in the meantime"):
        push(write_model(tmp_path / "other", seed=1), "acme/sasrec")
    assert hub.repository("acme/sasrec").commit_at("main").message == "theirs"


def test_private_or_not(hub, model):
    push(model, "acme/secret", private=True)
    push(model, "acme/open")
    assert [hub.repository(f"acme/{name}").private for name in ("secret", "open")] == [True, False]
    assert load_recommender("acme/secret").repo_id == "acme/secret"
    with pytest.raises(HubError, match="exists and is public"):
        push(model, "acme/open", private=True)


def test_a_dry_run_asks_nothing(hub, artifact):
    pushed = push(artifact, "acme/popsteer", tag="v1", dry_run=True)
    assert hub.seen == []
    assert pushed.revision is None
    push(artifact, "acme/popsteer")
    stored = published(hub, "acme/popsteer")
    assert pushed.files == {name: len(content) for name, content in stored.items()}


def test_a_card_can_be_given(hub, artifact, model):
    pushed = push(artifact, "acme/popsteer", card=f"---\na: b\n---\nof {model}\n")
    assert published(hub, "acme/popsteer")["README.md"] == b"---\na: b\n---\nof model\n"
    assert pushed.files["README.md"] == 22


def edit_on_the_hub(hub, text):
    repo = hub.repository("acme/popsteer")
    head = repo.commit_at("main")
    files = {**head.files, "README.md": hub.store.put(text.encode())}
    repo.branches["main"] = repo.add("by hand", files, head.oid).oid


def test_a_card_that_was_made_is_made_anew(hub, artifact):
    push(artifact, "acme/popsteer")
    assert b'load_artifact("acme/popsteer")' in published(hub, "acme/popsteer")["README.md"]
    save_card(artifact, license="mit")
    assert not push(artifact, "acme/popsteer").card_kept
    assert b"license: mit" in published(hub, "acme/popsteer")["README.md"]


def test_a_card_edited_on_the_hub_is_replaced_only_when_asked_for(hub, artifact):
    push(artifact, "acme/popsteer")
    edit_on_the_hub(hub, "mine")
    save_card(artifact, license="mit")
    asked = []

    def no():
        asked.append(1)
        return False

    for answer in (False, no):
        assert push(artifact, "acme/popsteer", overwrite_card=answer).card_kept
        stored = published(hub, "acme/popsteer")
        assert stored["README.md"] == b"mine"
    assert b'"license": "mit"' in stored["steerrec.json"]
    assert asked == [1]
    assert not push(artifact, "acme/popsteer", overwrite_card=lambda: True).card_kept
    assert b"license: mit" in published(hub, "acme/popsteer")["README.md"]


def test_a_card_edited_here_is_pushed(hub, artifact):
    (artifact / "README.md").write_text("by hand")
    push(artifact, "acme/popsteer")
    assert published(hub, "acme/popsteer")["README.md"] == b"by hand"


# --- pulling ------------------------------------------------------------------------------------


def test_only_the_files_of_the_format_are_pulled(hub, artifact, cache):
    push(artifact, "acme/popsteer")
    more = {
        "evil.py": b"raise SystemExit",
        "a/b/c/sae_weights.safetensors": b"deep",
        "pytorch_model.bin": b"pickle",
        "big.safetensors": b"else",
        "final-norm/run.sh": b"rm",
    }
    operations = [CommitOperationAdd(path, content) for path, content in more.items()]
    HfApi(hub.url).create_commit("acme/popsteer", operations, commit_message="more")
    snapshot = pull("acme/popsteer")
    found = contents(snapshot)
    assert {name for name in found if name in more} <= {"a/b/c/sae_weights.safetensors"}
    assert set(contents(artifact)) <= set(found)
    assert load_artifact(snapshot).at().table("popularity")


def test_how_often_the_hub_is_asked(hub, artifact):
    pushed = push(artifact, "acme/popsteer", tag="v1")

    def asked(**options):
        hub.seen.clear()
        load_artifact("acme/popsteer", **options)
        return len(hub.seen)

    assert asked(revision="v1") > 5
    assert asked(revision=pushed.revision) == 0
    assert asked(revision="v1") == 1  # where the tag points to
    assert asked(revision="v1", local_files_only=True) == 0


def test_offline_what_was_pulled_is_there(hub, model, artifact, monkeypatch):
    push(model, "acme/sasrec", tag="v1")
    push(artifact, "acme/popsteer", rec=load(model))
    load_artifact("acme/popsteer").load_base_model()
    hub.stop()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = load_artifact("acme/popsteer")
    assert torch.equal(scores(found.load_base_model()), scores(load(model)))
    with pytest.raises(HubError, match="'v1' is not in the cache, or not all of it"):
        load_recommender("acme/sasrec", revision="v1")  # only its commit has been asked for


def test_a_hub_that_is_away_does_not_take_the_cache_with_it(hub, artifact):
    push(artifact, "acme/popsteer")
    load_artifact("acme/popsteer")
    hub.stop()
    assert load_artifact("acme/popsteer").at().table("popularity")


def test_a_subfolder(hub, artifact, model, tmp_path):
    files = {**{f"sae/one/{k}": v for k, v in contents(artifact).items()}, **contents(model)}
    HfApi(hub.url).create_repo("acme/both")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    HfApi(hub.url).create_commit("acme/both", operations, commit_message="both")
    found = load_artifact("acme/both", subfolder="sae/one")
    assert found.at().table("popularity")
    snapshot = pull("acme/both", subfolder="sae/one")
    assert snapshot.copy_to(tmp_path / "copy") == "ARTIFACT"
    assert contents(tmp_path / "copy") == contents(artifact)
    push(snapshot, "acme/copy")
    assert set(published(hub, "acme/copy")) == set(contents(artifact))
    with pytest.raises(HubError, match="acme/both/other at 'main' holds neither a MODEL nor"):
        load_artifact("acme/both", subfolder="other")


def test_a_model_in_a_subfolder_is_no_base_model_that_others_could_find(hub, model, tmp_path):
    files = {f"models/one/{name}": content for name, content in contents(model).items()}
    HfApi(hub.url).create_repo("acme/many")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    HfApi(hub.url).create_commit("acme/many", operations, commit_message="many")
    rec = load_recommender("acme/many", subfolder="models/one")
    assert torch.equal(scores(rec), scores(load(model)))
    assert (rec.source, rec.repo_id) == ("acme/many", None)
    assert "repo_id" not in make_artifact(rec).base_model
    assert pull("acme/many", subfolder="models/one").copy_to(tmp_path / "copy") == "MODEL"
    assert load(tmp_path / "copy").repo_id is None


def test_a_cache_whose_blobs_are_shared_by_repositories(hub, artifact, cache, tmp_path):
    """As the client lays it out for what came by xet: a blob is a link into `cache/blobs`."""
    push(artifact, "acme/popsteer")
    snapshot = pull("acme/popsteer")
    shared = cache / "blobs" / "ab"
    shared.mkdir(parents=True)
    for blob in (cache / "models--acme--popsteer" / "blobs").iterdir():
        blob.rename(shared / blob.name)
        blob.symlink_to(os.path.relpath(shared / blob.name, blob.parent))
    hub.seen.clear()
    assert pull("acme/popsteer", revision=snapshot.revision) == snapshot
    assert snapshot.copy_to(tmp_path / "copy") == "ARTIFACT"
    assert hub.seen == []
    target = (snapshot.path / "README.md").resolve()
    assert target.parent == shared
    target.write_bytes(b"!")
    with pytest.raises(HubError, match=r"arrived damaged: README\.md"):
        pull("acme/popsteer", revision=snapshot.revision)
    assert not target.exists()
    assert pull("acme/popsteer", revision=snapshot.revision) == snapshot


def test_a_cache_of_ones_own(hub, artifact, cache, tmp_path):
    push(artifact, "acme/popsteer")
    snapshot = pull("acme/popsteer", cache_dir=tmp_path / "mine")
    assert snapshot.path.is_relative_to(tmp_path / "mine")
    assert os.fspath(snapshot) == str(snapshot.path)
    assert not cache.exists()


def test_a_snapshot_can_be_pushed_elsewhere_and_stays_as_it_is(hub, model):
    pushed = push(model, "acme/sasrec")
    snapshot = pull("acme/sasrec")
    before = contents(snapshot)
    push(snapshot, "acme/copy")
    assert contents(snapshot) == before
    assert published(hub, "acme/copy") == published(hub, "acme/sasrec")
    assert snapshot.revision == pushed.revision


# --- secrets ------------------------------------------------------------------------------------


def test_the_token_is_written_and_shown_nowhere(hub, model, artifact, tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    rec = load(model)
    rec.push_to_hub("acme/sasrec", private=True)
    push(artifact, "acme/popsteer", private=True, rec=rec, tag="v1")
    load_artifact("acme/popsteer", revision="v1").load_base_model()
    messages = []
    for repo_id, token in (("acme/nothing", TOKEN), ("acme/popsteer", OTHER), ("acme/x", False)):
        with pytest.raises(HubError) as error:
            pull(repo_id, token=token)
        messages.append(str(error.value))
    hub.stop()
    with pytest.raises(HubError) as error:
        push(model, "acme/sasrec")
    messages.append(str(error.value))
    out = capfd.readouterr()
    files = list(contents(tmp_path).values())
    stored = [*hub.store.blobs.values(), *hub.store.objects.values()]
    texts = [*messages, caplog.text, out.out, out.err]
    for secret in (TOKEN, OTHER):
        assert not any(secret in text for text in texts)
        assert not any(secret.encode() in content for content in [*files, *stored])


def test_a_token_that_got_into_a_card_is_not_pushed(hub, artifact):
    card = artifact / "README.md"
    card.write_text(card.read_text() + f"curl -H 'Authorization: Bearer {TOKEN}'\n")
    with pytest.raises(HubError, match=r"README\.md holds the token") as error:
        push(artifact, "acme/popsteer")
    assert TOKEN not in str(error.value)
    assert hub.seen == []
