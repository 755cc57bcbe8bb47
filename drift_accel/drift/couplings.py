"""Couplings: from distances to affinities A and coefficients c of the field V_i = sum_j c_ij y_j, one temperature at a time.

Shapes: B problems, G generated rows i, M = G + N + P targets j ordered [generated | negatives | positives].
Letters: l logits, d distances, w target weights, A affinities, c coefficients.
Sources: two_sided and joint are the release's (arXiv 2602.04770, algorithm 2); row and kernel its ablations (table 11); split is
its follow-up's; sinkhorn is entropic optimal transport in the log domain (arXiv 2605.11755).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drift_accel.drift.configuration import DriftConfig
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.statistics import DriftStatistics

SELF_PAIR_PENALTY = 100.0
SMALLEST_ROW_SUM = 1e-12
SMALLEST_MARGINAL_WEIGHT = 1e-6


@dataclass(frozen=True)
class Coupling:
    """One temperature: affinities A with their weights, coefficients c, and which pairs lie on the floor; each [B,G,M]."""

    affinities: Tensor
    coefficients: Tensor
    on_floor: Tensor | None  # None where it was not asked for


def couple(
    problems: DriftProblems,
    d: Tensor,
    w: Tensor,
    statistics: DriftStatistics,
    config: DriftConfig,
    temperature: float,
    *,
    floor_pairs: bool = False,
) -> Coupling:
    """Affinities and coefficients of one temperature from distances d [B,G,M] and weights w [B,M] (steps 3 to 5)."""
    logits = pair_logits(d, statistics, config, temperature)
    if config.drift_form == "joint":
        A, on_floor = affinities(logits, w, config, floor_pairs)
        c = _joint_coefficients(problems, A)
    else:
        parts = [
            affinities(l, v, config, floor_pairs) for l, v in zip(_sides(problems, logits), _sides(problems, w), strict=True)
        ]
        A = torch.cat([part[0] for part in parts], dim=-1)
        on_floor = torch.cat([part[1] for part in parts], dim=-1) if floor_pairs else None
        c = _split_coefficients(problems, A)
    return Coupling(affinities=A, coefficients=_weigh_parts(problems, c, config), on_floor=on_floor)


def pair_logits(d: Tensor, statistics: DriftStatistics, config: DriftConfig, temperature: float) -> Tensor:
    """l = -dn / tau [B,G,M] with dn = d / max(s, 1e-3), or d^2 / mean(d^2); self pairs (j = i < G) get dn + 100 (step 3)."""
    if config.metric == "l2":
        logits = d * (-1 / (statistics.normalised_distance_scale() * temperature))
    else:
        logits = d.square().mul_(-1 / (statistics.mean_squared_distance * temperature))
    if config.mask_self:
        logits.diagonal(dim1=1, dim2=2).sub_(SELF_PAIR_PENALTY / temperature)
    return logits


def affinities(logits: Tensor, w: Tensor, config: DriftConfig, floor_pairs: bool = False) -> tuple[Tensor, Tensor | None]:
    """A [B,G,targets] of the configured coupling for logits [B,G,targets] and weights w [B,targets]; logits are overwritten."""
    if config.coupling == "sinkhorn":
        return _transport_plan(logits, w, config) * logits.shape[1], _no_pairs(logits, floor_pairs)
    if config.coupling == "kernel":  # w exp(l), wherever the weight is placed
        return logits.exp_().mul_(w[:, None]), _no_pairs(logits, floor_pairs)
    # "after": the weight multiplies A, so w = 0 needs no logarithm. "log_bias": it enters the softmax over targets; in the one
    # over rows it is a constant and cancels, and an absent target (w = 0) has A = 0 whatever the floor.
    biased = config.weight_placement == "log_bias"
    row_logits = logits + w.log()[:, None] if biased else logits
    row_normaliser = torch.logsumexp(row_logits, dim=2, keepdim=True)
    if config.coupling == "row":
        log_A, on_floor = row_logits - row_normaliser, _no_pairs(logits, floor_pairs)
    else:
        column_normaliser = torch.logsumexp(logits, dim=1, keepdim=True)
        log_A = logits.sub_((row_normaliser + column_normaliser) / 2)
        if biased:
            log_A = log_A + w.log()[:, None] / 2
        on_floor = None
        if config.affinity_floor > 0:
            floor = math.log(config.affinity_floor) / 2
            on_floor = log_A <= floor if floor_pairs else None
            log_A = log_A.clamp_min(floor)
        elif floor_pairs:
            on_floor = _no_pairs(logits, floor_pairs)
    A = log_A.exp_()
    return A.mul_((w > 0)[:, None] if biased else w[:, None]), on_floor


def _transport_plan(logits: Tensor, w: Tensor, config: DriftConfig) -> Tensor:
    """Entropic transport plan [B,G,targets] with uniform rows; columns proportional to max(w, 1e-6), or uniform with log w."""
    G, num_targets = logits.shape[1:]
    if config.sinkhorn_marginal == "weighted_cols":
        mass = w.clamp_min(SMALLEST_MARGINAL_WEIGHT)
        log_columns = (mass / mass.sum(1, keepdim=True)).log()[:, None]  # [B,1,targets]
    else:
        logits = logits + w.log()[:, None]
        log_columns = torch.full_like(logits[:, :1], -math.log(num_targets))
    column_dual = torch.zeros_like(logits[:, :1])
    for _ in range(config.sinkhorn_iterations):
        row_dual = -math.log(G) - torch.logsumexp(logits + column_dual, dim=2, keepdim=True)
        column_dual = log_columns - torch.logsumexp(logits + row_dual, dim=1, keepdim=True)
    return (logits + row_dual + column_dual).exp_()


def _joint_coefficients(problems: DriftProblems, A: Tensor) -> Tensor:
    """c = A times the other side's mass, negative for what repels, so that sum_j c_ij = 0 (step 5)."""
    negative_mass, positive_mass = (side.sum(-1, keepdim=True) for side in _sides(problems, A))  # [B,G,1]
    c = A.clone()
    c_negative, c_positive = _sides(problems, c)
    c_negative.mul_(-positive_mass)
    c_positive.mul_(negative_mass)
    return c


def _split_coefficients(problems: DriftProblems, A: Tensor) -> Tensor:
    """V = P+ y+ - P- y-: each side divided by max(its row sum, 1e-12)."""
    c = A.clone()
    for side, sign in zip(_sides(problems, c), (-1, 1), strict=True):
        side.mul_(sign / side.sum(-1, keepdim=True).clamp_min(SMALLEST_ROW_SUM))
    return c


def _weigh_parts(problems: DriftProblems, c: Tensor, config: DriftConfig) -> Tensor:
    """Multiply what repels and what attracts; the remainder goes to x_i itself, so that the origin still does not matter.

    There is one where the multipliers differ, and in the split form where a side has no mass.
    """
    if config.drift_form == "joint" and config.attraction == config.repulsion == 1:
        return c
    c_negative, c_positive = _sides(problems, c)
    c_negative.mul_(config.repulsion)
    c_positive.mul_(config.attraction)
    c.diagonal(dim1=1, dim2=2).sub_(c.sum(-1))
    return c


def _sides(problems: DriftProblems, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The targets on the last axis that repel (generated samples and negatives) and those that attract, as views."""
    return pairs.split([problems.num_generated + problems.num_negatives, problems.num_positives], dim=-1)


def _no_pairs(logits: Tensor, wanted: bool) -> Tensor | None:
    return torch.zeros_like(logits, dtype=torch.bool) if wanted else None


DIAGNOSTICS = {
    "floor_share": "share of pairs whose row x column probability is at or under the floor",
    "positive_sample_size": "effective number of positives that a generated sample sees, (sum A)^2 / sum A^2, mean over rows",
    "negative_sample_size": "effective number of generated samples and negatives that a generated sample sees",
    "mean_coefficient": "mean |c| over all pairs",
}


def diagnose(problems: DriftProblems, coupling: Coupling) -> dict[str, Tensor]:
    """The numbers of DIAGNOSTICS, each (), of one temperature's coupling made with `floor_pairs`."""
    negative, positive = _sides(problems, coupling.affinities)
    return {
        "floor_share": coupling.on_floor.to(negative.dtype).mean(),
        "positive_sample_size": _effective_sample_size(positive),
        "negative_sample_size": _effective_sample_size(negative),
        "mean_coefficient": coupling.coefficients.abs().mean(),
    }


def _effective_sample_size(A: Tensor) -> Tensor:
    return (A.sum(-1).square() / A.square().sum(-1).clamp_min(torch.finfo(A.dtype).tiny)).mean()
