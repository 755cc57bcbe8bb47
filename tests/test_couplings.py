"""Every option of the drift against a dense float64 evaluation, and what must hold whatever the option."""

import itertools
import math

import numpy as np
import pytest
import torch
from dense_couplings import OPTION_MUTATIONS, PRESETS, DenseOptions
from dense_evaluation import assert_close, dense_drift
from test_drift_loss import (
    BEST_TYPE,
    TOLERANCE,
    assert_agrees,
    every_backend,
    every_device,
    largest_disagreement,
    numbers,
    random_problem,
)

from drift_accel import DriftConfig, drift_loss
from drift_accel.drift import DriftStatistics
from drift_accel.drift.configuration import DRIFT_PRESETS

TEMPERATURES = (0.02, 0.05, 0.2)
# Rounding of d / tau at tau = 0.02, which the affinity floor hides where there is one. The largest seen are 9e-4 and, where a
# transport plan forces mass on a masked self pair (G = 1: a logit of -5000), 4e-4.
FLOAT32 = 2e-3

ALONE = [
    {},
    {"weight_placement": "log_bias"},
    {"weight_placement": "log_bias", "affinity_floor": 0.0},
    {"affinity_floor": 0.0},
    {"affinity_floor": 1e-12},
    {"affinity_floor": 1e-2},
    {"coupling": "row"},
    {"coupling": "row", "weight_placement": "log_bias"},
    {"coupling": "sinkhorn"},
    {"coupling": "sinkhorn", "sinkhorn_iterations": 1},
    {"coupling": "sinkhorn", "sinkhorn_iterations": 3},
    {"coupling": "sinkhorn", "sinkhorn_marginal": "none"},
    {"coupling": "sinkhorn", "sinkhorn_marginal": "none", "sinkhorn_iterations": 1},
    {"drift_form": "split"},
    {"metric": "l2_sq"},
    {"mask_self": False},
    {"attraction": 0.5},
    {"attraction": 0.0},
    {"repulsion": 2.0},
    {"repulsion": 0.0},
    {"attraction": 3.0, "repulsion": 3.0},
    {"field": "per_temperature"},
    {"reduction": "paper"},
]
CHOICES = {
    "weight_placement": ("after", "log_bias"),
    "affinity_floor": (1e-6, 0.0, 1e-3),
    "coupling": ("two_sided", "row", "sinkhorn"),
    "sinkhorn_iterations": (20, 1, 5),
    "sinkhorn_marginal": ("weighted_cols", "none"),
    "drift_form": ("joint", "split"),
    "metric": ("l2", "l2_sq"),
    "mask_self": (True, False),
    "attraction": (1.0, 0.5, 0.0),
    "repulsion": (1.0, 2.0, 0.0),
    "field": ("summed", "per_temperature"),
}
COUPLINGS = [
    {"coupling": coupling, "weight_placement": placement, "drift_form": form}
    for coupling, placement, form in itertools.product(
        ("two_sided", "row", "sinkhorn"), ("after", "log_bias"), ("joint", "split")
    )
]
SIZES = ((1, 4), (1, 7), (1, 7), (0, 5), (1, 9))  # B, G, P, N, S of a sampled combination: from, below


def sampled_options(count=40, seed=5):
    """Combinations of all options, each with the sizes B, G, P, N, S and the kind of weights it is tried on."""
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(count):
        options = {name: values[rng.integers(len(values))] for name, values in CHOICES.items()}
        weights = ("random", "mixed", "one_problem_zero", "large")[rng.integers(4)]
        if options["coupling"] == "sinkhorn" and options["sinkhorn_marginal"] == "none":
            weights = "random"
        sizes = tuple(int(rng.integers(low, high)) for low, high in SIZES)
        cases.append((options, sizes, weights if sizes[3] else "random"))
    return cases


def option_name(options):
    changed = {name: value for name, value in options.items() if value != getattr(DenseOptions(), name)}
    return "-".join(str(value) for value in changed.values()) or "defaults"


def evaluate(backend, arrays, temperatures=TEMPERATURES, dtype=None, statistics=None, diagnostics=False, device="cpu", **options):
    """Run drift_loss on (generated, positives, negatives, weights); also return the gradient of the mean loss."""
    dtype = BEST_TYPE[backend] if dtype is None else dtype
    generated, positives, negatives, weights = (torch.as_tensor(value, device=device).to(dtype) for value in arrays)
    generated.requires_grad_()
    config = DriftConfig(temperatures=tuple(temperatures), backend=backend, **options)
    result = drift_loss(
        generated,
        positives,
        negatives,
        negative_weight=weights,
        config=config,
        statistics=statistics,
        diagnostics=diagnostics,
    )
    result.loss.mean().backward()
    return result, numbers(generated.grad)


def dense(arrays, options, temperatures=TEMPERATURES, mutation=None, **statistics):
    return dense_drift(*arrays, temperatures, options=DenseOptions(**options, mutation=mutation), **statistics)


def rounded(arrays, dtype):
    return [torch.as_tensor(value).to(dtype).double().numpy() for value in arrays]


def assert_option_agrees(backend, arrays, options, dtype, device="cpu"):
    limit = FLOAT32 if dtype == torch.float32 else TOLERANCE[dtype]
    arrays = rounded(arrays, dtype)
    result, gradient = evaluate(backend, arrays, dtype=dtype, device=device, **options)
    assert torch.isfinite(result.loss).all() and np.isfinite(gradient).all()
    expected = dense(arrays, options)
    assert_agrees(result, gradient, expected, loss=limit, grad=limit, scale=limit, sqnorm=limit)
    square = result.statistics.mean_squared_distance
    assert_close("mean of d^2", numbers(square), expected.mean_square, relative=limit)


def fixed_statistics(scale=3.0, sqnorm=1.0, mean_square=11.0, temperatures=TEMPERATURES):
    """Statistics given from outside, so that two evaluations differ in their field alone."""
    scale, sqnorm, mean_square = (torch.tensor(value, dtype=torch.float64) for value in (scale, sqnorm, mean_square))
    return DriftStatistics(scale, dict.fromkeys(temperatures, sqnorm), mean_square)


def every_dtype(backend):
    return [dtype for dtype in (torch.float64, torch.float32) if dtype == torch.float32 or BEST_TYPE[backend] == dtype]


# The dense evaluation itself


@pytest.mark.parametrize("shape", [(4, 6, 5, 3, 8), (2, 1, 1, 0, 3), (2, 3, 2, 0, 4), (3, 1, 4, 2, 5)])
@pytest.mark.parametrize("weights", ["random", "one_problem_zero"])
def test_dense_options_at_their_defaults_are_the_release(shape, weights):
    """Two sets of loops, written apart, for the same field."""
    arrays = random_problem(*shape, weights)
    release, options = dense_drift(*arrays, TEMPERATURES), dense(arrays, {})
    assert_close("loss", options.loss, release.loss, relative=1e-12, absolute=1e-20)
    assert_close("gradient", options.gradient, release.gradient, relative=1e-12, absolute=1e-20, normwise=True)
    for tau in TEMPERATURES:
        assert_close(f"n_{tau}", options.sqnorm[tau], release.sqnorm[tau], relative=1e-12, absolute=1e-20)
        assert options.diagnostics[tau] == pytest.approx(release.diagnostics[tau], rel=1e-12)


def test_unknown_mutation_of_an_option_is_refused():
    with pytest.raises(ValueError, match="floor_under_rows"):
        DenseOptions(mutation="floor_under_rows")


# Against the dense evaluation


@every_backend
@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", ALONE, ids=option_name)
def test_each_option_agrees_with_the_dense_evaluation(backend, device, dtype, options):
    if dtype not in every_dtype(backend):
        pytest.skip("the backend computes in float32")
    for weights in ("random", "one_problem_zero"):
        if weights != "random" and options.get("sinkhorn_marginal") == "none":
            continue
        assert_option_agrees(backend, random_problem(weights=weights), options, dtype, device)


@every_backend
@every_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", sampled_options(), ids=lambda case: f"{option_name(case[0])}-{'x'.join(map(str, case[1]))}")
def test_combined_options_agree_with_the_dense_evaluation(backend, device, dtype, case):
    if dtype not in every_dtype(backend):
        pytest.skip("the backend computes in float32")
    options, sizes, weights = case
    assert_option_agrees(backend, random_problem(*sizes, weights), options, dtype, device)


@every_backend
@pytest.mark.parametrize("name", PRESETS)
def test_presets_agree_with_the_dense_evaluation(backend, name):
    config = DriftConfig.preset(name, backend=backend)
    for option in DenseOptions.__dataclass_fields__:
        if option != "mutation":
            assert getattr(config, option) == getattr(DenseOptions(**PRESETS[name]), option), option
    arrays = random_problem(weights="one_problem_zero")
    x, p, n, w = (torch.as_tensor(value).to(BEST_TYPE[backend]) for value in arrays)
    x.requires_grad_()
    result = drift_loss(x, p, n, negative_weight=w, config=config)
    result.loss.mean().backward()
    limit = TOLERANCE[BEST_TYPE[backend]]
    expected = dense(rounded(arrays, BEST_TYPE[backend]), PRESETS[name])
    assert_agrees(result, numbers(x.grad), expected, loss=limit, grad=limit, scale=limit, sqnorm=limit)


@every_backend
@pytest.mark.parametrize("options", ALONE + COUPLINGS, ids=option_name)
def test_diagnostics_of_each_option_agree_with_the_dense_evaluation(backend, options):
    arrays = rounded(random_problem(), BEST_TYPE[backend])
    result, _ = evaluate(backend, arrays, diagnostics=True, **options)
    expected = dense(arrays, options).diagnostics
    for name, tau in itertools.product(expected[0.02], TEMPERATURES):
        if name == "mean_coefficient" and options.get("attraction", 1) != options.get("repulsion", 1):
            continue  # the remainder of c may be counted with the self pairs, whose displacement is zero
        actual = numbers(result.diagnostics[name][tau])
        assert_close(f"{name} at {tau}", actual, expected[tau][name], relative=TOLERANCE[BEST_TYPE[backend]])


@every_backend
@pytest.mark.parametrize("mutation", OPTION_MUTATIONS)
def test_mutated_options_would_be_caught(backend, mutation):
    """The implementation agrees with the option and not with the mutation, on one case that tells them apart."""
    options = OPTION_MUTATIONS[mutation]
    generated, positives, negatives, weights = random_problem(
        weights="random" if options.get("sinkhorn_marginal") == "none" else "one_problem_zero"
    )
    factor = 100.0 if mutation == "square_masked_before_scaling" else 1.0
    arrays = rounded([generated * factor, positives * factor, negatives * factor, weights], BEST_TYPE[backend])
    result, gradient = evaluate(backend, arrays, **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    right = largest_disagreement(result, gradient, dense(arrays, options))
    wrong = largest_disagreement(result, gradient, dense(arrays, options, mutation=mutation))
    assert right <= limit, f"the option itself: relative difference {right:.3e}, limit {limit:.1e}"
    assert wrong >= max(1e-3, 10 * right), f"{mutation} is too close to be told: relative difference {wrong:.3e}"


@every_backend
@pytest.mark.parametrize("options", ALONE + COUPLINGS, ids=option_name)
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 0, 3), (2, 1, 3, 0, 1), (2, 4, 1, 0, 3), (2, 1, 2, 3, 4)], ids=lambda shape: "x".join(map(str, shape))
)
def test_smallest_problems(backend, options, shape):
    """One generated sample has nobody else to see, one positive takes everything, and no negatives may be there."""
    for dtype in every_dtype(backend):
        assert_option_agrees(backend, random_problem(*shape), options, dtype)


@every_backend
@pytest.mark.parametrize("factor", [1e-7, 1e-5, 1e5])
@pytest.mark.parametrize("options", [{"metric": "l2_sq"}, {"metric": "l2_sq", "drift_form": "split"}], ids=option_name)
def test_squared_distances_of_tiny_and_huge_features(backend, options, factor):
    """d^2 has a floor of 1e-8, so its mean has one, and nothing else is floored."""
    generated, positives, negatives, weights = random_problem()
    arrays = generated * factor, positives * factor, negatives * factor, weights
    for dtype in every_dtype(backend):
        assert_option_agrees(backend, arrays, options, dtype)


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}, {"repulsion": 0.5}], ids=option_name)
def test_large_mean_offset_in_float32(backend, options):
    generated, positives, negatives, weights = random_problem(S=64)
    arrays = generated + 1000.0, positives + 1000.0, negatives + 1000.0, weights
    assert_option_agrees(backend, arrays, options, torch.float32)


# The kernel without normalisation, which the compiled op does not have


@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("placement", ["after", "log_bias"])
@pytest.mark.parametrize("weights", ["random", "one_problem_zero"])
def test_the_bare_kernel_agrees_with_the_dense_evaluation(form, placement, weights):
    options = {"coupling": "kernel", "drift_form": form, "weight_placement": placement}
    for shape in ((4, 6, 5, 3, 8), (2, 1, 1, 0, 3), (2, 1, 2, 3, 4)):
        assert_option_agrees("reference", random_problem(*shape, weights if shape[3] else "random"), options, torch.float64)


def test_all_kernels_are_the_same_field_at_a_temperature_that_makes_them_flat():
    """Only constants are left of them, and the field is divided by its norm."""
    arrays = random_problem()
    fields = [evaluate("reference", arrays, (1e7,), coupling=name)[1] for name in ("kernel", "row", "two_sided")]
    assert_close("gradient", fields[0], fields[1], relative=1e-5, normwise=True)
    assert_close("gradient", fields[0], fields[2], relative=1e-5, normwise=True)
    apart = [evaluate("reference", arrays, (0.5,), coupling=name)[1] for name in ("kernel", "row")]
    assert np.linalg.norm(apart[0] - apart[1]) > 1e-2 * np.linalg.norm(apart[1])


def test_temperatures_at_which_the_bare_kernel_vanishes_leave_the_others_alone():
    """exp(-d / 0.001) is 0 in every type: no field, and nothing divided by it."""
    arrays = random_problem()
    for dtype in (torch.float64, torch.float32):
        both, gradient = evaluate("reference", arrays, (0.001, 1.0), dtype=dtype, coupling="kernel")
        _, alone = evaluate("reference", arrays, (1.0,), dtype=dtype, coupling="kernel")
        assert float(both.drift_sqnorm[0.001]) < 1e-8
        assert_close("gradient", gradient, alone, relative=1e-5, normwise=True)


# Weights


@every_backend
@pytest.mark.parametrize("options", COUPLINGS, ids=option_name)
@pytest.mark.parametrize("num_generated", [1, 2, 6])
@pytest.mark.parametrize("weights", ["zero", "one_problem_zero"])
def test_guidance_of_exactly_one_is_finite_and_right(backend, options, num_generated, weights):
    """a = 1 gives w = 0: no logarithm of it may reach the loss."""
    arrays = random_problem(G=num_generated, weights=weights)
    for dtype, floor in itertools.product(every_dtype(backend), (1e-6, 0.0)):
        assert_option_agrees(backend, arrays, {**options, "affinity_floor": floor}, dtype)


@every_backend
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("value", [0.0, -0.5])
def test_uniform_columns_refuse_weights_that_are_not_positive(backend, form, value):
    generated, positives, negatives, weights = random_problem()
    weights[1, 2] = value
    options = {"coupling": "sinkhorn", "sinkhorn_marginal": "none", "drift_form": form}
    with pytest.raises(ValueError) as refusal:
        evaluate(backend, (generated, positives, negatives, weights), **options)
    for word in ("negative_weight", f"{value:g}", "sinkhorn_marginal", "none", "weighted_cols"):
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"
    evaluate(backend, (generated, positives, negatives[:, :0], weights[:, :0]), **options)  # no negatives: nothing to weigh


@every_backend
@pytest.mark.parametrize("options", [o for o in COUPLINGS if o["coupling"] != "sinkhorn"], ids=option_name)
@pytest.mark.parametrize("floor", [1e-6, 0.0])
def test_absent_targets_of_log_bias_are_no_targets(backend, options, floor):
    """log_bias: a weight of 0 is exactly a batch without the target, wherever it lies. after: it keeps its share of the row."""
    generated, positives, negatives, weights = random_problem(weights="zero")
    options = {**options, "affinity_floor": floor}
    with_zero, gradient = evaluate(backend, (generated, positives, negatives, weights), **options)
    without, expected = evaluate(backend, (generated, positives, negatives[:, :0], weights[:, :0]), **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    if options["weight_placement"] == "log_bias":
        assert_close("loss", numbers(with_zero.loss), numbers(without.loss), relative=limit)
        assert_close("gradient", gradient, expected, relative=limit, normwise=True)
    elif options["drift_form"] == "joint":  # split divides the share out, where no floor is in the way
        assert np.linalg.norm(gradient - expected) > 1e-3 * np.linalg.norm(expected)


@every_backend
@pytest.mark.parametrize("options", COUPLINGS, ids=option_name)
def test_weight_of_one_is_the_same_in_both_placements(backend, options):
    generated, positives, negatives, weights = random_problem()
    arrays = generated, positives, negatives, np.ones_like(weights)
    other = {**options, "weight_placement": "after"}
    _, gradient = evaluate(backend, arrays, **options)
    _, expected = evaluate(backend, arrays, **other)
    assert_close("gradient", gradient, expected, relative=TOLERANCE[BEST_TYPE[backend]], normwise=True)


def weight_ratio(arrays, weights, scale, tau, mask=True):
    """Z_i / Z_i^w [B, G]: the sum of the row softmax over all targets, without and with the weights in it."""
    generated, positives, negatives, _ = arrays
    y = np.concatenate([generated, negatives, positives], axis=1)
    kernel = np.exp(-np.linalg.norm(generated[:, :, None] - y[:, None], axis=-1) / scale / tau)
    G, N = generated.shape[1], negatives.shape[1]
    if mask:
        kernel[:, range(G), range(G)] = 0
    weighed = kernel.copy()
    weighed[:, :, G : G + N] *= weights[:, None]
    return kernel.sum(-1) / weighed.sum(-1)


@every_backend
@pytest.mark.parametrize("coupling, power, weight_of", [("two_sided", 1, np.sqrt), ("row", 2, np.copy)])
def test_log_bias_is_a_weight_as_factor_and_a_factor_of_the_row(backend, coupling, power, weight_of):
    """Without a floor, A of log_bias with w is A of `after` with sqrt(w) (two_sided) or w (row) times a factor of the row.

    A = sqrt(w e^l / Z_i^w * e^l / C_j) = sqrt(w) sqrt(row col) (Z_i / Z_i^w)^(1/2) for two_sided and w row (Z_i / Z_i^w) for
    row. c is a product of two A of a row, so the factor comes squared; the split form divides it out.
    """
    generated, positives, negatives, weights = arrays = random_problem()
    tau, scale = 0.2, 3.0
    common = {"coupling": coupling, "affinity_floor": 0.0, "temperatures": (tau,), "statistics": fixed_statistics(scale)}
    ratio = weight_ratio(arrays, weights, scale, tau) ** power
    assert ratio.max() / ratio.min() > 1.05
    limit = TOLERANCE[BEST_TYPE[backend]]
    for form, factor in (("joint", ratio), ("split", np.ones_like(ratio))):
        _, biased = evaluate(backend, arrays, weight_placement="log_bias", drift_form=form, **common)
        _, after = evaluate(backend, (generated, positives, negatives, weight_of(weights)), drift_form=form, **common)
        assert_close(form, biased, after * factor[:, :, None], relative=limit, normwise=True)


@every_backend
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize(
    "options, temperatures",
    [
        ({"coupling": "row", "weight_placement": "log_bias"}, TEMPERATURES),
        ({"coupling": "sinkhorn", "sinkhorn_iterations": 400}, (0.5,)),  # of the converged plan alone: it starts from w = 1
    ],
    ids=["row", "sinkhorn"],
)
def test_weight_of_two_is_the_target_twice(backend, form, options, temperatures):
    """Where w is a mass, a target of weight 2 is the target present twice, in the statistics as well."""
    generated, positives, negatives, weights = random_problem()
    ones = np.ones_like(weights)
    once = generated, positives, negatives, 2 * ones
    twice = generated, positives, np.concatenate([negatives, negatives], axis=1), np.concatenate([ones, ones], axis=1)
    first, gradient = evaluate(backend, once, temperatures, drift_form=form, **options)
    other, expected = evaluate(backend, twice, temperatures, drift_form=form, **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("scale", numbers(first.scale), numbers(other.scale), relative=limit)
    assert_close("loss", numbers(first.loss), numbers(other.loss), relative=limit)
    assert_close("gradient", gradient, expected, relative=limit, normwise=True)


# Transport plans


@every_backend
@pytest.mark.parametrize("marginal", ["weighted_cols", "none"])
def test_many_updates_meet_both_marginals(backend, marginal):
    options = {"coupling": "sinkhorn", "sinkhorn_marginal": marginal, "sinkhorn_iterations": 400}
    arrays = rounded(random_problem(B=2, weights="random"), BEST_TYPE[backend])
    temperatures = (0.2, 1.0)
    result, gradient = evaluate(backend, arrays, temperatures, **options)
    expected = dense(arrays, options, temperatures)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_agrees(result, gradient, expected, loss=limit, grad=limit, scale=limit, sqnorm=limit)
    G, N = arrays[0].shape[1], arrays[2].shape[1]
    for tau, b in itertools.product(temperatures, range(2)):
        A, _ = expected.couplings[tau][b]
        w = np.ones(A.shape[1])
        if marginal == "weighted_cols":
            w[G : G + N] = arrays[3][b]
        assert_close("columns", A.sum(axis=0), G * w / w.sum(), relative=1e-12)
        assert_close("rows", A.sum(axis=1), np.ones(G), relative=1e-7)


@every_backend
def test_few_updates_meet_the_columns_and_not_the_rows(backend):
    """Rows are updated first: whatever the number of updates, the columns have their mass exactly."""
    options = {"coupling": "sinkhorn", "sinkhorn_iterations": 1}
    arrays = rounded(random_problem(), BEST_TYPE[backend])
    assert_option_agrees(backend, arrays, options, BEST_TYPE[backend])
    A, _ = dense(arrays, options).couplings[0.05][0]
    w = np.ones(A.shape[1])
    w[6:9] = arrays[3][0]
    assert_close("columns", A.sum(axis=0), 6 * w / w.sum(), relative=1e-12)
    assert np.abs(A.sum(axis=1) - 1).max() > 1e-2


@every_backend
@pytest.mark.parametrize("form", ["joint", "split"])
def test_uniform_columns_cannot_express_a_weight(backend, form):
    """The column potential absorbs log w: the converged plan is that of no weight, which is why guidance is refused with it."""
    generated, positives, negatives, weights = arrays = random_problem()
    common = {
        "coupling": "sinkhorn",
        "sinkhorn_marginal": "none",
        "drift_form": form,
        "temperatures": (0.5,),
        "statistics": fixed_statistics(temperatures=(0.5,)),
    }
    ones = generated, positives, negatives, np.ones_like(weights)
    _, few = evaluate(backend, arrays, sinkhorn_iterations=1, **common)
    _, few_ones = evaluate(backend, ones, sinkhorn_iterations=1, **common)
    assert np.linalg.norm(few - few_ones) > 1e-3 * np.linalg.norm(few_ones)
    _, many = evaluate(backend, arrays, sinkhorn_iterations=400, **common)
    _, many_ones = evaluate(backend, ones, sinkhorn_iterations=400, **common)
    limit = 1e-7 if BEST_TYPE[backend] == torch.float64 else 1e-3
    assert_close("gradient", many, many_ones, relative=limit, normwise=True)


@every_backend
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("metric", ["l2", "l2_sq"])
def test_weight_of_zero_is_a_column_of_mass_1e_6(backend, form, metric):
    generated, positives, negatives, weights = arrays = random_problem(weights="zero")
    common = {"coupling": "sinkhorn", "drift_form": form, "metric": metric, "statistics": fixed_statistics()}
    _, zero = evaluate(backend, arrays, **common)
    _, small = evaluate(backend, (generated, positives, negatives, weights + 1e-6), **common)
    assert_close("gradient", zero, small, relative=TOLERANCE[BEST_TYPE[backend]], normwise=True)


@every_backend
def test_placement_of_the_weight_does_not_reach_a_transport_plan(backend):
    arrays = random_problem(weights="one_problem_zero")
    for form, iterations in itertools.product(("joint", "split"), (1, 20)):
        options = {"coupling": "sinkhorn", "drift_form": form, "sinkhorn_iterations": iterations}
        after, gradient = evaluate(backend, arrays, **options)
        biased, other = evaluate(backend, arrays, weight_placement="log_bias", **options)
        assert torch.equal(after.loss, biased.loss) and np.array_equal(gradient, other)


# The field


@every_backend
@pytest.mark.parametrize("options", ALONE + COUPLINGS + [{"drift_form": "split", "repulsion": 0.5}], ids=option_name)
def test_translation_changes_nothing(backend, options):
    """Coefficients sum to zero, the multipliers' remainder being taken from x_i itself; another shift for each problem."""
    generated, positives, negatives, weights = arrays = random_problem()
    shift = np.random.default_rng(1).standard_normal((4, 1, 8)) * 10
    moved = generated + shift, positives + shift, negatives + shift, weights
    first, gradient = evaluate(backend, arrays, **options)
    other, other_gradient = evaluate(backend, moved, **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("loss", numbers(other.loss), numbers(first.loss), relative=limit)
    assert_close("gradient", other_gradient, gradient, relative=limit, normwise=True)


@every_backend
@pytest.mark.parametrize("coupling", ["two_sided", "row"])
def test_split_side_without_mass_leaves_no_trace_of_the_origin(backend, coupling):
    """Weight 0 on the only targets that repel nearby: the row sum of P- is under 1e-12, so its rows do not sum to 1.

    The remainder belongs to x_i, as with unequal multipliers: the mean of the problem, which takes in targets that are
    absent, may not show.
    """
    generated, positives, negatives, weights = random_problem(weights="zero")
    generated[:, 1:] += 20.0
    negatives = generated[:, :1] + 0.1 * negatives
    arrays = rounded((generated, positives, negatives, weights), BEST_TYPE[backend])
    options = {"coupling": coupling, "drift_form": "split", "affinity_floor": 0.0}
    rows = [A[i, :9].sum() for A, _ in dense(arrays, options).couplings[0.02] for i in range(6)]
    assert min(rows) < 1e-12
    assert_option_agrees(backend, arrays, options, BEST_TYPE[backend])


@every_backend
@pytest.mark.parametrize("options", ALONE + COUPLINGS + [{"drift_form": "split", "attraction": 0.5}], ids=option_name)
def test_norm_of_the_field_from_pairwise_distances_alone(backend, options):
    """|V_i|^2 = -1/2 sum_jk c_ij c_ik |y_j - y_k|^2 / u^2 wherever the coefficients sum to zero."""
    tau = 0.2
    arrays = rounded(random_problem(), BEST_TYPE[backend])
    result, gradient = evaluate(backend, arrays, (tau,), **options)
    B, G, S = arrays[0].shape
    unit = max(float(result.scale) / math.sqrt(S), 1e-3)
    norm = math.sqrt(max(float(result.drift_sqnorm[tau]), 1e-8))
    V = -gradient * B * G * S * unit / 2 * norm
    y = np.concatenate([arrays[0], arrays[2], arrays[1]], axis=1)
    expected = dense(arrays, options, (tau,))
    limit = 1e-7 if BEST_TYPE[backend] == torch.float64 else 1e-4
    for b in range(B):
        _, c = expected.couplings[tau][b]
        squares = ((y[b][:, None] - y[b][None]) ** 2).sum(-1) / unit**2
        for i in range(G):
            row = c[i].copy()
            row[i] -= row.sum()
            assert_close(f"|V|^2 of {b}, {i}", (V[b, i] ** 2).sum(), -0.5 * row @ squares @ row, relative=limit)


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}, {"mask_self": False}], ids=option_name)
def test_field_is_linear_in_both_multipliers(backend, options):
    """V(a, r) = a V(1, 0) + r V(0, 1), with the statistics given."""
    arrays = random_problem(weights="one_problem_zero")
    given = fixed_statistics()
    gradients = {
        (a, r): evaluate(backend, arrays, attraction=a, repulsion=r, statistics=given, **options)[1]
        for a, r in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 3.0), (0.0, 0.0))
    }
    limit = TOLERANCE[BEST_TYPE[backend]]
    attracted, repelled = gradients[1.0, 0.0], gradients[0.0, 1.0]
    assert_close("1, 1", gradients[1.0, 1.0], attracted + repelled, relative=limit, normwise=True)
    assert_close("0.5, 3", gradients[0.5, 3.0], 0.5 * attracted + 3.0 * repelled, relative=limit, normwise=True)
    assert not gradients[0.0, 0.0].any()


@every_backend
@pytest.mark.parametrize("form", ["joint", "split"])
@pytest.mark.parametrize("part", ["attraction", "repulsion"])
def test_one_part_alone_points_the_right_way(backend, part, form):
    """One positive and no negatives: attraction alone goes from x_i to it, repulsion alone away from the other sample."""
    arrays = random_problem(G=2, P=1, N=0)
    generated, positives = arrays[:2]
    other_part = {"attraction": "repulsion", "repulsion": "attraction"}[part]
    _, gradient = evaluate(backend, arrays, (1.0,), drift_form=form, **{other_part: 0.0})
    wanted = positives - generated if part == "attraction" else generated - generated[:, ::-1]
    cosine = (-gradient * wanted).sum(-1) / np.linalg.norm(gradient, axis=-1) / np.linalg.norm(wanted, axis=-1)
    assert_close("cosine", cosine, np.ones((4, 2)), relative=1e-9 if BEST_TYPE[backend] == torch.float64 else 1e-5)


@every_backend
@pytest.mark.parametrize("coupling", ["two_sided", "row", "sinkhorn"])
def test_split_attraction_does_not_see_the_negatives(backend, coupling):
    generated, positives, negatives, weights = random_problem()
    moved = generated, positives, negatives[:, ::-1] * 3 + 1, weights * 2
    common = {"coupling": coupling, "drift_form": "split", "repulsion": 0.0, "statistics": fixed_statistics()}
    _, gradient = evaluate(backend, (generated, positives, negatives, weights), **common)
    _, other = evaluate(backend, moved, **common)
    assert_close("gradient", other, gradient, relative=TOLERANCE[BEST_TYPE[backend]], normwise=True)


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}], ids=option_name)
def test_no_floor_is_the_limit_of_small_floors(backend, options):
    arrays = random_problem()
    temperatures = (0.2, 0.5)  # every affinity above 1e-10, but for the masked diagonal
    none, gradient = evaluate(backend, arrays, temperatures, affinity_floor=0.0, **options)
    small, other = evaluate(backend, arrays, temperatures, affinity_floor=1e-30, **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("loss", numbers(small.loss), numbers(none.loss), relative=limit)
    assert_close("gradient", other, gradient, relative=limit, normwise=True)


@every_backend
@pytest.mark.parametrize("coupling", ["row", "sinkhorn"])
def test_floor_is_of_the_two_sided_coupling_alone(backend, coupling):
    arrays = random_problem()
    none, gradient = evaluate(backend, arrays, coupling=coupling, affinity_floor=0.0)
    large, other = evaluate(backend, arrays, coupling=coupling, affinity_floor=0.5)
    assert torch.equal(none.loss, large.loss) and np.array_equal(gradient, other)


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}, {"repulsion": 2.0}], ids=option_name)
def test_per_temperature_loss_has_the_gradient_of_the_summed_field(backend, options):
    arrays = random_problem(weights="one_problem_zero")
    summed, gradient = evaluate(backend, arrays, **options)
    separate, other = evaluate(backend, arrays, field="per_temperature", **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("gradient", other, gradient, relative=limit, normwise=True)
    # Each field has a mean square of 1 once normalised: three losses of 1 each, over the problems together.
    assert all(float(n) > 1e-8 for n in separate.drift_sqnorm.values())
    assert_close("mean loss", numbers(separate.loss).mean(), 3.0, relative=limit)
    assert np.abs(numbers(summed.loss) - numbers(separate.loss)).max() > 1e-3
    one, _ = evaluate(backend, arrays, (0.05,), **options)
    alone, _ = evaluate(backend, arrays, (0.05,), field="per_temperature", **options)
    assert_close("one temperature", numbers(alone.loss), numbers(one.loss), relative=limit)


# Statistics given from outside


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}, {"attraction": 0.5}], ids=option_name)
def test_given_statistics_are_used_and_not_measured(backend, options):
    arrays = rounded(random_problem(weights="one_problem_zero"), BEST_TYPE[backend])
    result, gradient = evaluate(backend, arrays, statistics=fixed_statistics(3.0, 0.25, 11.0), **options)
    expected = dense(arrays, options, scale=3.0, sqnorm=dict.fromkeys(TEMPERATURES, 0.25), mean_square=11.0)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_agrees(result, gradient, expected, loss=limit, grad=limit, scale=limit, sqnorm=limit)


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}], ids=option_name)
def test_one_problem_with_the_statistics_of_the_batch_is_the_batch(backend, options):
    """What slices and ranks rely on: a problem depends on the others through its statistics alone."""
    arrays = random_problem(weights="one_problem_zero")
    batch, gradient = evaluate(backend, arrays, **options)
    limit = TOLERANCE[BEST_TYPE[backend]]
    for b in range(4):
        single, alone = evaluate(backend, [value[b : b + 1] for value in arrays], statistics=batch.statistics, **options)
        assert_close(f"loss of problem {b}", numbers(single.loss), numbers(batch.loss)[b : b + 1], relative=limit)
        assert_close(f"gradient of problem {b}", alone, gradient[b : b + 1] * 4, relative=limit, normwise=True)


@every_backend
def test_squared_metric_without_its_statistic_is_refused(backend):
    given = fixed_statistics()
    given = DriftStatistics(given.scale, given.drift_sqnorm, None)
    with pytest.raises(ValueError, match="mean_squared_distance"):
        evaluate(backend, random_problem(), statistics=given, metric="l2_sq")


@every_backend
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}], ids=option_name)
@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["generated", "positives", "negatives", "negative_weight"])
def test_not_a_number_is_not_hidden(backend, options, where):
    arrays = [np.array(value) for value in random_problem()]
    arrays[where][(1,) * arrays[where].ndim] = float("nan")
    result, _ = evaluate(backend, arrays, **options)
    assert not torch.isfinite(result.loss).all()


# Refusals and presets


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weight_placement": "before"}, ("weight_placement", "before", "after", "log_bias")),
        ({"affinity_floor": -1e-9}, ("affinity_floor", "-1e-09")),
        ({"affinity_floor": float("nan")}, ("affinity_floor", "nan")),
        ({"affinity_floor": float("inf")}, ("affinity_floor", "inf")),
        ({"coupling": "column"}, ("coupling", "column", "two_sided", "row", "sinkhorn")),
        ({"sinkhorn_iterations": 0}, ("sinkhorn_iterations", "0")),
        ({"sinkhorn_iterations": -3}, ("sinkhorn_iterations", "-3")),
        ({"sinkhorn_iterations": 2.5}, ("sinkhorn_iterations", "2.5")),
        ({"sinkhorn_marginal": "uniform"}, ("sinkhorn_marginal", "uniform", "weighted_cols", "none")),
        ({"sinkhorn_marginal": None}, ("sinkhorn_marginal", "None")),
        ({"drift_form": "apart"}, ("drift_form", "apart", "joint", "split")),
        ({"metric": "l1"}, ("metric", "l1", "l2", "l2_sq")),
        ({"attraction": -1.0}, ("attraction", "-1.0")),
        ({"attraction": float("inf")}, ("attraction", "inf")),
        ({"repulsion": float("nan")}, ("repulsion", "nan")),
        ({"field": "each"}, ("field", "each", "summed", "per_temperature")),
        ({"reduction": "mean"}, ("reduction", "mean", "release", "paper")),
    ],
)
def test_bad_option_is_refused(options, words):
    with pytest.raises(ValueError) as refusal:
        DriftConfig(**options)
    for word in words:
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"


def test_presets_are_the_published_ones():
    assert DRIFT_PRESETS == PRESETS
    assert DriftConfig.preset("official") == DriftConfig()
    changed = DriftConfig.preset("sinkhorn_drift", affinity_floor=1e-9, temperatures=(0.1,))
    assert changed.affinity_floor == 1e-9 and changed.weight_placement == "log_bias" and changed.temperatures == (0.1,)
    with pytest.raises(ValueError) as refusal:
        DriftConfig.preset("offical")
    for word in ("preset", "offical", *PRESETS):
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"


def test_guidance_that_uniform_columns_cannot_express_is_refused():
    config = DriftConfig(coupling="sinkhorn", sinkhorn_marginal="none")
    for minimum in (1.0, 0.5):
        with pytest.raises(ValueError) as refusal:
            config.check_guidance(minimum, 4)
        for word in ("sinkhorn_marginal", "none", "4", str(minimum), "weighted_cols"):
            assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"
    config.check_guidance(1.001, 4)
    config.check_guidance(1.0, 0)
    DriftConfig(coupling="sinkhorn").check_guidance(1.0, 4)
    DriftConfig(sinkhorn_marginal="none").check_guidance(1.0, 4)  # not read by the two-sided coupling
