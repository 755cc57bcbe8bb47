"""The inception score: recorded value, limits that are known, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from drift_accel.evaluation import inception_score

GOLDEN = Path(__file__).parent / "goldens" / "metrics.npz"


@pytest.mark.parametrize("convert", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_matches_the_recorded_value(convert):
    recorded = np.load(GOLDEN)
    mean, deviation = inception_score(convert(recorded["logits"]))
    assert mean == pytest.approx(float(recorded["inception_score_mean"]), rel=1e-6)
    assert deviation == pytest.approx(float(recorded["inception_score_std"]), rel=1e-6)


def test_equal_predictions_score_one():
    mean, deviation = inception_score(np.tile(np.arange(5.0), (40, 1)))
    assert mean == pytest.approx(1.0, abs=1e-12)
    assert deviation == pytest.approx(0.0, abs=1e-12)


def test_certain_and_balanced_predictions_score_the_number_of_classes():
    # Probabilities underflow to exact zeros, and class 4 is never predicted.
    logits = np.full((80, 5), -1e4)
    logits[np.arange(80), np.arange(80) % 4] = 1e4
    mean, deviation = inception_score(logits, splits=1)
    assert mean == pytest.approx(4.0, rel=1e-12)
    assert deviation == 0.0


def test_splits_of_unequal_size_use_every_row():
    logits = np.random.default_rng(0).standard_normal((23, 6))
    order = np.random.RandomState(2020).permutation(23)
    probabilities = np.exp(logits[order])
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = []
    for part in (probabilities[:7], probabilities[7:15], probabilities[15:]):
        divergence = (part * np.log(part / part.mean(axis=0))).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    mean, deviation = inception_score(logits, splits=3)
    assert mean == pytest.approx(np.mean(scores), rel=1e-12)
    assert deviation == pytest.approx(np.std(scores), rel=1e-12)


def test_does_not_touch_the_global_generator():
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    inception_score(np.eye(20))
    assert np.random.rand() == expected


@pytest.mark.parametrize(
    ("logits", "splits", "message"),
    [
        (np.zeros(10), 1, "must have shape"),
        (np.zeros((5, 3)), 10, "splits must lie between 1 and the number of rows 5, got 10"),
        (np.zeros((5, 3)), 0, "splits must lie"),
        (np.full((5, 3), np.nan), 1, "NaN"),
    ],
)
def test_refuses_bad_input(logits, splits, message):
    with pytest.raises(ValueError, match=message):
        inception_score(logits, splits=splits)
