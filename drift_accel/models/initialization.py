"""Layers that draw nothing when they are built, and the draws that the models then make from a generator of their own.

torch's layers read its global random state in their constructors. Here a model's weights are a function of its
configuration and one seed, whatever was drawn before and on whichever device it is built.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """nn.Linear whose weights are left to the initialize_weights of the model that holds it."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Embedding(nn.Embedding):
    """nn.Embedding whose weights are left to the initialize_weights of the model that holds it."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weights are left to the initialize_weights of the model that holds it."""

    def reset_parameters(self) -> None:
        """Draw nothing."""


def default_generator() -> torch.Generator:
    """Return the generator that weights are drawn from when none is given: seed 0, apart from torch's global state."""
    return torch.Generator(device="cpu").manual_seed(0)


@torch.no_grad()
def draw(parameter: Tensor, fill: Callable[..., Tensor], generator: torch.Generator, **settings) -> None:
    """Fill `parameter` with `fill(values, generator=generator, **settings)`, drawn in float32 on the CPU."""
    if parameter.is_meta:
        return
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    fill(values, generator=generator, **settings)
    parameter.copy_(values)
