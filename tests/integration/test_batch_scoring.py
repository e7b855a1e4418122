"""Scoring in blocks: the lists of one process, gone on with after a stop, and nothing mixed up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from steerrec.artifacts import load_artifact
from steerrec.batch_scoring import Scorer, ScoringSpec, ScoringWorker, is_complete, score_blocks
from steerrec.data import build_histories, read_interactions
from steerrec.data.history_files import write_histories
from steerrec.engines import LocalEngine
from steerrec.errors import ArtifactError, DataError, StorageError
from steerrec.evaluation import CapturedUsers, measure_lists, recommend
from steerrec.loading import load_recommender
from steerrec.ranking import TopK
from steerrec.steering import Steering, SteerTransform

USERS = 60  # in a block


@pytest.fixture(scope="module")
def scene(world, tmp_path_factory):
    """The small world's model and artifact, and its histories in two files."""
    folder = tmp_path_factory.mktemp("batch")
    rec = load_recommender(world.model)
    artifact = load_artifact(world.artifact)
    names = {"user_col": "who", "item_col": "what", "time_col": "when"}
    histories = build_histories(read_interactions(world.data, k_core=3, **names), rec.catalogue)
    files = [folder / "a.parquet", folder / "b.parquet"]
    for file, users in zip(files, (np.arange(100), np.arange(100, len(histories))), strict=True):
        write_histories(histories.select(users), rec.catalogue, file)
    spec = ScoringSpec(artifact=str(world.artifact), model=str(world.model), k=5, mask_seen=True)
    return rec, artifact, histories, files, spec


class Counting(LocalEngine):
    """Counts what it runs, and stops before block `last`."""

    def __init__(self, last=None):
        super().__init__()
        object.__setattr__(self, "ran", [])
        object.__setattr__(self, "last", last)

    def run(self, worker, spec, blocks):
        for block in blocks:
            if block["number"] == self.last:
                raise KeyboardInterrupt
            self.ran.append(block["number"])
            yield from super().run(worker, spec, [block])


def rows_of(folder):
    return pl.read_parquet(folder / "part-*.parquet")


def test_the_lists_are_those_of_one_process_and_so_are_the_metrics(scene, tmp_path):
    rec, artifact, histories, files, spec = scene
    found = score_blocks(spec, files, tmp_path / "out", block_users=USERS)

    transform = SteerTransform(
        artifact.at().sae, Steering.popsteer(artifact.at().table("popularity"))
    )
    lists = recommend(rec, histories, k=5, mask_seen=True, transform=transform)
    rows = rows_of(tmp_path / "out")
    assert rows["item_id"].to_list() == rec.catalogue.item_ids.gather(lists.ids.flatten()).to_list()
    assert rows["user_id"].unique(maintain_order=True).to_list() == histories.user_ids.to_list()
    assert np.allclose(rows["score"], lists.scores.flatten(), atol=1e-5)
    users = CapturedUsers(torch.empty(0), histories, None, "none")
    whole = measure_lists(rec, users, TopK(lists.ids, lists.scores), mask_seen=True)
    assert found.evaluation.metrics == whole.metrics
    assert found.evaluation.protocol == whole.protocol
    assert (found.blocks, found.kept, found.users) == (5, 0, len(histories))
    assert is_complete(tmp_path / "out")


def test_a_stopped_run_is_gone_on_with_and_ends_in_the_same_files(scene, tmp_path):
    *_, files, spec = scene
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    score_blocks(spec, files, whole, block_users=USERS)
    with pytest.raises(KeyboardInterrupt):
        score_blocks(spec, files, parts, block_users=USERS, engine=Counting(last=2))
    assert not is_complete(parts)
    (parts / ".part-00002.parquet.abcd").write_bytes(b"half")  # of a worker that was killed
    (parts / "_blocks" / "00001.safetensors").write_bytes(b"damaged")
    engine = Counting()
    found = score_blocks(spec, files, parts, block_users=USERS, engine=engine)
    assert engine.ran == [1, 2, 3, 4]
    assert found.kept == 1
    assert rows_of(parts).equals(rows_of(whole))
    names = [sorted(path.name for path in folder.iterdir()) for folder in (whole, parts)]
    assert names[0] == names[1]
    again = score_blocks(spec, files, parts, block_users=USERS, engine=(idle := Counting()))
    assert idle.ran == []
    assert again.evaluation.metrics == found.evaluation.metrics


@pytest.mark.parametrize(
    "change", [{"alpha": 2.0}, {"k": 4}, {"mask_seen": False}, {"item_dtype": "int8"}]
)
def test_blocks_of_other_settings_are_refused(scene, tmp_path, change):
    *_, files, spec = scene
    with pytest.raises(KeyboardInterrupt):
        score_blocks(spec, files, tmp_path, block_users=USERS, engine=Counting(last=1))
    with pytest.raises(StorageError, match="other settings, data or another model"):
        score_blocks(replace(spec, **change), files, tmp_path, block_users=USERS)


def test_blocks_of_other_data_are_refused(scene, tmp_path):
    rec, _, histories, files, spec = scene
    mine = tmp_path / "mine.parquet"
    write_histories(histories.select(np.arange(100)), rec.catalogue, mine)
    score_blocks(spec, [mine], tmp_path / "out", block_users=USERS)
    write_histories(histories.select(np.arange(1, 101)), rec.catalogue, mine)
    with pytest.raises(StorageError, match="other settings, data"):
        score_blocks(spec, [mine], tmp_path / "out", block_users=USERS)
    with pytest.raises(StorageError, match="other settings, data"):
        score_blocks(spec, files[:1], tmp_path / "out", block_users=200)


def test_a_spec_is_json_and_its_digest_is_of_what_it_leads_to(scene):
    *_, spec = scene
    again = ScoringSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert Scorer(again).digest == Scorer(spec).digest
    assert Scorer(replace(spec, model=str(Path(spec.model).absolute()))).digest == (
        Scorer(spec).digest
    )
    assert Scorer(replace(spec, neurons=3)).digest != Scorer(spec).digest


def test_a_worker_that_finds_another_artifact_says_so(scene, tmp_path):
    *_, spec = scene
    with pytest.raises(ArtifactError, match="a worker has loaded another"):
        ScoringWorker({"scoring": spec.to_dict(), "folder": str(tmp_path), "digest": "other"})


def test_what_cannot_work_is_refused_before_any_block(scene, tmp_path):
    *_, files, spec = scene
    with pytest.raises(DataError, match="k is 500"):
        score_blocks(replace(spec, k=500), files, tmp_path)
    with pytest.raises(DataError, match="no histories to recommend from"):
        score_blocks(spec, [], tmp_path)
    assert list(tmp_path.iterdir()) == []
