"""The cache of latents or pixels that training reads: random rows at memory speed, by index or by class."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from drift_accel.data.cache_format import PIXELS, CacheHeader, CacheManifest, read_description
from drift_accel.data.cache_shards import RowBytes, arrow_schema, column_values, decode_picture, open_shard
from drift_accel.data.class_index import open_class_index

PIXEL_VALUES = (np.arange(256) / 127.5 - 1).astype(np.float32)  # what a byte is in model space
DECODING_THREADS = 8
# torch converts pieces below 32768 numbers without its thread pool, which does not survive a fork.
SERIAL_PIECE = 32767


class RowOrigin(NamedTuple):
    """Where a row came from: the picture's name and index at the source, and which view of it."""

    source: str
    image_index: int
    view: int


class LatentCache:
    """A complete cache at `path`, written by tools/export_latents.py.

    Rows are [C, H, W] float32 in model space: latents already scaled and shifted, pixels in [-1, 1]. They are stored as float16
    (latents) or bytes (pixels) and memory-mapped: opening reads no rows, all processes of a machine share one copy, and the
    system drops it when memory is short. With `in_memory` all rows are read at once and kept. Safe across fork and spawn: a
    pickled cache carries its path alone and opens again where it arrives.

    Raises FileNotFoundError and ValueError as `read_description` does, ValueError naming the file for a shard that is missing,
    cut or not the header's, and for `in_memory` rows that do not fit into this machine.
    """

    def __init__(self, path: str | os.PathLike, in_memory: bool = False):
        self.path, self.in_memory = Path(path), in_memory
        self._open()

    def _open(self) -> None:
        self._header, self._manifest = read_description(self.path)
        if self.in_memory:
            _require_memory(sum(entry.bytes for entry in self._manifest.shards), self.path)
        schema = arrow_schema(self._header)
        self._batches = [batch for entry in self._manifest.shards for batch in open_shard(self.path, entry, schema)]
        rows = sum(batch.num_rows for batch in self._batches)
        if rows != self._manifest.rows or len(self._header.classes) != self._manifest.num_classes:
            raise ValueError(
                f"{self.path} has {rows} rows of {len(self._header.classes)} classes, its manifest says {self._manifest.rows} "
                f"of {self._manifest.num_classes}: run tools/verify_cache.py on it"
            )
        self._bytes = RowBytes(self._batches, self._header.columns, self._header.row_bytes, self.in_memory)
        self._classes = open_class_index(self.path, self.num_classes, rows, self._read_labels)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __getstate__(self) -> dict:
        return {"path": self.path, "in_memory": self.in_memory}

    def __setstate__(self, state: dict) -> None:
        self.path, self.in_memory = state["path"], state["in_memory"]
        self._open()

    def __len__(self) -> int:
        return self._manifest.rows

    @property
    def header(self) -> CacheHeader:
        """What the rows are and how they were made."""
        return self._header

    @property
    def manifest(self) -> CacheManifest:
        """Files, sizes and hashes."""
        return self._manifest

    @property
    def num_classes(self) -> int:
        return len(self._header.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names for people, by label."""
        return tuple(entry.name for entry in self._header.classes)

    @property
    def class_ids(self) -> tuple[str, ...]:
        """Keys of the classes at the source (wnids, folder names), by label."""
        return tuple(entry.id for entry in self._header.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one row."""
        return self._header.image_shape

    @property
    def has_flipped(self) -> bool:
        """Whether `rows` can give the horizontally flipped view: stored beside each latent, computed for pixels."""
        return self._header.flip_stored or self._header.kind == PIXELS

    @property
    def is_sampled_at_read(self) -> bool:
        """Whether the posterior's mean and deviation are stored, so that `rows` needs a stream to draw from."""
        return self._header.sampling == "moments"

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of every row, int64 [rows]."""
        return self._classes.labels()

    def class_rows(self, label: int) -> np.ndarray:
        """The row indices of one class, ascending. Raises ValueError for a class that does not exist or has no rows."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class {label} does not exist: there are {self.num_classes} classes, from 0")
        rows = self._classes.rows(label)
        if not len(rows):
            raise ValueError(
                f"class {label} ({self.class_names[label]}) has no rows in {self.path}: export again with pictures of it, or "
                "leave the class out"
            )
        return rows

    def rows(
        self,
        indices: np.ndarray,
        flipped: np.ndarray | bool | None = None,
        stream: np.random.Generator | Sequence[np.random.Generator] | None = None,
    ) -> np.ndarray:
        """The rows at `indices` (any shape) as float32 [*indices.shape, C, H, W] in model space; a copy that may be changed.

        `flipped`: which of them are given flipped horizontally, booleans of the same shape or one for all. `stream`: for a
        cache of moments the generator of the posterior's normal numbers, drawn in the order of `indices`, or one generator for
        each entry of their first axis. Raises IndexError for an index that does not exist, ValueError for indices that are no
        integers, flips that are not there, a stream that is missing or not needed, and a picture that cannot be decoded.
        """
        stored = self.stored_rows(indices, flipped)
        if self._header.kind == PIXELS:
            if stream is not None:
                raise ValueError(f"{self.path} holds pixels: nothing is drawn, leave the stream out")
            return PIXEL_VALUES[stored]
        if self.is_sampled_at_read != (stream is not None):
            raise ValueError(
                f"{self.path} holds the posterior's moments: give the stream to draw from"
                if stream is None
                else f"{self.path} holds latents that are drawn already ({self._header.sampling}): leave the stream out"
            )
        values = _to_float32(stored)
        return values if stream is None else _sample(values, stream, np.shape(indices))

    def stored_rows(self, indices: np.ndarray, flipped: np.ndarray | bool | None = None) -> np.ndarray:
        """The rows as they are stored, for a device that converts them itself; arguments and errors as `rows`.

        float16 [*indices.shape, C, H, W] in model space, float16 [*, 2, C, H, W] (mean, deviation) for moments, or uint8
        [*, C, H, W] for pixels.
        """
        indices, flipped = self._check(indices, flipped)
        flat = indices.reshape(-1)
        mask = None if flipped is None else flipped.reshape(-1)
        if self._header.row_bytes is None:
            array = self._decode(flat)
        else:
            # Pixels have one column and are flipped below.
            stored = self._bytes.gather(flat, mask if self._header.flip_stored else None)
            array = stored.view(self._header.dtype).reshape(len(flat), *self._header.row_shape)
        if mask is not None and self._header.kind == PIXELS:
            array[mask] = array[mask][..., ::-1]
        return array.reshape(*indices.shape, *self._header.row_shape)

    def origins(self, indices: Sequence[int]) -> list[RowOrigin]:
        """Where rows [n] came from. Raises IndexError for an index that does not exist."""
        flat = self._check(indices, None)[0].reshape(-1)
        origins = []
        for index, segment in zip(flat, np.searchsorted(self._starts, flat, side="right") - 1, strict=True):
            row = int(index - self._starts[segment])
            values = (self._batches[segment].column(name)[row].as_py() for name in ("source", "image_index", "view"))
            origins.append(RowOrigin(*values))
        return origins

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all rows, mapped: where rows came from (source, image_index, view) and their label."""
        return pa.chunked_array([batch.column(name) for batch in self._batches])

    def require_model(self, **wanted) -> None:
        """Raise ValueError unless the rows fit a model: arguments of `CacheHeader.require_model`."""
        self._header.require_model(**wanted)

    def _check(self, indices, flipped) -> tuple[np.ndarray, np.ndarray | None]:
        indices = np.asarray(indices)
        if not indices.size:
            indices = indices.astype(np.int64)
        if indices.dtype.kind not in "iu":
            raise ValueError(f"row indices are {indices.dtype}: wanted integers")
        indices = indices.astype(np.int64, copy=False)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            outside = indices.min() if indices.min() < 0 else indices.max()
            raise IndexError(f"row {outside} does not exist: {self.path} has {len(self)} rows, from 0")
        if flipped is None:
            return indices, None
        flipped = np.asarray(flipped)
        if flipped.dtype != np.bool_ or flipped.shape not in ((), indices.shape):
            raise ValueError(f"flipped is {flipped.dtype} {flipped.shape}: wanted booleans {indices.shape}, one an index")
        if not flipped.any():
            return indices, None
        if not self.has_flipped:
            raise ValueError(f"{self.path} holds no flipped views: export it without --no_flip, or do not ask for flips")
        return indices, np.broadcast_to(flipped, indices.shape)

    def _decode(self, indices: np.ndarray) -> np.ndarray:
        """The compressed pictures of rows [n] as uint8 [n, C, H, W]. Raises ValueError naming a row that cannot be decoded."""
        pictures = self._bytes.pictures(indices)
        array = np.empty((len(pictures), *self.image_shape), dtype=np.uint8)

        def decode(place: int) -> None:
            try:
                array[place] = decode_picture(pictures[place], self.image_shape)
            except ValueError as error:
                raise ValueError(
                    f"row {indices[place]} of {self.path}: the picture cannot be decoded ({error}): run tools/verify_cache.py "
                    "--mode full on it"
                ) from error

        threads = min(DECODING_THREADS, os.cpu_count() or 1, len(pictures) // 8)
        if threads < 2:
            for place in range(len(pictures)):
                decode(place)
            return array
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, range(len(pictures))))
        return array

    def _read_labels(self) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *(column_values(batch, "label") for batch in self._batches)])


def _to_float32(array: np.ndarray) -> np.ndarray:
    """float16 to float32 by torch, which has the processor's instruction for it: ten times faster than numpy."""
    result = np.empty(array.shape, dtype=np.float32)
    if array.size:
        pieces = torch.from_numpy(array.reshape(-1)).split(SERIAL_PIECE)
        for source, target in zip(pieces, torch.from_numpy(result.reshape(-1)).split(SERIAL_PIECE), strict=True):
            target.copy_(source)
    return result


def _sample(
    moments: np.ndarray, stream: np.random.Generator | Sequence[np.random.Generator], shape: tuple[int, ...]
) -> np.ndarray:
    """mean + deviation * noise of moments [*shape, 2, C, H, W]."""
    mean, deviation = np.moveaxis(moments, len(shape), 0)  # each [*shape, C, H, W]
    if isinstance(stream, np.random.Generator):
        noise = stream.standard_normal(mean.shape, dtype=np.float32)
    else:
        if not shape or len(stream) != shape[0]:
            raise ValueError(f"there are {len(stream)} streams for indices of shape {shape}: wanted one, or one a first index")
        noise = np.empty(mean.shape, dtype=np.float32)
        for place, generator in enumerate(stream):
            noise[place] = generator.standard_normal(mean.shape[1:], dtype=np.float32)
    return mean + deviation * noise


def _require_memory(num_bytes: int, path: Path) -> None:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if num_bytes > 0.9 * memory:
        raise ValueError(
            f"{path} needs {num_bytes / 1e9:.1f} GB in memory, this machine has {memory / 1e9:.1f} GB: leave in_memory out, the "
            "memory-mapped rows are as fast once they have been read"
        )
