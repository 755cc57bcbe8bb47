"""The fused drift op on a CUDA device: against the reference in float64, and what only a device can show.

None of this runs without one. The arithmetic itself is proved on the host by test_cuda_arithmetic.py.
"""

import itertools

import numpy as np
import pytest
import torch
from dense_evaluation import assert_close
from test_couplings import ALONE, COUPLINGS, TEMPERATURES, option_name, sampled_options
from test_drift_loss import CASES, SHAPES, random_problem, records

from drift_accel import DriftConfig, drift_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GOLDEN = 5e-5
FLOAT32 = 1e-4
GRADIENT = {torch.float32: FLOAT32, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # the gradient is rounded to the features' type
TYPES = pytest.mark.parametrize("dtype", list(GRADIENT), ids=lambda dtype: str(dtype).removeprefix("torch."))


def on_device(arrays, dtype=torch.float32):
    *members, weights = (torch.as_tensor(value, device="cuda") for value in arrays)
    return [value.to(dtype) for value in members], weights.float()


def evaluate(members, weights, temperatures=TEMPERATURES, backend="fused", diagnostics=False, **options):
    """DriftLoss and the gradient of the mean loss, on the device."""
    generated, positives, negatives = members
    generated = generated.detach().clone().requires_grad_()
    config = DriftConfig(temperatures=tuple(temperatures), backend=backend, **options)
    result = drift_loss(generated, positives, negatives, negative_weight=weights, config=config, diagnostics=diagnostics)
    result.loss.mean().backward()
    return result, generated.grad


def numbers(tensor):
    return tensor.detach().double().cpu().numpy()


def assert_agrees(
    members, weights, dtype=torch.float32, limit=FLOAT32, gradient_limit=None, temperatures=TEMPERATURES, **options
):
    result, gradient = evaluate(members, weights, temperatures, **options)
    exact = [value.double() for value in members]
    expected, exact_gradient = evaluate(exact, weights.double(), temperatures, backend="reference", **options)
    assert_close("scale", numbers(result.scale), numbers(expected.scale), relative=limit)
    for tau, value in expected.drift_sqnorm.items():
        if float(value) > 1e-6:
            assert_close(f"n_{tau:g}", numbers(result.drift_sqnorm[tau]), numbers(value), relative=1e-3)
    assert_close("loss", numbers(result.loss), numbers(expected.loss), relative=limit, absolute=1e-20)
    gradient_limit = GRADIENT[dtype] if gradient_limit is None else gradient_limit
    assert_close("gradient", numbers(gradient), numbers(exact_gradient), relative=gradient_limit, absolute=1e-20, normwise=True)


def assert_same_bits(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def bits(members, weights, **options):
    result, gradient = evaluate(members, weights, **options)
    return [result.loss, gradient, result.scale, *result.drift_sqnorm.values()]


@pytest.mark.parametrize("case", CASES)
def test_records_of_the_release(case):
    record = {name.removeprefix(f"{case}/"): v for name, v in records().items() if name.startswith(f"{case}/")}
    temperatures = [round(float(tau), 6) for tau in record["temperatures"]]
    members, weights = on_device([record[name] for name in ("gen", "pos", "neg", "weight_neg")])
    result, gradient = evaluate(members, weights, temperatures)
    assert_close("loss", numbers(result.loss), record["loss"], relative=GOLDEN)
    assert_close("gradient", numbers(gradient), record["grad_mean_loss"], relative=GOLDEN, normwise=True)
    assert_close("scale", numbers(result.scale), record["scale"], relative=2e-5)
    for tau, value in result.drift_sqnorm.items():
        assert_close(f"n_{tau:g}", numbers(value), record[f"drift_sqnorm_{tau:g}"], relative=1e-4)


@TYPES
@pytest.mark.parametrize("options", ALONE + COUPLINGS[1:], ids=option_name)
def test_each_option(options, dtype):
    for weights_kind in ("random", "one_problem_zero"):
        if weights_kind == "random" or options.get("sinkhorn_marginal") != "none":
            assert_agrees(*on_device(random_problem(weights=weights_kind), dtype), dtype, **options)


@pytest.mark.parametrize("case", sampled_options(), ids=lambda case: f"{option_name(case[0])}-{'x'.join(map(str, case[1]))}")
def test_combined_options(case):
    options, sizes, weights_kind = case
    members, weights = on_device(random_problem(*sizes, weights_kind))
    assert_agrees(members, weights, limit=1e-3, gradient_limit=1e-3, **options)


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:5])) + f"-{len(shape[5])}-{shape[6]}")
def test_small_shapes(shape, dtype):
    *sizes, temperatures, weights_kind = shape
    members, weights = on_device(random_problem(*sizes, weights_kind), dtype)
    assert_agrees(members, weights, dtype, limit=5e-4, gradient_limit=max(5e-4, GRADIENT[dtype]), temperatures=temperatures)


@TYPES
@pytest.mark.parametrize(
    "shape",
    [(300, 64, 64, 32, 640), (40, 64, 128, 32, 257), (3, 512, 512, 512, 96), (2, 64, 64, 32, 40_000), (70_000, 4, 3, 1, 8)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_large_shapes(shape, dtype):
    """The recipes' sizes, problems beyond shared memory, several segments of features, several chunks of problems."""
    B, G, P, N, S = shape
    generator = torch.Generator("cuda").manual_seed(5)
    members = [torch.randn(B, count, S, generator=generator, device="cuda").mul_(0.9).to(dtype) for count in (G, P, N)]
    members[1] += 0.3
    weights = torch.rand(B, N, generator=generator, device="cuda") + 0.5
    assert_agrees(members, weights, dtype)


@TYPES
@pytest.mark.parametrize("offset", [3.0, 10.0, 300.0])
def test_large_common_offset(offset, dtype):
    generated, positives, negatives, weights = random_problem(B=3, G=24, P=20, N=9, S=96)
    members, weights = on_device([generated + offset, positives - 0.2 + offset, negatives + offset, weights], dtype)
    assert_agrees(members, weights, dtype)


def test_tf32_does_not_reach_the_op():
    members, weights = on_device(random_problem(B=3, G=24, P=20, N=9, S=96))
    exact = bits(members, weights)
    saved = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert_same_bits(exact, bits(members, weights))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert_same_bits(exact, bits(members, weights))
    finally:
        torch.backends.cuda.matmul.fp32_precision = saved


@TYPES
def test_diagnostics(dtype):
    members, weights = on_device(random_problem(), dtype)
    for options in COUPLINGS:
        result, _ = evaluate(members, weights, diagnostics=True, **options)
        expected, _ = evaluate(
            [value.double() for value in members], weights.double(), backend="reference", diagnostics=True, **options
        )
        for name, tau in itertools.product(expected.diagnostics, TEMPERATURES):
            actual, value = (numbers(one.diagnostics[name][tau]) for one in (result, expected))
            assert_close(f"{name} at {tau}", actual, value, relative=5e-4)


@TYPES
def test_same_bits_from_run_to_run(dtype):
    generator = torch.Generator("cuda").manual_seed(6)
    members = [torch.randn(200, count, 640, generator=generator, device="cuda").to(dtype) for count in (64, 64, 32)]
    weights = torch.rand(200, 32, generator=generator, device="cuda")
    first = bits(members, weights)
    for _ in range(5):
        torch.empty(1 << 26, device="cuda").fill_(float("nan"))  # what fresh memory holds must not matter
        assert_same_bits(first, bits(members, weights))


@TYPES
def test_strides_do_not_matter(dtype):
    members, weights = on_device(random_problem(B=3, G=6, P=5, N=4, S=12), dtype)
    wanted = bits(members, weights)
    by_location = [value.permute(1, 2, 0).contiguous().permute(2, 0, 1) for value in members]
    assert_same_bits(wanted, bits(by_location, weights.T.contiguous().T))
    shared = [members[0], members[1][:1].expand(3, -1, -1), members[2]]
    repeated = [members[0], members[1][:1].repeat(3, 1, 1), members[2]]
    assert_same_bits(bits(repeated, weights), bits(shared, weights))


def test_nothing_waits_for_the_device():
    members, weights = on_device(random_problem())
    bits(members, weights)  # first calls create handles and workspaces
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [bits(members, weights, **options) for options in ({}, {"coupling": "sinkhorn"}, {"field": "per_temperature"})]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value).all() for result in results for value in result)


def test_runs_on_the_current_stream():
    members, weights = on_device(random_problem(B=64, G=32, P=32, N=8, S=512))
    wanted = bits(members, weights)
    stream = torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device="cuda")
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.full_like(value, float("nan")) for value in members]
        for _ in range(10):
            busy = busy @ busy * 1e-2  # the members are written long after the op was asked for
        for place, value in zip(late, members, strict=True):
            place.copy_(value)
        results = bits(late, weights)
    stream.synchronize()
    assert_same_bits(wanted, results)


@TYPES
@pytest.mark.parametrize("options", [{}, {"coupling": "sinkhorn", "drift_form": "split"}, {"metric": "l2_sq"}], ids=option_name)
def test_graph_capture(options, dtype):
    members, weights = on_device(random_problem(B=9, G=16, P=12, N=4, S=96), dtype)
    others, other_weights = on_device(random_problem(B=9, G=16, P=12, N=4, S=96, seed=1), dtype)
    wanted, other_wanted = bits(members, weights, **options), bits(others, other_weights, **options)
    config = DriftConfig(temperatures=TEMPERATURES, backend="fused", **options)

    def run():
        result = drift_loss(*members, negative_weight=weights, config=config)
        return [result.loss, result.scale, *result.drift_sqnorm.values()]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert_same_bits([wanted[0], *wanted[2:]], captured)
    for place, value in zip((*members, weights), (*others, other_weights), strict=True):
        place.copy_(value)
    graph.replay()
    assert_same_bits([other_wanted[0], *other_wanted[2:]], captured)


def test_compiled_loss_is_the_eager_one():
    members, weights = on_device(random_problem(B=9, G=16, P=12, N=4, S=96))
    config = DriftConfig(temperatures=TEMPERATURES, backend="fused")

    def loss(generated, positives, negatives, weights):
        return drift_loss(generated * 1.0, positives, negatives, negative_weight=weights, config=config).loss.mean()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        generated = members[0].detach().clone().requires_grad_()
        function(generated, members[1], members[2], weights).backward()
        gradients.append(generated.grad)
    assert_close("gradient", numbers(gradients[1]), numbers(gradients[0]), relative=1e-5, normwise=True)


def test_memory_beyond_inputs_and_outputs_is_bounded():
    """Distances that are kept, one workspace of 64 MiB and partial sums; nothing with a temperature axis."""
    B, G, P, N, S = 2000, 64, 64, 32, 256
    members = [torch.randn(B, count, S, device="cuda", dtype=torch.bfloat16) for count in (G, P, N)]
    weights = torch.rand(B, N, device="cuda")
    outputs = members[0].numel() * 2 + B * 4
    distances = B * G * (G + P + N) * 4
    for temperatures in ((0.05,), tuple(0.02 * 1.3**k for k in range(12))):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        drift_loss(*members, negative_weight=weights, config=DriftConfig(temperatures=temperatures, backend="fused"))
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - outputs - distances
        assert extra < 100 << 20, f"{extra >> 20} MiB beyond inputs, outputs and distances"


def test_empty_batch():
    members, weights = on_device([value[:0] for value in random_problem()])
    result, gradient = evaluate(members, weights)
    assert result.loss.shape == (0,) and gradient.shape == members[0].shape


@pytest.mark.parametrize("device", range(1, torch.cuda.device_count()))
def test_other_devices(device):
    members, weights = on_device(random_problem())
    wanted = bits(members, weights)
    moved = bits([value.to(f"cuda:{device}") for value in members], weights.to(f"cuda:{device}"))
    for one, other in zip(wanted, moved, strict=True):
        assert np.array_equal(numbers(one), numbers(other))
