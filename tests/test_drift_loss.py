"""drift_loss against the records of the release, a dense float64 evaluation, and the properties of the method."""

import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_evaluation import FLOOR_MUTATIONS, MUTATIONS, assert_close, dense_drift, relative_difference

from drift_accel import DriftConfig, drift_loss
from drift_accel.drift import DriftStatistics
from drift_accel.drift.ops import load_extension

GOLDENS = Path(__file__).parent / "goldens" / "drift_loss.npz"
CASES = [f"case{k}_{variant}" for k in range(5) for variant in ("all", "one")]

NOT_BUILT = load_extension().problem
BACKENDS = [
    "reference",
    pytest.param("fused", marks=pytest.mark.skipif(NOT_BUILT is not None, reason=f"the fused op cannot be used: {NOT_BUILT}")),
]
BEST_TYPE = {"reference": torch.float64, "fused": torch.float32}
# float64: rounding of the expanded distance, amplified by 1 / 0.02. float32: the same, as the records show it.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4}
LOSS, GRADIENT, SCALE, SQNORM = 5e-5, 2e-5, 2e-5, 1e-4  # limits against the float32 records

DEFAULT = (0.02, 0.05, 0.2)
# B, G, P, N, S, temperatures, weights of the negatives
SHAPES = [
    (1, 1, 1, 0, 1, DEFAULT, "random"),
    (3, 1, 1, 0, 4, DEFAULT, "random"),
    (2, 1, 4, 3, 5, DEFAULT, "random"),
    (3, 5, 1, 0, 2, (0.2, 0.02, 0.05), "random"),
    (5, 2, 2, 1, 1, DEFAULT, "random"),
    (4, 6, 5, 3, 8, (0.05, 0.2, 0.02), "one_problem_zero"),
    (4, 6, 5, 3, 8, (1.0,), "zero"),
    (2, 4, 6, 0, 257, DEFAULT, "random"),
    (1, 3, 2, 5, 257, (0.5, 0.02, 0.1, 5.0), "large"),
    (2, 16, 12, 4, 33, DEFAULT, "one_problem_zero"),
    (6, 3, 9, 2, 16, (0.02,), "mixed"),
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]),
    ],
)


@lru_cache(maxsize=1)
def records():
    with np.load(GOLDENS) as archive:
        return {name: archive[name] for name in archive.files}


def random_problem(B=4, G=6, P=5, N=3, S=8, weights="random", seed=0):
    """Correlated groups of different place and spread: generated, positives, negatives, weights, all float64."""
    rng = np.random.default_rng([seed, B, G, P, N, S])
    places = rng.standard_normal((B, 3, 1, S)) * 0.5
    generated = rng.standard_normal((B, G, S)) * 0.8 + places[:, 0]
    positives = rng.standard_normal((B, P, S)) * 1.1 + places[:, 1]
    negatives = rng.standard_normal((B, N, S)) * 1.3 + places[:, 2]
    w = rng.uniform(0.2, 2.0, (B, N))
    if weights == "zero":
        w[:] = 0
    elif weights == "one_problem_zero":
        w[0] = 0
    elif weights == "mixed":
        w[:, 0] = 0
    elif weights == "large":
        w *= 100
    return generated, positives, negatives, w


def evaluate(backend, arrays, temperatures=DEFAULT, dtype=None, device="cpu", **options):
    """Run drift_loss on (generated, positives, negatives, weights); also return the gradient of the mean loss."""
    dtype = BEST_TYPE[backend] if dtype is None else dtype
    generated, positives, negatives, weights = (torch.as_tensor(value, device=device).to(dtype) for value in arrays)
    generated.requires_grad_()
    config = DriftConfig(temperatures=tuple(temperatures), backend=backend)
    result = drift_loss(generated, positives, negatives, negative_weight=weights, config=config, **options)
    result.loss.mean().backward()
    return result, generated.grad.detach().double().cpu().numpy()


def numbers(tensor):
    return tensor.detach().double().cpu().numpy()


def assert_agrees(result, gradient, dense, *, loss, grad, scale, sqnorm):
    assert_close("scale", numbers(result.scale), dense.scale, relative=scale)
    for tau, value in dense.sqnorm.items():
        assert_close(f"n_{tau:g}", numbers(result.drift_sqnorm[tau]), value, relative=sqnorm, absolute=1e-20)
    assert_close("loss", numbers(result.loss), dense.loss, relative=loss, absolute=1e-20)
    assert_close("gradient", gradient, dense.gradient, relative=grad, absolute=1e-20, normwise=True)


def largest_disagreement(result, gradient, dense):
    return max(
        relative_difference(numbers(result.scale), dense.scale),
        relative_difference(numbers(result.loss), dense.loss),
        relative_difference(gradient, dense.gradient, normwise=True),
        *(relative_difference(numbers(result.drift_sqnorm[tau]), value) for tau, value in dense.sqnorm.items()),
    )


# Against the records and the dense evaluation


@every_device
@every_backend
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_release(backend, device, case):
    record = {name.removeprefix(f"{case}/"): v for name, v in records().items() if name.startswith(f"{case}/")}
    temperatures = [round(float(tau), 6) for tau in record["temperatures"]]
    arrays = [record[name] for name in ("gen", "pos", "neg", "weight_neg")]
    result, gradient = evaluate(backend, arrays, temperatures, torch.float32, device)
    assert result.loss.dtype == torch.float32
    assert_close("loss", numbers(result.loss), record["loss"], relative=LOSS)
    assert_close("gradient", gradient, record["grad_mean_loss"], relative=GRADIENT, normwise=True)
    assert_close("scale", numbers(result.scale), record["scale"], relative=SCALE)
    assert list(result.drift_sqnorm) == temperatures
    for tau, value in result.drift_sqnorm.items():
        assert_close(f"n_{tau:g}", numbers(value), record[f"drift_sqnorm_{tau:g}"], relative=SQNORM)


@every_device
@every_backend
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:5])) + f"-{len(shape[5])}-{shape[6]}")
def test_agrees_with_the_dense_evaluation(backend, device, shape):
    *sizes, temperatures, weights = shape
    arrays = random_problem(*sizes, weights)
    dtype = BEST_TYPE[backend]
    arrays = [torch.as_tensor(value).to(dtype).double().numpy() for value in arrays]
    dense = dense_drift(*arrays, temperatures)
    result, gradient = evaluate(backend, arrays, temperatures, device=device)
    assert result.loss.shape == (sizes[0],) and result.scale.shape == ()
    limit = TOLERANCE[dtype]
    assert_agrees(result, gradient, dense, loss=limit, grad=limit, scale=limit, sqnorm=limit)


@every_backend
@pytest.mark.parametrize("mutation", MUTATIONS + FLOOR_MUTATIONS)
def test_mutated_mathematics_would_be_caught(backend, mutation):
    """The implementation agrees with the method and not with the mutation, on one case that tells them apart."""
    tiny = {"no_distance_floor": 1e-5, "no_unit_floor": 2e-4, "no_logit_scale_floor": 2e-4, "no_sqnorm_floor": 1e-7}
    generated, positives, negatives, weights = random_problem(weights="one_problem_zero")
    factor = tiny.get(mutation, 1.0)
    arrays = generated * factor, positives * factor, negatives * factor, weights
    arrays = [torch.as_tensor(value).to(BEST_TYPE[backend]).double().numpy() for value in arrays]
    result, gradient = evaluate(backend, arrays)
    limit = TOLERANCE[BEST_TYPE[backend]]
    right = largest_disagreement(result, gradient, dense_drift(*arrays, DEFAULT))
    wrong = largest_disagreement(result, gradient, dense_drift(*arrays, DEFAULT, mutation=mutation))
    assert right <= limit, f"the method itself: relative difference {right:.3e}, limit {limit:.1e}"
    assert wrong >= max(1e-3, 10 * right), f"{mutation} is too close to be told: relative difference {wrong:.3e}"


# Properties of the method


@every_backend
def test_value_is_the_mean_square_of_the_field(backend):
    """loss_b = mean over G and S of V^2 with V read from the gradient: dL_b / dx = -2 V / (G S u)."""
    arrays = random_problem()
    result, gradient = evaluate(backend, arrays)
    B, G, S = arrays[0].shape
    unit = max(float(result.scale) / S**0.5, 1e-3)
    V = -gradient * B * G * S * unit / 2
    assert_close("mean V^2", (V**2).mean(axis=(1, 2)), numbers(result.loss), relative=TOLERANCE[BEST_TYPE[backend]])


@every_backend
def test_upstream_gradient_multiplies_each_problem(backend):
    arrays = random_problem()
    _, of_mean = evaluate(backend, arrays)
    generated, positives, negatives, weights = (torch.as_tensor(v).to(BEST_TYPE[backend]) for v in arrays)
    generated.requires_grad_()
    upstream = torch.tensor([0.0, 1.0, -2.0, 1000.0], dtype=generated.dtype)
    config = DriftConfig(backend=backend)
    result = drift_loss(generated, positives, negatives, negative_weight=weights, config=config)
    result.loss.backward(upstream)
    expected = of_mean * len(upstream) * numbers(upstream)[:, None, None]
    assert_close("gradient", numbers(generated.grad), expected, relative=1e-6, normwise=True)
    assert not generated.grad[0].any()


@every_backend
def test_value_is_bounded_by_the_number_of_temperatures(backend):
    """Each normalised field has mean square 1 (its n is above 1e-8): one temperature gives 1, three at most 9."""
    for seed in range(3):
        arrays = random_problem(seed=seed)
        one, _ = evaluate(backend, arrays, (0.05,))
        assert_close("one temperature", numbers(one.loss.mean()), 1.0, relative=1e-5)
        three, _ = evaluate(backend, arrays)
        assert 3.0 <= numbers(three.loss).mean() <= 9.0 * (1 + 1e-6)


@every_backend
def test_order_of_temperatures_does_not_matter(backend):
    arrays = random_problem()
    limit = TOLERANCE[BEST_TYPE[backend]]
    first, gradient = evaluate(backend, arrays, (0.02, 0.05, 0.2))
    other, other_gradient = evaluate(backend, arrays, (0.2, 0.02, 0.05))
    assert_close("loss", numbers(other.loss), numbers(first.loss), relative=limit)
    assert_close("gradient", other_gradient, gradient, relative=limit, normwise=True)
    for tau in DEFAULT:
        assert_close(f"n_{tau}", numbers(other.drift_sqnorm[tau]), numbers(first.drift_sqnorm[tau]), relative=limit)


def assert_same(backend, arrays, other_arrays, transform, limit=None, **options):
    """`other_arrays` give the same statistics and loss, and `transform` of the gradient."""
    limit = TOLERANCE[BEST_TYPE[backend]] if limit is None else limit
    first, gradient = evaluate(backend, arrays, **options)
    other, other_gradient = evaluate(backend, other_arrays, **options)
    assert_close("scale", numbers(other.scale), numbers(first.scale), relative=limit)
    for tau in DEFAULT:
        assert_close(f"n_{tau}", numbers(other.drift_sqnorm[tau]), numbers(first.drift_sqnorm[tau]), relative=limit)
    assert_close("loss", numbers(other.loss), numbers(first.loss), relative=limit)
    assert_close("gradient", other_gradient, transform(gradient), relative=limit, normwise=True)


@every_backend
def test_translation_of_all_features_changes_nothing(backend):
    generated, positives, negatives, weights = arrays = random_problem()
    shift = np.random.default_rng(1).standard_normal((4, 1, 8)) * 3  # another for each problem
    assert_same(backend, arrays, (generated + shift, positives + shift, negatives + shift, weights), lambda g: g)


@every_backend
def test_rotation_of_the_feature_space_rotates_the_gradient(backend):
    generated, positives, negatives, weights = arrays = random_problem()
    rotation = np.linalg.qr(np.random.default_rng(2).standard_normal((8, 8)))[0]
    rotated = generated @ rotation, positives @ rotation, negatives @ rotation, weights
    assert_same(backend, arrays, rotated, lambda g: g @ rotation)


@every_backend
def test_permutation_within_each_group_permutes_the_gradient(backend):
    generated, positives, negatives, weights = arrays = random_problem()
    rng = np.random.default_rng(3)
    g, p, n = (rng.permutation(value.shape[1]) for value in arrays[:3])
    permuted = generated[:, g], positives[:, p], negatives[:, n], weights[:, n]
    assert_same(backend, arrays, permuted, lambda gradient: gradient[:, g])


@every_backend
def test_permutation_of_problems_permutes_the_losses(backend):
    arrays = random_problem()
    order = np.array([2, 0, 3, 1])
    limit = TOLERANCE[BEST_TYPE[backend]]
    first, gradient = evaluate(backend, arrays)
    other, other_gradient = evaluate(backend, [value[order] for value in arrays])
    assert_close("loss", numbers(other.loss), numbers(first.loss)[order], relative=limit)
    assert_close("gradient", other_gradient, gradient[order], relative=limit, normwise=True)


@every_backend
@pytest.mark.parametrize("factor", [1 / 64, 1024.0])
def test_scaling_all_features_divides_the_gradient(backend, factor):
    """Exact with the scale given; measured, the self pairs' floor of 1e-4 does not scale and leaves a trace in s."""
    generated, positives, negatives, weights = arrays = random_problem()
    scaled = generated * factor, positives * factor, negatives * factor, weights
    limit = TOLERANCE[BEST_TYPE[backend]]
    first, gradient = evaluate(backend, arrays)
    given = DriftStatistics(scale=first.scale * factor, drift_sqnorm=first.drift_sqnorm, mean_squared_distance=None)
    other, other_gradient = evaluate(backend, scaled, statistics=given)
    assert_close("loss", numbers(other.loss), numbers(first.loss), relative=limit)
    assert_close("gradient", other_gradient * factor, gradient, relative=limit, normwise=True)
    measured, measured_gradient = evaluate(backend, scaled)
    assert_close("measured scale", numbers(measured.scale), numbers(first.scale) * factor, relative=1e-3)
    assert_close("measured loss", numbers(measured.loss), numbers(first.loss), relative=2e-2)
    assert_close("measured gradient", measured_gradient * factor, gradient, relative=2e-2, normwise=True)


@every_backend
def test_zero_weight_leaves_the_scale_of_no_negatives(backend):
    """s = sum_bij w d / (G sum_bj w): the number of targets cancels, so targets of weight zero are not seen."""
    generated, positives, negatives, weights = random_problem(weights="zero")
    with_zero, _ = evaluate(backend, (generated, positives, negatives, weights))
    without, _ = evaluate(backend, (generated, positives, negatives[:, :0], weights[:, :0]))
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("scale", numbers(with_zero.scale), numbers(without.scale), relative=limit)


@every_backend
def test_zero_weight_far_from_all_rows_is_no_negatives(backend):
    """Zero weight takes the negatives out of A, not out of the row softmax; far away they have no share there either."""
    generated, positives, negatives, weights = random_problem(weights="zero")
    without, gradient = evaluate(backend, (generated, positives, negatives[:, :0], weights[:, :0]))
    far, far_gradient = evaluate(backend, (generated, positives, negatives + 1e3, weights))
    limit = 1e-7 if BEST_TYPE[backend] == torch.float64 else 1e-2
    assert_close("loss", numbers(far.loss), numbers(without.loss), relative=limit)
    assert_close("gradient", far_gradient, gradient, relative=limit, normwise=True)
    for tau in DEFAULT:
        assert_close(f"n_{tau}", numbers(far.drift_sqnorm[tau]), numbers(without.drift_sqnorm[tau]), relative=limit)


@every_backend
def test_zero_weight_near_the_rows_shortens_the_field_and_keeps_its_direction(backend):
    """Above the floor c_ij is multiplied by r_i = Z_i without / Z_i with the negatives, for every j alike.

    Two temperatures would mix directions, so one is taken; it is large enough for no pair but the masked ones to lie on
    the floor, and those are worth 1e-3 of the row.
    """
    tau = 2.0
    generated, positives, negatives, weights = random_problem(weights="zero")
    near = generated, positives, negatives, weights
    without, gradient = evaluate(backend, (generated, positives, negatives[:, :0], weights[:, :0]), (tau,))
    given = DriftStatistics(without.scale, without.drift_sqnorm, None)
    _, near_gradient = evaluate(backend, near, (tau,), statistics=given)
    y = np.concatenate([generated, negatives, positives], axis=1)
    kernel = np.exp(-np.linalg.norm(generated[:, :, None] - y[:, None], axis=-1) / float(without.scale) / tau)
    kernel[:, range(6), range(6)] = 0
    share = 1 - kernel[:, :, 6:9].sum(-1) / kernel.sum(-1)  # [B, G]
    # The common factor sqrt(row) of both A in c leaves r_i itself.
    assert_close("gradient", near_gradient, gradient * share[:, :, None], relative=1e-2, normwise=True)
    assert share.min() < 0.9


@every_backend
def test_no_negatives_may_be_none_or_empty(backend):
    generated, positives, negatives, weights = random_problem(N=0)
    empty, gradient = evaluate(backend, (generated, positives, negatives, weights))
    x = torch.as_tensor(generated).to(BEST_TYPE[backend]).requires_grad_()
    none = drift_loss(x, torch.as_tensor(positives).to(x.dtype), config=DriftConfig(backend=backend))
    none.loss.mean().backward()
    assert torch.equal(none.loss, empty.loss)
    assert np.array_equal(numbers(x.grad), gradient)


@every_backend
def test_missing_weight_means_one(backend):
    generated, positives, negatives, weights = random_problem()
    ones, _ = evaluate(backend, (generated, positives, negatives, np.ones_like(weights)))
    x, p, n = (torch.as_tensor(value).to(BEST_TYPE[backend]) for value in (generated, positives, negatives))
    assert torch.equal(drift_loss(x, p, n, config=DriftConfig(backend=backend)).loss, ones.loss)


@every_backend
def test_guidance_of_exactly_one_is_finite(backend):
    """a = 1 gives w = 0: no logarithm of it may be taken."""
    result, gradient = evaluate(backend, random_problem(weights="zero"))
    assert torch.isfinite(result.loss).all() and torch.isfinite(result.scale) and np.isfinite(gradient).all()


# Statistics


def subset(arrays, b):
    return [value[b : b + 1] for value in arrays]


@every_backend
def test_given_statistics_make_problems_independent(backend):
    """One problem at a time with the batch's statistics is the batch: what slices and ranks rely on."""
    arrays = random_problem(B=5)
    batch, gradient = evaluate(backend, arrays)
    given = DriftStatistics(scale=batch.scale, drift_sqnorm=batch.drift_sqnorm, mean_squared_distance=None)
    whole, whole_gradient = evaluate(backend, arrays, statistics=given)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("loss of the whole", numbers(whole.loss), numbers(batch.loss), relative=limit)
    assert_close("gradient of the whole", whole_gradient, gradient, relative=limit, normwise=True)
    for b in range(5):
        single, single_gradient = evaluate(backend, subset(arrays, b), statistics=given)
        assert_close(f"loss of problem {b}", numbers(single.loss), numbers(batch.loss)[b : b + 1], relative=limit)
        expected = gradient[b : b + 1] * 5
        assert_close(f"gradient of problem {b}", single_gradient, expected, relative=limit, normwise=True)
        assert float(single.scale) == float(batch.scale)


@every_backend
def test_given_statistics_are_used_and_not_measured(backend):
    arrays = random_problem()
    scale, sqnorm = 3.0, {0.02: 0.5, 0.05: 1e-12, 0.2: 2.0}  # one below the floor of 1e-8
    dense = dense_drift(*arrays, DEFAULT, scale=scale, sqnorm=sqnorm)
    dtype = BEST_TYPE[backend]
    given = DriftStatistics(
        scale=torch.tensor(scale, dtype=dtype),
        drift_sqnorm={tau: torch.tensor(value, dtype=dtype) for tau, value in sqnorm.items()},
        mean_squared_distance=None,
    )
    result, gradient = evaluate(backend, arrays, statistics=given)
    limit = TOLERANCE[dtype]
    assert_agrees(result, gradient, dense, loss=limit, grad=limit, scale=limit, sqnorm=limit)


@every_backend
def test_statistics_carry_no_gradient(backend):
    result, _ = evaluate(backend, random_problem())
    assert not result.scale.requires_grad
    assert not any(value.requires_grad for value in result.drift_sqnorm.values())


# Gradient, types, surroundings


@every_backend
def test_gradient_flows_to_generated_only(backend):
    tensors = [torch.as_tensor(v).to(BEST_TYPE[backend]) for v in random_problem()]
    config = DriftConfig(backend=backend)
    tensors[0].requires_grad_()
    generated, positives, negatives, weights = tensors
    drift_loss(generated, positives, negatives, negative_weight=weights, config=config).loss.sum().backward()
    assert generated.grad is not None and generated.grad.abs().sum() > 0
    for index, name in ((1, "positives"), (2, "negatives"), (3, "negative_weight")):
        changed = list(tensors)
        changed[index] = changed[index].clone().requires_grad_()
        generated, positives, negatives, weights = changed
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            drift_loss(generated, positives, negatives, negative_weight=weights, config=config)


@every_backend
def test_no_gradient_is_recorded_where_none_is_asked_for(backend):
    x, p, n, w = (torch.as_tensor(v).to(BEST_TYPE[backend]) for v in random_problem())
    config = DriftConfig(backend=backend)
    assert not drift_loss(x, p, n, negative_weight=w, config=config).loss.requires_grad
    x.requires_grad_()
    with torch.no_grad():
        assert not drift_loss(x, p, n, negative_weight=w, config=config).loss.requires_grad


@every_backend
def test_inputs_are_left_as_they_were_and_may_be_strided(backend):
    arrays = random_problem()
    result, gradient = evaluate(backend, arrays)
    # [B, S, members] storage seen as [B, members, S], as maps in channels-first layout arrive.
    strided = [torch.as_tensor(v).to(BEST_TYPE[backend]).transpose(1, 2).contiguous().transpose(1, 2) for v in arrays[:3]]
    weights = torch.as_tensor(arrays[3]).to(BEST_TYPE[backend])
    copies = [value.clone() for value in strided]
    strided[0].requires_grad_()
    other = drift_loss(*strided, negative_weight=weights, config=DriftConfig(backend=backend))
    other.loss.mean().backward()
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_close("loss", numbers(other.loss), numbers(result.loss), relative=limit)
    assert_close("gradient", numbers(strided[0].grad), gradient, relative=limit, normwise=True)
    assert all(torch.equal(value, copy) for value, copy in zip(strided, copies, strict=True))


@every_backend
@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(backend, device, dtype):
    """The loss of bf16 features is that of the same values in float32: only the gradient is rounded on its way out."""
    arrays = [torch.as_tensor(value).to(dtype).float().numpy() for value in random_problem()[:3]]
    arrays.append(np.full((4, 3), 0.75, dtype=np.float32))
    narrow, narrow_gradient = evaluate(backend, arrays, dtype=dtype, device=device)
    wide, wide_gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
    assert narrow.loss.dtype == narrow.scale.dtype == torch.float32
    assert_close("loss", numbers(narrow.loss), numbers(wide.loss), relative=1e-6)
    assert_close("gradient", narrow_gradient, wide_gradient, relative=torch.finfo(dtype).eps, normwise=True)


@every_backend
@every_device
def test_autocast_does_not_reach_the_drift(backend, device):
    arrays = random_problem()
    outside, gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside, inside_gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
    assert torch.equal(inside.loss, outside.loss)
    assert np.array_equal(inside_gradient, gradient)


@every_backend
@every_device
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_matmul_precision_does_not_reach_the_drift(backend, device, precision):
    """TF32 in the expanded distance destroys small distances; the caller's setting is left as it was."""
    arrays = random_problem(S=257)
    outside, gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        inside, inside_gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(inside.loss, outside.loss)
    assert np.array_equal(inside_gradient, gradient)


NEWER_PRECISION_INTERFACE = """
import torch
from drift_accel import DriftConfig, drift_loss
points = torch.linspace(-1, 1, 2 * 7 * 257).sin().reshape(2, 7, 257).to({device!r})
config = DriftConfig(backend={backend!r})
outside = drift_loss(points[:, :4], points[:, 4:], config=config).loss
torch.backends.cuda.matmul.fp32_precision = "tf32"
inside = drift_loss(points[:, :4], points[:, 4:], config=config).loss
assert torch.equal(inside, outside), (inside, outside)
assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""


@every_backend
@every_device
def test_tf32_set_by_the_newer_interface_does_not_reach_the_drift(backend, device):
    """torch refuses to read the older setting once `fp32_precision` is set: a caller who did so must not fail here.

    In a process of its own, because the mixture of both cannot be undone within one.
    """
    program = NEWER_PRECISION_INTERFACE.format(backend=backend, device=device)
    project = Path(__file__).parent.parent
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=project, check=False)
    assert finished.returncode == 0, finished.stderr


@every_backend
def test_same_input_gives_the_same_bits(backend):
    arrays = random_problem()
    first, gradient = evaluate(backend, arrays)
    again, again_gradient = evaluate(backend, arrays)
    assert torch.equal(first.loss, again.loss) and np.array_equal(gradient, again_gradient)


# Extreme features


@every_backend
@every_device
@pytest.mark.parametrize("deviations", [10, 1000])
@pytest.mark.parametrize("each_feature", [False, True])
def test_large_mean_offset_in_float32(backend, device, deviations, each_feature):
    """Features after a ReLU lie far off zero: the distances must not lose their digits to the offset."""
    generated, positives, negatives, weights = random_problem(B=3, G=16, P=16, N=4, S=64)
    offset = np.random.default_rng(4).uniform(-deviations, deviations, 64) if each_feature else float(deviations)
    arrays = [np.float32(value + offset) for value in (generated, positives, negatives)] + [np.float32(weights)]
    dense = dense_drift(*arrays, DEFAULT)  # of the float32 values, so the rounding of the input is in both
    result, gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
    assert_agrees(result, gradient, dense, loss=LOSS, grad=GRADIENT, scale=SCALE, sqnorm=SQNORM)


@every_backend
@every_device
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e-5, 1e-4, 1e6, 1e12])
def test_huge_and_tiny_features_in_float32(backend, device, factor):
    """No square overflows or is lost; under the floors the values are those of the dense evaluation still."""
    generated, positives, negatives, weights = random_problem()
    arrays = [np.float32(value * factor) for value in (generated, positives, negatives)] + [np.float32(weights)]
    dense = dense_drift(*arrays, DEFAULT)
    result, gradient = evaluate(backend, arrays, dtype=torch.float32, device=device)
    assert torch.isfinite(result.loss).all() and np.isfinite(gradient).all()
    # At 1e6 and above the self pairs' distance is rounding (about 1e-3 s) and stays in s.
    limit = 1e-3 if factor < 1 else 2e-2
    assert_agrees(result, gradient, dense, loss=limit, grad=limit, scale=1e-3, sqnorm=limit)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_coinciding_points_give_zero(backend, dtype, value):
    if dtype == torch.float64 and BEST_TYPE[backend] != dtype:
        pytest.skip("the backend computes in float32")
    generated, positives, negatives, weights = random_problem()
    arrays = [np.full_like(points, value) for points in (generated, positives, negatives)] + [weights]
    result, gradient = evaluate(backend, arrays, dtype=dtype)
    assert torch.isfinite(result.loss).all() and np.isfinite(gradient).all()
    assert numbers(result.loss).max() < 1e-6
    assert_close("scale", numbers(result.scale), 1e-4, relative=1e-5)  # every distance lies on the floor


@every_backend
def test_constant_feature_receives_no_gradient(backend):
    generated, positives, negatives, weights = random_problem()
    for points in (generated, positives, negatives):
        points[:, :, 2] = 5.0
    _, gradient = evaluate(backend, (generated, positives, negatives, weights))
    assert np.abs(gradient[:, :, 2]).max() <= TOLERANCE[BEST_TYPE[backend]] * np.abs(gradient).max()


@every_backend
def test_coinciding_pairs_among_distinct_points_are_finite(backend):
    generated, positives, negatives, weights = random_problem()
    generated[:, 1], positives[:, 0], negatives[:, 0] = generated[:, 0], generated[:, 0], positives[:, 1]
    arrays = generated, positives, negatives, weights
    result, gradient = evaluate(backend, arrays)
    limit = TOLERANCE[BEST_TYPE[backend]]
    assert_agrees(result, gradient, dense_drift(*arrays, DEFAULT), loss=limit, grad=limit, scale=limit, sqnorm=limit)


@every_backend
@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["generated", "positives", "negatives", "negative_weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_input_is_not_hidden(backend, where, value):
    """No floor may turn a NaN into a number: the trainer stops on it."""
    arrays = [np.array(v) for v in random_problem()]
    arrays[where][(1,) * arrays[where].ndim] = value
    result, _ = evaluate(backend, arrays)
    assert not torch.isfinite(result.loss).all()
    assert not torch.isfinite(result.scale) or value == float("inf")


# Diagnostics


@every_backend
@pytest.mark.parametrize("weights", ["random", "zero"])
def test_diagnostics_agree_with_the_dense_evaluation(backend, weights):
    arrays = random_problem(weights=weights)
    result, _ = evaluate(backend, arrays, diagnostics=True)
    dense = dense_drift(*arrays, DEFAULT).diagnostics
    for name in ("floor_share", "positive_sample_size", "negative_sample_size", "mean_coefficient"):
        for tau in DEFAULT:
            actual = numbers(result.diagnostics[name][tau])
            assert_close(f"{name} at {tau}", actual, dense[tau][name], relative=TOLERANCE[BEST_TYPE[backend]])


@every_backend
def test_diagnostics_change_nothing_and_are_off_by_default(backend):
    arrays = random_problem()
    without, gradient = evaluate(backend, arrays)
    with_them, other_gradient = evaluate(backend, arrays, diagnostics=True)
    assert without.diagnostics is None
    assert torch.equal(without.loss, with_them.loss) and np.array_equal(gradient, other_gradient)


# Refusals: each names the argument and what it was


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


REFUSED_INPUTS = {
    "generated_2d": ({"generated": zeros(3, 8)}, ("generated", "[3, 8]")),
    "generated_4d": ({"generated": zeros(2, 3, 8, 1)}, ("generated", "[2, 3, 8, 1]")),
    "positives_2d": ({"positives": zeros(4, 8)}, ("positives", "[4, 8]")),
    "negatives_1d": ({"negatives": zeros(8)}, ("negatives", "[8]")),
    "positives_features": ({"positives": zeros(2, 4, 7)}, ("positives", "[2, 4, 7]")),
    "positives_problems": ({"positives": zeros(3, 4, 8)}, ("positives", "[3, 4, 8]")),
    "positives_one_problem": ({"positives": zeros(1, 4, 8)}, ("positives", "[1, 4, 8]")),
    "negatives_features": ({"negatives": zeros(2, 5, 1)}, ("negatives", "[2, 5, 1]")),
    "negatives_problems": ({"negatives": zeros(1, 5, 8)}, ("negatives", "[1, 5, 8]")),
    "weight_of_another_count": ({"negative_weight": zeros(2, 4)}, ("negative_weight", "[2, 4]")),
    "weight_of_one_problem": ({"negative_weight": zeros(1, 5)}, ("negative_weight", "[1, 5]")),
    "weight_1d": ({"negative_weight": zeros(5)}, ("negative_weight", "[5]")),
    "weight_3d": ({"negative_weight": zeros(2, 5, 1)}, ("negative_weight", "[2, 5, 1]")),
    "weight_without_negatives": ({"negatives": None}, ("negative_weight", "[2, 5]")),
    "no_generated": ({"generated": zeros(2, 0, 8)}, ("generated", "[2, 0, 8]")),
    "no_positives": ({"positives": zeros(2, 0, 8)}, ("positives", "[2, 0, 8]")),
    "integer_generated": ({"generated": zeros(2, 3, 8, dtype=torch.int64)}, ("generated", "int64")),
    "integer_positives": ({"positives": zeros(2, 4, 8, dtype=torch.int32)}, ("positives", "int32")),
    "integer_negatives": ({"negatives": zeros(2, 5, 8, dtype=torch.uint8)}, ("negatives", "uint8")),
    "boolean_generated": ({"generated": zeros(2, 3, 8, dtype=torch.bool)}, ("generated", "bool")),
}


@every_backend
@pytest.mark.parametrize("changed, words", REFUSED_INPUTS.values(), ids=REFUSED_INPUTS.keys())
def test_bad_input_is_refused(backend, changed, words):
    arguments = {
        "generated": zeros(2, 3, 8),
        "positives": zeros(2, 4, 8),
        "negatives": zeros(2, 5, 8),
        "negative_weight": zeros(2, 5),
    }
    arguments.update(changed)
    with pytest.raises(ValueError) as refusal:
        drift_loss(**arguments, config=DriftConfig(backend=backend))
    for word in words:
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperatures": ()}, ("temperatures", "empty")),
        ({"temperatures": (0.02, 0.0)}, ("temperatures", "0.0")),
        ({"temperatures": (-0.1,)}, ("temperatures", "-0.1")),
        ({"temperatures": (float("nan"),)}, ("temperatures", "nan")),
        ({"temperatures": (float("inf"),)}, ("temperatures", "inf")),
        ({"temperatures": (0.2, 0.2)}, ("temperatures", "0.2")),
        ({"backend": "cuda"}, ("backend", "cuda", "fused")),
        ({"keep_distances": "sometimes"}, ("keep_distances", "sometimes", "auto, always, never")),
    ],
)
def test_bad_configuration_is_refused(options, words):
    with pytest.raises(ValueError) as refusal:
        DriftConfig(**options)
    for word in words:
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"


@every_backend
def test_statistics_without_a_temperature_are_refused(backend):
    given = DriftStatistics(torch.tensor(1.0), {0.05: torch.tensor(0.1)}, None)
    with pytest.raises(ValueError, match=r"statistics.*0\.02"):
        evaluate(backend, random_problem(), (0.02, 0.05), statistics=given)
