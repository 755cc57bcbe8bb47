"""Pretraining the feature encoder as a masked autoencoder, with a classifier in the last steps.

Source: arXiv 2602.04770, appendix A.3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from drift_accel.data.samplers import draw_epoch_rows
from drift_accel.data.sources import Source, read_images
from drift_accel.foundation.random_streams import uniform_draws
from drift_accel.training.step_parts import step_part


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """The classifier phase: total loss = lambda * classification + (1 - lambda) * reconstruction.

    Raises ValueError for values that cannot work.
    """

    steps: int = 0
    """Last steps of the run that train the classifier too; 0: none."""
    weight: float = 0.1
    """lambda after its warm-up, in [0, 1]."""
    warmup_steps: int = 1000
    """Steps over which lambda rises linearly from 0."""

    def __post_init__(self):
        if self.steps < 0:
            raise ValueError(f"classifier.steps is {self.steps}: give an integer of at least 0")
        if not 0 <= self.weight <= 1:
            raise ValueError(f"classifier.weight is {self.weight}: give a share in [0, 1]")
        if self.warmup_steps < 1:
            raise ValueError(f"classifier.warmup_steps is {self.warmup_steps}: give an integer of at least 1")

    def weight_at(self, step: int, total_steps: int) -> float:
        """lambda of a step counted from 0: weight * min(1, k / warmup_steps), k steps into the phase."""
        into_phase = step - (total_steps - self.steps)
        return self.weight * min(1.0, max(0, into_phase) / self.warmup_steps) if self.steps else 0.0


def is_classifier_phase(init_from: str | None, classifier_steps: int, steps: int) -> bool:
    """Whether a run of `steps` is nothing but the classifier phase of an encoder that another run pretrained."""
    return init_from is not None and classifier_steps == steps


@dataclass(frozen=True)
class MaeBatch:
    """images [B,C,H,W], labels [B], mask [B,1,h,w] on the encoder's grid, 1 = hidden."""

    images: Tensor
    labels: Tensor
    mask: Tensor

    def labels_from(self, start: int, stop: int) -> "MaeBatch":
        """The images `start` to `stop` with labels and masks, as views."""
        return MaeBatch(self.images[start:stop], self.labels[start:stop], self.mask[start:stop])


class MaeTask:
    """The task of `drift_accel.train_mae`; a process's images go through the network in `accumulate` equal parts.

    With `overfit_one_batch` every step has the draws of step 0.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        *,
        batch_size: int,
        mask_ratio: float,
        classifier: ClassifierConfig,
        total_steps: int,
        seed: int,
        flip: bool = False,
        accumulate: int = 1,
        overfit_one_batch: bool = False,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        num_processes: int = 1,
    ):
        self.model, self.source = model, source
        self.mask_ratio, self.classifier, self.total_steps = mask_ratio, classifier, total_steps
        self.seed, self.flip, self.device, self.dtype = seed, flip, device, dtype
        self.num_samples, self.accumulate, self.overfit_one_batch = batch_size, accumulate, overfit_one_batch
        here = batch_size // num_processes
        self.slots = np.arange(rank * here, (rank + 1) * here)

    def draw(self, step: int) -> MaeBatch:
        """This process's images of a step and their masks: patches hidden independently."""
        step = 0 if self.overfit_one_batch else step
        rows, labels, mask = self.draw_rows(step)
        images = read_images(self.source, rows[:, None], self.seed, "images", step, self.slots, self.flip)[:, 0]
        tensors = (torch.from_numpy(images), labels, mask)
        return MaeBatch(*(tensor.pin_memory() if self.device.type == "cuda" else tensor for tensor in tensors))

    def draw_rows(self, step: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """This process's rows [B] of a step, their labels [B] and masks [B,1,h,w] on the encoder's grid."""
        rows = draw_epoch_rows(self.seed, step, self.slots, self.num_samples, len(self.source))
        config = self.model.config
        side = config.input_size // config.input_patch_size // config.mask_patch_size
        uniforms = uniform_draws(self.seed, "mask", step, self.slots.tolist(), (1, side, side))
        mask = self.model.expand_mask(torch.from_numpy((uniforms < self.mask_ratio).astype(np.float32)))
        return rows, torch.from_numpy(self.source.labels[rows]), mask

    def transfer(self, batch: MaeBatch) -> MaeBatch:
        """The batch on the run's device in the type of its weights."""
        return MaeBatch(
            images=batch.images.to(self.device, self.dtype, non_blocking=True),
            labels=batch.labels.to(self.device, non_blocking=True),
            mask=batch.mask.to(self.device, self.dtype, non_blocking=True),
        )

    def data_state(self) -> dict[str, Tensor]:
        """Nothing: draws are functions of the step."""
        return {}

    def load_data_state(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""

    def split(self, batch: MaeBatch) -> list[MaeBatch]:
        """The batch in `accumulate` parts, as views."""
        size = batch.labels.shape[0] // self.accumulate
        return [batch.labels_from(start, start + size) for start in range(0, batch.labels.shape[0], size)]

    def prepare(self, model: nn.Module, parts: Sequence[MaeBatch], autocast: Callable) -> None:
        """Nothing: the loss is a mean over images."""

    def compute(self, model: nn.Module, batch: MaeBatch, step: int, *, diagnostics: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a part's images; metrics are the means of its parts."""
        weight = self.classifier.weight_at(step, self.total_steps)
        with step_part("encoder"):
            parts = model(batch.images, batch.labels, batch.mask, lambda_cls=weight)
            metrics = {name: value.detach().mean() for name, value in parts._asdict().items()}
            metrics["classifier_weight"] = torch.full_like(metrics["loss"], weight)
            return parts.loss.mean(), metrics

    def end_step(self, non_finite: Tensor) -> dict[str, Tensor]:
        """Nothing: a step leaves the weights alone."""
        return {}
