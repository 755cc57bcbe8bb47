"""What the drift of a set of feature keys has to move and compute at least: sizes, bytes, products, exponentials.

Shapes: L labels, T locations and S features of a key, G generated, P positives, N unconditional negatives a label,
R = P + N real targets, M = G + R targets. Source: the sizes follow from arXiv 2602.04770, appendix A.5.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from drift_accel.drift.encoders import GLOBAL_KEY, as_specs, encoder_features
from drift_accel.drift.features import FeatureConfig

EXPONENTIALS = 3  # of a pair and temperature: row softmax, column softmax, affinity


@dataclass(frozen=True)
class KeySize:
    """One feature key: T problems a label (`locations`) of S features (`num_features`)."""

    name: str
    locations: int
    num_features: int


@dataclass(frozen=True)
class DriftCost:
    """The least work of one forward and gradient.

    num_bytes: features read twice (statistics must be known before the field), the gradient written once. flops: distances and
    field, one product each of G x M x S, and the real targets' symmetric Gram for the field norms, half of R x R x S;
    a multiply-add counts 2. exponentials: 3 a pair and temperature. distances: pairs, each 4 bytes where they are kept.
    """

    num_bytes: int = 0
    flops: int = 0
    exponentials: int = 0
    distances: int = 0

    def __add__(self, other: "DriftCost") -> "DriftCost":
        return DriftCost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def least_seconds(self, bytes_per_second: float, flops_per_second: float, exponentials_per_second: float) -> float:
        """Roofline bound in seconds: the slowest of the three, as if the other two cost nothing beside it."""
        return max(self.num_bytes / bytes_per_second, self.flops / flops_per_second, self.exponentials / exponentials_per_second)


def key_sizes(encoder, image_shape: tuple[int, int, int], config: FeatureConfig | None = None) -> list[KeySize]:
    """Every key of one encoder, or of EncoderSpecs, on the meta device for images [C,H,W], `global` included; no arithmetic."""
    with torch.no_grad():
        features = encoder_features(as_specs(encoder, config), torch.empty(1, *image_shape, device="meta"))
    sizes = [KeySize(name, value.shape[1], value.shape[2]) for name, value in features.items()]
    channels, height, width = image_shape
    return [*sizes, KeySize(GLOBAL_KEY, 1, channels * height * width)]


def drift_cost(
    sizes: Iterable[KeySize],
    *,
    labels: int,
    generated: int,
    positives: int,
    negatives: int,
    num_temperatures: int = 3,
    element_size: int = 2,
) -> DriftCost:
    """Least work of a step's drift over all keys; `element_size` is bytes a feature."""
    real = positives + negatives
    targets = generated + real
    total = DriftCost()
    for size in sizes:
        problems = labels * size.locations
        pairs = problems * generated * targets
        total += DriftCost(
            num_bytes=problems * size.num_features * element_size * (2 * targets + generated),
            flops=problems * size.num_features * (4 * generated * targets + real * real),
            exponentials=EXPONENTIALS * num_temperatures * pairs,
            distances=pairs,
        )
    return total
