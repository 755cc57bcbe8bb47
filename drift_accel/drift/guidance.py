"""Training-time guidance: how strong it is for each label, and what weight that gives the unconditional negatives."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

LARGEST_POWER = 100  # beyond it the powers of the inverse CDF leave float64
MODES = ("power", "uniform", "mixed")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Distribution of the guidance scale a that is drawn for each label of a step.

    Raises ValueError for an unknown mode, a range below 1 or reversed, or a fraction outside [0, 1].
    """

    mode: str = "power"
    """"power": density proportional to a^-power; "uniform": power 0; "mixed": power, and a = 1 for half of the labels."""
    minimum: float = 1.0
    """Smallest a, at least 1 (1 means no guidance)."""
    maximum: float = 4.0
    """Largest a, at least `minimum`."""
    power: float = 3.0
    """p of the density a^-p; 1 is log-uniform. Not read in mode "uniform"."""
    no_guidance_fraction: float | None = None
    """Share f of labels whose a is replaced by 1; None means 0.5 in mode "mixed" and 0 otherwise."""
    conditioning_only: bool = False
    """True: the network sees a but the negatives do not weigh (w = 0); for runs with one generated sample or no negatives."""

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"guidance.mode is {self.mode!r}: choose one of {', '.join(MODES)}")
        if not 1 <= self.minimum < float("inf"):
            raise ValueError(f"guidance.minimum is {self.minimum}: guidance starts at 1 (no guidance); give a number >= 1")
        if not self.minimum <= self.maximum < float("inf"):
            raise ValueError(f"guidance.maximum is {self.maximum}: it must be finite and at least minimum = {self.minimum}")
        if self.no_guidance_fraction is not None and not 0 <= self.no_guidance_fraction <= 1:
            raise ValueError(f"guidance.no_guidance_fraction is {self.no_guidance_fraction}: give a share in [0, 1]")
        if not abs(self.power) <= LARGEST_POWER:
            raise ValueError(f"guidance.power is {self.power}: give a number from -{LARGEST_POWER} to {LARGEST_POWER}")

    @property
    def skip_fraction(self) -> float:
        """Share f of labels without guidance, with the mode's default filled in."""
        if self.no_guidance_fraction is not None:
            return self.no_guidance_fraction
        return 0.5 if self.mode == "mixed" else 0.0

    @property
    def smallest(self) -> float:
        """Smallest a that can be drawn or weigh: 1 wherever labels go without guidance."""
        return 1.0 if self.skip_fraction > 0 or self.conditioning_only else self.minimum

    @property
    def exponent(self) -> float:
        """p of the density, 0 in mode "uniform"."""
        return 0.0 if self.mode == "uniform" else self.power

    def check_counts(self, num_generated: int, num_negatives: int) -> None:
        """Raise ValueError where a > 1 can be drawn but w = (a - 1)(G - 1) / N is not defined or is always 0."""
        if self.maximum == 1 or self.conditioning_only:
            return
        if num_negatives == 0 or num_generated == 1:
            raise ValueError(
                f"guidance up to {self.maximum} needs unconditional negatives and at least 2 generated samples a label, but "
                f"there are {num_negatives} negatives and {num_generated} generated: raise them, set guidance.maximum to 1, "
                "or set guidance.conditioning_only to true"
            )


def draw_guidance(config: GuidanceConfig, uniform_scale: np.ndarray, uniform_skip: np.ndarray) -> np.ndarray:
    """Turn two uniform draws in [0, 1) a label into guidance scales, float64, by inverse CDF (arXiv 2602.04770, A.8).

    `uniform_scale` goes through the inverse CDF of a^-p on [minimum, maximum]; a = 1 where `uniform_skip` < f.
    """
    u = np.asarray(uniform_scale, dtype=np.float64)
    low, high, p = config.minimum, config.maximum, config.exponent
    if p == 1:
        a = low * (high / low) ** u
    else:
        q = 1 - p
        a = (low**q + u * (high**q - low**q)) ** (1 / q)
    a = np.clip(a, low, high)
    return np.where(np.asarray(uniform_skip) < config.skip_fraction, 1.0, a)


def negative_weight(guidance_scale: Tensor, num_generated: int, num_negatives: int) -> Tensor:
    """w = (a - 1)(G - 1) / N, the weight of each unconditional negative; same shape as `guidance_scale`.

    Zero for num_negatives = 0, where no target carries it.
    """
    if num_negatives == 0:
        return guidance_scale * 0
    return (guidance_scale - 1) * ((num_generated - 1) / num_negatives)
