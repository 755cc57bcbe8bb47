"""Builds csrc/cuda/host_harness.cpp and runs problems through it: the kernels' programs, thread after thread, on a host."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
BUILDS = {
    "plain": ["-O2", "-DDRIFT_CHECKED_CELLS"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
COUPLINGS = {"two_sided": 0, "row": 1, "sinkhorn": 2}
SHARED_BYTES = 99 << 10  # the least that a block may have among the supported devices
PLAN = ("chunk", "threads", "shared", "gram", "segments", "field_kernel")


def compiler():
    return shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")


def build(directory):
    """Compile every build of BUILDS side by side: {name: path}."""
    processes = {}
    for name, flags in BUILDS.items():
        command = [compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags, str(SOURCES / "host_harness.cpp")]
        path = Path(directory) / name
        processes[name] = path, subprocess.Popen([*command, "-o", str(path)], stderr=subprocess.PIPE, text=True)
    for path, process in processes.values():
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{path.name} build of the host harness failed:\n{errors}")
    return {name: path for name, (path, _) in processes.items()}


@dataclass(frozen=True)
class HarnessResult:
    """sums [3], norms [T + 1], loss [B], gradient of mean(loss) [B,G,S], diagnostics [T,4]; plans of the last two stages."""

    sums: np.ndarray
    norms: np.ndarray
    loss: np.ndarray
    gradient: np.ndarray
    diagnostics: np.ndarray
    norms_plan: dict
    loss_plan: dict

    @property
    def scale(self):
        return self.sums[0] / max(self.sums[2], 1)

    @property
    def mean_square(self):
        return self.sums[1] / max(self.sums[2], 1)

    @property
    def sqnorm(self):
        return self.norms[:-1] / max(self.norms[-1], 1)


def run_harness(
    binary,
    members,
    weights,
    temperatures,
    options,
    *,
    keep=True,
    backwards=False,
    checked=False,
    diagnostics=False,
    shared_bytes=SHARED_BYTES,
    workspace_bytes=64 << 20,
    segment_features=16384,
    norms="auto",
    library_fields=False,
    scale=None,
    mean_square=None,
    sqnorm=None,
):
    """Members are tensors [B,G,S], [B,P,S], [B,N,S] of one type and any strides, weights a float32 tensor [B,N] or None."""
    generated, positives, negatives = members
    lines = {
        "B": generated.shape[0],
        "G": generated.shape[1],
        "P": positives.shape[1],
        "N": negatives.shape[1],
        "S": generated.shape[2],
        "type": ELEMENT_TYPES[generated.dtype],
        "temperatures": tuple(temperatures),
        "coupling": COUPLINGS[options.get("coupling", "two_sided")],
        "log_bias": options.get("weight_placement", "after") == "log_bias",
        "split": options.get("drift_form", "joint") == "split",
        "squared": options.get("metric", "l2") == "l2_sq",
        "mask_self": options.get("mask_self", True),
        "weighted_columns": options.get("sinkhorn_marginal", "weighted_cols") == "weighted_cols",
        "separate_losses": options.get("field", "summed") == "per_temperature",
        "affinity_floor": options.get("affinity_floor", 1e-6),
        "sinkhorn_iterations": options.get("sinkhorn_iterations", 20),
        "attraction": options.get("attraction", 1.0),
        "repulsion": options.get("repulsion", 1.0),
        "keep": keep,
        "backwards": backwards,
        "checked": checked,
        "diagnostics": diagnostics,
        "shared_bytes": shared_bytes,
        "workspace_bytes": workspace_bytes,
        "segment_features": segment_features,
        "norms": {"auto": 0, "gram": 1, "fields": 2}[norms],
        "library_fields": library_fields,
    }
    arrays = []
    named = {"generated": generated, "positives": positives, "negatives": negatives}
    for name, tensor in named.items() if weights is None else [*named.items(), ("weights", weights)]:
        storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())[tensor.storage_offset() :]
        lines[f"{name}_strides"], lines[f"{name}_storage"] = tensor.stride(), len(storage)
        arrays.append(storage.contiguous().view(torch.uint8).numpy().tobytes())
    for name, value in (("scale", scale), ("mean_square", mean_square), ("sqnorms", sqnorm)):
        if value is not None:
            lines[name] = value
    path = Path(binary).parent / "case"
    text = "".join(
        f"{name} {' '.join(repr(float(v)) for v in (value if isinstance(value, tuple) else (value,)))}\n"
        for name, value in lines.items()
    )
    path.write_bytes(text.encode() + b"\n" + b"".join(arrays))
    process = subprocess.run([str(binary), str(path), f"{path}.out"], capture_output=True, text=True)
    if process.returncode:
        raise AssertionError(f"the host harness ended with {process.returncode}:\n{process.stderr[-3000:]}")
    return _read_result(np.fromfile(f"{path}.out", dtype=np.float32).astype(np.float64), generated.shape, len(temperatures))


def _read_result(values, shape, num_temperatures):
    B, G, S = shape
    counts = (3, num_temperatures + 1, B, B * G * S, num_temperatures * 4, len(PLAN), len(PLAN))
    sums, norms, loss, gradient, diagnostics, *plans = np.split(values, np.cumsum(counts)[:-1])
    assert len(plans[-1]) == len(PLAN)
    norms_plan, loss_plan = (dict(zip(PLAN, (int(value) for value in plan), strict=True)) for plan in plans)
    gradient = gradient.reshape(B, G, S) / max(B, 1)
    return HarnessResult(sums, norms, loss, gradient, diagnostics.reshape(num_temperatures, 4), norms_plan, loss_plan)
