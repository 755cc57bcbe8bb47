"""Statistics of a batch that is seen slice by slice: sums that add up, and field norms without the features.

A slice's features do not stay in memory, so after the first pass n_tau needs another way. V_i = sum_j c_ij y_j gives
|V_i|^2 = sum_jk c_ij c_ik y_j.y_k, which takes the inner products of the targets alone; the distances d_ij come from the same
products. Their precision holds because targets are centred in each problem first, as in reference.py.

Shapes: B problems, G generated rows i, R = N + P real targets, M = G + R targets j ordered [generated | negatives | positives],
S features. Letters: x generated, y targets, w target weights, d distances, c coefficients, u, s scales.
Source: arXiv 2602.04770, algorithm 2; the identity for |V|^2 follows from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from drift_accel.drift.configuration import DriftConfig
from drift_accel.drift.couplings import couple
from drift_accel.drift.loss import stages_of
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.reference import (
    SMALLEST_SQUARED_DISTANCE,
    _centred_targets,
    _exact_products,
    _target_weights,
)
from drift_accel.drift.statistics import DistanceSums, DriftStatistics, NormSums


@dataclass(frozen=True)
class TargetProducts:
    """What one key's slice leaves behind: inner products of its centred targets; no features.

    of_generated [B,G,M]: x_i . y_j; of_real [B,R,R]: y_j . y_k of the real targets; weight [B,M]: w; num_features: S. The counts
    are those of the problems, as `couplings.couple` reads them.
    """

    of_generated: Tensor
    of_real: Tensor
    weight: Tensor
    num_features: int
    num_negatives: int
    num_positives: int

    @property
    def num_problems(self) -> int:
        return self.of_generated.shape[0]

    @property
    def num_generated(self) -> int:
        return self.of_generated.shape[1]


@torch.no_grad()
def distance_sums(problems: Mapping[str, DriftProblems], config: DriftConfig) -> dict[str, DistanceSums]:
    """Stage 1 of every key of a slice: the sums from which s is formed."""
    stages = stages_of(problems, config)
    return {key: stages.distances_and_sums(members, keep=False)[1] for key, members in problems.items()}


@torch.no_grad()
def norm_sums(
    problems: Mapping[str, DriftProblems], scales: Mapping[str, DriftStatistics], config: DriftConfig
) -> dict[str, NormSums]:
    """Stage 2 of every key of a slice from its features, given the scales: the sums from which n_tau is formed."""
    stages = stages_of(problems, config)
    return {key: stages.field_norm_sums(members, None, scales[key], config) for key, members in problems.items()}


@torch.no_grad()
def target_products(problems: DriftProblems) -> TargetProducts:
    """Keep of a key's problems what their field norms need."""
    G = problems.num_generated
    with _exact_products(problems.generated.device.type):
        y = _centred_targets(problems)  # [B,M,S]
        real = y[:, G:]  # [B,R,S]
        return TargetProducts(
            of_generated=torch.bmm(y[:, :G], y.transpose(1, 2)),
            of_real=torch.bmm(real, real.transpose(1, 2)),
            weight=_target_weights(problems),
            num_features=problems.num_features,
            num_negatives=problems.num_negatives,
            num_positives=problems.num_positives,
        )


def target_products_bytes(problems: Mapping[str, DriftProblems]) -> int:
    """Memory that `target_products` of every key would keep."""
    total = 0
    for members in problems.values():
        G, R = members.num_generated, members.num_negatives + members.num_positives
        element_size = torch.finfo(members.arithmetic_type).bits // 8
        total += members.num_problems * (G * (G + R) + R * R + G + R) * element_size
    return total


@torch.no_grad()
def norm_sums_of_products(products: TargetProducts, scale: DriftStatistics, config: DriftConfig) -> NormSums:
    """Stage 2 from kept products: sum of V_tau^2 over problems, rows and features for each temperature (step 6).

    Plain PyTorch whatever the backend. Equal to `field_norm_sums` up to rounding, which in float32 stays below 1e-3 wherever
    n_tau > 1e-6.
    """
    G = products.num_generated
    K_gg, K_gr = products.of_generated.split([G, products.of_real.shape[1]], dim=2)  # [B,G,G], [B,G,R]
    K_rr = products.of_real
    d = _distances(products)  # [B,G,M]
    u = scale.feature_scale(products.num_features)
    squared = {}
    with _exact_products(d.device.type):
        for temperature in config.temperatures:
            c = couple(products, d, products.weight, scale, config, temperature).coefficients
            c_g, c_r = c.split([G, K_rr.shape[1]], dim=2)  # [B,G,G], [B,G,R]
            field_sq = (torch.bmm(c_g, K_gg) * c_g).sum(-1)  # [B,G], |V_i|^2 u^2
            field_sq += 2 * (torch.bmm(c_g, K_gr) * c_r).sum(-1) + (torch.bmm(c_r, K_rr) * c_r).sum(-1)
            squared[temperature] = field_sq.clamp_min_(0).sum() / u.square()
    count = products.num_problems * G * products.num_features
    return NormSums(squared_field=squared, count=torch.full((), count, dtype=d.dtype, device=d.device))


def add_distance_sums(total: Mapping[str, DistanceSums] | None, more: Mapping[str, DistanceSums]) -> dict[str, DistanceSums]:
    """Sums of two slices, key by key; None is nothing yet."""
    if total is None:
        return dict(more)
    return {key: DistanceSums(*(getattr(total[key], f.name) + getattr(m, f.name) for f in fields(m))) for key, m in more.items()}


def add_norm_sums(total: Mapping[str, NormSums] | None, more: Mapping[str, NormSums]) -> dict[str, NormSums]:
    """Sums of two slices, key by key; None is nothing yet."""
    if total is None:
        return dict(more)
    return {
        key: NormSums(
            squared_field={tau: total[key].squared_field[tau] + value for tau, value in m.squared_field.items()},
            count=total[key].count + m.count,
        )
        for key, m in more.items()
    }


def _distances(products: TargetProducts) -> Tensor:
    """d [B,G,M] of step 1 from |x|^2 + |y|^2 - 2 x.y, the squares being the products of a target with itself."""
    G = products.num_generated
    x_sq = products.of_generated[:, :, :G].diagonal(dim1=1, dim2=2)  # [B,G]
    y_sq = torch.cat([x_sq, products.of_real.diagonal(dim1=1, dim2=2)], dim=1)  # [B,M]
    d_sq = (y_sq[:, None] + x_sq[:, :, None]).sub_(products.of_generated, alpha=2)  # [B,G,M]
    return d_sq.clamp_min_(SMALLEST_SQUARED_DISTANCE).sqrt_()
