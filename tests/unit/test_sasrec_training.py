"""Training the reference SASRec: losses, windows, early stopping, and a resume that is exact."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from steerrec.adapters import sasrec_training
from steerrec.adapters.sasrec_training import (
    SASRecTraining,
    fit_sasrec,
    sampled_loss,
    softmax_loss,
    training_windows,
)
from steerrec.data import Catalogue, Histories, build_histories, leave_one_out, simulate
from steerrec.errors import TrainingError
from steerrec.evaluation import evaluate

from .toy_models import tiny_catalogue, tiny_config

# --- losses -------------------------------------------------------------------------------------


def positions(count=10, items=7, width=4, negatives=5):
    """Hidden states, item matrix, targets, sampled negatives."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, width, generator=generator, dtype=torch.double)
    weight = torch.randn(items, width, generator=generator, dtype=torch.double)
    targets = torch.randint(items, (count,), generator=generator)
    sampled = torch.randint(items, (count, negatives), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, sampled


@pytest.mark.parametrize("chunk", [1, 3, 9, 10, 512])
def test_softmax_loss_is_cross_entropy_in_value_and_gradients(chunk):
    hidden, weight, targets, _ = positions()
    expected = F.cross_entropy(hidden @ weight.T, targets)
    loss = softmax_loss(hidden, weight, targets, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss * 3, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected * 3, (hidden, weight)))


def test_softmax_loss_passes_gradcheck():
    hidden, weight, targets, _ = positions()
    assert torch.autograd.gradcheck(
        lambda h, w: softmax_loss(h, w, targets, chunk=4), (hidden, weight)
    )


def test_softmax_loss_survives_large_scores_and_leaves_its_inputs_alone():
    hidden, weight, targets, _ = positions()
    before = hidden.clone(), weight.clone()
    loss = softmax_loss(hidden * 1e4, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(hidden * 1e4 @ weight.T, targets))
    softmax_loss(hidden, weight, targets).backward()
    assert torch.equal(hidden, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.parametrize("chunk", [1, 3, 10, 512])
def test_sampled_loss_without_calibration_is_binary_cross_entropy(chunk):
    hidden, weight, targets, negatives = positions()
    scores = hidden @ weight.T
    logits = torch.cat([scores.gather(1, targets[:, None]), scores.gather(1, negatives)], dim=1)
    labels = torch.zeros_like(logits)
    labels[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(logits, labels)
    loss = sampled_loss(hidden, weight, targets, negatives, chunk=chunk)
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss * 3, (hidden, weight))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected * 3, (hidden, weight)))


def test_sampled_loss_passes_gradcheck():
    hidden, weight, targets, negatives = positions()
    assert torch.autograd.gradcheck(
        lambda h, w: sampled_loss(h, w, targets, negatives, t=0.6, chunk=4), (hidden, weight)
    )


@pytest.mark.parametrize("t", [0.0, 0.4, 0.75, 1.0])
def test_sampled_loss_is_gbce_as_the_paper_defines_it(t):
    """-1/(n + 1) (log sigma(s+)^beta + sum log(1 - sigma(s-))), a = n / (N - 1) = 5/6."""
    hidden, weight, targets, negatives = positions()
    alpha = 5 / 6
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    if t == 1:
        assert math.isclose(beta, alpha)
    losses = []
    for h, target, sampled in zip(hidden, targets, negatives, strict=True):
        positive = torch.sigmoid(h @ weight[target]) ** beta
        terms = [torch.log(positive)]
        terms += [torch.log(1 - torch.sigmoid(h @ weight[row])) for row in sampled]
        losses.append(-sum(terms) / (5 + 1))
    expected = torch.stack(losses).mean()
    torch.testing.assert_close(sampled_loss(hidden, weight, targets, negatives, t=t), expected)


# --- windows ------------------------------------------------------------------------------------


def test_windows_worked_by_hand():
    histories = Histories.from_lists([[1, 2, 3, 4, 5, 6], [7], [8, 9], []])
    windows = [window.tolist() for window in training_windows(histories, 2)]
    assert sorted(windows) == [[1, 2], [2, 3, 4], [4, 5, 6], [8, 9]]
    windows = [window.tolist() for window in training_windows(histories, 5)]
    assert sorted(windows) == [[1, 2, 3, 4, 5, 6], [8, 9]]


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6), max_length=st.integers(1, 13))
def test_every_training_position_is_in_exactly_one_window(lengths, max_length):
    ends = np.cumsum(lengths)
    lists = [list(range(end - n, end)) for end, n in zip(ends, lengths, strict=True)]  # no repeats
    windows = training_windows(Histories.from_lists(lists), max_length)
    targets = Counter(int(item) for window in windows for item in window[1:])
    assert targets == Counter(item for row in lists for item in row[1:])
    for window in windows:
        assert 2 <= len(window) <= max_length + 1
        assert (np.diff(window) == 1).all()


# --- whole runs ---------------------------------------------------------------------------------

ITEMS = 20


@pytest.fixture(scope="module")
def split():
    """Forty users who walk through twenty items, mostly by steps of one or two."""
    rng = np.random.default_rng(0)
    lists = []
    for _ in range(40):
        steps = rng.choice([1, 2, 7], rng.integers(4, 14), p=[0.6, 0.3, 0.1])
        lists.append((rng.integers(ITEMS) + np.cumsum(steps)) % ITEMS)
    return leave_one_out(Histories.from_lists(lists), ITEMS)


CONFIG = {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.1}
TRAINING = SASRecTraining(epochs=4, batch_size=8, warmup_steps=5, negatives=6)


def fit(split, work, training=TRAINING, **config):
    return fit_sasrec(
        split,
        tiny_catalogue(ITEMS),
        config=tiny_config(ITEMS, **(CONFIG | config)),
        training=training,
        work=work,
    )


def weights(rec):
    return torch.cat([p.flatten() for p in rec.model.state_dict().values()])


def timeless(summary):
    """A summary without what no two runs share: how long an epoch took."""
    log = [{k: v for k, v in entry.items() if k != "seconds"} for entry in summary["log"]]
    return {**summary, "log": log}


@pytest.mark.parametrize("loss", ["softmax", "bce", "gbce"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_that_was_interrupted_ends_in_the_weights_of_one_that_was_not(
    split, tmp_path, monkeypatch, loss, epoch
):
    """Ctrl-C in the middle of an epoch; at 1, before there is any checkpoint."""
    training = replace(TRAINING, loss=loss)
    straight, summary = fit(split, tmp_path / "straight", training)

    name = "softmax_loss" if loss == "softmax" else "sampled_loss"
    original, calls = getattr(sasrec_training, name), []
    batches = math.ceil(len(training_windows(split.train, 6)) / training.batch_size)

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == (epoch - 1) * batches + 3:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(sasrec_training, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(split, tmp_path / "work", training)
    before = len(calls)
    resumed, resumed_summary = fit(split, tmp_path / "work", training)

    assert len(calls) - before == (5 - epoch) * batches  # the epochs before are not done again
    assert torch.equal(weights(resumed), weights(straight))
    assert timeless(resumed_summary) == timeless(summary)
    assert summary["epochs"] == 4


def test_a_finished_run_is_not_trained_again(split, tmp_path, monkeypatch):
    rec, summary = fit(split, tmp_path)
    monkeypatch.setattr(sasrec_training, "softmax_loss", None)
    again, summary_again = fit(split, tmp_path)
    assert torch.equal(weights(again), weights(rec))
    assert summary_again == summary


def test_a_seed_gives_its_weights_whatever_the_state_of_torch(split, tmp_path):
    one, _ = fit(split, tmp_path / "one")
    torch.manual_seed(12345)
    state = torch.random.get_rng_state()
    two, _ = fit(split, tmp_path / "two")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(weights(one), weights(two))
    other, _ = fit(split, tmp_path / "other", replace(TRAINING, seed=1))
    assert not torch.equal(weights(one), weights(other))


def test_a_checkpoint_of_other_settings_is_refused(split, tmp_path):
    fit(split, tmp_path, replace(TRAINING, epochs=1))
    refused = pytest.raises(TrainingError, match="checkpoint of other settings or data")
    with refused:
        fit(split, tmp_path, replace(TRAINING, epochs=2))
    with refused:
        fit(split, tmp_path, replace(TRAINING, epochs=1), hidden_dropout_prob=0.1)
    other = leave_one_out(split.histories.select(range(39)), ITEMS)
    with refused:
        fit(other, tmp_path, replace(TRAINING, epochs=1))


def test_a_damaged_checkpoint_is_refused(split, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half of")
    with pytest.raises(TrainingError, match="not a usable checkpoint"):
        fit(split, tmp_path)


def test_an_epoch_learns_from_every_training_position_once_and_from_nothing_held_out(
    split, tmp_path, monkeypatch
):
    seen = []
    original = sasrec_training.softmax_loss

    def watched(hidden, weight, targets):
        seen.extend(targets.tolist())
        return original(hidden, weight, targets)

    monkeypatch.setattr(sasrec_training, "softmax_loss", watched)
    fit(split, tmp_path, replace(TRAINING, epochs=1))
    assert Counter(seen) == Counter(int(item) for row in split.train for item in row[1:])


def test_every_epoch_has_an_order_and_negatives_of_its_own(split, tmp_path, monkeypatch):
    targets, negatives = [], []
    original = sasrec_training.sampled_loss

    def watched(hidden, weight, batch_targets, batch_negatives, **options):
        targets.append(batch_targets.tolist())
        negatives.append(batch_negatives[:4].tolist())
        return original(hidden, weight, batch_targets, batch_negatives, **options)

    monkeypatch.setattr(sasrec_training, "sampled_loss", watched)
    # without dropout the negatives are all that is drawn at random
    fit(
        split,
        tmp_path,
        replace(TRAINING, loss="bce", epochs=2),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    half = len(targets) // 2
    assert targets[:half] != targets[half:]
    assert negatives[0] != negatives[half]


def test_the_inputs_of_a_batch_are_what_came_before_each_target(split, tmp_path, monkeypatch):
    """Every input row is a window without its last item, right-padded."""
    batches = []
    model = sasrec_training.SASRecModel
    forward = model.forward

    def watched(self, input_ids, **options):
        if self.training:
            batches.append(input_ids)
        return forward(self, input_ids, **options)

    monkeypatch.setattr(model, "forward", watched)
    fit(split, tmp_path, replace(TRAINING, epochs=1))
    rows = [tuple(i - 1 for i in row if i) for batch in batches for row in batch.tolist()]
    expected = [tuple(window[:-1].tolist()) for window in training_windows(split.train, 6)]
    assert Counter(rows) == Counter(expected)


def test_it_stops_when_validation_gets_no_better_and_keeps_the_best_weights(
    split, tmp_path, monkeypatch
):
    scores, validated = iter([0.1, 0.3, 0.2, 0.3, 0.1, 0.9]), []

    def fake(rec, *_, **__):
        validated.append(weights(rec).clone())
        return SimpleNamespace(metrics={"ndcg@10": next(scores)})

    monkeypatch.setattr(sasrec_training, "evaluate", fake)
    rec, summary = fit(split, tmp_path, replace(TRAINING, epochs=9, patience=3))
    assert summary["epochs"] == 5
    assert summary["best_valid_ndcg@10"] == 0.3
    assert [entry["valid_ndcg@10"] for entry in summary["log"]] == [0.1, 0.3, 0.2, 0.3, 0.1]
    assert torch.equal(weights(rec), validated[1])
    assert not torch.equal(validated[1], validated[4])


def test_patience_counts_on_after_an_interruption(split, tmp_path, monkeypatch):
    scores = iter([0.3, 0.2, KeyboardInterrupt(), 0.1, 0.9])

    def fake(*_, **__):
        score = next(scores)
        if isinstance(score, BaseException):
            raise score
        return SimpleNamespace(metrics={"ndcg@10": score})

    monkeypatch.setattr(sasrec_training, "evaluate", fake)
    training = replace(TRAINING, epochs=9, patience=2)
    with pytest.raises(KeyboardInterrupt):
        fit(split, tmp_path, training)
    _, summary = fit(split, tmp_path, training)
    assert summary["epochs"] == 3
    assert summary["best_valid_ndcg@10"] == 0.3


def test_validation_can_be_rare_but_is_never_left_out_at_the_end(split, tmp_path):
    _, summary = fit(split, tmp_path, replace(TRAINING, epochs=5, validate_every=2))
    validated = [entry["epoch"] for entry in summary["log"] if "valid_ndcg@10" in entry]
    assert validated == [2, 4, 5]


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(split, tmp_path, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def watched(self, *args, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(split, tmp_path, replace(TRAINING, epochs=10, patience=10, learning_rate=0.01))
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01], rel=0.02)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[len(rates) // 2] == pytest.approx(0.0055, rel=0.02)
    assert rates[-1] == pytest.approx(0.001, rel=0.02)


def test_a_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(split, tmp_path):
    with pytest.raises(TrainingError, match="lower the learning rate"):
        fit(split, tmp_path, replace(TRAINING, learning_rate=1e38, max_grad_norm=1e38))
    assert not list(tmp_path.iterdir())


def test_histories_of_single_items_teach_nothing(tmp_path):
    split = leave_one_out(Histories.from_lists([[0, 1, 2], [3, 4, 5]]), ITEMS)
    with pytest.raises(TrainingError, match="nothing to learn from"):
        fit(split, tmp_path)


def test_a_catalogue_of_fewer_than_ten_items_is_refused(tmp_path):
    split = leave_one_out(Histories.from_lists([[0, 1, 2, 3, 4]]), 9)
    with pytest.raises(TrainingError, match="the catalogue has 9 items; expected at least 10"):
        fit_sasrec(
            split,
            tiny_catalogue(9),
            config=tiny_config(9),
            training=TRAINING,
            work=tmp_path,
        )


def test_an_output_embedding_of_its_own_is_trained(split, tmp_path):
    rec, _ = fit(split, tmp_path / "trained", tie_word_embeddings=False)
    untrained, _ = fit(
        split, tmp_path / "not", replace(TRAINING, learning_rate=0.0), tie_word_embeddings=False
    )
    assert not torch.equal(rec.item_head.weight, untrained.item_head.weight)


def test_a_model_that_reads_padding_on_the_left_is_not_trained(split, tmp_path):
    with pytest.raises(TrainingError, match="padding_side is 'left'"):
        fit(split, tmp_path, padding_side="left")
    assert not list(tmp_path.iterdir())


def test_an_unknown_loss_is_refused():
    with pytest.raises(TrainingError, match="one of softmax, bce, gbce; got 'bpr'"):
        SASRecTraining(loss="bpr")


@pytest.mark.parametrize(
    "training",
    [
        SASRecTraining(loss="softmax", epochs=6, batch_size=16, learning_rate=5e-3),
        SASRecTraining(loss="bce", epochs=10, batch_size=8, learning_rate=2e-3, negatives=1),
    ],
    ids=["softmax", "bce"],
)
def test_a_trained_model_clearly_beats_the_popularity_ranking(tmp_path, training):
    interactions = simulate(300, 100, seed=0)
    catalogue = Catalogue.from_interactions(interactions)
    split = leave_one_out(build_histories(interactions, catalogue), len(catalogue))
    _, targets = split.held_out("test")
    popular = np.argsort(-catalogue.counts, kind="stable")[:10]
    hits = targets[:, None] == popular[None, :]
    popularity = float((hits / np.log2(np.arange(2, 12))).sum(axis=1).mean())
    rec, _ = fit_sasrec(
        split,
        catalogue,
        config=tiny_config(
            len(catalogue),
            hidden_size=32,
            intermediate_size=64,
            max_position_embeddings=30,
            initializer_range=0.02,
        ),
        training=training,
        work=tmp_path,
    )
    ndcg = evaluate(rec, split, which="test", k=10).metrics["ndcg@10"]
    assert ndcg > 1.5 * popularity
