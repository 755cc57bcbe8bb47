"""The drift in plain PyTorch: the oracle that every other backend is compared with, and the fallback.

Three stages with a reduction of batch statistics between them (statistics.py):
  1. distances and their weighted sums       -> scale s
  2. coupling, coefficients, field norms     -> n_tau
  3. summed field, loss and its gradient
Source: "Generative Modeling via Drifting", arXiv 2602.04770, algorithm 2 and appendix A.5-A.7, as the official release
computes it. Nothing with a temperature axis outlives a loop iteration; between stages only the distances are held.

Shapes: B problems, G generated rows i, M = G + N + P targets j ordered [generated | negatives | positives], S features.
Letters: x generated, y targets, w target weights, d distances, l logits, A affinities, c coefficients, V field, u, s scales.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_accel.drift.configuration import DriftConfig
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.statistics import DistanceSums, DriftStatistics, NormSums

SMALLEST_SQUARED_DISTANCE = 1e-8
SELF_PAIR_PENALTY = 100.0
# The floor under row * column is part of the method: at tau = 0.02 most pairs lie on it.
LOG_AFFINITY_FLOOR = math.log(1e-6) / 2


def distances_and_sums(problems: DriftProblems) -> tuple[Tensor, DistanceSums]:
    """Stage 1: d [B,G,M] and its weighted sums (steps 1 and 2)."""
    with _exact_products():
        y, w = _centred_targets(problems), _target_weights(problems)  # [B,M,S], [B,M]
        x = y[:, : problems.num_generated]  # [B,G,S]
        y_sq = y.square().sum(-1)  # [B,M]
        x_sq = y_sq[:, : problems.num_generated]  # [B,G]
        d_sq = torch.baddbmm(y_sq[:, None] + x_sq[:, :, None], x, y.transpose(1, 2), alpha=-2)  # [B,G,M]
        d_sq = d_sq.clamp_min_(SMALLEST_SQUARED_DISTANCE)
        d = d_sq.sqrt()
    sums = DistanceSums(
        weighted_distance=(d.sum(1) * w).sum(),
        weighted_square=(d_sq.sum(1) * w).sum(),
        weight=problems.num_generated * w.sum(),
    )
    return d, sums


def field_norm_sums(problems: DriftProblems, d: Tensor, scale: DriftStatistics, config: DriftConfig) -> NormSums:
    """Stage 2: sum of V_tau^2 over problems, rows and features for each temperature (step 6)."""
    squared = {}
    with _exact_products():
        y, w = _scaled_targets(problems, scale), _target_weights(problems)
        for temperature in config.temperatures:
            coupling = _couple(problems, d, w, scale, temperature)
            squared[temperature] = torch.bmm(coupling.coefficients, y).square().sum()
    count = problems.num_problems * problems.num_generated * problems.num_features
    return NormSums(squared_field=squared, count=torch.full((), count, dtype=d.dtype, device=d.device))


def loss_and_gradient(
    problems: DriftProblems, d: Tensor, statistics: DriftStatistics, config: DriftConfig, *, diagnostics: bool = False
) -> tuple[Tensor, Tensor, dict[str, dict[float, Tensor]] | None]:
    """Stage 3: loss [B], its gradient with respect to the generated features [B,G,S], diagnostics by name and temperature.

    loss_b = mean over G and S of V^2, the value of (x/u - sg(x/u + V))^2; gradient = -2 V / (G S u) (step 7).
    """
    numbers = {name: {} for name in DIAGNOSTICS} if diagnostics else None
    separate_losses = 0
    summed = None  # sum over tau of c / norm, [B,G,M]
    with _exact_products():
        y, w = _scaled_targets(problems, statistics), _target_weights(problems)
        for temperature in config.temperatures:
            coupling = _couple(problems, d, w, statistics, temperature)
            if diagnostics:
                for name, value in _diagnose(problems, coupling).items():
                    numbers[name][temperature] = value
            coefficients = coupling.coefficients.div_(statistics.field_norm(temperature))
            if config.field == "per_temperature":
                separate_losses = separate_losses + torch.bmm(coefficients, y).square().mean((1, 2))
            summed = coefficients if summed is None else summed.add_(coefficients)
        V = torch.bmm(summed, y)  # [B,G,S]
    loss = separate_losses if config.field == "per_temperature" else V.square().mean((1, 2))
    u = statistics.feature_scale(problems.num_features)
    gradient = V * (-2 / (problems.num_generated * problems.num_features * u))
    return loss, gradient, numbers


@dataclass(frozen=True)
class Coupling:
    """One temperature: affinities A with their weights, coefficients c, log A before weights and floor; each [B,G,M]."""

    affinities: Tensor
    coefficients: Tensor
    log_affinity: Tensor


def _couple(problems: DriftProblems, d: Tensor, w: Tensor, scale: DriftStatistics, temperature: float) -> Coupling:
    """Two-sided coupling in log space (steps 3 to 5).

    log A = log w + max(l - (LSE_j l + LSE_i l) / 2, ln(floor) / 2), so that w = 0 needs no logarithm: A = w exp(...).
    """
    logits = d * (-1 / (scale.normalised_distance_scale() * temperature))  # [B,G,M]
    logits.diagonal(dim1=1, dim2=2).sub_(SELF_PAIR_PENALTY / temperature)  # j = i < G
    normaliser = torch.logsumexp(logits, dim=2, keepdim=True) + torch.logsumexp(logits, dim=1, keepdim=True)
    log_affinity = logits.sub_(normaliser / 2)
    A = log_affinity.clamp_min(LOG_AFFINITY_FLOOR).exp_().mul_(w[:, None])  # [B,G,M]

    # Each side is weighted by the other's mass, so that sum_j c_ij = 0 and the field does not depend on the origin.
    negative_mass, positive_mass = (side.sum(-1, keepdim=True) for side in _sides(problems, A))  # [B,G,1]
    c = A.clone()
    c_negative, c_positive = _sides(problems, c)
    c_negative.mul_(-positive_mass)
    c_positive.mul_(negative_mass)
    return Coupling(affinities=A, coefficients=c, log_affinity=log_affinity)


def _sides(problems: DriftProblems, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of [B,G,M] that repel (generated samples and negatives) and those that attract (positives), as views."""
    return pairs.split([problems.num_generated + problems.num_negatives, problems.num_positives], dim=-1)


DIAGNOSTICS = {
    "floor_share": "share of pairs whose row x column probability is at or under the floor",
    "positive_sample_size": "effective number of positives that a generated sample sees, (sum A)^2 / sum A^2, mean over rows",
    "negative_sample_size": "effective number of generated samples and negatives that a generated sample sees",
    "mean_coefficient": "mean |c| over all pairs",
}


def _diagnose(problems: DriftProblems, coupling: Coupling) -> dict[str, Tensor]:
    negative, positive = _sides(problems, coupling.affinities)
    return {
        "floor_share": (coupling.log_affinity <= LOG_AFFINITY_FLOOR).to(negative.dtype).mean(),
        "positive_sample_size": _effective_sample_size(positive),
        "negative_sample_size": _effective_sample_size(negative),
        "mean_coefficient": coupling.coefficients.abs().mean(),
    }


def _effective_sample_size(A: Tensor) -> Tensor:
    return (A.sum(-1).square() / A.square().sum(-1).clamp_min(torch.finfo(A.dtype).tiny)).mean()


def _centred_targets(problems: DriftProblems) -> Tensor:
    """Targets y [B,M,S] minus their mean in each problem: the expanded distance loses its digits to a large common offset."""
    members = [problems.generated, problems.positives]
    if problems.negatives is not None:
        members.insert(1, problems.negatives)
    y = torch.cat(members, dim=1).to(problems.arithmetic_type)
    return y - y.mean(1, keepdim=True)


def _scaled_targets(problems: DriftProblems, statistics: DriftStatistics) -> Tensor:
    """y~ = y / u [B,M,S], centred: coefficients sum to zero, so the mean drops out of the field (steps 3 and 5)."""
    return _centred_targets(problems) / statistics.feature_scale(problems.num_features)


def _target_weights(problems: DriftProblems) -> Tensor:
    """w [B,M]: 1 for generated samples and positives, the given weight for unconditional negatives."""
    G, N, M = problems.num_generated, problems.num_negatives, problems.num_generated + problems.num_negatives
    w = torch.ones(
        problems.num_problems, M + problems.num_positives, dtype=problems.arithmetic_type, device=problems.generated.device
    )
    if N and problems.negative_weight is not None:
        w[:, G:M] = problems.negative_weight
    return w


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """No autocast and no TF32: rounding a product before the subtraction in |x|^2 + |y|^2 - 2 x.y destroys small distances."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    saved = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, saved, strict=True):
            switch.fp32_precision = precision
