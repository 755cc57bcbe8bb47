"""The drifting loss of one feature key, or of many keys that share their reductions."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_accel.drift import reference
from drift_accel.drift.configuration import BackendError, DriftConfig
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.statistics import DriftStatistics, reduce_distance_sums, reduce_norm_sums


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

    Raises ValueError for shapes, types or options that do not fit, BackendError for a backend that is not there.
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
    require_backend(config.backend)
    _check_feasible(problems, config)
    results = {}
    with torch.no_grad():
        distances, sums = {}, {}
        for key, members in problems.items():
            distances[key], sums[key] = reference.distances_and_sums(members)
        if statistics is None:
            statistics = compute_statistics(problems, distances, sums, config, group)
        else:
            _check_given(statistics, problems, config)
        values = {
            key: reference.loss_and_gradient(members, distances.pop(key), statistics[key], config, diagnostics=diagnostics)
            for key, members in problems.items()
        }
    for key, (loss, gradient, numbers) in values.items():
        results[key] = DriftLoss(
            loss=_LossWithGradient.apply(problems[key].generated, loss, gradient),
            scale=statistics[key].scale,
            drift_sqnorm=statistics[key].drift_sqnorm,
            diagnostics=numbers,
            statistics=statistics[key],
        )
    return results


def compute_statistics(
    problems: Mapping[str, DriftProblems],
    distances: Mapping[str, Tensor],
    sums: Mapping[str, "reference.DistanceSums"],
    config: DriftConfig,
    group=None,
) -> dict[str, DriftStatistics]:
    """Scale and field norms of every key over `group`, from stage 1's distances and sums (MATH steps 2 and 6)."""
    scales = reduce_distance_sums(sums, group)
    norms = {key: reference.field_norm_sums(members, distances[key], scales[key], config) for key, members in problems.items()}
    return reduce_norm_sums(norms, scales, group)


def require_backend(name: str) -> None:
    """Raise BackendError where a backend is asked for that this build does not have."""
    if name == "fused":
        raise BackendError("drift.backend is 'fused' but this build has no compiled drift op: use 'auto' or 'reference'")


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
