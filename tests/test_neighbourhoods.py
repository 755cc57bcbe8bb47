"""Balls and neighbours across two sets: explicit loops, limits, copies, invariances."""

import numpy as np
import pytest

from drift_accel.evaluation import precision_recall
from drift_accel.evaluation.neighbourhoods import expected_coverage, find_neighbourhoods


def make_sets(seed: int, num_real: int = 61, num_generated: int = 47) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((num_real, 5)), 0.8 * random.standard_normal((num_generated, 5)) + 0.3


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([[float(np.sqrt(((a - b) ** 2).sum())) for b in y] for a in x])


def by_definition(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """Density and coverage as Naeem et al. 2020 write them, precision and recall beside, in loops over points."""
    radii = {
        name: np.array([np.sort(np.delete(row, i))[k - 1] for i, row in enumerate(distances(points, points))])
        for name, points in (("real", real), ("generated", generated))
    }
    across = distances(real, generated)
    inside = [sum(across[i, j] <= radii["real"][i] for i in range(len(real))) for j in range(len(generated))]
    return {
        "density": sum(inside) / (k * len(generated)),
        "coverage": np.mean([min(across[i]) <= radii["real"][i] for i in range(len(real))]),
        "precision": np.mean([count > 0 for count in inside]),
        "recall": np.mean([any(across[i] <= radii["generated"]) for i in range(len(real))]),
    }


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("seed", range(2))
def test_matches_loops_over_points(seed, k):
    real, generated = make_sets(seed)
    found = find_neighbourhoods(real, generated, k)
    for name, expected in by_definition(real, generated, k).items():
        assert getattr(found, name) == pytest.approx(float(expected), abs=1e-12), name
    assert (found.precision, found.recall) == precision_recall(real, generated, k=k)


@pytest.mark.parametrize("tile_size", [4, 50, 4096])
def test_neighbours_are_those_of_a_full_sort_whatever_the_tiles(tile_size):
    real, generated = make_sets(3)
    found = find_neighbourhoods(real, generated, 4, tile_size=tile_size)
    across = distances(generated, real)
    np.testing.assert_array_equal(found.nearest_real, np.argsort(across, axis=1)[:, :4])
    np.testing.assert_allclose(found.nearest_real_distances, np.sort(across, axis=1)[:, :4], rtol=1e-12)
    np.testing.assert_array_equal(found.nearest_generated, np.argsort(across.T, axis=1)[:, :4])
    np.testing.assert_allclose(found.nearest_generated_distances, np.sort(across.T, axis=1)[:, :4], rtol=1e-12)


def test_a_set_against_itself():
    points, _ = make_sets(1)
    found = find_neighbourhoods(points, points, 5)
    assert (found.coverage, found.precision, found.recall) == (1.0, 1.0, 1.0)
    # Each point lies in its own ball and in those of the points whose k nearest it is among: k + 1 on average.
    assert found.density == pytest.approx(6 / 5, abs=1e-12)
    np.testing.assert_array_equal(found.nearest_real[:, 0], np.arange(len(points)))
    assert (found.nearest_real_distances[:, 0] == 0).all()


def test_a_set_far_away_covers_nothing():
    points, _ = make_sets(1)
    found = find_neighbourhoods(points, points + 1e3, 5)
    assert (found.coverage, found.precision, found.recall, found.density) == (0.0, 0.0, 0.0, 0.0)
    assert found.isolation.min() > 100


def test_collapse_onto_one_point_keeps_precision_and_loses_coverage():
    points, _ = make_sets(2, num_real=200)
    found = find_neighbourhoods(points, np.repeat(points[:1], 50, axis=0), 5)
    assert found.precision == 1.0
    assert found.coverage < 0.15
    assert found.recall == pytest.approx(1 / 200)


def test_the_order_of_rows_a_shift_and_a_scale_change_nothing():
    real, generated = make_sets(4)
    random = np.random.default_rng(0)
    first, second = random.permutation(len(real)), random.permutation(len(generated))
    plain = find_neighbourhoods(real, generated)
    moved = find_neighbourhoods(3.5 * real[first] + 20, 3.5 * generated[second] + 20)
    for name in ("density", "coverage", "precision", "recall"):
        assert getattr(moved, name) == getattr(plain, name)
    np.testing.assert_allclose(moved.isolation, plain.isolation[second], rtol=1e-9)
    np.testing.assert_array_equal(moved.covered, plain.covered[first])
    np.testing.assert_array_equal(first[moved.nearest_real], plain.nearest_real[second])


def test_equal_distributions_reach_the_expected_coverage():
    random = np.random.default_rng(0)
    coverages = [
        find_neighbourhoods(random.standard_normal((120, 3)), random.standard_normal((60, 3)), 2).coverage for _ in range(40)
    ]
    # Lemma 2 by its own argument: of the k + ... nearest points around a real one, the first k are real with this probability.
    error = np.std(coverages) / np.sqrt(len(coverages))
    assert np.mean(coverages) == pytest.approx(expected_coverage(120, 60, 2), abs=4 * error)
    assert expected_coverage(1000, 1000, 5) == pytest.approx(1 - 0.5**5, abs=0.01)


def test_copies_do_not_divide_by_zero():
    real = np.zeros((10, 2))
    found = find_neighbourhoods(real, np.concatenate([real[:5], real[:5] + 1]), 3)
    assert found.coverage == 1.0
    assert np.isnan(found.isolation[:5]).all() and np.isinf(found.isolation[5:]).all()


@pytest.mark.parametrize(
    ("real", "generated", "k", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), 3, "real has 3 points"),
        (np.zeros((9, 2)), np.zeros((3, 2)), 3, "generated has 3 points"),
        (np.zeros((9, 2)), np.zeros((9, 3)), 3, "different dimensions, 2 and 3"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), 3, "generated holds a NaN"),
        (np.zeros((9, 2)), np.zeros((9, 2)), 0, "k must be at least 1"),
    ],
)
def test_refuses_bad_input(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        find_neighbourhoods(real, generated, k)
