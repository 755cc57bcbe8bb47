"""From cropped pixels to the rows of a cache: through a VAE, or as pixels.

Shapes: B pictures of a batch, S side of a picture, C channels, h and w of a latent.
"""

import hashlib
import io
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from drift_accel.data.cache_format import LATENTS, PIXEL_ENCODINGS, PIXELS, SAMPLINGS
from drift_accel.foundation.random_streams import random_stream
from drift_accel.models.autoencoder import vae_scaling

POSTERIOR_STREAM = "export/posterior"  # part of the meaning of a seed: renaming it changes every drawn latent
VAE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Rows = dict[str, np.ndarray | list[bytes]]


class RowEncoder(Protocol):
    """What the export needs from an encoder."""

    def header_values(self) -> dict[str, Any]:
        """The header's fields that belong to the encoder."""

    def encode(self, pixels: np.ndarray, image_indices: Sequence[int], views: Sequence[int]) -> Rows:
        """Column -> rows [B, ...] of pixels uint8 [B, S, S, 3]; row i depends on its picture, image index and view alone.

        There may be fewer indices than pictures: those behind the last index are padding, and so are their rows.
        """


class VaeEncoder:
    """Latents of a diffusers AutoencoderKL in model space, (latent - shift) * scale, as float16.

    `name`, `revision` and `dtype` are recorded; `vae` already has that dtype and device. `sampling` is "sample" (mean +
    deviation * normal numbers that belong to (seed, image index, view, orientation)), "mean" or "moments" (both, side by side).
    With `flip` the mirrored picture is encoded too. Scale and shift come from the VAE's configuration where they are None.
    Raises ValueError for an unknown sampling, a picture size that the VAE cannot take, and a scale that is zero.
    """

    def __init__(
        self,
        vae: nn.Module,
        *,
        name: str,
        size: int,
        revision: str | None = None,
        sampling: str = "sample",
        flip: bool = True,
        seed: int = 0,
        scale: float | None = None,
        shift: float | None = None,
        weights_sha256: str | None = None,
    ):
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling is {sampling!r}: choose one of {', '.join(SAMPLINGS)}")
        self.vae, self.sampling, self.flip, self.seed = vae, sampling, flip, seed
        parameter = next(vae.parameters())
        self._device, self._dtype = parameter.device, parameter.dtype
        own_scale, own_shift = vae_scaling(vae.config)
        self.scale = own_scale if scale is None else float(scale)
        self.shift = own_shift if shift is None else float(shift)
        if not np.all(np.asarray(self.scale)):
            raise ValueError(f"scale is {self.scale}: every latent would be zero; give the factor that makes their deviation 1")
        self._record = {
            "name": name,
            "revision": revision,
            "weights_sha256": weights_sha256 or weights_hash(vae),
            "dtype": str(self._dtype).removeprefix("torch."),
            "class": type(vae).__name__,
        }
        self.image_shape = self._latent_shape(size)

    def header_values(self) -> dict[str, Any]:
        """The header's fields that belong to the encoder."""
        return {
            "kind": LATENTS,
            "encoding": "float16",
            "image_shape": self.image_shape,
            "sampling": self.sampling,
            "flip_stored": self.flip,
            "scale": self.scale,
            "shift": self.shift,
            "vae": self._record,
        }

    def encode(self, pixels: np.ndarray, image_indices: Sequence[int], views: Sequence[int]) -> Rows:
        """{"latent": float16 [B, C, h, w], "latent_flipped": the same of the mirrored pictures}; [B, 2, C, h, w] of moments."""
        images = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2)  # [B, 3, S, S]
        images = (images.float() / 127.5 - 1).to(self._dtype)
        rows = {"latent": self._encode(images, image_indices, views, 0)}
        if self.flip:
            rows["latent_flipped"] = self._encode(images.flip(-1), image_indices, views, 1)
        return rows

    def _encode(self, images: Tensor, image_indices: Sequence[int], views: Sequence[int], orientation: int) -> np.ndarray:
        cudnn = torch.backends.cudnn
        with (
            torch.inference_mode(),
            cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32),
        ):
            posterior = self.vae.encode(images.contiguous()).latent_dist
            mean, deviation = posterior.mean.float().cpu(), posterior.std.float().cpu()  # each [B, C, h, w]
        if self.sampling == "sample":
            mean = mean + deviation * self._noise(mean.shape, image_indices, views, orientation)
        scale, shift = (torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (self.scale, self.shift))
        rows = (mean - shift) * scale
        if self.sampling == "moments":
            rows = torch.stack([rows, deviation * scale.abs()], dim=1)  # [B, 2, C, h, w]
        return rows.half().numpy()

    def _noise(self, shape: Sequence[int], image_indices: Sequence[int], views: Sequence[int], orientation: int) -> Tensor:
        noise = np.zeros(shape, dtype=np.float32)
        for place, (image, view) in enumerate(zip(image_indices, views, strict=True)):
            stream = random_stream(self.seed, POSTERIOR_STREAM, int(image), 2 * int(view) + orientation)
            noise[place] = stream.standard_normal(shape[1:], dtype=np.float32)
        return torch.from_numpy(noise)

    def _latent_shape(self, size: int) -> tuple[int, int, int]:
        channels = getattr(self.vae.config, "in_channels", 3)
        if channels != 3:
            raise ValueError(f"the VAE takes pictures of {channels} channels: choose one for RGB")
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        if size % factor:
            raise ValueError(f"image size {size} is no multiple of {factor}, by which this VAE reduces: choose one that is")
        return (self.vae.config.latent_channels, size // factor, size // factor)


class PixelEncoder:
    """Pixels as they are: `encoding` "uint8" (numbers), "png" (lossless, about half the size) or "jpeg" (lossy, smallest).

    Nothing is drawn and nothing mirrored: that is done at reading. Raises ValueError for another encoding or JPEG quality.
    """

    def __init__(self, *, size: int, encoding: str = "uint8", jpeg_quality: int = 95):
        if encoding not in PIXEL_ENCODINGS:
            raise ValueError(f"encoding is {encoding!r}: choose one of {', '.join(PIXEL_ENCODINGS)}")
        if not 1 <= jpeg_quality <= 100:
            raise ValueError(f"JPEG quality is {jpeg_quality}: give a number from 1 to 100")
        self.encoding, self.image_shape, self.jpeg_quality = encoding, (3, size, size), jpeg_quality

    def header_values(self) -> dict[str, Any]:
        """The header's fields that belong to the encoder."""
        return {
            "kind": PIXELS,
            "encoding": self.encoding,
            "image_shape": self.image_shape,
            "sampling": None,
            "flip_stored": False,
            "scale": None,
            "shift": None,
            "vae": None,
        }

    def encode(self, pixels: np.ndarray, image_indices: Sequence[int], views: Sequence[int]) -> Rows:
        """{"pixels": uint8 [B, 3, S, S]} or {"image": B files}."""
        if self.encoding == "uint8":
            return {"pixels": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))}
        return {"image": [self._compress(picture) for picture in pixels]}

    def _compress(self, picture: np.ndarray) -> bytes:
        content = io.BytesIO()
        image = Image.fromarray(picture)
        if self.encoding == "png":
            image.save(content, format="PNG")
        else:
            # Full colour resolution: the default halves it, which a generator of pixels would learn.
            image.save(content, format="JPEG", quality=self.jpeg_quality, subsampling=0)
        return content.getvalue()


def weights_hash(module: nn.Module) -> str:
    """The SHA-256 over names, shapes and float32 values of a module's weights, whatever file and type they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
