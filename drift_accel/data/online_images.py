"""Pictures as training rows without a cache: random crops of a folder, encoded by a VAE while the run goes on, or as pixels.

Every crop and every posterior draw belongs to (seed, step, slot), so any number of processes trains on the same rows.
Shapes: B pictures, S side of a crop, C x h x w one latent.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from drift_accel.data.crops import adm_centre_crop, random_resized_crop, to_rgb
from drift_accel.data.image_sources import ImageSource, open_image_source
from drift_accel.data.row_encoders import weights_hash
from drift_accel.data.sources import SOURCES, DataConfig, Source, open_source
from drift_accel.foundation.random_streams import normal_draws, random_stream
from drift_accel.models.autoencoder import vae_scaling

ENCODING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DECODING_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class OnlineImagesConfig:
    """How pictures become rows, for data.source images. Raises ValueError for values that cannot work."""

    vae: str | None = None
    """"digits" (bundled), a folder or a hub id: the VAE that encodes each crop, its posterior sampled; null: train on pixels."""
    revision: str | None = None
    """Revision of a hub id."""
    dtype: str = "float32"
    """"float32" or "bfloat16": type of the VAE's weights and arithmetic."""
    image_size: int = 256
    """Side of the crops in pixels."""
    min_area: float = 0.2
    """Smallest part of a picture's area that a random crop keeps, in (0, 1]; the largest is all of it."""
    vae_batch: int = 32
    """Crops that pass through the VAE at once; part of the last bits of the latents."""

    def __post_init__(self):
        if self.dtype not in ENCODING_DTYPES:
            raise ValueError(f"data.images.dtype is {self.dtype!r}: choose one of {', '.join(ENCODING_DTYPES)}")
        for name in ("image_size", "vae_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.images.{name} is {getattr(self, name)}: give an integer of at least 1")
        if not 0 < self.min_area <= 1:
            raise ValueError(f"data.images.min_area is {self.min_area}: give a share of the area in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class EncoderDataConfig(DataConfig):
    """The data of an encoder's pretraining: those of every run, and "images", a folder of class folders.

    Raises ValueError for values that cannot work.
    """

    known_sources = (*SOURCES, "images")
    images: OnlineImagesConfig = field(default_factory=OnlineImagesConfig)
    """Read with source "images" alone: a random crop of each picture of `path`, mirrored at random, then the VAE."""

    def __post_init__(self):
        super().__post_init__()
        if self.source != "images":
            return
        if not self.path:
            raise ValueError("data.path is missing: give the folder that holds one folder of pictures a class")
        for name, value in (("flip", self.flip), ("in_memory", self.in_memory), ("max_rows", self.max_rows)):
            if value:
                reason = "random crops are mirrored already" if name == "flip" else "pictures are read from the disk as they are"
                raise ValueError(f"data.{name} is {value}, but {reason}: leave it out with data.source images")


class CropEncoder:
    """Crops, uint8, to the space that the model is trained in: through a frozen VAE, or pixels in [-1, 1].

    `vae` is None for pixels. Raises ValueError for a size that the VAE cannot take.
    """

    def __init__(self, config: OnlineImagesConfig, vae: nn.Module | None):
        self.config = config
        self.seconds = EncodingTime()
        self.digest = None if vae is None else weights_hash(vae)  # of the weights as they are, before they are rounded
        self.vae = None if vae is None else vae.to(ENCODING_DTYPES[config.dtype]).eval().requires_grad_(False)
        size = config.image_size
        self.image_shape = (3, size, size)
        self.scale, self.shift = (None, None) if vae is None else vae_scaling(vae.config)
        if vae is not None:
            factor = 2 ** (len(vae.config.block_out_channels) - 1)
            if size % factor:
                raise ValueError(f"data.images.image_size is {size}: this VAE takes multiples of {factor}")
            self.image_shape = (vae.config.latent_channels, size // factor, size // factor)

    def to(self, device: torch.device) -> "CropEncoder":
        """Encode on this device from now on."""
        if self.vae is not None:
            self.vae = self.vae.to(device)
        return self

    @property
    def description(self) -> dict[str, Any]:
        """What an export says of its training rows: kind, scale, shift and the VAE."""
        if self.vae is None:
            return {"kind": "pixels", "scale": None, "shift": None, "vae": None}
        config = self.config
        vae = {"name": config.vae, "revision": config.revision, "weights_sha256": self.digest, "dtype": config.dtype}
        return {"kind": "latents", "scale": self.scale, "shift": self.shift, "vae": {**vae, "class": type(self.vae).__name__}}

    @torch.no_grad()
    def encode(self, pixels: Tensor, noise: Tensor | None, first_index: int = 0) -> Tensor:
        """Rows [B, C, h, w] float32 in model space of crops uint8 [B, 3, S, S] on the encoder's device.

        `noise` [B, C, h, w] are the posterior's normal numbers. Crop i runs at row (first_index + i) % vae_batch of a padded
        batch, so that its bits do not depend on how a step's crops are shared by processes.
        """
        images = pixels.float() / 127.5 - 1  # [B, 3, S, S]
        if self.vae is None:
            return images
        batch, end, rows = self.config.vae_batch, first_index + len(images), []
        cudnn = torch.backends.cudnn
        with self.seconds.measure(images.device), cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for start in range(first_index - first_index % batch, end, batch):
                asked = slice(max(start, first_index) - first_index, min(start + batch, end) - first_index)
                places = slice(max(start, first_index) - start, min(start + batch, end) - start)
                padded = images.new_zeros((batch, *images.shape[1:]), dtype=ENCODING_DTYPES[self.config.dtype])
                padded[places] = images[asked].to(padded.dtype)
                with torch.autocast(images.device.type, enabled=False):
                    posterior = self.vae.encode(padded).latent_dist
                mean, deviation = posterior.mean[places].float(), posterior.std[places].float()  # each [b, C, h, w]
                rows.append(mean + deviation * noise[asked].float())
        scale, shift = (images.new_tensor(value).reshape(-1, 1, 1) for value in (self.scale, self.shift))
        return (torch.cat(rows) - shift) * scale


class OnlineImages:
    """The pictures of a folder as rows of training; offers what a source of rows offers, and random crops beside it.

    `rows` gives central crops, for validation. Raises as `open_image_source` does.
    """

    def __init__(self, path: str, encoder: CropEncoder, pictures: ImageSource | None = None):
        self.pictures = open_image_source(path) if pictures is None else pictures
        self.path, self.encoder = path, encoder
        self.labels = self.pictures.labels
        self.class_names, self.class_ids = self.pictures.class_names, self.pictures.class_ids
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def num_classes(self) -> int:
        """Classes of the folder."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one row."""
        return self.encoder.image_shape

    @property
    def header(self) -> SimpleNamespace:
        """kind, scale, shift and vae, as a cache's header has them."""
        return SimpleNamespace(**self.encoder.description)

    @property
    def is_sampled_at_read(self) -> bool:
        """Whether rows need normal numbers for the VAE's posterior."""
        return self.encoder.vae is not None

    def class_rows(self, label: int) -> np.ndarray:
        """The rows of one class, ascending. Raises ValueError for a class that does not exist."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class {label} does not exist: there are {self.num_classes} classes, from 0")
        return np.flatnonzero(self.labels == label)

    def random_crops(self, rows: np.ndarray, seed: int, step: int, slots: np.ndarray) -> np.ndarray:
        """Crops uint8 [B, 3, S, S] of rows [B], each drawn and mirrored by the stream of its (seed, step, slot)."""
        config = self.encoder.config

        def crop(place: int) -> np.ndarray:
            stream = random_stream(seed, "images/crop", step, int(slots[place]))
            image = to_rgb(self.pictures.load(int(rows[place])))
            return random_resized_crop(image, config.image_size, stream, (config.min_area, 1.0))

        return self._stacked(crop, len(rows))

    def posterior_noise(self, seed: int, step: int, slots: np.ndarray) -> np.ndarray | None:
        """Normal numbers float32 [B, C, h, w] of (seed, step, slot); None for pixels."""
        if not self.is_sampled_at_read:
            return None
        return normal_draws(seed, "images/posterior", step, [int(slot) for slot in slots], self.image_shape)

    def rows(self, indices: np.ndarray, flipped: None = None, streams: Sequence[np.random.Generator] | None = None) -> np.ndarray:
        """Central crops of rows [B] in model space, float32 [B, C, h, w]; `streams`: one a row, for the VAE's posterior.

        Raises ValueError for flips, which random crops alone have.
        """
        if flipped is not None:
            raise ValueError("central crops of pictures are not mirrored: leave flipped out")
        size = self.encoder.config.image_size
        pixels = self._stacked(lambda place: adm_centre_crop(to_rgb(self.pictures.load(int(indices[place]))), size), len(indices))
        noise = None
        if self.is_sampled_at_read:
            draws = [stream.standard_normal(self.image_shape, dtype=np.float32) for stream in streams]
            noise = torch.from_numpy(np.stack(draws))
        device = torch.device("cpu") if self.encoder.vae is None else next(self.encoder.vae.parameters()).device
        latents = self.encoder.encode(torch.from_numpy(pixels).to(device), None if noise is None else noise.to(device))
        return latents.cpu().numpy()

    def _stacked(self, crop, count: int) -> np.ndarray:
        self._pool = self._pool or ThreadPoolExecutor(DECODING_THREADS, thread_name_prefix="pictures")
        return np.ascontiguousarray(np.stack(list(self._pool.map(crop, range(count)))).transpose(0, 3, 1, 2))


class EncodingTime:
    """Seconds that a device spent on encoding, read without waiting for it in between."""

    def __init__(self):
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds, self._since = 0.0, time.perf_counter()
        self._device, self._started = None, 0.0

    def measure(self, device: torch.device) -> "EncodingTime":
        """A context whose duration on `device` counts."""
        self._device = device
        return self

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()
        else:
            self._started = time.perf_counter()

    def __exit__(self, *_) -> None:
        if self._device.type == "cuda":
            self._events[-1][1].record()
        else:
            self._seconds += time.perf_counter() - self._started

    def read_share(self) -> float:
        """The share of the time since the last reading; for log steps, when the device is waited for anyway."""
        for first, last in self._events:
            last.synchronize()
            self._seconds += first.elapsed_time(last) / 1000
        now = time.perf_counter()
        share = self._seconds / max(now - self._since, 1e-9)
        self._events, self._seconds, self._since = [], 0.0, now
        return share


def open_encoder_data(config: EncoderDataConfig) -> Source | OnlineImages:
    """Open the configured source. Raises as `open_source`, `load_vae` and `open_image_source` do."""
    if config.source != "images":
        return open_source(config)
    from drift_accel.models.autoencoder import load_vae

    vae = None if config.images.vae is None else load_vae(config.images.vae, revision=config.images.revision)
    return OnlineImages(config.path, CropEncoder(config.images, vae))


def data_line(config: EncoderDataConfig, source: Source | OnlineImages) -> str:
    """One line for the head of a run: where its rows come from."""
    rows = f"{len(source):,} rows of {source.num_classes} classes"
    if config.source == "digits":
        return f"data: {rows}, handwritten digits ({config.split})"
    if config.source == "images":
        images = config.images
        crops = f"{len(source):,} pictures of {config.path}, random crops ({images.min_area:g} to 1 of the area) and mirroring"
        if images.vae is None:
            return f"data: {crops}, as pixels of {images.image_size}x{images.image_size}"
        return f"data: {crops}, encoded on line by the VAE {images.vae} ({images.dtype}, sampled posterior)"
    header = source.header
    made = f"{header.views} view(s) a picture, {header.crop.get('kind', 'unknown')} crops"
    posterior = {"sample": ", sampled at export", "mean": ", posterior means", "moments": ", sampled when read"}
    return f"data: {rows}, {header.kind} of the cache {config.path} ({made}{posterior.get(header.sampling, '')})"
