"""Exponential moving averages of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Decays of the averages that are kept. Raises ValueError for an empty list or a decay outside [0, 1)."""

    decays: tuple[float, ...] = (0.999,)
    """One average a decay, started at the initial weights and updated after each step; the first one is used for samples."""

    def __post_init__(self):
        if not self.decays or len(set(self.decays)) != len(self.decays):
            raise ValueError(f"ema.decays is {self.decays}: list at least one decay, each once")
        if any(not 0 <= decay < 1 for decay in self.decays):
            raise ValueError(f"ema.decays is {self.decays}: each must lie in [0, 1)")


def average_name(decay: float) -> str:
    """The name of one average in files and folders: ema_0.999."""
    return f"ema_{decay:.12g}"


class WeightAverages:
    """Averages e <- decay * e + (1 - decay) * weight of a model's parameters, matched by name, in the parameters' own type."""

    def __init__(self, model: nn.Module, decays: tuple[float, ...]):
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: parameter.detach().clone() for name, parameter in model.named_parameters()} for decay in decays
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's current weights."""
        weights = dict(model.named_parameters())
        for decay, average in self.averages.items():
            torch._foreach_mul_(list(average.values()), decay)
            torch._foreach_add_(list(average.values()), [weights[name].detach() for name in average], alpha=1 - decay)

    @torch.no_grad()
    def load(self, decay: float, weights: dict[str, Tensor]) -> None:
        """Restore one average. Raises ValueError where the names differ."""
        average = self.averages[decay]
        if set(average) != set(weights):
            raise ValueError(f"the average {decay} does not fit the model: {sorted(set(average) ^ set(weights))[:5]} differ")
        for name, tensor in average.items():
            tensor.copy_(weights[name])

    @contextmanager
    def applied_to(self, model: nn.Module, decay: float) -> Iterator[nn.Module]:
        """Let `model` hold the average inside the block, and its own weights again after it, also after an error."""
        average = self.averages[decay]
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        try:
            _copy_into(model, average)
            yield model
        finally:
            _copy_into(model, own)


@torch.no_grad()
def _copy_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
