"""The Frechet distance: recorded value, scipy's matrix square root, invariances, singular covariances, refusals."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from drift_accel.evaluation import frechet_distance, gaussian_statistics

GOLDEN = Path(__file__).parent / "goldens" / "metrics.npz"


def make_gaussian(seed: int, dimension: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    factor = random.standard_normal((dimension, 3 * dimension))
    return random.standard_normal(dimension), factor @ factor.T / (3 * dimension)


def test_matches_the_recorded_value():
    recorded = np.load(GOLDEN)
    statistics = [gaussian_statistics(recorded[f"features_{name}"]) for name in ("real", "generated")]
    assert frechet_distance(*statistics[0], *statistics[1]) == pytest.approx(float(recorded["frechet"]), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_matches_the_matrix_square_root(seed):
    mean_a, covariance_a = make_gaussian(seed)
    mean_b, covariance_b = make_gaussian(seed + 100)
    root = scipy.linalg.sqrtm(covariance_a @ covariance_b)
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(covariance_a + covariance_b - 2 * root.real)
    assert frechet_distance(mean_a, covariance_a, mean_b, covariance_b) == pytest.approx(expected, rel=1e-9)


def test_is_symmetric_and_does_not_change_under_rotation():
    mean_a, covariance_a = make_gaussian(1)
    mean_b, covariance_b = make_gaussian(2)
    distance = frechet_distance(mean_a, covariance_a, mean_b, covariance_b)
    assert frechet_distance(mean_b, covariance_b, mean_a, covariance_a) == pytest.approx(distance, rel=1e-10)
    rotation, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((12, 12)))
    turned = [
        rotation @ mean_a, rotation @ covariance_a @ rotation.T, rotation @ mean_b, rotation @ covariance_b @ rotation.T
    ]  # fmt: skip
    assert frechet_distance(*turned) == pytest.approx(distance, rel=1e-10)


def test_known_distance_of_diagonal_gaussians():
    deviations_a, deviations_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 4.0])
    mean_a, mean_b = np.zeros(3), np.array([1.0, 0.0, 2.0])
    expected = 5.0 + ((deviations_a - deviations_b) ** 2).sum()
    with pytest.warns(RuntimeWarning, match="covariance_a is singular .rank 2 of 3."):
        distance = frechet_distance(mean_a, np.diag(deviations_a**2), mean_b, np.diag(deviations_b**2))
    assert distance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_rows", [500, 40], ids=["regular", "singular"])
@pytest.mark.filterwarnings("ignore:covariance")
def test_equal_sets_have_distance_zero(num_rows):
    features = np.random.default_rng(0).standard_normal((num_rows, 64)).astype(np.float32) + 0.5
    statistics = gaussian_statistics(features)
    assert 0.0 <= frechet_distance(*statistics, *statistics) < 1e-8
    shuffled = gaussian_statistics(features[::-1])
    assert 0.0 <= frechet_distance(*statistics, *shuffled) < 1e-8


def test_well_conditioned_input_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(*make_gaussian(1), *make_gaussian(2))


def test_negative_eigenvalues_are_named():
    mean, covariance = make_gaussian(1)
    indefinite = covariance - np.linalg.eigvalsh(covariance)[1] * np.eye(12)
    with pytest.warns(RuntimeWarning, match="covariance_b is not positive semi-definite"):
        assert np.isfinite(frechet_distance(mean, covariance, mean, indefinite))


def test_statistics_match_numpy_and_do_not_depend_on_the_type():
    features = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0)) + 100.0
    mean, covariance = gaussian_statistics(features)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, features.double().mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert np.array_equal(covariance, gaussian_statistics(features.numpy())[1])
    assert np.isfinite(gaussian_statistics(features.bfloat16())[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c: (m[:-1], c), r"mean_a must be \[D\]"),
        (lambda m, c: (m, c[:, :-1]), r"covariance_a \[D, D\]"),
        (lambda m, c: (np.full_like(m, np.nan), c), "NaN"),
        (lambda m, c: (m, c + np.inf), "NaN or an infinite"),
        (lambda m, c: (m, c + np.triu(np.ones_like(c))), "not symmetric"),
        (lambda m, c: (m[:-1], c[:-1, :-1]), "different dimensions, 11 and 12"),
    ],
)
def test_refuses_what_is_no_gaussian(change, message):
    mean, covariance = make_gaussian(1)
    with pytest.raises(ValueError, match=message):
        frechet_distance(*change(mean, covariance), mean, covariance)


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(3), np.full((4, 2), np.nan), np.full((4, 2), np.inf)])
def test_statistics_refuse_bad_features(features):
    with pytest.raises(ValueError, match="features"):
        gaussian_statistics(features)
