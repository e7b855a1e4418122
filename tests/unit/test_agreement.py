"""Which column predicts the causal effect: against scipy, and on columns that are known to."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from steerrec.agreement import attribution_study
from steerrec.attribution import AttributionTable
from steerrec.errors import ArtifactError
from steerrec.study_plot import plot_attribution_study

RNG = np.random.default_rng(0)


def table(n=200, **columns):
    """Effects of n neurons, many of them equal; neuron 0 is not measured, neuron 1 never active."""
    effect = np.random.default_rng(1).normal(size=n).round(1)
    measured, active = np.ones(n), np.full(n, 0.1)
    measured[0] = active[1] = 0
    given = {
        "cohens_d": np.random.default_rng(2).normal(size=n),
        "causal_effect": effect,
        "causal_effect_se": np.full(n, 0.5),
        "causal_gini": -effect,
        "causal_measured": measured,
        "causal_active": active,
        **columns,
    }
    tensors = {name: torch.from_numpy(values).float() for name, values in given.items()}
    return AttributionTable(tensors, {"name": "popularity"})


def noisy(scale):
    effect = table()["causal_effect"].numpy()
    return (effect + scale * np.random.default_rng(3).normal(size=len(effect))).round(1)


def test_correlations_are_spearmans_over_the_neurons_that_count():
    given = table(auroc=0.5 + 0.1 * noisy(1.0), grad_attribution=noisy(0.3))
    study = attribution_study(given, replicates=10)
    assert study.neurons == 198
    assert [row.column for row in study.rows] == ["grad_attribution", "auroc", "cohens_d"]
    assert study.best == "grad_attribution"
    effect = given["causal_effect"].numpy()[2:]
    for row in study.rows:
        values = given.signed(row.column).numpy()[2:]
        assert row.correlation == pytest.approx(scipy.stats.spearmanr(values, effect).statistic)
        sizes = scipy.stats.spearmanr(abs(values), abs(effect)).statistic
        assert row.magnitude == pytest.approx(sizes)


def test_the_interval_is_that_of_resampled_neurons():
    given = table(grad_attribution=noisy(1.0))
    row = attribution_study(given, columns=["grad_attribution"], replicates=2000).rows[0]
    pair = np.stack([given[name].numpy()[2:] for name in ("grad_attribution", "causal_effect")])
    drawn = [
        scipy.stats.spearmanr(*pair[:, RNG.integers(198, size=198)]).statistic for _ in range(1000)
    ]
    assert row.interval == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.02)


def test_a_column_that_is_the_effect_finds_all_and_one_against_it_too_by_size():
    effect = table()["causal_effect"].numpy()
    study = attribution_study(table(auroc=0.5 + effect / 10, grad_attribution=-effect))
    best, *_, worst = study.rows
    assert (best.column, worst.column) == ("auroc", "grad_attribution")
    assert best.found >= 0.9  # equal effects are cut off somewhere
    assert (best.correlation, worst.correlation) == pytest.approx((1, -1))
    assert worst.magnitude == pytest.approx(1)
    assert best.interval == pytest.approx((1, 1))


def test_reliability_and_a_least_activity():
    active = np.full(200, 0.01)
    active[10:60] = 0.2
    given = table(causal_active=active)
    study = attribution_study(given, least_active=0.05, replicates=10)
    assert (study.neurons, study.least_active) == (50, 0.05)
    variance = given["causal_effect"].numpy()[10:60].var()
    assert study.reliability == pytest.approx(1 - 0.25 / variance)
    with pytest.raises(ArtifactError, match=r"0 neurons .* in more than 50\.00% of the users; exp"):
        attribution_study(given, least_active=0.5)


def test_another_target_and_json():
    study = attribution_study(table(), target="causal_gini", replicates=20)
    assert study.target == "causal_gini"
    assert json.loads(json.dumps(study.to_dict()))["rows"][0]["column"] == "cohens_d"


def test_one_seed_gives_one_study():
    one, again, other = (attribution_study(table(), replicates=50, seed=s) for s in (0, 0, 1))
    assert one == again
    assert one != other


def test_a_table_that_was_not_measured_is_an_error():
    given = table()
    plain = AttributionTable({"cohens_d": given["cohens_d"]}, given.contrast)
    with pytest.raises(ArtifactError, match="no causal_effect; add it with `steerrec score"):
        attribution_study(plain)
    with pytest.raises(ArtifactError, match="0 neurons were switched off"):
        attribution_study(table(causal_active=np.zeros(200)))
    with pytest.raises(ArtifactError, match="has no column 'taste'; it has causal_active, "):
        attribution_study(given, columns=["taste"])


def test_the_picture(tmp_path):
    given = table(grad_attribution=noisy(0.3))
    file = tmp_path / "new" / "study.png"
    plot_attribution_study(given, attribution_study(given, replicates=20), file, title="Made up")
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
