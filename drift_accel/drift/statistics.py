"""The two kinds of batch statistics that couple the problems of a feature key: its scale and its field norms.

Both are means over the GLOBAL batch, so every stage first forms local sums, then reduces them over a process group;
the sums of all keys travel in one packed all-reduce a stage.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drift_accel.foundation.collectives import packed_all_reduce

SMALLEST_SCALE = 1e-3
SMALLEST_SQNORM = 1e-8


@dataclass(frozen=True)
class DriftStatistics:
    """Statistics of one feature key over the global batch.

    scale (): s, the weighted mean distance (step 2). drift_sqnorm: n_tau (), the mean squared field, by temperature (step 6).
    mean_squared_distance (): the weighted mean of d^2.
    """

    scale: Tensor
    drift_sqnorm: dict[float, Tensor] = field(default_factory=dict)
    mean_squared_distance: Tensor | None = None

    def normalised_distance_scale(self) -> Tensor:
        """max(s, 1e-3): what distances are divided by before the temperature (step 3)."""
        return self.scale.clamp_min(SMALLEST_SCALE)

    def feature_scale(self, num_features: int) -> Tensor:
        """u = max(s / sqrt(S), 1e-3): what features are divided by (step 3)."""
        return (self.scale / num_features**0.5).clamp_min(SMALLEST_SCALE)

    def field_norm(self, temperature: float) -> Tensor:
        """sqrt(max(n_tau, 1e-8)): what the field of one temperature is divided by (step 6)."""
        return self.drift_sqnorm[temperature].clamp_min(SMALLEST_SQNORM).sqrt()


@dataclass(frozen=True)
class DistanceSums:
    """Local sums of stage 1 over the problems of a key: each a scalar tensor."""

    weighted_distance: Tensor  # sum_bij w_bj d_bij
    weighted_square: Tensor  # sum_bij w_bj d_bij^2
    weight: Tensor  # G sum_bj w_bj

    def mean(self) -> DriftStatistics:
        """s = mean_bij(w_bj d_bij) / mean_bj(w_bj): the factors 1/(B G M) and 1/(B M) leave G (step 2).

        The weight is at least 1 for every row of every problem; it is 0 only without any problem, and then so is s.
        """
        weight = self.weight.clamp_min(1)
        return DriftStatistics(scale=self.weighted_distance / weight, mean_squared_distance=self.weighted_square / weight)


@dataclass(frozen=True)
class NormSums:
    """Local sums of stage 2: sum of V_tau^2 over problems, rows and features, by temperature, and how many were added."""

    squared_field: dict[float, Tensor]
    count: Tensor


def reduce_distance_sums(sums: Mapping[str, DistanceSums], group) -> dict[str, DriftStatistics]:
    """Reduce stage 1 of all keys over `group` (None: this process alone) in one all-reduce; return each key's scale."""
    packed = torch.stack([torch.stack([s.weighted_distance, s.weighted_square, s.weight]) for s in sums.values()])
    (packed,) = packed_all_reduce([packed], group)
    return {key: DistanceSums(*row).mean() for key, row in zip(sums, packed.unbind(), strict=True)}


def reduce_norm_sums(sums: Mapping[str, NormSums], scales: Mapping[str, DriftStatistics], group) -> dict[str, DriftStatistics]:
    """Reduce stage 2 of all keys over `group` in one all-reduce; return each key's statistics with n_tau filled in."""
    packed = torch.stack([torch.stack([*s.squared_field.values(), s.count]) for s in sums.values()])
    (packed,) = packed_all_reduce([packed], group)
    complete = {}
    for (key, local), row in zip(sums.items(), packed.unbind(), strict=True):
        means = (row[:-1] / row[-1].clamp_min(1)).unbind()
        complete[key] = DriftStatistics(
            scale=scales[key].scale,
            mean_squared_distance=scales[key].mean_squared_distance,
            drift_sqnorm=dict(zip(local.squared_field, means, strict=True)),
        )
    return complete
