"""What the drift costs, forward and gradient: python tools/benchmark_drift.py [--recipe latent_l2] [--dtype bfloat16]

The reference as it is (eager), the reference under torch.compile and the fused op, alternating in one process on the same
problems; each with its peak of extra memory and its largest error against float64. A plain copy, a plain matrix product and
plain exponentials measured in the same run give the bound that no implementation can pass. Ratios are of medians of one run.
"""

import argparse
import contextlib
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from drift_accel.drift import DriftConfig, DriftProblems, drift_loss, reference
from drift_accel.drift.configuration import BackendError
from drift_accel.drift.cost import KeySize, drift_cost, key_sizes
from drift_accel.drift.loss import require_backend
from drift_accel.foundation.devices import find_device
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json
from drift_accel.models import MaskedAutoencoder

BACKENDS = ("reference", "compiled", "fused")
# problems, generated, positives, negatives, features of a label's location vectors in small
SHAPES = ((256, 64, 64, 16, 256), (1024, 16, 16, 8, 64), (64, 64, 64, 32, 640))
# ConvNeXt-V2 base at 224: the maps of stages 1 to 3, pooled statistics of all four, and the two of the last map.
CONVNEXT_KEYS = (
    *(KeySize(f"convenxt_stage_{s}", t, c) for s, t, c in ((1, 784, 256), (2, 196, 512), (3, 49, 1024))),
    *(KeySize(f"convenxt_stage_{s}_{k}", 1, 128 << s) for s in range(4) for k in ("mean", "std")),
    *(KeySize(f"global_{k}", 1, 1024) for k in ("mean", "std")),
)
ERROR_FEATURES = 4_000_000  # feature values that are evaluated in float64


@dataclass(frozen=True)
class Recipe:
    """Encoder keys and samples a label of a published recipe (arXiv 2602.04770, table 8)."""

    image_shape: tuple[int, int, int]
    patch_size: int
    positives: int
    negatives: int
    extra: tuple[KeySize, ...] = ()
    width: int = 640
    generated: int = 64

    def sizes(self) -> list[KeySize]:
        """All feature keys."""
        with torch.device("meta"):
            encoder = MaskedAutoencoder(
                in_channels=self.image_shape[0], input_size=self.image_shape[1], input_patch_size=self.patch_size,
                width=self.width, blocks=(3, 4, 6, 3),
            )  # fmt: skip
        return [*key_sizes(encoder, self.image_shape), *self.extra]


RECIPES = {
    "latent_b2_ablation": Recipe((4, 32, 32), 1, 64, 16, width=256),
    "latent_l2": Recipe((4, 32, 32), 1, 64, 32),
    "pixel_l16": Recipe((3, 256, 256), 8, 128, 32, CONVNEXT_KEYS),
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape_help = "problems, generated, positives, negatives, features; may be repeated (default: three shapes)"
    parser.add_argument("--shape", type=int, nargs=5, action="append", metavar=("B", "G", "P", "N", "S"), help=shape_help)
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="all keys of a published recipe instead of shapes")
    parser.add_argument(
        "--labels", type=int, default=1, help="labels of this GPU's step, with --recipe (default: 1; 16 on 8 GPUs)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the features")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=(0.02, 0.05, 0.2))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--rounds", type=int, default=15, help="rounds, each backend once a round (default: 15)")
    parser.add_argument("--report", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    if arguments.shape and arguments.recipe:
        parser.error("give --shape or --recipe, not both")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if "fused" in arguments.backends:
            require_backend("fused")
    except BackendError as error:
        raise SystemExit(f"benchmark_drift: {error}") from None
    results = measure(arguments)
    if arguments.report:
        atomic_write_json(arguments.report, {**results, "provenance": collect_provenance(command=sys.argv)})


def measure(arguments: argparse.Namespace) -> dict:
    """Every case on the chosen device; each line is printed as soon as it is known."""
    device, dtype = find_device(arguments.device), getattr(torch, arguments.dtype)
    config = DriftConfig(temperatures=tuple(arguments.temperatures))
    limits = measure_limits(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, {arguments.dtype}, temperatures {list(config.temperatures)}, {arguments.rounds} rounds")
    rates = (
        "plain copy {bytes_per_second:.3g} B/s, plain product {flops_per_second:.3g} FLOP/s, exp {exponentials_per_second:.3g}/s"
    )
    print(rates.format(**limits))
    columns = (("B G P N S", 24), ("backend", 10), ("median ms", 10), ("quartiles", 17), ("speed-up", 9))
    columns += (("of bound", 9), ("extra MB", 9), ("error", 9))
    print(" ".join(f"{name:>{width}}" for name, width in columns))
    cases = [measure_case(case, device, dtype, config, arguments, limits) for case in cases_of(arguments)]
    results = {"device": name, "dtype": arguments.dtype, "limits": limits, "cases": cases}
    if arguments.recipe:
        results["recipe"] = summarise(cases, arguments, limits)
    else:
        print_means(cases)
    return results


def cases_of(arguments: argparse.Namespace) -> list[dict]:
    """{"count", "shape"}: how often a shape occurs in a step."""
    if not arguments.recipe:
        return [{"count": 1, "shape": tuple(shape)} for shape in arguments.shape or SHAPES]
    recipe = RECIPES[arguments.recipe]
    counts: dict[tuple[int, int], int] = {}
    for size in recipe.sizes():
        counts[size.locations, size.num_features] = counts.get((size.locations, size.num_features), 0) + 1
    members = (recipe.generated, recipe.positives, recipe.negatives)
    return [{"count": n, "shape": (arguments.labels * t, *members, s)} for (t, s), n in counts.items()]


def measure_case(case: dict, device, dtype, config: DriftConfig, arguments: argparse.Namespace, limits: dict) -> dict:
    """Times, memory and errors of every backend on one shape."""
    B, G, P, N, S = case["shape"]
    tensors = make_problem(case["shape"], device, dtype)
    runs = {name: runner(name, config) for name in BACKENDS if name in arguments.backends}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compile, allocate, warm caches
        for _ in range(2):
            run(*tensors)
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            times[name].append(seconds(lambda run=run: run(*tensors), device))
    cost = drift_cost(
        [KeySize("", 1, S)], labels=B, generated=G, positives=P, negatives=N,
        num_temperatures=len(config.temperatures), element_size=dtype.itemsize,
    )  # fmt: skip
    bound = cost.least_seconds(**limits)
    result = {**case, "cost": asdict(cost), "bound_s": bound, "backends": {}}
    exact = evaluate_float64(case["shape"], device, dtype, config)
    for name, run in runs.items():
        low, median, high = quartiles(times[name])
        entry = {
            "median_s": median, "quartiles_s": (low, high), "extra_bytes": extra_memory(lambda run=run: run(*tensors), device),
            "gradient_error": relative_error(run, exact),
        }  # fmt: skip
        paired = zip(times.get("reference", ()), times[name], strict=False)
        entry["speed_up"] = statistics.median(a / b for a, b in paired) if "reference" in times else None
        result["backends"][name] = entry
        shown = (f"{case['count']}x " if case["count"] > 1 else "") + " ".join(map(str, case["shape"]))
        speed = f"{entry['speed_up']:8.2f}x" if entry["speed_up"] else " " * 9
        times_text = f"{median * 1e3:10.2f} {low * 1e3:8.2f}-{high * 1e3:<8.2f} {speed} {median / bound:8.1f}x"
        print(f"{shown:>24} {name:>10} {times_text} {entry['extra_bytes'] / 1e6:9.1f} {entry['gradient_error']:9.1e}", flush=True)
    return result


def runner(name: str, config: DriftConfig) -> Callable[..., tuple[Tensor, Tensor]]:
    """A function from (generated, positives, negatives, weight) to loss [B] and gradient."""
    if name == "compiled":
        return compiled_reference(config)
    chosen = DriftConfig(**{**vars(config), "backend": name})

    def run(generated: Tensor, positives: Tensor, negatives: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        generated = generated.detach().requires_grad_()
        loss = drift_loss(generated, positives, negatives, negative_weight=weight, config=chosen).loss
        (gradient,) = torch.autograd.grad(loss.mean(), generated)
        return loss.detach(), gradient

    return run


def compiled_reference(config: DriftConfig) -> Callable[..., tuple[Tensor, Tensor]]:
    """The reference's three stages in one graph. Its precision switches are set around the graph, which cannot hold them."""
    from drift_accel.drift.statistics import reduce_distance_sums, reduce_norm_sums

    exact_products = reference._exact_products

    def stages(generated: Tensor, positives: Tensor, negatives: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        problems = DriftProblems(generated, positives, negatives, weight)
        d, sums = reference.distances_and_sums(problems)
        scales = reduce_distance_sums({"": sums}, None)
        norms = {"": reference.field_norm_sums(problems, d, scales[""], config)}
        loss, gradient, _ = reference.loss_and_gradient(problems, d, reduce_norm_sums(norms, scales, None)[""], config)
        return loss, gradient.to(generated.dtype) / loss.shape[0]

    compiled = torch.compile(stages, dynamic=False)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        reference._exact_products = lambda device_type: contextlib.nullcontext()
        try:
            with torch.no_grad(), exact_products(tensors[0].device.type):
                return compiled(*tensors)
        finally:
            reference._exact_products = exact_products

    return run


def make_problem(shape: tuple[int, ...], device, dtype) -> tuple[Tensor, ...]:
    """Features of three clouds with a common offset, and weights."""
    B, G, P, N, S = shape
    draws = torch.Generator(device=device).manual_seed(0)

    def cloud(members: int) -> Tensor:
        return torch.randn(B, members, S, generator=draws, device=device, dtype=torch.float32).add_(0.5).to(dtype)

    return cloud(G), cloud(P), cloud(N), torch.rand(B, N, generator=draws, device=device)


def evaluate_float64(shape: tuple[int, ...], device, dtype, config: DriftConfig) -> tuple[tuple[Tensor, ...], Tensor]:
    """A part of the problems and its gradient by the reference in float64, on the same rounded features."""
    B, G, P, N, S = shape
    few = min(B, max(1, ERROR_FEATURES // ((G + P + N) * S)))
    tensors = tuple(tensor[:few] for tensor in make_problem((few, *shape[1:]), device, dtype))
    _, gradient = runner("reference", config)(*(tensor.double() for tensor in tensors))
    return tensors, gradient


def relative_error(run, exact: tuple[tuple[Tensor, ...], Tensor]) -> float:
    """Norm of the gradient's error over the norm of the gradient."""
    tensors, wanted = exact
    _, gradient = run(*tensors)
    return float((gradient.double() - wanted).norm() / wanted.norm())


def measure_limits(device, dtype) -> dict[str, float]:
    """The device's own rates: copying, a matrix product of the features' type, exponentials."""
    on_gpu = device.type == "cuda"
    source = torch.empty(2**31 if on_gpu else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 1536
    product_type = dtype if on_gpu else torch.float32  # processors multiply half types more slowly than float32
    a, b = (torch.randn(side, side, device=device, dtype=product_type) for _ in range(2))
    values = torch.rand(2**24 if on_gpu else 2**22, device=device)
    result = torch.empty_like(values)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        limits = {
            "bytes_per_second": 2 * source.numel() / best_seconds(lambda: target.copy_(source), device),
            "flops_per_second": 2 * side**3 / best_seconds(lambda: torch.mm(a, b), device),
            "exponentials_per_second": values.numel() / best_seconds(lambda: torch.exp(values, out=result), device),
        }
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    return limits


def best_seconds(call: Callable[[], object], device, rounds: int = 10) -> float:
    """The fastest of several: a limit is what the device can do undisturbed."""
    call()
    return min(seconds(call, device) for _ in range(rounds))


def seconds(call: Callable[[], object], device) -> float:
    """Time of one call, on the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def extra_memory(call: Callable[[], object], device) -> int:
    """Peak bytes beyond what was there before; on a processor, of resident memory (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # else what was freed before hides what is allocated now
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return -1
    call()
    return max(0, resident_bytes("VmHWM") - before)


def resident_bytes(field: str) -> int:
    """One of this process's memory figures."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def print_means(cases: list[dict]) -> None:
    """Geometric means over the cases of the fused op's speed-ups."""
    for other in ("reference", "compiled"):
        ratios = [
            case["backends"][other]["median_s"] / case["backends"]["fused"]["median_s"]
            for case in cases
            if {other, "fused"} <= set(case["backends"])
        ]
        if ratios:
            print(f"fused against {other}: {statistics.geometric_mean(ratios):.2f}x (geometric mean of {len(ratios)} shapes)")


def summarise(cases: list[dict], arguments: argparse.Namespace, limits: dict) -> dict:
    """The whole recipe: sums over all keys, beside its bound."""
    total = {name: sum(c["count"] * c["backends"][name]["median_s"] for c in cases) for name in cases[0]["backends"]}
    recipe = RECIPES[arguments.recipe]
    sizes = recipe.sizes()
    cost = drift_cost(
        sizes, labels=arguments.labels, generated=recipe.generated, positives=recipe.positives, negatives=recipe.negatives,
        num_temperatures=len(arguments.temperatures), element_size=getattr(torch, arguments.dtype).itemsize,
    )  # fmt: skip
    bound = cost.least_seconds(**limits)
    problems = sum(size.locations for size in sizes) * arguments.labels
    work = f"{cost.num_bytes / 1e9:.2f} GB, {cost.flops / 1e12:.3f} TFLOP, {cost.exponentials / 1e9:.2f} G exponentials"
    print(
        f"{arguments.recipe}, {arguments.labels} label(s), {len(sizes)} keys, {problems:,} problems: {work}, {bound * 1e3:.2f} ms"
    )
    for name, value in total.items():
        print(f"{name:>10} {value * 1e3:10.2f} ms, {value / bound:.1f}x the bound")
    return {"name": arguments.recipe, "labels": arguments.labels, "cost": asdict(cost), "bound_s": bound, "total_s": total}


if __name__ == "__main__":
    main()
