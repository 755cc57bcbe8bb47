"""KID: clean-fid's estimator, its own random numbers, known limits, refusals."""

import numpy as np
import pytest
from cleanfid.fid import kernel_distance as clean_fid_kernel_distance

from drift_accel.evaluation.kernel_distance import kernel_distance


def make_sets(shift: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.standard_normal((90, 16)), random.standard_normal((70, 16)) + shift


def test_equals_clean_fids_with_the_same_subsets():
    real, generated = make_sets()
    np.random.seed(0)
    expected = clean_fid_kernel_distance(real, generated, num_subsets=7, max_subset_size=40)
    mean, deviation = kernel_distance(real, generated, num_subsets=7, subset_size=40)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert deviation > 0


def test_does_not_touch_the_global_generator_and_repeats():
    real, generated = make_sets()
    state = np.random.get_state()[1].copy()
    assert kernel_distance(real, generated, num_subsets=3) == kernel_distance(real, generated, num_subsets=3)
    assert np.array_equal(np.random.get_state()[1], state)


def test_grows_with_the_distance_and_is_about_zero_for_equal_distributions():
    values = [kernel_distance(*make_sets(shift), num_subsets=20, subset_size=60)[0] for shift in (0.0, 0.3, 0.6)]
    assert abs(values[0]) < 0.1 * values[1] and values[1] < values[2]


def test_features_of_half_precision_are_summed_in_double():
    real, generated = (features.astype(np.float32) for features in make_sets())
    expected = kernel_distance(real.astype(np.float64), generated.astype(np.float64), num_subsets=3)
    assert kernel_distance(real, generated, num_subsets=3) == expected


@pytest.mark.parametrize(
    ("real", "generated", "options", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), {}, "real must have shape"),
        (np.zeros((5, 3)), np.zeros(5), {}, "generated must have shape"),
        (np.zeros((5, 3)), np.zeros((5, 4)), {}, "different dimensions, 3 and 4"),
        (np.zeros((5, 3)), np.zeros((5, 3)), {"num_subsets": 0}, "at least 1 subset of 2 rows, got 0"),
        (np.zeros((5, 3)), np.zeros((5, 3)), {"subset_size": 1}, "at least 1 subset of 2 rows"),
    ],
)
def test_refuses_bad_input(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(real, generated, **options)
