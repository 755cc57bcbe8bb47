"""From samples to a set of activations: read, put through the model in batches of one shape, written batch file by batch file.

Sample p of the selection always runs at row p % model_batch of a padded batch, so that what it gives does not depend on how
many processes there are, how large the files are, or where a run was killed.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drift_accel.analysis.activations.batches import ARROW, NO_CLASS, SampleRecord
from drift_accel.analysis.activations.models import ActivationModel, InputSpec
from drift_accel.analysis.activations.sources import ActivationSource, SampleSource, SourceRows
from drift_accel.analysis.activations.staging import StagedSet
from drift_accel.analysis.activations.store import IMAGES
from drift_accel.analysis.activations.writing import BatchWriter
from drift_accel.data.latent_export import Workers
from drift_accel.foundation.provenance import package_versions

MODEL_PICTURES, ORIGINAL_PICTURES, NO_PICTURES = "model", "original", "none"
PICTURES = (MODEL_PICTURES, ORIGINAL_PICTURES, NO_PICTURES)
RECORDED_PACKAGES = ("torch", "diffusers", "numpy", "pillow")
TRIED = 16  # samples that are tried for one that can be read, before the work begins
PICTURE_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class ExtractionConfig:
    """How activations are taken and kept. Raises ValueError for values out of range."""

    layers: tuple[str, ...]
    """Names, as the model's `layer_shapes` has them; () leaves the choice to the command (`default_layers`)."""
    pooled: bool = True
    """Averaged over space, or whole maps."""
    storage: str = ARROW
    """"arrow" or "npz"."""
    dtype: str = "float32"
    """Of the stored numbers: float32 or float16."""
    batch_size: int | None = None
    """Samples a file; None: 1,024 of Arrow, 64 of npz."""
    model_batch: int = 64
    """Samples that the model gets at once, padded to this number; part of the last bits of a result."""
    pictures: str = MODEL_PICTURES
    """Which pictures are kept: "model" (as the model gets them, PNG), "original" (copies of the files), "none"."""
    max_bad: int = 0
    """Pictures that may be unreadable: so many are left out and recorded, one more stops the work."""

    def __post_init__(self):
        for name in ("batch_size", "model_batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")
        if not all(self.layers) or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"--layers is {', '.join(self.layers) or 'empty'}: name each layer once")
        if self.max_bad < 0:
            raise ValueError(f"--max_bad is {self.max_bad}: give at least 0")
        if self.pictures not in PICTURES:
            raise ValueError(f"--images is {self.pictures!r}: choose one of {', '.join(PICTURES)}")


class ActivationExtraction:
    """The set `name` in `folder` of the samples `items` (indices of `source`, ascending) through `model`.

    Raises ValueError, before anything is written, for an empty selection, classes that the model does not have, samples that
    it cannot take and pictures that cannot be kept.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        source: ActivationSource,
        items: np.ndarray,
        model: ActivationModel,
        config: ExtractionConfig,
        *,
        selection: dict[str, Any] | None = None,
    ):
        if not len(items):
            raise ValueError(f"{source.place} has no samples to take activations of: the set would be empty")
        self.source, self.items, self.model, self.config = source, np.asarray(items, dtype=np.int64), model, config
        self.name, self.labels = name, source.labels[self.items]
        self._require_classes()
        self._try_samples()
        self.staged = StagedSet(
            folder,
            name,
            self._settings(selection or {}),
            shapes=self._stored_shapes(),
            num_samples=len(self.items),
            storage=config.storage,
            dtype=config.dtype,
            batch_size=config.batch_size,
        )

    def run(
        self,
        *,
        workers: Workers | None = None,
        overwrite: bool = False,
        command: Sequence[str] = (),
        log: Callable[[str], None] = print,
    ) -> Path:
        """Compute what is missing; raises and returns as `StagedSet.write`."""
        row_bytes = sum(prod(shape) for shape in self.staged.shapes.values()) * np.dtype(self.config.dtype).itemsize
        picture = self._first.pixels
        row_bytes += 0 if picture is None or self.config.pictures == NO_PICTURES else picture[0].nbytes
        log_bytes = len(self.items) * row_bytes
        if workers is None or workers.is_main:
            log(f"{len(self.items):,} samples, {len(self.staged.shapes)} layers: about {log_bytes / 1e9:.3f} GB in {self.name}")
        with ThreadPoolExecutor(1) as self._reader, ThreadPoolExecutor(PICTURE_THREADS) as self._savers:
            return self.staged.write(
                self._compute,
                workers=workers,
                max_bad=self.config.max_bad,
                overwrite=overwrite,
                estimated_bytes=log_bytes,
                command=command,
                description=f"activations of {self.name}",
                log=log,
            )

    def _compute(self, places: range, writer: BatchWriter, advance: Callable[[int], None]) -> list[str]:
        unreadable = []
        for block, rows in self._read_blocks(places):
            unreadable += rows.unreadable
            kept = [block[place] for place in rows.kept]
            if kept:
                writer.add(self._activations(rows, kept), self._records(rows, kept, writer.images))
            advance(len(block))
        return unreadable

    def _read_blocks(self, places: range) -> Iterator[tuple[range, SourceRows]]:
        """The places in aligned blocks of the model's batch with what was read of them, one block ahead of its use."""
        size, blocks = self.config.model_batch, []
        for start in range(places.start - places.start % size, places.stop, size):
            blocks.append(range(max(start, places.start), min(start + size, places.stop)))
        if isinstance(self.source, SampleSource):  # these are made on the device that the model needs
            for block in blocks:
                yield block, self.source.read(self.items[block.start : block.stop])
            return
        ahead = None
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            rows = self.source.read(self.items[block.start : block.stop]) if ahead is None else ahead.result()
            if following is not None:
                ahead = self._reader.submit(self.source.read, self.items[following.start : following.stop])
            yield block, rows

    def _activations(self, rows: SourceRows, kept: Sequence[int]) -> dict[str, np.ndarray]:
        """The layers of the samples that were read, each at its own row of the model's batch."""
        size = self.config.model_batch
        inputs = model_inputs(rows, self.source, self.model.spec)
        at = [place % size for place in kept]
        batch = torch.zeros((size, *inputs.shape[1:]))
        labels, indices = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        batch[at], labels[at], indices[at] = inputs, np.maximum(self.labels[kept], 0), self.items[kept]
        found = self.model.compute(self.config.layers, batch, labels, indices.tolist(), self.config.pooled)
        return {layer: values[at] for layer, values in found.items()}

    def _records(self, rows: SourceRows, kept: Sequence[int], images: Path) -> list[SampleRecord]:
        paths = list(self._savers.map(lambda row: self._keep_picture(rows, row, kept[row], images), range(len(kept))))
        records = []
        for place, path in zip(kept, paths, strict=True):
            label = int(self.labels[place])
            key, name = self.source.class_of(label)
            original = self.source.original_path(int(self.items[place]))
            records.append(
                SampleRecord(class_id=label, synset_id=key, class_name=name, original_path=original, image_path=path)
            )  # fmt: skip
        return records

    def _keep_picture(self, rows: SourceRows, row: int, place: int, images: Path) -> str | None:
        """Keep one picture; returns its path below the output folder."""
        if self.config.pictures == NO_PICTURES:
            return None
        original = self.source.original_file(int(self.items[place]))
        suffix = original.suffix if self.config.pictures == ORIGINAL_PICTURES else ".png"
        file = images / f"sample_{place:06d}{suffix}"
        if self.config.pictures == ORIGINAL_PICTURES:
            shutil.copyfile(original, file)
        else:
            picture = rows.pixels[row]
            Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(file, format="PNG")
        return f"{IMAGES}/{self.name}/{file.name}"

    def _require_classes(self) -> None:
        classes = self.model.num_classes
        if classes is None:
            return
        if (self.labels == NO_CLASS).any():
            index = int(self.items[np.flatnonzero(self.labels == NO_CLASS)[0]])
            raise ValueError(
                f"{self.source.original_path(index)} has no class, and the model takes one of its {classes}: give pictures in "
                "class folders, or a model that takes no labels"
            )
        if self.labels.max() >= classes:
            raise ValueError(f"labels of {self.source.place} reach {self.labels.max()}, the model has 0 to {classes - 1}")

    def _try_samples(self) -> None:
        """Put one sample through the model's door."""
        first = None
        for place in range(min(TRIED, len(self.items))):
            rows = self.source.read(self.items[place : place + 1])
            if rows.kept:
                first = rows
                break
        if first is None:
            rows = self.source.read(self.items[:1])
            raise ValueError(f"none of the first {min(TRIED, len(self.items))} pictures can be read:\n  {rows.unreadable[0]}")
        self._side = model_inputs(first, self.source, self.model.spec).shape[-1]
        if self.config.pictures == ORIGINAL_PICTURES and self.source.original_file(int(self.items[0])) is None:
            raise ValueError(f"{self.source.place} has no files to copy: give --images model or none")
        if self.config.pictures == MODEL_PICTURES and first.pixels is None:
            raise ValueError(f"{self.source.place} has latents and no pictures: name their VAE with --vae, or --images none")
        self._first = first

    @cached_property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """The layers' shapes before pooling."""
        every = self.model.layer_shapes(self._side)
        missing = [layer for layer in self.config.layers if layer not in every]
        if missing:
            raise ValueError(f"the model has no layer {missing[0]!r} that can be taken: --list_layers shows those it has")
        return {layer: every[layer] for layer in self.config.layers}

    def _stored_shapes(self) -> dict[str, tuple[int, ...]]:
        return {layer: shape[:1] if self.config.pooled else shape for layer, shape in self.full_shapes.items()}

    def _settings(self, selection: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        labels, counts = np.unique(self.labels, return_counts=True)
        classes = []
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            key, name = self.source.class_of(label)
            classes.append({"class_id": label, "synset_id": key, "class_name": name, "samples": count})
        kept = sha256(self.items.tobytes() + self.labels.astype(np.int64).tobytes()).hexdigest()
        preprocessing = [*self.source.preprocessing()]
        if self._first.model_space is None:
            preprocessing.append("x / 127.5 - 1")
        return {
            "seed": selection.get("seed", 0),
            "pooled": config.pooled,
            "full_shapes": {layer: list(shape) for layer, shape in self.full_shapes.items()},
            "model_batch": config.model_batch,
            "images": config.pictures,
            "model": self.model.identity(),
            "source": {**self.source.identity(), "num_samples": len(self.source)},
            "selection": {**selection, "num_samples": len(self.items), "chosen_sha256": kept},
            "preprocessing": preprocessing,
            "classes": classes,
            "versions": package_versions(RECORDED_PACKAGES),
        }


def model_inputs(rows: SourceRows, source: ActivationSource, spec: InputSpec) -> Tensor:
    """What a model gets of samples that were read, float32 [n, C, H, W]; grey pictures gain or lose equal channels.

    Raises ValueError for latents where pixels are wanted and the other way round, other channels, and another size.
    """
    if spec.space == "latent" and not source.is_latent:
        raise ValueError(f"the model takes latents of {spec.channels} channels, {source.place} has pictures: give a latent cache")
    if rows.model_space is not None and source.is_latent == (spec.space == "latent"):
        inputs = torch.from_numpy(np.ascontiguousarray(rows.model_space, dtype=np.float32))
    elif rows.pixels is not None:
        inputs = torch.from_numpy(rows.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    else:
        raise ValueError(f"the model takes pictures, {source.place} has latents: name their VAE with --vae")
    if inputs.shape[1] == 1 and spec.channels == 3:
        inputs = inputs.repeat(1, 3, 1, 1)
    elif inputs.shape[1] == 3 and spec.channels == 1 and bool((inputs == inputs[:, :1]).all()):
        inputs = inputs[:, :1]
    if inputs.shape[1] != spec.channels:
        raise ValueError(f"the model takes images of {spec.channels} channels, {source.place} has {inputs.shape[1]}")
    if spec.size is not None and tuple(inputs.shape[2:]) != (spec.size, spec.size):
        raise ValueError(
            f"the model takes images of {spec.size} x {spec.size}, {source.place} has {inputs.shape[2]} x {inputs.shape[3]}: "
            f"give --image_size {spec.size} for pictures, or data of that size"
        )
    return inputs
