"""The fused drift op: the compiled library, its three stages under the names of reference.py, and who chooses between the two.

The library (csrc/, `drift_accel._C`) computes in float32 for float32, bfloat16 and float16 features, on processors and, where it
was built with CUDA, on GPUs. Its results agree with reference.py up to rounding; no gradient passes through the ops themselves
(the loss carries its own, see loss.py).

Shapes: B problems, G generated rows, M = G + N + P targets, S features, T temperatures.
"""

import functools
import logging
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import drift_accel
from drift_accel.drift.configuration import BACKENDS, BackendError, DriftConfig
from drift_accel.drift.couplings import DIAGNOSTICS
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.source_hash import hash_sources
from drift_accel.drift.statistics import DistanceSums, DriftStatistics, NormSums

EXTENSION = "drift_accel._C"
BACKEND_VARIABLE = "DRIFT_ACCEL_BACKEND"
BUILD_COMMAND = "pip install --no-build-isolation -e ."
MAX_TEMPERATURES = 16
FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED_COUPLINGS = ("two_sided", "row", "sinkhorn")

logger = logging.getLogger(__name__)


# The library


@dataclass(frozen=True)
class Extension:
    """The compiled library as it was found. info: its build facts, None where it could not be loaded. problem: why it is not
    used, None where it is."""

    info: dict | None
    problem: str | None


@functools.cache
def load_extension() -> Extension:
    """Load the compiled library once; never raises, `problem` says what is wrong and what to do."""
    try:
        info = import_module(EXTENSION).build_info()
    except ModuleNotFoundError:
        return Extension(None, f"it is not built; build it: {BUILD_COMMAND}")
    except (ImportError, OSError, RuntimeError) as error:
        return Extension(None, f"it cannot be loaded ({str(error).splitlines()[0]}); build it again: {BUILD_COMMAND}")
    problem = _what_is_stale(info)
    if problem is None:
        _register_fakes()
    else:
        problem = f"it is stale ({problem}); build it again: {BUILD_COMMAND}"
    return Extension(info, problem)


def _what_is_stale(info: dict) -> str | None:
    """How the library differs from what it should be built of; an installed package has no sources beside it to compare."""
    if info["version"] != drift_accel.__version__:
        return f"built as version {info['version']}, the package is {drift_accel.__version__}"
    if info["torch"] != torch.__version__:
        return f"built for torch {info['torch']}, this is {torch.__version__}"
    sources = Path(drift_accel.__file__).resolve().parents[1] / "csrc"
    if (sources / "registration.cpp").exists():
        now = hash_sources(sources, cuda=info["cuda"])
        if now != info["source_hash"]:
            return f"built from sources {info['source_hash']}, csrc is {now}"
    return None


# The choice


def fused_obstacle(num_temperatures: int, dtype: torch.dtype, device_type: str, coupling: str = "two_sided") -> str | None:
    """Why the fused op cannot take such a call, or None where it can."""
    if coupling not in FUSED_COUPLINGS:
        return f"coupling {coupling!r} has no fused form"
    if dtype not in FUSED_TYPES:
        return f"{dtype} features have no fused form"
    if num_temperatures > MAX_TEMPERATURES:
        return f"{num_temperatures} temperatures have no fused form ({MAX_TEMPERATURES} have)"
    extension = load_extension()
    if extension.problem is not None:
        return extension.problem
    if device_type not in ("cpu", "cuda"):
        return f"there is no fused op for {device_type} devices"
    if device_type == "cuda" and not extension.info["cuda"]:
        return f"it is built without CUDA; with nvcc and a CUDA torch: DRIFT_ACCEL_CUDA=1 {BUILD_COMMAND}"
    return None


def wanted_backend(configured: str) -> str:
    """The configured backend or, where that is "auto", the one of the environment. ValueError for one that does not exist."""
    named = os.environ.get(BACKEND_VARIABLE) or "auto"
    if named not in BACKENDS:
        raise ValueError(f"the environment variable {BACKEND_VARIABLE} is {named!r}: choose one of {', '.join(BACKENDS)}")
    return named if configured == "auto" else configured


# A constant to torch.compile: the choice depends on the configuration, the types and this build alone.
@torch.compiler.assume_constant_result
def choose_backend(
    configured: str, num_temperatures: int, dtype: torch.dtype, device_type: str, coupling: str = "two_sided"
) -> str:
    """ "reference" or "fused", logged once with the reason.

    Raises BackendError where "fused" is asked for and impossible, ValueError for an unknown name in the environment.
    """
    return _decide(wanted_backend(configured), num_temperatures, dtype, device_type, coupling)


@functools.cache
def _decide(wanted: str, num_temperatures: int, dtype: torch.dtype, device_type: str, coupling: str) -> str:
    if wanted == "reference":
        _log_once(logging.INFO, "the drift runs in plain PyTorch, as asked")
        return "reference"
    obstacle = fused_obstacle(num_temperatures, dtype, device_type, coupling)
    if obstacle is None:
        where = load_extension().info["cpu_instructions"] if device_type == "cpu" else device_type
        _log_once(logging.INFO, f"the drift runs in the fused op ({where}), {'as asked' if wanted == 'fused' else 'it is built'}")
        return "fused"
    if wanted == "fused":
        raise BackendError(f"the drift's backend is 'fused', which cannot be used: {obstacle}. Or use 'auto' or 'reference'")
    _log_once(logging.WARNING, f"the drift runs in plain PyTorch, not in the fused op: {obstacle}")
    return "reference"


@functools.cache
def _log_once(level: int, line: str) -> None:
    logger.log(level, line)


# The stages, as in reference.py


def distances_and_sums(problems: DriftProblems, *, keep: bool = True) -> tuple[Tensor | None, DistanceSums]:
    """Stage 1: d [B,G,M], or None where they are not kept, and its weighted sums (steps 1 and 2)."""
    distances, sums = torch.ops.drift_accel.distances(*_members(problems), keep)
    return distances if keep else None, DistanceSums(*sums.unbind())


def field_norm_sums(problems: DriftProblems, d: Tensor | None, scale: DriftStatistics, config: DriftConfig) -> NormSums:
    """Stage 2: sum of V_tau^2 over problems, rows and features for each temperature (step 6); d None: computed again."""
    sums = torch.ops.drift_accel.field_norms(*_members(problems), d, _scales(problems, scale), **_options(config))
    *squared, count = sums.unbind()
    return NormSums(squared_field=dict(zip(config.temperatures, squared, strict=True)), count=count)


def loss_and_gradient(
    problems: DriftProblems, d: Tensor | None, statistics: DriftStatistics, config: DriftConfig, *, diagnostics: bool = False
) -> tuple[Tensor, Tensor, dict[str, dict[float, Tensor]] | None]:
    """Stage 3: loss [B], its gradient [B,G,S] in the features' type, diagnostics by name and temperature (step 7)."""
    sqnorms = torch.stack([statistics.drift_sqnorm[tau] for tau in config.temperatures])
    loss, gradient, means = torch.ops.drift_accel.loss_and_gradient(
        *_members(problems),
        d,
        _scales(problems, statistics),
        sqnorms.to(device=problems.generated.device, dtype=torch.float32),
        **_options(config),
        diagnostics=diagnostics,
    )
    if not diagnostics:
        return loss, gradient, None
    by_name = zip(DIAGNOSTICS, means.unbind(1), strict=True)
    return loss, gradient, {name: dict(zip(config.temperatures, v.unbind(), strict=True)) for name, v in by_name}


def _members(problems: DriftProblems) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    weight = problems.negative_weight
    if weight is not None:
        weight = weight.detach().to(device=problems.generated.device, dtype=torch.float32)
    return problems.generated, problems.positives, problems.negatives, weight


def _scales(problems: DriftProblems, statistics: DriftStatistics) -> Tensor:
    """(s, mean of d^2) [2] as the op takes them; the second is read by the squared metric alone, which has it."""
    square = statistics.scale if statistics.mean_squared_distance is None else statistics.mean_squared_distance
    return torch.stack([statistics.scale, square]).to(device=problems.generated.device, dtype=torch.float32)


def _options(config: DriftConfig) -> dict:
    return {
        "temperatures": list(config.temperatures),
        "coupling": config.coupling,
        "drift_form": config.drift_form,
        "weight_placement": config.weight_placement,
        "metric": config.metric,
        "field": config.field,
        "affinity_floor": config.affinity_floor,
        "mask_self": config.mask_self,
        "sinkhorn_marginal": config.sinkhorn_marginal,
        "sinkhorn_iterations": config.sinkhorn_iterations,
        "attraction": config.attraction,
        "repulsion": config.repulsion,
    }


# What torch.compile needs to know: shapes and types without the computation


def _register_fakes() -> None:
    torch.library.register_fake("drift_accel::distances", _fake_distances)
    torch.library.register_fake("drift_accel::field_norms", _fake_field_norms)
    torch.library.register_fake("drift_accel::loss_and_gradient", _fake_loss_and_gradient)


def _fake_distances(generated, positives, negatives, negative_weight, keep):
    num_targets = sum(members.shape[1] for members in (generated, negatives, positives) if members is not None)
    shape = (*generated.shape[:2], num_targets) if keep else (0,)
    return generated.new_empty(shape, dtype=torch.float32), generated.new_empty(3, dtype=torch.float32)


def _fake_field_norms(generated, positives, negatives, negative_weight, distances, scales, temperatures, *options):
    return generated.new_empty(len(temperatures) + 1, dtype=torch.float32)


def _fake_loss_and_gradient(
    generated, positives, negatives, negative_weight, distances, scales, sqnorms, temperatures, *options
):  # fmt: skip
    *_, diagnostics = options
    return (
        generated.new_empty(generated.shape[0], dtype=torch.float32),
        generated.new_empty(generated.shape),
        generated.new_empty((len(temperatures), len(DIAGNOSTICS)) if diagnostics else (0,), dtype=torch.float32),
    )
