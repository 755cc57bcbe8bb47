"""The drift in plain PyTorch: the oracle that every other backend is compared with, and the fallback.

Three stages with a reduction of batch statistics between them (statistics.py):
  1. distances and their weighted sums       -> scale s
  2. coupling, coefficients, field norms     -> n_tau
  3. summed field, loss and its gradient
Source: "Generative Modeling via Drifting", arXiv 2602.04770, algorithm 2 and appendix A.5-A.7, as the official release
computes it. Nothing with a temperature axis outlives a loop iteration; between stages only the distances are held,
or nothing (`keep_distances`).

Shapes: B problems, G generated rows i, M = G + N + P targets j ordered [generated | negatives | positives], S features.
Letters: x generated, y targets, w target weights, d distances, c coefficients (couplings.py), V field, u, s scales.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from drift_accel.drift.configuration import DriftConfig
from drift_accel.drift.couplings import DIAGNOSTICS, couple, diagnose
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.statistics import DistanceSums, DriftStatistics, NormSums

SMALLEST_SQUARED_DISTANCE = 1e-8


def distances_and_sums(problems: DriftProblems, *, keep: bool = True) -> tuple[Tensor | None, DistanceSums]:
    """Stage 1: d [B,G,M], or None where they are not kept, and its weighted sums (steps 1 and 2)."""
    d_sq, w = _squared_distances(problems), _target_weights(problems)
    d = d_sq.sqrt()
    sums = DistanceSums(
        weighted_distance=(d.sum(1) * w).sum(),
        weighted_square=(d_sq.sum(1) * w).sum(),
        weight=problems.num_generated * w.sum(),
    )
    return d if keep else None, sums


def field_norm_sums(problems: DriftProblems, d: Tensor | None, scale: DriftStatistics, config: DriftConfig) -> NormSums:
    """Stage 2: sum of V_tau^2 over problems, rows and features for each temperature (step 6); d None: computed again."""
    squared = {}
    d = _squared_distances(problems).sqrt_() if d is None else d
    with _exact_products(problems.generated.device.type):
        y, w = _scaled_targets(problems, scale), _target_weights(problems)
        for temperature in config.temperatures:
            coupling = couple(problems, d, w, scale, config, temperature)
            squared[temperature] = torch.bmm(coupling.coefficients, y).square().sum()
    count = problems.num_problems * problems.num_generated * problems.num_features
    return NormSums(squared_field=squared, count=torch.full((), count, dtype=d.dtype, device=d.device))


def loss_and_gradient(
    problems: DriftProblems, d: Tensor | None, statistics: DriftStatistics, config: DriftConfig, *, diagnostics: bool = False
) -> tuple[Tensor, Tensor, dict[str, dict[float, Tensor]] | None]:
    """Stage 3: loss [B], its gradient with respect to the generated features [B,G,S], diagnostics by name and temperature.

    loss_b = mean over G and S of V^2, the value of (x/u - sg(x/u + V))^2; gradient = -2 V / (G S u) (step 7).
    d None: the distances are computed again.
    """
    d = _squared_distances(problems).sqrt_() if d is None else d
    numbers = {name: {} for name in DIAGNOSTICS} if diagnostics else None
    separate_losses = 0
    summed = None  # sum over tau of c / norm, [B,G,M]
    with _exact_products(problems.generated.device.type):
        y, w = _scaled_targets(problems, statistics), _target_weights(problems)
        for temperature in config.temperatures:
            coupling = couple(problems, d, w, statistics, config, temperature, floor_pairs=diagnostics)
            if diagnostics:
                for name, value in diagnose(problems, coupling).items():
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


def _squared_distances(problems: DriftProblems) -> Tensor:
    """d^2 [B,G,M] from the expanded square (step 1)."""
    with _exact_products(problems.generated.device.type):
        y = _centred_targets(problems)  # [B,M,S]
        x = y[:, : problems.num_generated]  # [B,G,S]
        y_sq = y.square().sum(-1)  # [B,M]
        x_sq = y_sq[:, : problems.num_generated]  # [B,G]
        d_sq = torch.baddbmm(y_sq[:, None] + x_sq[:, :, None], x, y.transpose(1, 2), alpha=-2)  # [B,G,M]
        return d_sq.clamp_min_(SMALLEST_SQUARED_DISTANCE)


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
def _exact_products(device_type: str) -> Iterator[None]:
    """No autocast and no TF32: rounding a product before the subtraction in |x|^2 + |y|^2 - 2 x.y destroys small distances."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    saved = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, saved, strict=True):
            switch.fp32_precision = precision
