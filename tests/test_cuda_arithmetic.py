"""The arithmetic of the CUDA kernels, run thread after thread on the host (csrc/cuda/host_harness.cpp): no device is needed.

Float32 results are held against the records of the release, the tests' own float64 loops and, where those are too slow, the
reference in float64 on the same rounded inputs.
"""

import itertools
import math
import subprocess

import numpy as np
import pytest
import torch
from cuda_harness import SHARED_BYTES, build, compiler, run_harness
from dense_evaluation import assert_close
from test_couplings import ALONE, COUPLINGS, TEMPERATURES, dense, option_name, sampled_options
from test_drift_loss import CASES, DEFAULT, SHAPES, random_problem, records

from drift_accel import DriftConfig, drift_loss

GOLDEN = 5e-5  # of the loss elementwise and of the gradient norm-wise
FLOAT32 = 1e-4  # distances in float32 over a temperature of 0.02; where a case needs more, it says so
GRADIENT = {torch.float32: FLOAT32, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # the gradient is rounded to the features' type
HALF = (torch.bfloat16, torch.float16)
# B, G, P, N, S
EDGES = [
    (3, 1, 1, 0, 1),
    (2, 1, 1, 1, 1),
    (2, 7, 1, 0, 3),
    (2, 1, 9, 5, 65),
    (3, 9, 8, 7, 63),
    (1, 33, 31, 5, 130),
    (2, 17, 40, 0, 64),
]
MODES = [{}, {"coupling": "sinkhorn", "drift_form": "split"}, {"field": "per_temperature"}]
DIAGNOSTICS = ("floor_share", "positive_sample_size", "negative_sample_size", "mean_coefficient")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=lambda dtype: str(dtype).removeprefix("torch."))

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler (g++, clang++ or c++) on PATH")


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """{build: path of the program}; "sanitized" stops at the first bad address or undefined operation."""
    return build(tmp_path_factory.mktemp("host_harness"))


def tensors(arrays, dtype=torch.float32):
    """(generated, positives, negatives) of the type, and the weights in float32."""
    *members, weights = (torch.as_tensor(value) for value in arrays)
    return [value.to(dtype) for value in members], weights.float()


def as_float64(members, weights):
    return [value.double().numpy() for value in (*members, weights)]


def reference(members, weights, temperatures=TEMPERATURES, **options):
    """The reference in float64 on the same numbers: DriftLoss and the gradient of the mean loss."""
    generated, positives, negatives = (value.double() for value in members)
    generated = generated.clone().requires_grad_()
    config = DriftConfig(temperatures=tuple(temperatures), backend="reference", **options)
    result = drift_loss(generated, positives, negatives, negative_weight=weights.double(), config=config)
    result.loss.mean().backward()
    return result, generated.grad.numpy()


def assert_agrees(result, dense, dtype=torch.float32, limit=FLOAT32, gradient_limit=None):
    """A HarnessResult against a DenseDrift; norms where the method does not floor them away."""
    assert_close("scale", result.scale, dense.scale, relative=limit)
    assert_close("mean of d^2", result.mean_square, dense.mean_square, relative=limit)
    for k, (tau, value) in enumerate(dense.sqnorm.items()):
        if value > 1e-6:
            assert_close(f"n_{tau:g}", result.sqnorm[k], value, relative=1e-3)
    assert_close("loss", result.loss, dense.loss, relative=limit, absolute=1e-20)
    gradient_limit = GRADIENT[dtype] if gradient_limit is None else gradient_limit
    assert_close("gradient", result.gradient, dense.gradient, relative=gradient_limit, absolute=1e-20, normwise=True)


def assert_agrees_with_reference(result, members, weights, dtype=torch.float32, limit=FLOAT32, **options):
    expected, gradient = reference(members, weights, **options)
    for k, value in enumerate(expected.drift_sqnorm.values()):
        if float(value) > 1e-6:
            assert_close(f"n of temperature {k}", result.sqnorm[k], float(value), relative=1e-3)
    assert_close("scale", result.scale, float(expected.scale), relative=limit)
    assert_close("loss", result.loss, expected.loss.detach().numpy(), relative=limit, absolute=1e-20)
    assert_close("gradient", result.gradient, gradient, relative=GRADIENT[dtype], absolute=1e-20, normwise=True)


def assert_same_bits(first, second):
    for name in ("sums", "norms", "loss", "gradient", "diagnostics"):
        assert np.array_equal(getattr(first, name), getattr(second, name), equal_nan=True), name


# Against the records of the release


@pytest.mark.parametrize("program", ["plain", "sanitized"])
@pytest.mark.parametrize("case", CASES)
def test_records_of_the_release(harness, program, case):
    record = {name.removeprefix(f"{case}/"): v for name, v in records().items() if name.startswith(f"{case}/")}
    temperatures = [round(float(tau), 6) for tau in record["temperatures"]]
    members, weights = tensors([record[name] for name in ("gen", "pos", "neg", "weight_neg")])
    paths = [("auto", True, SHARED_BYTES)]
    if program == "plain":
        paths = itertools.product(("gram", "fields"), (True, False), (0, SHARED_BYTES))
    for norms, keep, shared_bytes in paths:
        result = run_harness(
            harness[program], members, weights, temperatures, {}, norms=norms, keep=keep, shared_bytes=shared_bytes
        )
        assert_close("loss", result.loss, record["loss"], relative=GOLDEN)
        assert_close("gradient", result.gradient, record["grad_mean_loss"], relative=GOLDEN, normwise=True)
        assert_close("scale", result.scale, record["scale"], relative=2e-5)
        for k, tau in enumerate(temperatures):
            assert_close(f"n_{tau:g}", result.sqnorm[k], record[f"drift_sqnorm_{tau:g}"], relative=1e-4)


# Every option, every type


@TYPES
@pytest.mark.parametrize("options", ALONE + COUPLINGS[1:], ids=option_name)
def test_each_option(harness, options, dtype):
    """Also: no value of a block's memory is read unwritten, or touched by two threads in one phase (checked)."""
    members, weights = tensors(random_problem(weights="random"), dtype)
    expected = dense(as_float64(members, weights), options)
    for path in ({"norms": "gram"}, {"norms": "fields"}, {"norms": "fields", "shared_bytes": 0, "library_fields": True}):
        result = run_harness(
            harness["plain"],
            members,
            weights,
            TEMPERATURES,
            options,
            **path,
            checked=True,
            diagnostics=True,
        )
        assert_agrees(result, expected, dtype)
        for (k, tau), (column, name) in itertools.product(enumerate(TEMPERATURES), enumerate(DIAGNOSTICS)):
            if name == "mean_coefficient" and options.get("attraction", 1) != options.get("repulsion", 1):
                continue  # what is left of a row goes to the self pair here, to no pair in the loops
            value = expected.diagnostics[tau][name]
            assert_close(f"{name} at {tau}", result.diagnostics[k, column], value, relative=FLOAT32)


@pytest.mark.parametrize("case", sampled_options(), ids=lambda case: f"{option_name(case[0])}-{'x'.join(map(str, case[1]))}")
def test_combined_options(harness, case):
    options, sizes, weights_kind = case
    members, weights = tensors(random_problem(*sizes, weights_kind))
    expected = dense(as_float64(members, weights), options)
    for norms in ("gram", "fields"):
        result = run_harness(harness["plain"], members, weights, TEMPERATURES, options, norms=norms, keep=False, checked=True)
        assert_agrees(result, expected, limit=1e-3, gradient_limit=1e-3)  # tau = 0.02 without a floor amplifies most


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:5])) + f"-{len(shape[5])}-{shape[6]}")
def test_shapes_of_the_dense_evaluation(harness, shape):
    *sizes, temperatures, weights_kind = shape
    members, weights = tensors(random_problem(*sizes, weights_kind))
    expected = dense(as_float64(members, weights), {}, temperatures)
    for program, checked in (("plain", True), ("sanitized", False)):
        result = run_harness(harness[program], members, weights, temperatures, {}, checked=checked)
        assert_agrees(result, expected, limit=5e-4, gradient_limit=5e-4)


@pytest.mark.parametrize("mistake", ["race", "unwritten"])
def test_checked_memory_stops_at_a_mistake(harness, mistake):
    """The check that the tests above rely on: a value that another thread writes in the phase, and one that nobody wrote."""
    process = subprocess.run([str(harness["plain"]), "demonstrate", mistake], capture_output=True, text=True)
    assert process.returncode != 0 and {"race": "another thread", "unwritten": "before it was written"}[mistake] in process.stderr


# Sizes, paths and order


@TYPES
@pytest.mark.parametrize(
    "shape",
    [
        (3, 1, 1, 0, 1),
        (2, 1, 1, 1, 1),
        (2, 7, 1, 0, 3),
        (2, 1, 9, 5, 65),
        (3, 9, 8, 7, 63),
        (1, 33, 31, 5, 130),
        (2, 17, 40, 0, 64),
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_edge_shapes_on_every_path(harness, shape, dtype):
    """Shared and global memory, fields with and without a library, one problem or all at a time, one segment or several."""
    members, weights = tensors(random_problem(*shape, weights="one_problem_zero" if shape[3] else "random"), dtype)
    expected = dense(as_float64(members, weights), {})
    paths = [
        {"norms": "gram"},
        {"norms": "fields", "shared_bytes": 0, "keep": False},
        {"norms": "gram", "workspace_bytes": 0, "segment_features": 16, "keep": False, "library_fields": True},
        {"norms": "fields", "library_fields": True},
        {"norms": "fields", "keep": False},
        {"norms": "fields", "workspace_bytes": 0, "segment_features": 8, "shared_bytes": 0},
    ]
    for path in paths:
        result = run_harness(harness["sanitized"], members, weights, TEMPERATURES, {}, **path)
        assert_agrees(result, expected, dtype, limit=5e-4)
        plans = (result.norms_plan, result.loss_plan)
        assert all(plan["shared"] == (path.get("shared_bytes", 1) > 0) for plan in plans)
        assert all(plan["chunk"] == (1 if "workspace_bytes" in path else shape[0]) for plan in plans)
        assert all(plan["segments"] == math.ceil(shape[4] / path.get("segment_features", 1 << 20)) for plan in plans)
        assert plans[0]["gram"] == (path["norms"] == "gram")
        by_library = dtype == torch.float32 or path.get("library_fields", False) or path.get("shared_bytes") == 0
        assert all(plan["field_kernel"] == (not by_library) for plan in plans)


@pytest.mark.parametrize(
    "options", [{}, {"coupling": "sinkhorn", "drift_form": "split"}, {"field": "per_temperature"}], ids=option_name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bits_do_not_depend_on_the_order_of_threads_or_on_chunks(harness, options, dtype):
    members, weights = tensors(random_problem(B=3, G=19, P=12, N=5, S=70), dtype)
    for path in ({"norms": "gram", "library_fields": True}, {"norms": "fields"}, {"shared_bytes": 0, "keep": False}):
        first = run_harness(harness["plain"], members, weights, TEMPERATURES, options, diagnostics=True, **path)
        for change in ({"backwards": True}, {"workspace_bytes": 0}):  # the other order of threads; one problem at a time
            other = run_harness(harness["plain"], members, weights, TEMPERATURES, options, diagnostics=True, **path, **change)
            assert_same_bits(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape, shared",
    [((2, 64, 64, 32, 640), True), ((1, 64, 128, 32, 300), False), ((1, 200, 512, 130, 24), False), ((1, 3, 512, 0, 5), True)],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_large_problems(harness, shape, shared, dtype):
    """The sizes of the published recipes in 99 KB of shared memory, and problems that need the global path."""
    members, weights = tensors(random_problem(*shape), dtype)
    result = run_harness(harness["plain"], members, weights, TEMPERATURES, {})
    assert result.norms_plan["shared"] == result.loss_plan["shared"] == shared
    assert_agrees_with_reference(result, members, weights, dtype)


def test_many_features_in_segments(harness):
    members, weights = tensors(random_problem(B=1, G=4, P=5, N=3, S=40_000))
    result = run_harness(harness["plain"], members, weights, TEMPERATURES, {})
    assert result.loss_plan["segments"] == 3
    assert_agrees_with_reference(result, members, weights)


def test_number_of_temperatures_up_to_the_largest(harness):
    temperatures = tuple(0.03 * 1.3**k for k in range(16))
    members, weights = tensors(random_problem())
    for options in ({}, {"field": "per_temperature"}):
        result = run_harness(harness["sanitized"], members, weights, temperatures, options, diagnostics=True)
        assert_agrees(result, dense(as_float64(members, weights), options, temperatures))


def test_no_problems(harness):
    members, weights = tensors([value[:0] for value in random_problem()])
    result = run_harness(harness["sanitized"], members, weights, TEMPERATURES, {})
    assert not result.sums.any() and not result.norms.any() and result.loss.shape == (0,)


@TYPES
def test_strides_do_not_matter(harness, dtype):
    members, weights = tensors(random_problem(B=3, G=6, P=5, N=4, S=12), dtype)
    wanted = run_harness(harness["sanitized"], members, weights, TEMPERATURES, {})
    by_location = [value.permute(1, 2, 0).contiguous().permute(2, 0, 1) for value in members]  # problems innermost
    padded = [torch.nn.functional.pad(value, (3, 2, 1, 1))[:, 1:-1, 3:-2] for value in members]
    for strided in (by_location, padded):
        assert not any(value.is_contiguous() for value in strided)
        assert_same_bits(wanted, run_harness(harness["sanitized"], strided, weights.T.contiguous().T, TEMPERATURES, {}))
    shared = [members[0], members[1][:1].expand(3, -1, -1), members[2]]
    repeated = [members[0], members[1][:1].repeat(3, 1, 1), members[2]]
    assert_same_bits(
        run_harness(harness["sanitized"], shared, weights[:1].expand(3, -1), TEMPERATURES, {}),
        run_harness(harness["sanitized"], repeated, weights[:1].repeat(3, 1), TEMPERATURES, {}),
    )


def test_missing_weights_mean_one(harness):
    members, weights = tensors(random_problem())
    ones = run_harness(harness["sanitized"], members, torch.ones_like(weights), TEMPERATURES, {})
    assert_same_bits(ones, run_harness(harness["sanitized"], members, None, TEMPERATURES, {}))


# Hard numbers


@TYPES
@pytest.mark.parametrize("offset", [3.0, 10.0, 300.0])
def test_large_common_offset(harness, offset, dtype):
    """Features of spread 1 far off zero, rounded to their type there: the gradient against float64 on the same numbers."""
    generated, positives, negatives, weights = random_problem(B=3, G=24, P=20, N=9, S=96)
    members, weights = tensors([generated + offset, positives - 0.2 + offset, negatives + offset, weights], dtype)
    for path in ({"norms": "gram"}, {"norms": "fields"}, {"norms": "fields", "library_fields": True}):
        result = run_harness(harness["plain"], members, weights, DEFAULT, {}, **path)
        assert_agrees_with_reference(result, members, weights, dtype, limit=2e-5)


@pytest.mark.parametrize("dtype", HALF, ids=["bfloat16", "float16"])
def test_offset_that_no_pivot_can_take(harness, dtype):
    """One target at zero leaves no exact pivot to any feature: accuracy must not hang on it."""
    generated, positives, negatives, weights = random_problem(B=2, G=24, P=20, N=9, S=96)
    members, weights = tensors([generated + 10, positives + 10, negatives + 10, weights], dtype)
    members[2][:, 0] = 0
    result = run_harness(harness["plain"], members, weights, DEFAULT, {})
    assert_agrees_with_reference(result, members, weights, dtype, limit=2e-3)


@TYPES
def test_coinciding_points(harness, dtype):
    """All generated samples equal, as at the start of training, and some positives equal to them."""
    generated, positives, negatives, weights = random_problem(B=3, G=12, P=10, N=4, S=48)
    generated[:] = generated[:, :1]
    positives[:, :3] = generated[:, :3]
    members, weights = tensors([generated, positives, negatives, weights], dtype)
    result = run_harness(harness["plain"], members, weights, DEFAULT, {}, keep=False)
    assert_agrees_with_reference(result, members, weights, dtype)


def test_everything_at_one_point(harness):
    members, weights = tensors([np.full_like(value, 0.7) for value in random_problem()[:3]] + [random_problem()[3]])
    result = run_harness(harness["sanitized"], members, weights, DEFAULT, {})
    assert np.abs(result.loss).max() < 1e-12 and np.abs(result.gradient).max() < 1e-5  # rounding of the mean, over u = 1e-3
    assert_close("scale", result.scale, 1e-4, relative=1e-5)  # every distance at its floor


@pytest.mark.parametrize("options", COUPLINGS, ids=option_name)
def test_zero_weight_is_finite_and_exact(harness, options):
    members, weights = tensors(random_problem(weights="zero"))
    expected = dense(as_float64(members, weights), options)
    for norms in ("gram", "fields"):
        result = run_harness(harness["plain"], members, weights, TEMPERATURES, options, norms=norms, checked=True)
        assert_agrees(result, expected, limit=5e-4, gradient_limit=5e-4)


@pytest.mark.parametrize("factor", [1e-7, 1e-5, 1e5, 1e12])
@pytest.mark.parametrize("metric", ["l2", "l2_sq"])
def test_tiny_and_huge_features(harness, metric, factor):
    generated, positives, negatives, weights = random_problem()
    members, weights = tensors([generated * factor, positives * factor, negatives * factor, weights])
    result = run_harness(harness["plain"], members, weights, TEMPERATURES, {"metric": metric})
    assert_agrees_with_reference(result, members, weights, limit=5e-4, metric=metric)


def test_statistics_from_outside(harness):
    members, weights = tensors(random_problem(weights="one_problem_zero"))
    sqnorm = dict(zip(TEMPERATURES, (0.5, 1e-12, 2.0), strict=True))  # one below the floor of 1e-8
    for metric in ("l2", "l2_sq"):
        expected = dense(as_float64(members, weights), {"metric": metric}, scale=3.0, sqnorm=sqnorm, mean_square=11.0)
        result = run_harness(
            harness["plain"],
            members,
            weights,
            TEMPERATURES,
            {"metric": metric},
            scale=3.0,
            mean_square=11.0,
            sqnorm=tuple(sqnorm.values()),
        )
        assert_close("loss", result.loss, expected.loss, relative=FLOAT32)
        assert_close("gradient", result.gradient, expected.gradient, relative=FLOAT32, normwise=True)


@pytest.mark.parametrize("where", [0, 1, 2, 3], ids=["generated", "positives", "negatives", "negative_weight"])
@pytest.mark.parametrize("options", COUPLINGS + [{"metric": "l2_sq"}], ids=option_name)
def test_not_a_number_is_not_hidden(harness, options, where):
    for dtype in (torch.float32, torch.bfloat16):
        members, weights = tensors(random_problem(), dtype)
        spoilt = (*members, weights)[where]
        spoilt[(1,) * spoilt.ndim] = float("nan")
        result = run_harness(harness["plain"], members, weights, TEMPERATURES, options)
        assert not np.isfinite(result.loss).all()


def test_norms_through_the_gram_matrix_are_those_of_the_fields(harness):
    """Where n_tau > 1e-6 the two agree within 1e-3: also for many rows of few features, where most cancels."""
    for shape in ((2, 64, 64, 16, 2), (4, 30, 40, 10, 8), (2, 48, 48, 0, 500)):
        generated, _, negatives, weights = random_problem(*shape)
        positives = np.roll(generated, 1, axis=0)[:, :, ::-1].copy()  # the same cloud
        members, weights = tensors([generated, positives, negatives, weights])
        for temperatures in ((0.02, 0.2), (5.0, 50.0)):
            gram, fields = (
                run_harness(harness["plain"], members, weights, temperatures, {}, norms=norms) for norms in ("gram", "fields")
            )
            for one, other in zip(gram.sqnorm, fields.sqnorm, strict=True):
                if other > 1e-6:
                    assert_close("n_tau", one, other, relative=1e-3)


@TYPES
def test_rounding_to_each_type_is_that_of_torch(harness, dtype):
    """The gradient is rounded to nearest even, subnormal numbers and ties included: a scale makes its values cover the range."""
    members, weights = tensors(random_problem(B=2, G=4, P=3, N=2, S=16), dtype)
    for scale in (1.0, 100.0):
        result = run_harness(harness["plain"], members, weights, (0.2,), {}, scale=scale, sqnorm=(1e-3,))
        gradient = torch.as_tensor(result.gradient * 2)
        assert torch.equal(gradient.to(dtype).double(), gradient)
