"""Class by class: numbers by their definitions, and the words for what is wrong with a class."""

import numpy as np
import pytest

from drift_accel.analysis.comparison.class_coverage import (
    ABSENT,
    COLLAPSED,
    FINE,
    NOT_REAL,
    UNCOVERED,
    compare_classes,
    missing_classes,
    worst_classes,
)
from drift_accel.evaluation.neighbourhoods import find_neighbourhoods

CENTRES = 8.0 * np.eye(5)
NAMES = {label: f"kind {label}" for label in range(5)}


def draw(seed: int, per_class: int = 30) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(5), per_class)
    return CENTRES[labels] + random.standard_normal((len(labels), 5)), labels


def compare(generated, labels, real=None, real_labels=None):
    if real is None:
        real, real_labels = draw(0)
    return compare_classes(real, real_labels, generated, labels, find_neighbourhoods(real, generated, 5), NAMES)


def test_every_kind_of_fault_gets_its_word():
    generated, labels = draw(1)
    kept = labels != 0
    generated, labels = generated[kept], labels[kept]  # 0 is absent
    generated[labels == 1] = CENTRES[2]  # 1 is drawn as one point of another class: both words fit, collapse is said
    generated[labels == 2] += 0.01
    generated[labels == 3] = generated[labels == 4] + 0.1  # 3 is asked for, 4 is drawn
    generated, labels = np.concatenate([generated, CENTRES[4:] + 1]), np.append(labels, 9)
    found = {one.label: one for one in compare(generated, labels)}
    assert [found[label].state for label in (0, 1, 2, 3, 4, 9)] == [ABSENT, COLLAPSED, FINE, UNCOVERED, FINE, NOT_REAL]
    assert [one.name for one in missing_classes(list(found.values()))] == ["kind 0", "kind 3"]
    assert {one.label for one in worst_classes(list(found.values()), 3)} == {0, 1, 3}
    assert found[0].centroid_distance is None and found[9].coverage is None and found[9].name == "9"


def test_numbers_by_their_definitions():
    real, real_labels = draw(0)
    generated, labels = draw(1)
    generated[labels == 2] = CENTRES[2] + 0.5 * (generated[labels == 2] - CENTRES[2]) + [3, 0, 0, 0, 0]
    near = find_neighbourhoods(real, generated, 5)
    for one in compare_classes(real, real_labels, generated, labels, near, NAMES):
        mine, its = real[real_labels == one.label], generated[labels == one.label]
        spread = np.sqrt(np.trace(np.cov(mine.T)))
        assert one.centroid_distance == pytest.approx(np.linalg.norm(its.mean(0) - mine.mean(0)) / spread)
        assert one.spread_ratio == pytest.approx(np.trace(np.cov(its.T)) / np.trace(np.cov(mine.T)))
        assert one.coverage == near.covered[real_labels == one.label].mean()
        votes = [(real_labels[near.nearest_real[i]] == one.label).mean() for i in np.flatnonzero(labels == one.label)]
        assert one.label_agreement == pytest.approx(np.mean(votes))
        assert (one.num_real, one.num_generated) == (30, 30)


def test_equal_distributions_lie_at_the_expected_distance_and_nothing_is_wrong():
    found = [one for seed in range(1, 9) for one in compare(*draw(seed))]
    assert {one.state for one in found} == {FINE}
    mean = np.sqrt(np.mean([one.centroid_distance**2 for one in found]))
    # All eight are held against the same real draw, which is why the tolerance is wide.
    assert mean == pytest.approx(found[0].expected_centroid_distance, rel=0.25)


def test_a_class_of_few_samples_is_not_called_uncovered_by_chance():
    real, real_labels = draw(0)
    generated, labels = draw(1)
    few = np.concatenate([real, 100 + np.arange(5.0)[None]])
    found = compare(generated, np.where(labels == 0, 7, labels), few, np.append(real_labels, 7))
    assert next(one for one in found if one.label == 7).state == FINE  # one real sample, uncovered; nothing can be said


def test_samples_without_a_class_belong_to_none():
    generated, labels = draw(1)
    real, real_labels = draw(0)
    assert compare(generated, np.full(len(labels), -1), real, np.full(len(real), -1)) == []
