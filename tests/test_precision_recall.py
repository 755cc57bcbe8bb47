"""Precision and recall: recorded values, a brute-force loop, tiles, duplicates, borders, refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch

from drift_accel.evaluation import precision_recall
from drift_accel.training.measurement import peak_allocation

GOLDEN = Path(__file__).parent / "goldens" / "metrics.npz"


def covered_share(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """The definition, one point at a time."""
    radii = []
    for index, centre in enumerate(centres):
        others = np.delete(centres, index, axis=0)
        radii.append(np.sort(np.linalg.norm(others - centre, axis=1))[k - 1])
    return float(np.mean([(np.linalg.norm(centres - point, axis=1) <= np.array(radii)).any() for point in points]))


def make_sets(seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    real = random.standard_normal((83, 6))
    generated = 0.8 * random.standard_normal((71, 6)) + 0.4
    return real, generated


def test_matches_the_recorded_values():
    recorded = np.load(GOLDEN)
    precision, recall = precision_recall(recorded["features_real"], recorded["features_generated"])
    assert precision == pytest.approx(float(recorded["precision"]), rel=1e-6)
    assert recall == pytest.approx(float(recorded["recall"]), rel=1e-6)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("seed", range(2))
def test_matches_a_loop_over_points(seed, k):
    real, generated = make_sets(seed)
    precision, recall = precision_recall(real, generated, k=k)
    assert precision == covered_share(generated, real, k)
    assert recall == covered_share(real, generated, k)


@pytest.mark.parametrize("offset", [0.0, 1e4], ids=["centred", "far from the origin"])
def test_does_not_depend_on_the_tile_size_or_the_type(offset):
    real, generated = (torch.from_numpy(points + offset).float() for points in make_sets(5))
    expected = covered_share(generated.double().numpy(), real.double().numpy(), 3)
    results = {precision_recall(real, generated, tile_size=size) for size in (1, 7, 64, 83, 4096)}
    results.add(precision_recall(real.numpy(), generated.numpy()))
    assert len(results) == 1
    assert results.pop()[0] == expected


def test_the_border_belongs_to_the_ball():
    # Neighbours on a line, 1 apart: the first radius is 1, and 4.0 is exactly 1 away from the last real point.
    real = np.array([[0.0], [1.0], [2.0], [3.0]]) / 3
    assert precision_recall(real, np.array([[4.0], [4.001], [-1.0], [-2.0]]) / 3, k=1)[0] == 0.5


@pytest.mark.parametrize("tile_size", [2, 4096])
def test_duplicates_are_neighbours_of_each_other(tile_size):
    # Every radius is zero, so that only exact copies are inside; features far from zero make rounding visible.
    random = np.random.default_rng(0)
    points = random.standard_normal((5, 40)) * 100 + 1e3
    real = np.repeat(points, 4, axis=0)
    generated = np.concatenate([np.repeat(points[:2], 4, axis=0), points[:1] + 1e-2])
    precision, recall = precision_recall(real, generated, k=3, tile_size=tile_size)
    assert precision == 8 / 9
    assert recall == 2 / 5


def test_a_set_covers_itself():
    real, _ = make_sets(1)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1e3) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (np.zeros((3, 2)), np.zeros((9, 2)), {}, "real has 3 points; the 3-th neighbour needs at least 4"),
        (np.zeros((9, 2)), np.zeros((1, 2)), {"k": 1}, "generated has 1 points"),
        (np.zeros((9, 2)), np.zeros((9, 3)), {}, "different dimensions, 2 and 3"),
        (np.zeros(9), np.zeros((9, 3)), {}, "real must have shape"),
        (np.zeros((9, 2)), np.full((9, 2), np.nan), {}, "generated holds a NaN"),
        (np.zeros((9, 2)), np.zeros((9, 2)), {"k": 0}, "k must be at least 1, got 0"),
        (np.zeros((9, 2)), np.zeros((9, 2)), {"tile_size": 0}, "tile_size must be at least 1, got 0"),
    ],
)
def test_refuses_bad_input(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, **options)


def test_memory_beside_the_features_does_not_grow_with_their_number():
    """Tiles bound it: four times the points take four times the k distances a point that are kept, and little else."""
    sets = {count: torch.randn(2, count, 16, generator=torch.Generator().manual_seed(0)) for count in (1000, 4000)}
    peaks = {
        count: peak_allocation(lambda pair=pair: precision_recall(*pair, tile_size=100), torch.device("cpu"))
        for count, pair in sets.items()
    }
    whole_matrix = 4000 * 4000 * 8
    assert peaks[4000] - peaks[1000] < 3000 * (2 * 3 + 4) * 8 + 3000 * 16 * 8 * 2
    assert peaks[4000] < whole_matrix / 50
