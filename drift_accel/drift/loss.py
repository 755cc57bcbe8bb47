"""The drifting loss of one feature key, or of many keys that share their reductions."""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_accel.drift import ops, reference
from drift_accel.drift.configuration import DriftConfig
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.statistics import DistanceSums, DriftStatistics, reduce_distance_sums, reduce_norm_sums

# keep_distances "auto": the distances of all keys are kept between the stages while they take no more than this.
KEPT_DISTANCES_BYTES = 2 << 30

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriftLoss:
    """The drift of one feature key.

    loss [B]: one value a problem, differentiable with respect to the generated features only. scale (): s.
    drift_sqnorm {temperature: ()}: n_tau, from which progress is read: how far the samples are still asked to move (the loss
    is normalised by it and stays nearly constant). diagnostics {name: {temperature: ()}} or None, over this process's problems.
    """

    loss: Tensor
    scale: Tensor
    drift_sqnorm: dict[float, Tensor]
    diagnostics: dict[str, dict[float, Tensor]] | None
    statistics: DriftStatistics


def drift_loss(
    generated: Tensor,
    positives: Tensor,
    negatives: Tensor | None = None,
    *,
    negative_weight: Tensor | None = None,
    config: DriftConfig | None = None,
    statistics: DriftStatistics | None = None,
    group=None,
    diagnostics: bool = False,
) -> DriftLoss:
    """Compute the drifting loss of one feature key (arXiv 2602.04770, algorithm 2 and appendix A.5-A.7).

    Args:
        generated: [B,G,S] features of generated samples, B independent problems; the only input that receives gradient.
        positives: [B,P,S] features of real samples of the same class.
        negatives: [B,N,S] features of real samples of any class, or None.
        negative_weight: [B,N] weight of each negative, (a - 1)(G - 1) / N for guidance a; None means 1.
        config: temperatures and options; None means the release's.
        statistics: scale and norms given from outside; None computes them from this batch.
        group: torch.distributed group to take the statistics over; None stays in this process.
        diagnostics: also return what `drift_accel.drift.DIAGNOSTICS` names, per temperature.

    Raises ValueError for shapes, types or options that do not fit and where anything but `generated` requires grad,
    BackendError for a backend that is not there.
    """
    problems = DriftProblems(generated, positives, negatives, negative_weight)
    given = None if statistics is None else {"": statistics}
    return drift_losses({"": problems}, config=config, statistics=given, group=group, diagnostics=diagnostics)[""]


def drift_losses(
    problems: Mapping[str, DriftProblems],
    *,
    config: DriftConfig | None = None,
    statistics: Mapping[str, DriftStatistics] | None = None,
    group=None,
    diagnostics: bool = False,
) -> dict[str, DriftLoss]:
    """Compute the drifting loss of every feature key; the statistics of all keys travel in one all-reduce a stage.

    `problems` and `statistics` are by key. Shapes, options and errors as in `drift_loss`.
    """
    config = DriftConfig() if config is None else config
    backend = stages_of(problems, config)
    _refuse_gradients(problems)
    _check_feasible(problems, config)
    with torch.no_grad():
        distances: dict[str, Tensor | None] = {}
        if statistics is None:
            distances, sums = measure_distances(problems, config)
            statistics = compute_statistics(problems, distances, sums, config, group)
        else:
            _check_given(statistics, problems, config)
        values = {
            key: backend.loss_and_gradient(members, distances.pop(key, None), statistics[key], config, diagnostics=diagnostics)
            for key, members in problems.items()
        }
    return {
        key: DriftLoss(
            loss=_LossWithGradient.apply(problems[key].generated, loss, gradient),
            scale=statistics[key].scale,
            drift_sqnorm=statistics[key].drift_sqnorm,
            diagnostics=numbers,
            statistics=statistics[key],
        )
        for key, (loss, gradient, numbers) in values.items()
    }


def measure_distances(
    problems: Mapping[str, DriftProblems], config: DriftConfig
) -> tuple[dict[str, Tensor | None], dict[str, DistanceSums]]:
    """Stage 1 of every key: distances [B,G,M], None where `keep_distances` has them computed again, and their sums."""
    backend, keep = stages_of(problems, config), keeps_distances(problems, config)
    distances, sums = {}, {}
    for key, members in problems.items():
        distances[key], sums[key] = backend.distances_and_sums(members, keep=keep)
    return distances, sums


def compute_statistics(
    problems: Mapping[str, DriftProblems],
    distances: Mapping[str, Tensor | None],
    sums: Mapping[str, DistanceSums],
    config: DriftConfig,
    group=None,
) -> dict[str, DriftStatistics]:
    """Scale and field norms of every key over `group`, from stage 1's distances and sums (steps 2 and 6)."""
    backend = stages_of(problems, config)
    scales = reduce_distance_sums(sums, group)
    norms = {key: backend.field_norm_sums(members, distances[key], scales[key], config) for key, members in problems.items()}
    return reduce_norm_sums(norms, scales, group)


def keeps_distances(problems: Mapping[str, DriftProblems], config: DriftConfig) -> bool:
    """Whether the distances of all keys stay in memory between the stages; logged once."""
    if config.keep_distances != "auto":
        return config.keep_distances == "always"
    needed = 0
    for members in problems.values():
        targets = members.num_generated + members.num_negatives + members.num_positives
        item = 8 if members.arithmetic_type == torch.float64 else 4
        needed += members.num_problems * members.num_generated * targets * item
    keep = needed <= KEPT_DISTANCES_BYTES
    if not torch.compiler.is_compiling():
        _log_kept_distances(keep)
    return keep


@functools.cache
def _log_kept_distances(keep: bool) -> None:
    limit = f"{KEPT_DISTANCES_BYTES / 2**30:g} GiB"
    logger.info(f"distances are {'kept' if keep else 'computed again'} between the stages ({limit} is the limit)")


def require_backend(
    name: str,
    num_temperatures: int = 1,
    dtype: torch.dtype = torch.float32,
    device_type: str = "cpu",
    coupling: str = "two_sided",
) -> None:
    """Raise BackendError where a backend is asked for, here or by the environment, that this build does not have."""
    ops.choose_backend(name, num_temperatures, dtype, device_type, coupling)


def stages_of(problems: Mapping[str, DriftProblems], config: DriftConfig):
    """The module whose stages all keys go through: float64 keys take the others with them, so that their sums can be packed."""
    members = list(problems.values())
    for key in members:
        dtype, device = key.generated.dtype, key.generated.device.type
        if ops.choose_backend(config.backend, len(config.temperatures), dtype, device, config.coupling) == "reference":
            return reference
    return ops if members else reference


def _refuse_gradients(problems: Mapping[str, DriftProblems]) -> None:
    """The field is a constant of the loss: a gradient to the real samples or to their weights would silently be none."""
    if not torch.is_grad_enabled():
        return
    for key, members in problems.items():
        for name in ("positives", "negatives", "negative_weight"):
            value = getattr(members, name)
            if value is not None and value.requires_grad:
                of_key = f" of key {key!r}" if key else ""
                raise ValueError(
                    f"{name}{of_key} requires grad, but the drift has a gradient with respect to `generated` alone: "
                    f"pass {name}.detach()"
                )


def _check_given(statistics: Mapping[str, DriftStatistics], problems: Mapping, config: DriftConfig) -> None:
    for key in problems:
        if key not in statistics:
            raise ValueError(f"statistics has no entry for feature key {key!r}: it has {sorted(statistics)}")
        if config.metric == "l2_sq" and statistics[key].mean_squared_distance is None:
            raise ValueError(f"statistics of key {key!r} has no mean_squared_distance, which drift.metric 'l2_sq' divides by")
        missing = set(config.temperatures) - set(statistics[key].drift_sqnorm)
        if missing:
            raise ValueError(
                f"statistics of key {key!r} has no drift_sqnorm for temperatures {sorted(missing)}: "
                f"it has {sorted(statistics[key].drift_sqnorm)}"
            )


def _check_feasible(problems: Mapping[str, DriftProblems], config: DriftConfig) -> None:
    """Uniform transport columns cannot meet a weight of 0; only this option pays for looking at the values."""
    if config.coupling != "sinkhorn" or config.sinkhorn_marginal != "none":
        return
    for key, members in problems.items():
        weight = members.negative_weight
        if weight is not None and bool((weight <= 0).any()):
            name = f" of key {key!r}" if key else ""
            raise ValueError(
                f"negative_weight{name} has a value of {weight.min().item():g}: sinkhorn_marginal 'none' needs weights above 0; "
                "use 'weighted_cols'"
            )


class _LossWithGradient(torch.autograd.Function):
    """A loss [B] whose gradient with respect to the generated features is already known: autograd keeps nothing else."""

    @staticmethod
    def forward(ctx, generated: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient.to(generated.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None, None]).to(gradient.dtype), None, None
