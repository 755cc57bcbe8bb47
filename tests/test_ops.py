"""The fused drift op: what it is to torch, edge shapes and types, memory, threads, and who chooses it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_evaluation import assert_close, relative_difference
from test_drift_loss import numbers, random_problem

from drift_accel import DriftConfig, drift_loss
from drift_accel.drift import DriftProblems, DriftStatistics, drift_losses, ops, reference
from drift_accel.drift.configuration import BackendError
from drift_accel.drift.loss import compute_statistics, keeps_distances, measure_distances

ROOT = Path(__file__).resolve().parents[1]
NOT_BUILT = ops.load_extension().problem
needs_op = pytest.mark.skipif(NOT_BUILT is not None, reason=f"the fused op cannot be used: {NOT_BUILT}")
TEMPERATURES = (0.02, 0.05, 0.2)
HALF = (torch.bfloat16, torch.float16)

# One list for torch's own checks: sizes B, G, P, N, S, type of the features, what is done to their layout, options.
SAMPLES = {
    "plain": ((3, 4, 5, 2, 8), torch.float32, "contiguous", {}),
    "no_negatives": ((2, 4, 5, 0, 8), torch.float32, "contiguous", {}),
    "bfloat16": ((2, 6, 5, 3, 17), torch.bfloat16, "contiguous", {}),
    "float16": ((2, 6, 5, 3, 17), torch.float16, "contiguous", {}),
    "transposed": ((2, 4, 3, 2, 9), torch.float32, "transposed", {}),
    "expanded": ((3, 4, 3, 2, 9), torch.float32, "expanded", {}),
    "stepped": ((3, 4, 3, 2, 9), torch.bfloat16, "stepped", {}),
    "no_problems": ((0, 4, 3, 2, 9), torch.float32, "contiguous", {}),
    "row": ((2, 3, 4, 2, 5), torch.float32, "contiguous", {"coupling": "row", "weight_placement": "log_bias"}),
    "sinkhorn": ((2, 3, 4, 2, 5), torch.float32, "contiguous", {"coupling": "sinkhorn", "drift_form": "split"}),
    "squared": ((2, 3, 4, 2, 5), torch.float32, "contiguous", {"metric": "l2_sq", "field": "per_temperature"}),
    "exact": ((2, 3, 4, 2, 5), torch.float32, "contiguous", {"affinity_floor": 0.0, "attraction": 0.5}),
}
every_sample = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


def lay_out(tensor, layout):
    """The same values in another layout of memory."""
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":  # one problem seen several times
        return tensor[:1].expand_as(tensor)
    if layout == "stepped":
        return tensor.repeat_interleave(2, dim=2)[:, :, ::2]
    return tensor


def tensors(sizes, dtype=torch.float32, layout="contiguous", seed=0):
    generated, positives, negatives, weight = (torch.as_tensor(value) for value in random_problem(*sizes, seed=seed))
    features = [lay_out(value.to(dtype), layout) for value in (generated, positives, negatives)]
    return [*features, weight.float()] if sizes[3] else [*features[:2], None, None]


def problems(sizes, *arguments, **options):
    return DriftProblems(*tensors(sizes, *arguments, **options))


def stages(backend, members, config, keep=True, diagnostics=False):
    """All three stages of a backend on one key: distances, scale, statistics, loss, gradient, diagnostics."""
    d, sums = backend.distances_and_sums(members, keep=keep)
    scale = sums.mean()
    norms = backend.field_norm_sums(members, d, scale, config)
    sqnorm = {tau: value / norms.count.clamp_min(1) for tau, value in norms.squared_field.items()}
    statistics = DriftStatistics(scale.scale, sqnorm, scale.mean_squared_distance)
    return d, statistics, *backend.loss_and_gradient(members, d, statistics, config, diagnostics=diagnostics)


def widened(members):
    """The same problems in float64: what rounding is measured against."""
    return DriftProblems(*(value if value is None else value.double() for value in vars(members).values()))


def assert_stages_agree(members, config, *, loss=5e-5, gradient=5e-5, sqnorm=1e-4, keep=True):
    _, statistics, value, slope, _ = stages(ops, members, config, keep)
    _, wide, wide_value, wide_slope, _ = stages(reference, widened(members), config)
    assert_close("scale", numbers(statistics.scale), numbers(wide.scale), relative=2e-5)
    for tau in config.temperatures:
        assert_close(f"n_{tau}", numbers(statistics.drift_sqnorm[tau]), numbers(wide.drift_sqnorm[tau]), relative=sqnorm)
    assert_close("loss", numbers(value), numbers(wide_value), relative=loss)
    assert_close("gradient", numbers(slope), numbers(wide_slope), relative=gradient, normwise=True)


# What it is to torch


@needs_op
@every_sample
@pytest.mark.parametrize("kept", [True, False])
def test_opcheck(sample, kept):
    sizes, dtype, layout, options = sample
    members = problems(sizes, dtype, layout)
    config = DriftConfig(**options)
    d, statistics, *_ = stages(ops, members, config, keep=kept)
    arguments, op_options = ops._members(members), ops._options(config)
    scales = ops._scales(members, statistics)
    sqnorms = torch.stack(list(statistics.drift_sqnorm.values()))
    library = torch.ops.drift_accel
    torch.library.opcheck(library.distances, (*arguments, kept))
    torch.library.opcheck(library.field_norms, (*arguments, d, scales), op_options)
    for diagnostics in (False, True)[: 1 + sizes[0]]:  # the mean over no problems is NaN, which equals nothing
        last = {**op_options, "diagnostics": diagnostics}
        torch.library.opcheck(library.loss_and_gradient, (*arguments, d, scales, sqnorms), last)


def compiled_and_eager(compiler, **options):
    generated, positives, negatives, weight = tensors((3, 6, 5, 2, 16))
    config = DriftConfig(backend="fused", **options)

    def value(x):
        result = drift_loss(x * 1.5, positives, negatives, negative_weight=weight, config=config)
        return result.loss.mean() + 0 * result.scale

    gradients = []
    for function in (value, torch.compile(value, fullgraph=True, backend=compiler)):
        x = generated.clone().requires_grad_()
        function(x).backward()
        gradients.append(x.grad)
    return gradients


@needs_op
@pytest.mark.parametrize(
    "options", [{}, {"coupling": "sinkhorn"}, {"keep_distances": "never", "field": "per_temperature"}], ids=str
)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_compiles_as_one_graph(options, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        eager, compiled = compiled_and_eager("aot_eager", **options)
    assert torch.equal(eager, compiled)


@needs_op
def test_a_loss_compiles_with_inductor():
    eager, compiled = compiled_and_eager("inductor")
    assert_close("gradient", numbers(compiled), numbers(eager), relative=1e-6, normwise=True)


@needs_op
def test_autocast_changes_nothing():
    members = problems((2, 6, 5, 3, 40))
    outside = stages(ops, members, DriftConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stages(ops, members, DriftConfig())
    assert torch.equal(outside[2], inside[2]) and torch.equal(outside[3], inside[3])


# Shapes, types, strides


@needs_op
@every_sample
def test_samples_agree_with_the_reference(sample):
    sizes, dtype, layout, options = sample
    if sizes[0] == 0:
        pytest.skip("nothing to compare: see the test of no problems")
    rounding = torch.finfo(dtype).eps if dtype in HALF else 0
    limit = 2e-4  # tau = 0.02 without a floor
    assert_stages_agree(
        problems(sizes, dtype, layout), DriftConfig(**options), loss=limit, gradient=limit + rounding, sqnorm=5e-4
    )


@needs_op
def test_no_problems_give_empty_results_and_zero_sums():
    members = problems((0, 4, 3, 2, 9))
    d, statistics, loss, gradient, _ = stages(ops, members, DriftConfig())
    assert d.shape == (0, 4, 9) and loss.shape == (0,) and gradient.shape == (0, 4, 9)
    assert statistics.scale == 0 and not any(statistics.drift_sqnorm.values())
    result = drift_loss(*tensors((0, 4, 3, 2, 9))[:3], config=DriftConfig(backend="fused"))
    assert result.loss.shape == (0,) and result.scale == 0


EDGES = [
    (2, 1, 1, 0, 1),
    (3, 1, 1, 1, 1),
    (2, 1, 512, 0, 3),
    (1, 512, 1, 0, 4),
    (1, 512, 512, 512, 20),
    (1, 17, 33, 1, 129),
    (2, 5, 3, 2, 145),
    (1, 4, 5, 3, 262_144),
    (3, 2, 2, 1, 30_000),
    (1, 1, 2, 0, 262_144),
]


@needs_op
@pytest.mark.parametrize("sizes", EDGES, ids=lambda sizes: "x".join(map(str, sizes)))
@pytest.mark.parametrize("keep", [True, False])
def test_edge_shapes_agree_with_the_reference(sizes, keep):
    # A few rows whose nearest target is far nearer than all others leave little of the field at tau = 0.02.
    assert_stages_agree(problems(sizes), DriftConfig(temperatures=(0.1, 0.3)), keep=keep)


@needs_op
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_half_precision_features_agree_with_float64_of_the_same_values(dtype, offset):
    generated, positives, negatives, weight = tensors((4, 16, 16, 4, 64))
    members = DriftProblems(*((value + offset).to(dtype) for value in (generated, positives, negatives)), weight)
    _, statistics, loss, gradient, _ = stages(ops, members, DriftConfig())
    assert gradient.dtype == dtype and gradient.is_contiguous() and loss.dtype == torch.float32
    assert_stages_agree(members, DriftConfig(), gradient=5e-3)


@needs_op
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_half_precision_value_is_read_as_torch_reads_it(dtype):
    """One feature, distances from 0: |x| comes back for all 65,536 patterns, subnormal, infinite and NaN."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 1)
    zeros = torch.zeros_like(patterns)
    d, _ = ops.distances_and_sums(DriftProblems(zeros, patterns))
    expected = patterns[:, 0, 0].float().abs().double().square().clamp_min(1e-8).sqrt()
    actual = d[:, 0, 1].double()
    small = expected < 1.8e19  # the square of more overflows
    assert_close("distances", numbers(actual[small]), numbers(expected[small]), relative=1e-6)
    assert not torch.isfinite(actual[~(expected < 1.9e19)]).any()


@needs_op
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_are_rounded_to_the_nearest(dtype):
    members = problems((4, 8, 8, 4, 33), dtype)
    statistics = stages(ops, members, DriftConfig())[1]
    narrow = ops.loss_and_gradient(members, None, statistics, DriftConfig())[1]
    wide_members = DriftProblems(*(value.float() for value in vars(members).values()))
    wide = ops.loss_and_gradient(wide_members, None, statistics, DriftConfig())[1]
    assert torch.equal(narrow, wide.to(dtype))


@needs_op
@pytest.mark.parametrize("layout", ["transposed", "stepped"])
def test_strides_change_no_bit(layout):
    straight = stages(ops, problems((3, 7, 5, 3, 21)), DriftConfig())
    strided = stages(ops, problems((3, 7, 5, 3, 21), torch.float32, layout), DriftConfig())
    assert all(torch.equal(straight[k], strided[k]) for k in (0, 2, 3))


@needs_op
def test_weights_may_be_expanded():
    generated, positives, negatives, _ = tensors((3, 7, 5, 4, 21))
    label = torch.tensor([0.5, 1.0, 2.0])[:, None]
    results = [
        stages(ops, DriftProblems(generated, positives, negatives, weight), DriftConfig())
        for weight in (label.expand(-1, 4), label.expand(-1, 4).contiguous())
    ]
    assert torch.equal(results[0][2], results[1][2]) and torch.equal(results[0][3], results[1][3])


@needs_op
def test_coinciding_points_are_at_the_floor_exactly():
    points = torch.linspace(-3, 5, 2 * 9 * 70).sin().reshape(2, 9, 70) * 37 + 1000
    d, _ = ops.distances_and_sums(DriftProblems(points[:, :5], points[:, [5, 0, 3]], points[:, [6, 4]]))
    floor = torch.tensor(1e-8).double().sqrt().float()
    assert (d[:, range(5), range(5)] == floor).all()
    assert (d[:, 4, 6] == floor).all() and (d[:, 0, 8] == floor).all() and (d[:, 3, 9] == floor).all()
    assert (d > floor).sum() == d.numel() - 2 * 8


# Norms from inner products


@needs_op
@pytest.mark.parametrize("closeness", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("mask_self", [True, False])
@pytest.mark.parametrize("sizes", [(2, 16, 16, 0, 256), (1, 32, 64, 8, 1024)], ids=str)
def test_norms_are_those_of_the_field_where_it_nearly_cancels(sizes, mask_self, closeness):
    """Positives beside the generated samples: V is the small difference of two long vectors.

    One temperature and its own n: mean(loss) n is the mean square of the field that the gradient is made of.
    """
    generated, positives, negatives, weight = tensors(sizes)
    count = min(sizes[1:3])
    positives[:, :count] = generated[:, :count] + closeness * positives[:, :count]
    for tau in (0.02, 0.05, 0.2, 1.0, 20.0):
        config = DriftConfig(temperatures=(tau,), mask_self=mask_self)
        _, statistics, loss, _, _ = stages(ops, DriftProblems(generated, positives, negatives, weight), config)
        if statistics.drift_sqnorm[tau] > 1e-6:
            assert_close(f"n_{tau} times the loss", numbers(loss.mean()), 1.0, relative=1e-3)


# Bits


@needs_op
@pytest.mark.parametrize("sizes", [(7, 12, 9, 5, 70), (1, 4, 5, 3, 100_000), (2, 70, 40, 0, 20_000)], ids=str)
@pytest.mark.parametrize("options", [{}, {"coupling": "sinkhorn"}, {"field": "per_temperature", "affinity_floor": 0.0}], ids=str)
def test_bits_depend_neither_on_threads_nor_on_the_run(sizes, options):
    members, config = problems(sizes), DriftConfig(**options)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(stages(ops, members, config, diagnostics=True))
    finally:
        torch.set_num_threads(threads)
    d, statistics, loss, gradient, found = results[0]
    for other in results[1:]:
        assert torch.equal(other[0], d) and torch.equal(other[2], loss) and torch.equal(other[3], gradient)
        assert other[1] == statistics and other[4] == found


@needs_op
@pytest.mark.parametrize("sizes", [(5, 12, 9, 5, 70), (1, 4, 5, 3, 50_000)], ids=str)
def test_distances_that_are_computed_again_are_the_same_bits(sizes):
    members, config = problems(sizes), DriftConfig()
    kept, again = (stages(ops, members, config, keep=keep) for keep in (True, False))
    assert again[0] is None and kept[1] == again[1]
    assert torch.equal(kept[2], again[2]) and torch.equal(kept[3], again[3])


OTHER_INSTRUCTIONS = """
import json, torch
from drift_accel.drift import DriftConfig
from test_ops import ops, problems, reference, stages, widened
from dense_evaluation import relative_difference
from test_drift_loss import numbers
largest = 0.0
for options in ({}, {"coupling": "sinkhorn"}, {"affinity_floor": 0.0}, {"drift_form": "split", "weight_placement": "log_bias"}):
    for sizes in ((3, 18, 9, 5, 70), (2, 4, 3, 0, 300), (2, 33, 20, 7, 150)):
        members, config = problems(sizes), DriftConfig(**options)
        fused, wide = stages(ops, members, config), stages(reference, widened(members), config)
        largest = max(largest, relative_difference(numbers(fused[3]), numbers(wide[3]), normwise=True))
        largest = max(largest, relative_difference(numbers(fused[2]), numbers(wide[2])))
print(json.dumps([ops.load_extension().info["cpu_instructions"], largest]))
"""


@needs_op
@pytest.mark.parametrize("instructions", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_reference(instructions):
    """Kernels for older processors are compiled as well; a processor that lacks a set takes the next one below."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "DRIFT_ACCEL_CPU_INSTRUCTIONS": instructions, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", OTHER_INSTRUCTIONS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    ran, largest = json.loads(result.stdout)
    if ran != instructions:
        pytest.skip(f"this processor runs {ran}")
    assert largest < 1e-4


# Memory


@needs_op
def test_memory_beyond_inputs_and_outputs():
    """Kept distances are all that grows with the number of problems; nothing has an axis of temperatures."""
    from torch.profiler import ProfilerActivity, profile

    scratch = ops.import_module(ops.EXTENSION).peak_scratch_bytes
    threads = torch.get_num_threads()

    def measure(num_problems, keep, temperatures):
        members = tensors((num_problems, 16, 16, 8, 64))
        config = DriftConfig(backend="fused", keep_distances=keep, temperatures=temperatures)
        scratch(reset=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            drift_loss(*members[:3], negative_weight=members[3], config=config)
        allocated = sum(max(event.self_cpu_memory_usage, 0) for event in record.key_averages())
        return allocated - members[0].nbytes, scratch()

    many = tuple(0.02 * k for k in range(1, ops.MAX_TEMPERATURES + 1))
    try:
        torch.set_num_threads(2)
        for num_problems, temperatures in itertools.product((50, 100), (TEMPERATURES, many)):
            distances = num_problems * 16 * 40 * 4
            small = 1000 + 8 * num_problems + 100 * len(temperatures)  # losses, statistics
            kept, kept_scratch = measure(num_problems, "always", temperatures)
            again, again_scratch = measure(num_problems, "never", temperatures)
            assert distances <= kept <= distances + small
            assert again <= small
            assert max(kept_scratch, again_scratch) <= 2 * 300_000
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_op)])
def test_distances_are_kept_as_configured_and_by_bytes(backend, monkeypatch):
    members = {"a": problems((4, 6, 5, 3, 8)), "b": problems((2, 6, 5, 3, 8))}
    results = []
    for mode in ("always", "never", "auto"):
        config = DriftConfig(backend=backend, keep_distances=mode)
        assert keeps_distances(members, config) == (mode != "never")
        distances, _ = measure_distances(members, config)
        assert all((value is None) == (mode == "never") for value in distances.values())
        results.append(drift_losses(members, config=config))
    for other, key in itertools.product(results[1:], members):
        assert torch.equal(other[key].loss, results[0][key].loss)
        assert other[key].drift_sqnorm == results[0][key].drift_sqnorm
    needed = 6 * 6 * 14 * 4
    for limit, keep in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr("drift_accel.drift.loss.KEPT_DISTANCES_BYTES", limit)
        assert keeps_distances(members, DriftConfig()) == keep


@needs_op
def test_stages_called_one_by_one_are_the_loss():
    members = {"a": problems((4, 6, 5, 3, 8)), "b": problems((2, 6, 5, 3, 33))}
    config = DriftConfig(backend="fused")
    distances, sums = measure_distances(members, config)
    statistics = compute_statistics(members, distances, sums, config)
    whole = drift_losses(members, config=config)
    given = drift_losses(members, config=config, statistics=statistics)
    for key in members:
        assert torch.equal(whole[key].loss, given[key].loss) and whole[key].scale == statistics[key].scale


# Refusals of the op itself: what is wrong, what is wanted, what was given

BAD_CALLS = {
    "float64": (lambda a: a.update(generated=a["generated"].double()), ("generated", "Double", "float32")),
    "other_type": (lambda a: a.update(positives=a["positives"].bfloat16()), ("positives", "BFloat16", "Float")),
    "axes": (lambda a: a.update(positives=a["positives"][0]), ("positives", "[4, 8]", "features")),
    "features": (lambda a: a.update(negatives=a["negatives"][:, :, :7]), ("negatives", "[2, 2, 7]", "[2, 3, 8]")),
    "no_rows": (lambda a: a.update(generated=a["generated"][:, :0]), ("generated", "[2, 0, 8]", "at least one")),
    "weight_shape": (lambda a: a.update(negative_weight=a["negative_weight"][:, :1]), ("negative_weight", "[2, 1]", "[2, 2]")),
    "weight_type": (lambda a: a.update(negative_weight=a["negative_weight"].double()), ("negative_weight", "Double")),
    "distances": (lambda a: a.update(distances=torch.ones(2, 3, 8)), ("distances", "[2, 3, 8]", "[2, 3, 9]")),
    "distances_type": (lambda a: a.update(distances=torch.ones(2, 3, 9).double()), ("distances", "Double", "float32")),
    "scales": (lambda a: a.update(scales=torch.ones(3)), ("scales", "[3]", "[2]")),
    "sqnorms": (lambda a: a.update(sqnorms=torch.ones(2)), ("sqnorms", "[2]", "[3]")),
    "no_temperature": (lambda a: a.update(temperatures=[]), ("temperatures", "0", "1 to 16")),
    "temperatures": (lambda a: a.update(temperatures=[0.1] * 17), ("temperatures", "17", "16")),
    "temperature": (lambda a: a.update(temperatures=[0.1, 0.0, 1.0]), ("temperatures", "0", "positive")),
    "coupling": (lambda a: a.update(coupling="column"), ("coupling", "column", "two_sided, row, sinkhorn")),
    "form": (lambda a: a.update(drift_form="both"), ("drift_form", "both", "joint, split")),
    "placement": (lambda a: a.update(weight_placement="before"), ("weight_placement", "before", "after, log_bias")),
    "metric": (lambda a: a.update(metric="l1"), ("metric", "l1", "l2, l2_sq")),
    "field": (lambda a: a.update(field="each"), ("field", "each", "summed, per_temperature")),
    "marginal": (lambda a: a.update(sinkhorn_marginal="rows"), ("sinkhorn_marginal", "rows", "weighted_cols, none")),
    "floor": (lambda a: a.update(affinity_floor=-1.0), ("affinity_floor", "-1")),
    "iterations": (lambda a: a.update(sinkhorn_iterations=0), ("sinkhorn_iterations", "0")),
    "attraction": (lambda a: a.update(attraction=float("nan")), ("attraction", "nan")),
}


@needs_op
@pytest.mark.parametrize("change, words", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_calls_are_refused(change, words):
    names = ("generated", "positives", "negatives", "negative_weight")
    arguments = dict(zip(names, tensors((2, 3, 4, 2, 8)), strict=True))
    arguments.update(
        distances=None, scales=torch.ones(2), sqnorms=torch.ones(3), diagnostics=False, **ops._options(DriftConfig())
    )
    torch.ops.drift_accel.loss_and_gradient(**arguments)
    change(arguments)
    with pytest.raises(ValueError) as refusal:
        torch.ops.drift_accel.loss_and_gradient(**arguments)
    for word in words:
        assert word in str(refusal.value), f"the refusal does not say {word!r}: {refusal.value}"


@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=needs_op)])
@pytest.mark.parametrize("name", ["positives", "negatives", "negative_weight"])
def test_a_gradient_to_anything_but_the_generated_samples_is_refused(backend, name):
    names = ("generated", "positives", "negatives", "negative_weight")
    arguments = dict(zip(names, tensors((2, 3, 4, 2, 8)), strict=True))
    arguments[name].requires_grad_()
    config = DriftConfig(backend=backend)
    with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
        drift_loss(**arguments, config=config)
    with pytest.raises(ValueError, match=rf"{name} of key 'layer1' requires grad"):
        drift_losses({"layer1": DriftProblems(**arguments)}, config=config)
    with torch.no_grad():
        drift_loss(**arguments, config=config)


# Who chooses


@pytest.fixture
def fresh_choice(monkeypatch):
    """The choice is made and logged once: here again for every test."""
    monkeypatch.delenv(ops.BACKEND_VARIABLE, raising=False)
    caches = (ops._decide, ops._log_once)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def choose(configured="auto", count=3, dtype=torch.float32, device="cpu", coupling="two_sided"):
    return ops.choose_backend(configured, count, dtype, device, coupling)


@needs_op
def test_the_fused_op_is_chosen_where_it_is_built_and_logged_once(fresh_choice, caplog):
    with caplog.at_level("INFO", logger=ops.__name__):
        assert [choose(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32)] == ["fused"] * 4
    (record,) = caplog.records
    assert "fused op" in record.message and "it is built" in record.message and record.levelname == "INFO"


@needs_op
@pytest.mark.parametrize(
    "call, reason",
    [
        ({"dtype": torch.float64}, "torch.float64"),
        ({"count": 17}, "17 temperatures"),
        ({"device": "mps"}, "mps"),
        ({"coupling": "kernel"}, "coupling 'kernel'"),
    ],
    ids=str,
)
def test_what_has_no_fused_form_goes_to_the_reference_and_says_so_once(fresh_choice, caplog, call, reason):
    assert [choose(**call), choose(**call)] == ["reference"] * 2
    (record,) = caplog.records
    assert reason in record.message and "plain PyTorch" in record.message
    with pytest.raises(BackendError, match=reason):
        choose("fused", **call)


@needs_op
def test_float64_and_many_temperatures_work_under_auto():
    generated, positives, negatives, weight = tensors((2, 3, 4, 2, 8))
    wide = drift_loss(generated.double(), positives.double(), negatives.double(), negative_weight=weight)
    assert wide.loss.dtype == torch.float64
    many = DriftConfig(temperatures=tuple(0.02 * k for k in range(1, 18)))
    assert len(drift_loss(generated, positives, config=many).drift_sqnorm) == 17
    for arguments, config in (((generated.double(), positives.double()), DriftConfig(backend="fused")),):
        with pytest.raises(BackendError, match="float64"):
            drift_loss(*arguments, config=config)


def test_the_environment_decides_where_the_configuration_says_auto(fresh_choice):
    fresh_choice.setenv(ops.BACKEND_VARIABLE, "reference")
    assert choose() == "reference"
    if NOT_BUILT is None:
        assert choose("fused") == "fused"
    fresh_choice.setenv(ops.BACKEND_VARIABLE, "")
    assert choose("reference") == "reference"
    fresh_choice.setenv(ops.BACKEND_VARIABLE, "fastest")
    for configured in ("auto", "reference", "fused"):
        with pytest.raises(ValueError) as refusal:
            choose(configured)
        for word in (ops.BACKEND_VARIABLE, "fastest", "auto, reference, fused"):
            assert word in str(refusal.value)


# Without the finder of an editable installation, which would look for a missing library in this checkout.
USE = """
import sys, torch
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
from drift_accel import DriftConfig, drift_loss
points = torch.linspace(-1, 1, 2 * 7 * 5).sin().reshape(2, 7, 5)
for _ in range(2):
    print(drift_loss(points[:, :4], points[:, 4:]).loss.isfinite().all().item())
try:
    drift_loss(points[:, :4], points[:, 4:], config=DriftConfig(backend="fused"))
except Exception as error:
    print(type(error).__name__, error)
"""


def copy_package(target, *, library, sources):
    """The package elsewhere, with or without its compiled library and its sources."""
    ignored = shutil.ignore_patterns("__pycache__", *([] if library else ["_C*"]))
    shutil.copytree(ROOT / "drift_accel", target / "drift_accel", ignore=ignored)
    if sources:
        shutil.copytree(ROOT / "csrc", target / "csrc")
    return target


def use(folder):
    environment = {name: value for name, value in os.environ.items() if name != ops.BACKEND_VARIABLE}
    environment["PYTHONPATH"] = str(folder)
    result = subprocess.run([sys.executable, "-c", USE], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[:2] == ["True", "True"]
    return [line for line in result.stderr.splitlines() if line], lines[2:]


def test_a_missing_library_is_one_clear_line_and_an_error_where_it_is_asked_for(tmp_path):
    said, (refusal,) = use(copy_package(tmp_path, library=False, sources=True))
    (line,) = said
    assert "plain PyTorch" in line and "not built" in line and ops.BUILD_COMMAND in line
    assert refusal.startswith("BackendError") and "not built" in refusal and ops.BUILD_COMMAND in refusal


@needs_op
def test_a_stale_library_is_one_clear_line_and_an_error_where_it_is_asked_for(tmp_path):
    folder = copy_package(tmp_path, library=True, sources=True)
    said, rest = use(folder)
    assert (said, rest) == ([], [])
    path = folder / "csrc/cpu/products.h"
    path.write_text(path.read_text() + "// a change\n")
    (line,), (refusal,) = use(folder)
    assert "plain PyTorch" in line and "stale" in line and ops.BUILD_COMMAND in line
    assert refusal.startswith("BackendError") and "stale" in refusal


@needs_op
def test_an_installed_library_needs_no_sources(tmp_path):
    assert use(copy_package(tmp_path, library=True, sources=False)) == ([], [])


def test_a_library_that_does_not_load_says_why(tmp_path):
    folder = copy_package(tmp_path, library=False, sources=False)
    (folder / "drift_accel/_C.py").write_text("raise ImportError('undefined symbol: of_another_torch')")
    (line,), _ = use(folder)
    assert "cannot be loaded (undefined symbol: of_another_torch)" in line


@pytest.mark.parametrize("fact, value", [("version", "0.0.1"), ("torch", "1.0"), ("source_hash", "0" * 16)])
def test_what_makes_a_library_stale(fact, value):
    extension = ops.load_extension()
    if extension.info is None:
        pytest.skip("the fused op is not built")
    right = {**extension.info, "source_hash": ops.hash_sources(ROOT / "csrc", cuda=extension.info["cuda"])}
    assert ops._what_is_stale(right) is None
    assert value in ops._what_is_stale({**right, fact: value})


def test_the_precision_of_the_comparison_itself():
    """relative_difference of float64 with itself in float32 is rounding: the limits above are not met by accident."""
    wide = torch.linspace(1, 2, 100, dtype=torch.float64)
    assert 0 < relative_difference(numbers(wide.float()), numbers(wide)) < 1e-7
