"""What activations are taken of: real pictures or rows, and generated samples, each with its class and where it came from.

Shapes: n samples that are read together, H, W of pictures, C, h, w of model space.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from drift_accel.data.class_table import ClassEntry, ClassTable
from drift_accel.data.crops import ImageCrop, to_rgb
from drift_accel.data.image_sources import ImageFolder, ImageSource
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.source_classes import labels_in_table
from drift_accel.foundation.random_streams import random_stream
from drift_accel.sampling.pictures import Pictures
from drift_accel.sampling.quantization import to_rgb as to_three_channels
from drift_accel.sampling.quantization import to_uint8
from drift_accel.sampling.vae_choice import LatentDecoder

READING_THREADS = 8
POSTERIOR_STREAM = "activations/posterior"  # part of the meaning of a set: renaming it changes sets of caches of moments
NO_LABEL = -1


@dataclass(kw_only=True)
class SourceRows:
    """Samples that were read; those that could not be read are left out of the arrays."""

    kept: list[int]
    """Places, among those asked for, of the samples in the arrays."""
    pixels: np.ndarray | None = None
    """uint8 [n, H, W, 1 or 3]."""
    model_space: np.ndarray | None = None
    """float32 [n, C, h, w]: latents, images in [-1, 1] or noise, as a model takes them; None: `pixels` are the images."""
    unreadable: list[str] = field(default_factory=list)
    """One line a sample that could not be read."""


class ActivationSource(Protocol):
    """A set of samples by index."""

    labels: np.ndarray
    """int64 [len], -1 where the class is not known."""
    is_latent: bool
    """Whether `model_space` holds latents."""

    def __len__(self) -> int:
        """The number of samples."""

    def class_of(self, label: int) -> tuple[str, str]:
        """(key, name) of a class: its synset or folder, and its name."""

    def read(self, items: Sequence[int]) -> SourceRows:
        """The samples `items`, ascending; each is the same however they are asked for."""

    def original_path(self, index: int) -> str:
        """Where a sample came from, in words that lead there."""

    def original_file(self, index: int) -> Path | None:
        """The picture's file; None where it is part of something else."""

    def identity(self) -> dict[str, Any]:
        """What decides the samples, in plain values."""

    def preprocessing(self) -> list[str]:
        """What is done to a picture before the model, in order."""


class _Classes:
    """Labels of samples, and the keys and names of their classes by label."""

    def __init__(self, place: str | Path, labels: np.ndarray, ids: Sequence[str] | None, names: Sequence[str] | None):
        self.place, self.labels = str(place), np.asarray(labels, dtype=np.int64)
        self._ids, self._names = ids, names

    def __len__(self) -> int:
        return len(self.labels)

    def class_of(self, label: int) -> tuple[str, str]:
        """(key, name) of a class: its synset or folder, and its name; the label itself where only that is known."""
        if label == NO_LABEL:
            return "", ""
        return (str(label), str(label)) if self._ids is None else (self._ids[label], self._names[label])

    def table(self) -> ClassTable:
        """The classes by label, as far as they are known here."""
        count = int(self.labels.max(initial=0)) + 1 if self._ids is None else len(self._ids)
        pairs = [self.class_of(label) for label in range(count)]
        return ClassTable(
            [ClassEntry(index=label, wnid=key, names=tuple(name.split(", "))) for label, (key, name) in enumerate(pairs)]
        )

    def forget_keys(self) -> None:
        """Keep the labels alone: where the keys are nothing but other spellings of them."""
        self._ids = self._names = None

    @property
    def class_ids(self) -> Sequence[str] | None:
        """The keys by label; None where only labels are known."""
        return self._ids

    def use_table(self, table: ClassTable) -> None:
        """Take labels and names from a table: a class becomes the entry of its key, or, without keys, of its number.

        Raises ValueError naming every class that the table does not have.
        """
        used = np.unique(self.labels[self.labels != NO_LABEL]).tolist()
        if self._ids is not None:
            found = labels_in_table(self.place, self._ids, used, table)
            self.labels = np.where(self.labels == NO_LABEL, NO_LABEL, found[self.labels])
        elif used and used[-1] >= len(table):
            raise ValueError(f"labels of {self.place} reach {used[-1]}, but the class table has {len(table)} classes")
        self._ids, self._names = table.wnids, tuple(", ".join(entry.names) for entry in table)


class PictureSource(_Classes):
    """Pictures of files, of a saved data set or of arrays, cropped to `crop` (None: as they are, which must be one size).

    `has_ranks`: whether the labels are only the ranks of classes that happen to be there.
    """

    is_latent = False

    def __init__(self, source: ImageSource, place: Path, crop: ImageCrop | None, *, has_ranks: bool = False):
        super().__init__(place, source.labels, source.class_ids, source.class_names)
        self.source, self.crop, self.has_ranks = source, crop, has_ranks

    def read(self, items: Sequence[int]) -> SourceRows:
        """Decoded and cropped by threads."""
        with ThreadPoolExecutor(READING_THREADS) as pool:
            found = list(pool.map(self._load, map(int, items)))
        kept = [place for place, picture in enumerate(found) if isinstance(picture, np.ndarray)]
        pictures = [found[place] for place in kept]
        other = next((place for place in kept if found[place].shape != pictures[0].shape), None)
        if other is not None:
            (first, size), (second, other_size) = (
                (self.source.name(int(items[place])), found[place].shape[1::-1]) for place in (kept[0], other)
            )
            raise ValueError(
                f"pictures of {self.place} are of unequal size: {first} is {size}, {second} is {other_size} (width, height); "
                "give --image_size"
            )
        pixels = np.stack(pictures) if pictures else None
        return SourceRows(kept=kept, pixels=pixels, unreadable=[text for text in found if isinstance(text, str)])

    def original_path(self, index: int) -> str:
        """The file, or the row in its file."""
        if isinstance(self.source, ImageFolder):
            return f"{self.place}/{self.source.name(index)}"
        return f"{self.place}: {self.source.name(index)}"

    def original_file(self, index: int) -> Path | None:
        """The file, of a folder."""
        return self.source.path(index) if isinstance(self.source, ImageFolder) else None

    def identity(self) -> dict[str, Any]:
        """Names and labels; contents are not read."""
        return {"kind": "pictures", "place": self.place, "fingerprint": self.source.fingerprint()}

    def preprocessing(self) -> list[str]:
        """The crop."""
        return ["as they are, converted to RGB"] if self.crop is None else list(self.crop.operations())

    def _load(self, index: int) -> np.ndarray | str:
        try:
            picture = self.source.load(index)
            return np.asarray(to_rgb(picture)) if self.crop is None else self.crop(picture, index)
        except OSError as error:
            return f"{self.place}: {error}"
        except ValueError as error:
            return f"{self.place}: {self.source.name(index)}: {error}"


class RowSource(_Classes):
    """Rows of a latent cache, or of labelled images in memory: model space as models make and take it."""

    def __init__(self, rows, place: str, identity: dict[str, Any], *, is_latent: bool, decoder: LatentDecoder | None = None):
        super().__init__(place, rows.labels, getattr(rows, "class_ids", rows.class_names), rows.class_names)
        self.rows, self.is_latent, self.decoder, self._identity = rows, is_latent, decoder, identity

    def read(self, items: Sequence[int]) -> SourceRows:
        """The rows; a posterior that is drawn at reading is drawn by the row's number. With a VAE also latents' pictures."""
        items = np.asarray(items, dtype=np.int64)
        if self.rows.is_sampled_at_read:
            streams = [random_stream(0, POSTERIOR_STREAM, 0, index) for index in items.tolist()]
            images = self.rows.rows(items, None, streams)
        else:
            images = self.rows.rows(items)
        images = np.ascontiguousarray(images, dtype=np.float32)
        pixels = None
        if not self.is_latent:
            pixels = to_uint8(torch.from_numpy(images))
        elif self.decoder is not None:
            pixels = self._decode(images, items)
        return SourceRows(kept=list(range(len(items))), pixels=pixels, model_space=images)

    def original_path(self, index: int) -> str:
        """The picture that a cache's row was made of, or the row."""
        if isinstance(self.rows, LatentCache):
            return self.rows.origins([index])[0].source
        return f"{self.place} row {index}"

    def original_file(self, index: int) -> None:
        """None."""

    def identity(self) -> dict[str, Any]:
        """The cache's hashes, or the name of the data set."""
        decoder = None if self.decoder is None else self.decoder.identity()
        return {"kind": "rows", "place": self.place, **self._identity, "vae": decoder}

    def preprocessing(self) -> list[str]:
        """What the cache's header says."""
        return list(self.rows.header.pixel_operations) if isinstance(self.rows, LatentCache) else ["rows in [-1, 1] as they are"]

    def _decode(self, latents: np.ndarray, items: np.ndarray) -> np.ndarray | None:
        device = next(self.decoder.vae.parameters()).device
        pictures, start = [], 0
        for run in _runs(items):
            rows = torch.from_numpy(latents[start : start + len(run)]).to(device)
            pictures.append(to_uint8(self.decoder(rows, run.start)))
            start += len(run)
        return np.concatenate(pictures) if pictures else None


class SampleSource(_Classes):
    """Generated samples, or pictures that a generation kept: any `Pictures`.

    `noise`: gives the noise [n, C, h, w] of samples, where the model is to get that in place of the finished sample.
    Without a `table` classes are named by their labels.
    """

    def __init__(
        self,
        pictures: Pictures,
        place: str,
        *,
        is_latent: bool,
        table: ClassTable | None = None,
        noise=None,
        needs_pictures: bool = True,
        crop: ImageCrop | None = None,
    ):
        super().__init__(place, np.full(len(pictures), NO_LABEL) if pictures.labels is None else pictures.labels, None, None)
        self.pictures, self.is_latent, self.crop = pictures, is_latent, crop
        self._noise, self._needs_pictures = noise, needs_pictures
        if table is not None:
            self.use_table(table)

    def read(self, items: Sequence[int]) -> SourceRows:
        """The samples, and the noise in the place of their model space where it is fed."""
        kept = list(range(len(items)))
        noise = None if self._noise is None else self._noise(items)
        if noise is not None and not self._needs_pictures:
            return SourceRows(kept=kept, model_space=noise)
        batches = [self.pictures.batch(run) for run in _runs(items)]
        pixels, model_space = (
            None if parts[0] is None else np.concatenate(parts)
            for parts in zip(*((batch.pixels, batch.model_space) for batch in batches), strict=True)
        )
        if self.crop is not None and pixels is not None:
            pixels = np.stack([self.crop(Image.fromarray(picture)) for picture in to_three_channels(pixels)])
            model_space = None
        return SourceRows(kept=kept, pixels=pixels, model_space=model_space if noise is None else noise)

    def original_path(self, index: int) -> str:
        """Which sample of what."""
        return f"{self.place} sample {index}"

    def original_file(self, index: int) -> None:
        """None."""

    def identity(self) -> dict[str, Any]:
        """What decides the samples."""
        return {"kind": "samples", "place": self.place, **self.pictures.identity(), "noise": self._noise is not None}

    def preprocessing(self) -> list[str]:
        """The crop, if any."""
        return ["as generated"] if self.crop is None else list(self.crop.operations())


def _runs(items: Sequence[int]) -> list[range]:
    """Ascending items as ranges of neighbours."""
    items = np.asarray(items, dtype=np.int64)
    breaks = np.flatnonzero(np.diff(items) != 1) + 1
    return [range(int(part[0]), int(part[-1]) + 1) for part in np.split(items, breaks) if len(part)]
