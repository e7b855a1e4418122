"""User vectors in memory and in shards: which prefixes, which rows, and what survives a failure."""

import errno
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from steerrec import activations
from steerrec.activations import (
    ActivationSampling,
    ActivationShards,
    capture_activations,
    collect_user_vectors,
    digest,
    sample_prefixes,
)
from steerrec.data import Histories
from steerrec.errors import DataError, SiteError, StorageError, TrainingError

from .tiny import TinyRecommender, random_histories, random_recommender

SAMPLING = ActivationSampling(rows=100, held_out_users=0.2, shard_rows=16)


@pytest.fixture
def rec():
    return random_recommender()


@pytest.fixture
def train():
    return random_histories()


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_prefixes(histories):
    return [
        (user, length)
        for user, items in enumerate(histories)
        for length in range(1, len(items))  # the item after the last is not for training
    ]


# --- in memory


def test_collected_vectors_are_those_of_the_model_in_the_order_of_the_histories(rec, train):
    vectors = collect_user_vectors(rec, train, batch_size=7)
    embedding = rec.model.item_embedding.weight[1:]
    expected = torch.stack([embedding[items[-rec.max_length :]].mean(dim=0) for items in train])
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_batch_size_does_not_matter(rec, train, batch_size):
    vectors = collect_user_vectors(rec, train, batch_size=batch_size)
    torch.testing.assert_close(vectors, collect_user_vectors(rec, train, batch_size=8))


def test_half_precision_models_give_float32_vectors(rec, train):
    rec.model.half()
    assert collect_user_vectors(rec, train).dtype == torch.float32


def test_no_histories_are_refused(rec):
    with pytest.raises(DataError, match="no histories"):
        collect_user_vectors(rec, Histories.from_lists([]))


# --- which prefixes


def test_asking_for_as_many_as_there_are_gives_every_training_prefix_once():
    train = Histories.from_lists([[5], [1, 2, 3], [], [4, 4], [1, 2, 3, 4, 5]])
    expected = [(1, 1), (1, 2), (3, 1), (4, 1), (4, 2), (4, 3), (4, 4)]
    users, lengths = sample_prefixes(train, 7, np.random.default_rng(0))
    assert sorted(zip(users.tolist(), lengths.tolist(), strict=True)) == expected


@given(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda x: max(x) > 1), st.data())
def test_drawn_prefixes_are_training_prefixes_none_twice(lengths, data):
    train = Histories.from_lists([[0] * length for length in lengths])
    there = all_prefixes(train)
    n = data.draw(st.integers(0, len(there)))
    users, cuts = sample_prefixes(train, n, np.random.default_rng(data.draw(st.integers(0, 99))))
    drawn = list(zip(users.tolist(), cuts.tolist(), strict=True))
    assert len(drawn) == len(set(drawn)) == n
    assert set(drawn) <= set(there)


def test_prefixes_are_drawn_uniformly_over_prefixes_not_users():
    train = Histories.from_lists([[0] * 2, [0] * 5, [0] * 4])  # 1 + 4 + 3 prefixes
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(all_prefixes(train), 0)
    users, lengths = sample_prefixes(train, 8000, rng)  # more than there are: with replacement
    for prefix in zip(users.tolist(), lengths.tolist(), strict=True):
        counts[prefix] += 1
    assert len(counts) == 8
    # 1000 expected of each; the standard deviation is sqrt(8000 * 1/8 * 7/8) = 30
    assert all(abs(count - 1000) < 5 * 30 for count in counts.values())


def test_histories_without_prefixes_are_refused():
    with pytest.raises(DataError, match="no training prefixes"):
        sample_prefixes(Histories.from_lists([[1], []]), 3, np.random.default_rng(0))


# --- shards


def test_the_shards_hold_the_vectors_of_the_sampled_prefixes(rec, train, tmp_path):
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    for part, users, lengths in activations._parts(train, SAMPLING):
        shards = ActivationShards(tmp_path, part)
        prefixes = train.prefixes(users, lengths, rec.max_length)
        found = shards.gather(np.arange(len(shards)))
        expected = collect_user_vectors(rec, prefixes)
        assert len(shards) == len(users)
        assert shards.width == 4
        # rows are in an order of their own: compare as sorted lists
        torch.testing.assert_close(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])


def test_a_large_enough_limit_takes_every_training_prefix(rec, train, tmp_path):
    sampling = ActivationSampling(held_out_users=0.2)
    capture_activations(rec, train, tmp_path, sampling=sampling)
    rows = [len(ActivationShards(tmp_path, part)) for part in ("train", "held_out")]
    assert sum(rows) == len(all_prefixes(train))


def test_no_prefix_of_a_held_out_user_is_trained_on(train):
    (_, users, _), (_, held_out, _) = activations._parts(train, SAMPLING)
    usable = {user for user, _ in all_prefixes(train)}
    assert not set(users) & set(held_out)
    assert len(set(held_out)) == round(0.2 * len(usable))
    assert set(users) | set(held_out) <= usable


def test_one_user_is_held_out_at_least_and_one_alone_is_refused():
    pair = Histories.from_lists([[1, 2], [3], [1, 2, 3]])
    (_, users, _), (_, held_out, _) = activations._parts(pair, SAMPLING)
    assert {tuple(set(users)), tuple(set(held_out))} == {(0,), (2,)}
    with pytest.raises(DataError, match="fewer than two users"):
        activations._parts(Histories.from_lists([[1, 2], [3]]), SAMPLING)


def test_the_seed_decides_which_prefixes(train):
    def drawn(seed):
        parts = activations._parts(train, replace(SAMPLING, seed=seed))
        return [(users.tolist(), lengths.tolist()) for _, users, lengths in parts]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_gather_is_plain_indexing_of_the_concatenated_shards(rec, train, tmp_path):
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    shards = ActivationShards(tmp_path)
    paths = sorted(tmp_path.glob("train-*.safetensors"))
    assert len(paths) == 7  # 100 rows, 16 a shard
    whole = torch.cat([load_file(path)["user_vectors"] for path in paths])
    rows = np.random.default_rng(0).integers(0, 100, 250)  # repeats, out of order
    assert torch.equal(shards.gather(rows), whole[rows])
    assert torch.equal(torch.cat([shards.gather(r) for r in shards.chunks(33)]), whole)
    assert shards.gather(rows[:0]).shape == (0, 4)
    shards.gather(rows).zero_()  # a tensor of its own
    assert torch.equal(shards.gather(rows), whole[rows])


# --- interruption and failure


def test_an_interrupted_capture_goes_on_and_ends_in_the_same_files(
    rec, train, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    capture_activations(rec, train, whole, sampling=SAMPLING)
    forwards, rec.forwards = rec.forwards, 0
    written = activations.save_file

    def interrupt_the_fourth(tensors, path):
        if len(list(cut.glob("train-*"))) == 3:
            raise KeyboardInterrupt
        written(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(activations, "save_file", interrupt_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            capture_activations(rec, train, cut, sampling=SAMPLING)
    names = [f"train-0000{number}.safetensors" for number in range(3)]
    assert sorted(files(cut)) == ["settings.json", *names]
    with pytest.raises(TrainingError, match="no complete set of activations"):
        ActivationShards(cut)
    capture_activations(rec, train, cut, sampling=SAMPLING)
    assert files(cut) == files(whole)
    assert rec.forwards == forwards + 1  # only the shard that was lost was computed again


def test_a_whole_folder_is_not_captured_again(rec, train, tmp_path):
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    rec.forwards = 0
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    assert rec.forwards == 0


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", ["sampling", "data", "times", "window", "weights"])
def test_a_folder_of_other_settings_is_refused(rec, train, tmp_path, change, whole):
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    if not whole:
        (tmp_path / "activations.json").unlink()
    before, sampling = files(tmp_path), SAMPLING
    if change == "sampling":
        sampling = replace(SAMPLING, seed=1)
    elif change == "data":
        train = Histories(train.items[::-1].copy(), train.offsets, train.user_ids)
    elif change == "times":
        train = replace(train, columns={"time": np.arange(len(train.items))})
    elif change == "window":
        rec.max_length = 5
    else:
        rec = random_recommender(seed=1)
    with pytest.raises(TrainingError, match="of other settings, data or another model"):
        capture_activations(rec, train, tmp_path, sampling=sampling)
    assert files(tmp_path) == before


def test_the_digest_of_histories_without_columns_is_that_of_items_and_lengths(train):
    expected = hashlib.sha256(train.offsets.tobytes() + train.items.tobytes()).hexdigest()
    assert digest(train) == expected  # folders that were begun before there were columns go on


def test_the_digest_tells_columns_apart(train):
    steps = np.arange(len(train.items))
    columns = [{"a": steps}, {"b": steps}, {"a": steps * 1.0}, {"a": steps, "b": steps}]
    swapped = {"b": steps, "a": steps}
    found = [digest(replace(train, columns=each)) for each in columns]
    assert len({digest(train), *found}) == 5
    assert digest(replace(train, columns=swapped)) == found[-1]


def test_a_full_disk_leaves_no_half_shard_and_can_be_resumed(rec, train, tmp_path, monkeypatch):
    whole, full = tmp_path / "whole", tmp_path / "full"
    capture_activations(rec, train, whole, sampling=SAMPLING)

    def fill_the_disk(tensors, path):
        save_file(tensors, path)
        if len(list(full.glob("train-*"))) == 2:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(activations, "save_file", fill_the_disk)
        with pytest.raises(StorageError, match=r"train-00002.*No space left on device") as caught:
            capture_activations(rec, train, full, sampling=SAMPLING)
    assert "\n" not in str(caught.value)
    names = ["train-00000.safetensors", "train-00001.safetensors"]
    assert sorted(files(full)) == ["settings.json", *names]
    capture_activations(rec, train, full, sampling=SAMPLING)
    assert files(full) == files(whole)


def test_a_model_that_emits_nan_is_refused(train, tmp_path):
    embedding = torch.zeros(20, 4)
    embedding[3] = torch.nan
    rec = TinyRecommender(embedding, torch.ones(20, 4), [1] * 20)
    with pytest.raises(SiteError, match=r"site 'mean' emits values that are not finite"):
        capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    assert not (tmp_path / "activations.json").exists()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def exchange(path):
    save_file({"user_vectors": torch.zeros(2, 4)}, path)


@pytest.mark.parametrize("damage", [truncate, exchange, lambda path: path.unlink()])
def test_a_damaged_shard_is_refused(rec, train, tmp_path, damage):
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    damage(tmp_path / "train-00002.safetensors")
    with pytest.raises(TrainingError, match=r"shard .*train-00002\.safetensors"):
        ActivationShards(tmp_path)
    ActivationShards(tmp_path, "held_out")  # whole, and read on its own


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": {"train": [16]}}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / "activations.json").write_text(text)
    with pytest.raises(TrainingError, match="no complete set of activations; capture them again"):
        ActivationShards(tmp_path)


def test_damaged_settings_are_refused(rec, train, tmp_path):
    (tmp_path / "settings.json").write_text('{"site"')
    with pytest.raises(TrainingError, match="of other settings, data or another model"):
        capture_activations(rec, train, tmp_path, sampling=SAMPLING)


def test_the_manifest_says_what_the_shards_hold(rec, train, tmp_path):
    capture_activations(rec, train, tmp_path, sampling=SAMPLING)
    manifest = json.loads((tmp_path / "activations.json").read_text())
    assert manifest["width"] == 4
    assert manifest["parts"]["train"] == [16] * 6 + [4]
    assert sum(manifest["parts"]["held_out"]) == len(ActivationShards(tmp_path, "held_out"))
