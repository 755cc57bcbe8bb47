"""Exponential moving averages of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from drift_accel.training.sharding import fill, is_sharded, local_part, model_of, require_same_shapes, skeleton, whole_tensors

CLASSIFIER_PHASE_NAME = "encoder_cls"  # export of a classifier phase that is a run of its own
UPDATE_CHUNK = 2**25  # numbers that one update moves at a time: what it needs beside the averages stays below 128 MiB in float32


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


def export_names(decays: Sequence[float], *, classifier_phase: bool = False) -> dict[float, str]:
    """Each average's name as an export: ema_DECAY; of a classifier phase encoder_cls, of several encoder_cls_ema_DECAY."""
    names = {decay: average_name(decay) for decay in decays}
    if not classifier_phase:
        return names
    alone = len(names) == 1
    return {decay: CLASSIFIER_PHASE_NAME if alone else f"{CLASSIFIER_PHASE_NAME}_{name}" for decay, name in names.items()}


class WeightAverages:
    """Averages e <- decay * e + (1 - decay) * weight of a model's parameters, matched by name, in the parameters' own type.

    An average is split over processes as its parameter is; the model may be split already or not. `bones` is what
    `sharding.skeleton` made of the model before that; None makes it here, of a model that is not split.
    """

    def __init__(self, model: nn.Module, decays: tuple[float, ...], bones: nn.Module | None = None):
        self.bones = skeleton(model) if bones is None else bones
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: parameter.detach().clone() for name, parameter in model.named_parameters()} for decay in decays
        }

    @torch.no_grad()
    def update(self, model: nn.Module, non_finite: Tensor | None = None) -> None:
        """Take one step towards the model's current weights; none where the flag `non_finite` () is 1, without reading it.

        Two rounded products, as the release adds them: in float32 e + (1 - decay) * (weight - e) ends elsewhere.
        """
        weights = dict(model.named_parameters())
        for decay, average in self.averages.items():
            for names in _chunks(average):
                moving = [local_part(average[name]) for name in names]
                towards = [local_part(weights[name].detach()) for name in names]
                kept = decay
                if non_finite is not None:
                    counts = (1 - non_finite).to(moving[0].dtype)  # 1, or 0 where this step must not count
                    kept = torch.where(counts > 0, torch.full_like(counts, decay), torch.ones_like(counts))
                    towards = torch._foreach_mul(towards, counts)
                torch._foreach_mul_(moving, kept)
                torch._foreach_add_(moving, towards, alpha=1 - decay)

    @torch.no_grad()
    def load(self, decay: float, weights: dict[str, Tensor]) -> None:
        """Restore one average from whole tensors. Raises ValueError where names or shapes differ."""
        average = self.averages[decay]
        require_same_shapes(average, weights, f"the average {decay} does not fit the model")
        for name, tensor in average.items():
            fill(tensor, weights[name])

    @contextmanager
    def applied_to(self, model: nn.Module, decay: float) -> Iterator[nn.Module]:
        """A model with the average's weights inside the block: `model` itself, which gets its own weights back after it, also
        after an error; of a split model a whole copy, for which every process of the run must come here.
        """
        average = self.averages[decay]
        if any(is_sharded(tensor) for tensor in average.values()):
            yield model_of(self.bones, dict(whole_tensors(average)))
            return
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        try:
            _copy_into(model, average)
            yield model
        finally:
            _copy_into(model, own)


def _chunks(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """The names in runs of at most UPDATE_CHUNK numbers, or one tensor."""
    names, size = [], 0
    for name, tensor in tensors.items():
        if names and size + tensor.numel() > UPDATE_CHUNK:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.numel()
    if names:
        yield names


@torch.no_grad()
def _copy_into(model: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
