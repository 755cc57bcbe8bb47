"""Pretraining the feature encoder on pictures that a VAE encodes while the run goes on (arXiv 2602.04770, appendix A.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from drift_accel.data.online_images import OnlineImages
from drift_accel.training.mae_task import MaeBatch, MaeTask
from drift_accel.training.step_parts import step_part


@dataclass(frozen=True)
class CropBatch:
    """pixels uint8 [B,3,S,S], posterior noise [B,C,h,w] or None, labels [B], mask [B,1,h,w]."""

    pixels: Tensor
    noise: Tensor | None
    labels: Tensor
    mask: Tensor


class OnlineMaeTask(MaeTask):
    """MaeTask on random crops of `source`, an OnlineImages; crops are decoded on the host and encoded on the run's device."""

    source: OnlineImages

    def draw(self, step: int) -> CropBatch:
        """This process's crops of a step, the VAE's posterior draws and the masks."""
        step = 0 if self.overfit_one_batch else step
        rows, labels, mask = self.draw_rows(step)
        pixels = torch.from_numpy(self.source.random_crops(rows, self.seed, step, self.slots))
        noise = self.source.posterior_noise(self.seed, step, self.slots)
        tensors = (pixels, None if noise is None else torch.from_numpy(noise), labels, mask)
        pin = self.device.type == "cuda"
        return CropBatch(*(tensor.pin_memory() if pin and tensor is not None else tensor for tensor in tensors))

    def transfer(self, batch: CropBatch) -> MaeBatch:
        """The encoded batch on the run's device in the type of its weights."""
        pixels = batch.pixels.to(self.device, non_blocking=True)
        noise = None if batch.noise is None else batch.noise.to(self.device, non_blocking=True)
        with step_part("vae"):
            images = self.source.encoder.encode(pixels, noise, int(self.slots[0]))
        return MaeBatch(
            images=images.to(self.dtype),
            labels=batch.labels.to(self.device, non_blocking=True),
            mask=batch.mask.to(self.device, self.dtype, non_blocking=True),
        )
