"""Training the generator: what a step draws, and its drifting loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from drift_accel.data.queue import SampleQueue
from drift_accel.data.samplers import LABEL_ORDERS, DirectSampler, draw_labels
from drift_accel.data.sources import Source, read_images
from drift_accel.drift import DriftConfig, FeatureConfig, GuidanceConfig, draw_guidance
from drift_accel.drift.encoders import as_specs
from drift_accel.foundation.random_streams import integer_draws, normal_draws, uniform_draws
from drift_accel.training.monitoring import class_diversity
from drift_accel.training.slices import STATE_PREFIX, Autocast, StepStatistics, slice_batch
from drift_accel.training.step import DriftBatch, Encoders, step_loss, step_problems


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many labels and samples a step has. Raises ValueError for counts that cannot work."""

    labels: int = 64
    """Labels of a step over all processes; a multiple of the number of processes."""
    generated: int = 64
    """Generated samples a label (G)."""
    positives: int = 64
    """Real samples of the label's class (P)."""
    negatives: int = 16
    """Real samples of any class (N), which guidance pushes away from; 0 without guidance."""
    labels_per_slice: int | None = None
    """Labels of a process that pass through the networks at once; null: all of them. Smaller slices need less memory."""
    label_order: str = "independent"
    """"independent": each label drawn on its own, as the release does; "shuffled": every class once before any repeats."""

    def __post_init__(self):
        for name, at_least in (("labels", 1), ("generated", 1), ("positives", 1), ("negatives", 0)):
            if getattr(self, name) < at_least:
                raise ValueError(f"batch.{name} is {getattr(self, name)}: give an integer of at least {at_least}")
        if self.labels_per_slice is not None and self.labels_per_slice < 1:
            raise ValueError(f"batch.labels_per_slice is {self.labels_per_slice}: give at least 1, or null for all")
        if self.label_order not in LABEL_ORDERS:
            raise ValueError(f"batch.label_order is {self.label_order!r}: choose one of {', '.join(LABEL_ORDERS)}")

    def check_processes(self, num_processes: int) -> None:
        """Raise ValueError where the labels cannot be split evenly."""
        if self.labels % num_processes:
            raise ValueError(
                f"batch.labels is {self.labels}, which {num_processes} processes cannot share evenly: "
                f"use {self.labels // num_processes * num_processes or num_processes} labels or another number of processes"
            )


class GeneratorTask:
    """The task of `drift_accel.train`: labels are split over processes and slices.

    `statistics` names over which of them the drift's statistics are taken, and `statistics_memory_gb` bounds what "global" keeps
    between its passes (slices.py); `log` gets one line about it. `real_images` has the pictures behind the sampler's latents, row
    by row, for encoders behind a decoder; without it the latents are decoded. With `overfit_one_batch` every step has the draws
    of step 0.
    """

    def __init__(
        self,
        model: nn.Module,
        encoder: Encoders,
        sampler: DirectSampler | SampleQueue,
        *,
        batch: BatchConfig,
        guidance: GuidanceConfig,
        drift: DriftConfig,
        features: FeatureConfig | None = None,
        seed: int,
        real_images: Source | None = None,
        flip: bool = False,
        overfit_one_batch: bool = False,
        statistics: str = "global",
        statistics_memory_gb: float = 16.0,
        log: Callable[[str], None] = print,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rank: int = 0,
        num_processes: int = 1,
        group=None,
    ):
        batch.check_processes(num_processes)
        self.model, self.sampler, self.source, self.real_images = model, sampler, sampler.source, real_images
        self.specs = as_specs(encoder, features)
        self.batch, self.guidance, self.drift = batch, guidance, drift
        self.seed, self.flip, self.device, self.dtype = seed, flip, device, dtype
        self.overfit_one_batch = overfit_one_batch
        self.statistics = StepStatistics(statistics, drift, group=group, memory_gb=statistics_memory_gb, log=log)
        labels_here = batch.labels // num_processes
        self.slots = range(rank * labels_here, (rank + 1) * labels_here)  # label slots of the global batch
        self.num_samples = batch.labels * batch.generated

    def draw(self, step: int) -> DriftBatch:
        """This process's labels of a step with all their samples; slot by slot the same for any number of processes."""
        step = 0 if self.overfit_one_batch else step
        counts, config, slots = self.batch, self.model.config, self.slots
        labels = draw_labels(self.seed, step, counts.labels, self.source.num_classes, counts.label_order)[
            slots.start : slots.stop
        ]
        uniforms = uniform_draws(self.seed, "guidance", step, slots, (2,), "float64")
        guidance = draw_guidance(self.guidance, uniforms[:, 0], uniforms[:, 1])
        self.sampler.advance(step)
        positives = self.sampler.positives(step, slots, labels)
        negatives = self.sampler.negatives(step, slots)
        shape = (counts.generated, config.in_channels, config.input_size, config.input_size)
        noise = normal_draws(self.seed, "noise", step, slots, shape)
        styles = integer_draws(
            self.seed, "styles", step, slots, (counts.generated, config.num_style_tokens), config.style_codebook_size
        )
        batch = DriftBatch(
            labels=torch.from_numpy(labels),
            guidance_scale=torch.from_numpy(guidance),
            positives=self._read(self.source, "positives", step, positives),
            negatives=self._read(self.source, "negatives", step, negatives),
            noise=torch.from_numpy(noise).flatten(0, 1),
            style_indices=torch.from_numpy(styles).flatten(0, 1),
            guidance_weighs=not self.guidance.conditioning_only,
            positive_images=self._read(self.real_images, "positives", step, positives),
            negative_images=self._read(self.real_images, "negatives", step, negatives),
        )
        return batch.pinned() if self.device.type == "cuda" else batch

    def _read(self, source: Source | None, name: str, step: int, rows: np.ndarray) -> Tensor | None:
        """Images [slots, count, C, H, W] of the drawn rows, mirrored alike in every source; None without one."""
        if source is None:
            return None
        return torch.from_numpy(read_images(source, rows, self.seed, name, step, self.slots, self.flip))

    def transfer(self, batch: DriftBatch) -> DriftBatch:
        """The batch on the run's device in the type of its weights."""
        return batch.to(self.device, self.dtype)

    def data_state(self) -> dict[str, Tensor]:
        """What the sampler holds after the last draw."""
        return {name: torch.from_numpy(array) for name, array in self.sampler.state_arrays().items()}

    def load_data_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved `data_state` and `end_step`."""
        statistics = {name: tensor for name, tensor in state.items() if name.startswith(STATE_PREFIX)}
        self.statistics.load_state(statistics, self.device)
        self.sampler.load_state_arrays({name: tensor.numpy() for name, tensor in state.items() if name not in statistics})

    def split(self, batch: DriftBatch) -> list[DriftBatch]:
        """The batch's labels in slices."""
        return slice_batch(batch, self.batch.labels_per_slice)

    def prepare(self, model: nn.Module, slices: Sequence[DriftBatch], autocast: Autocast) -> None:
        """Statistics that must be known before the gradient pass, in passes over the slices without gradient."""

        def extract(part: DriftBatch):
            with torch.no_grad(), autocast():
                return step_problems(model, self.specs, part)

        self.statistics.prepare(slices, extract)

    def compute(self, model: nn.Module, batch: DriftBatch, step: int, *, diagnostics: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The drifting loss of a slice's labels and its metrics."""
        problems = step_problems(model, self.specs, batch)
        result = step_loss(problems, batch, self.drift, specs=self.specs, diagnostics=diagnostics, **self.statistics.of_slice())
        self.statistics.observe(problems)
        spread = class_diversity(problems, batch.labels.shape[0]) if diagnostics else {}
        return result.loss, {**result.metrics, **spread, "guidance_scale": batch.guidance_scale.mean()}

    def end_step(self, non_finite: Tensor) -> dict[str, Tensor]:
        """What the next step needs of this one, for checkpoints: lagged statistics."""
        return self.statistics.end_step(non_finite)
