"""Selections: balanced, by seed alone, nested, refused where there are too few."""

import numpy as np
import pytest

from drift_accel.analysis.activations.sample_selection import select_samples

LABELS = np.repeat([0, 1, 2, 5], [30, 4, 12, 7])[np.random.Generator(np.random.Philox(key=2)).permutation(53)]


def counts(items) -> list[int]:
    return np.bincount(LABELS[items], minlength=6).tolist()


def test_so_many_of_each_class():
    items = select_samples(LABELS, per_class=4)
    assert counts(items) == [4, 4, 4, 0, 0, 4] and (np.diff(items) > 0).all()
    assert set(select_samples(LABELS, per_class=2)) < set(items)  # fewer are among the more
    assert set(select_samples(LABELS, per_class=4, classes=[5, 0])) == {i for i in items if LABELS[i] in (0, 5)}
    assert set(select_samples(LABELS, per_class=4, seed=1)) != set(items)
    assert select_samples(LABELS, classes=[1]).tolist() == np.flatnonzero(LABELS == 1).tolist()
    assert select_samples(LABELS).tolist() == list(range(53))


def test_so_many_in_all_take_classes_in_turn():
    for count in (1, 6, 16, 25, 53):
        items = select_samples(LABELS, num_samples=count)
        found = np.array(counts(items))[[0, 1, 2, 5]]
        assert found.sum() == count
        # A class is behind the largest by more than one only where it has no more.
        assert all(have == total or have >= found.max() - 1 for have, total in zip(found, [30, 4, 12, 7], strict=True))
    assert set(select_samples(LABELS, num_samples=6)) < set(select_samples(LABELS, num_samples=16))


def test_samples_do_not_depend_on_other_classes():
    alone = select_samples(np.where(LABELS == 2, 2, 0), per_class=5, classes=[2])
    assert alone.tolist() == select_samples(LABELS, per_class=5, classes=[2]).tolist()


def test_unlabelled_samples_are_one_class():
    assert len(select_samples(np.full(9, -1), num_samples=4)) == 4
    assert select_samples(np.zeros(0, np.int64)).tolist() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 5}, r"class 1 \(1\) has 4 samples, 5 were asked for: ask for at most 4"),
        ({"per_class": 0}, "--per_class is 0"),
        ({"num_samples": 0}, "--num_samples is 0"),
        ({"num_samples": 54}, "there are 53 samples, 54 were asked for"),
        ({"num_samples": 4, "per_class": 1}, "give one"),
        ({"classes": [0, 3]}, r"class 3 \(3\) has no samples"),
    ],
)
def test_impossible_selections_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        select_samples(LABELS, **options)
