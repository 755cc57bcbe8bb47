"""What all feature networks share: one shape of batch, so that a picture's features do not depend on the others."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drift_accel.evaluation.protocols import Protocol
from drift_accel.sampling.pictures import PictureBatch
from drift_accel.sampling.quantization import to_rgb

RESIZING_THREADS = 8


class FeatureNetwork:
    """Features of pictures under a protocol: a `Measure` for SampleStore.

    Subclasses give `features` [b, D], and with it "logits" [b, classes] and "spatial" [b, S] where they have them, for
    exactly `batch` inputs.
    """

    provides: tuple[str, ...] = ("features",)

    before_chunk: Callable[[], None] = staticmethod(lambda: None)
    """Called before each chunk of pictures; what it raises ends the work."""

    def __init__(self, path: Path, protocol: Protocol, weights_sha256: str, *, device: torch.device | str, batch: int):
        self.path, self.protocol, self.weights_sha256 = path, protocol, weights_sha256
        self.device, self.batch = torch.device(device), batch
        self._threads: ThreadPoolExecutor | None = None

    def identity(self) -> dict[str, Any]:
        """Protocol, network file and hash, what is taken from it."""
        return {
            "protocol": self.protocol.name,
            "operations": list(self.protocol.operations),
            "network": self.path.name,
            "network_sha256": self.weights_sha256,
            "provides": list(self.provides),
            "batch": self.batch,
        }

    def __call__(self, batch: PictureBatch) -> Mapping[str, np.ndarray]:
        """Arrays float32 [n, ...] of n pictures, by name. Raises ValueError for pictures that the network cannot take."""
        self.before_chunk()
        inputs = self.prepare(batch)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.provides}
        with torch.inference_mode():
            for start in range(0, len(inputs), self.batch):
                rows = inputs[start : start + self.batch]
                padding = rows.new_zeros((self.batch - len(rows), *rows.shape[1:]))
                outputs = self.compute(torch.cat([rows, padding]).to(self.device))
                for name in self.provides:
                    parts[name].append(outputs[name][: len(rows)].float().cpu().numpy())
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def prepare(self, batch: PictureBatch) -> Tensor:
        """The network's input of n pictures [n, ...] on the CPU."""
        raise NotImplementedError

    def compute(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """The outputs of exactly `batch` inputs."""
        raise NotImplementedError

    def rgb(self, batch: PictureBatch) -> np.ndarray:
        """uint8 [n, H, W, 3]. Raises ValueError for latents without pixels."""
        if batch.pixels is None:
            raise ValueError(
                f"protocol {self.protocol.name!r} looks at pixels, but there are only latents: name their VAE with --vae"
            )
        return to_rgb(batch.pixels)

    def resized(self, batch: PictureBatch, resize) -> Tensor:
        """float32 [n, 3, S, S] of pictures that `resize` (uint8 [H, W, 3] -> float [S, S, 3]) takes one by one, in threads."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(RESIZING_THREADS)
        rows = list(self._threads.map(resize, self.rgb(batch)))
        return torch.from_numpy(np.stack(rows)).float().permute(0, 3, 1, 2).contiguous()
