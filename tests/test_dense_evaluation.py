"""The dense evaluation agrees with the recorded values of the release, and the records can tell every mistake."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from dense_evaluation import FLOOR_MUTATIONS, MUTATIONS, assert_close, dense_drift

GOLDENS = Path(__file__).parent / "goldens" / "drift_loss.npz"
CASES = [f"case{k}_{variant}" for k in range(5) for variant in ("all", "one")]
# float32 rounding of the record itself; an independent float64 evaluation reaches 2e-5, 6e-6, 5e-6 and 3e-5.
LOSS, GRADIENT, SCALE, SQNORM = 5e-5, 2e-5, 2e-5, 1e-4
# A factor on case0 (s = 5.5, S = 16) that brings it under the floor concerned.
TINY = {"no_distance_floor": 1e-5, "no_unit_floor": 1e-4, "no_logit_scale_floor": 1e-4, "no_sqnorm_floor": 1e-7}


@lru_cache(maxsize=1)
def records():
    with np.load(GOLDENS) as archive:
        return {name: archive[name] for name in archive.files}


def inputs(case):
    names = ("gen", "pos", "neg", "weight_neg")
    temperatures = [round(float(tau), 6) for tau in records()[f"{case}/temperatures"]]
    return *(records()[f"{case}/{name}"] for name in names), temperatures


def assert_agrees_with_record(case, mutation=None):
    result = dense_drift(*inputs(case), mutation=mutation)
    record = {name.removeprefix(f"{case}/"): v for name, v in records().items() if name.startswith(f"{case}/")}
    assert_close(f"{case} loss", result.loss, record["loss"], relative=LOSS)
    assert_close(f"{case} gradient", result.gradient, record["grad_mean_loss"], relative=GRADIENT, normwise=True)
    assert_close(f"{case} scale", result.scale, record["scale"], relative=SCALE)
    for tau, value in result.sqnorm.items():
        assert_close(f"{case} n_{tau:g}", value, record[f"drift_sqnorm_{tau:g}"], relative=SQNORM)


@pytest.mark.parametrize("case", CASES)
def test_dense_evaluation_agrees_with_the_release(case):
    assert_agrees_with_record(case)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_each_mutation_is_seen_by_a_recorded_case(mutation):
    seen = []
    for case in ("case0_all", "case1_all", "case3_all"):
        try:
            assert_agrees_with_record(case, mutation)
        except AssertionError:
            seen.append(case)
    assert seen, f"no recorded case tells the mutation {mutation} from the method"


@pytest.mark.parametrize("mutation", FLOOR_MUTATIONS)
def test_floor_mutations_need_points_that_no_record_has(mutation):
    """The records stay above these floors, so tiny features have to tell them: the reason for cases of their own."""
    dense, mutated = dense_drift(*inputs("case0_all")), dense_drift(*inputs("case0_all"), mutation=mutation)
    assert_close("recorded case", mutated.gradient, dense.gradient, relative=LOSS, normwise=True)
    generated, positives, negatives, weights, temperatures = inputs("case0_all")
    tiny = [value * TINY[mutation] for value in (generated, positives, negatives)]
    right = dense_drift(*tiny, weights, temperatures)
    wrong = dense_drift(*tiny, weights, temperatures, mutation=mutation)
    with pytest.raises(AssertionError):
        assert_close("gradient", wrong.gradient, right.gradient, relative=1e-2, normwise=True)


def test_given_statistics_replace_the_measured_ones():
    arguments = inputs("case0_all")
    measured = dense_drift(*arguments)
    one_problem = [value[1:2] for value in arguments[:4]]
    given = dense_drift(*one_problem, arguments[4], scale=measured.scale, sqnorm=measured.sqnorm)
    assert_close("loss of one problem", given.loss, measured.loss[1:2], relative=1e-12)


def test_value_is_the_mean_square_of_the_normalised_drift():
    """With one temperature the mean loss is n / max(n, 1e-8) = 1; with three it cannot exceed 3^2."""
    assert_close("mean loss", dense_drift(*inputs("case2_one")).loss.mean(), 1.0, relative=1e-12)
    assert dense_drift(*inputs("case2_all")).loss.mean() <= 9.0


def test_unknown_mutation_is_refused():
    with pytest.raises(ValueError, match="no_flor"):
        dense_drift(*inputs("case1_one"), mutation="no_flor")
