"""One batch file of a set while it is written, with the pictures of its samples beside it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from drift_accel.analysis.activations.batches import ARROW, SampleRecord, arrow_rows, arrow_schema, write_npz_batch
from drift_accel.analysis.activations.store import IMAGES

BATCH_STEM = "batch"


class BatchWriter:
    """Writes one batch file into a chunk's folder, a few samples at a time; Arrow keeps none of them in memory."""

    def __init__(self, folder: Path, storage: str, dtype: str, shapes: Mapping[str, Sequence[int]]):
        self.folder, self.storage, self.dtype, self.shapes = folder, storage, np.dtype(dtype), shapes
        self.images = folder / IMAGES
        self.num_samples = self.num_non_finite = 0
        self._samples: list[SampleRecord] = []
        self._parts: list[Mapping[str, np.ndarray]] = []
        self._schema = arrow_schema(shapes, dtype)
        self._sink = self._stream = None
        if storage == ARROW:
            self._sink = pa.OSFile(str(folder / f"{BATCH_STEM}.arrow"), "wb")
            self._stream = pa.ipc.new_stream(self._sink, self._schema)

    def add(self, activations: Mapping[str, np.ndarray], samples: Sequence[SampleRecord]) -> None:
        """Append activations [n, ...] by layer of n samples.

        Raises ValueError for rows of another number or size than the set has, and for values that float16 cannot hold.
        """
        rows = {layer: self._stored(layer, activations[layer], len(samples)) for layer in self.shapes}
        self.num_samples += len(samples)
        finite = [np.isfinite(values).all(axis=1) for values in rows.values()]
        self.num_non_finite += int((~np.logical_and.reduce(finite)).sum())
        if self._stream is not None:
            self._stream.write_batch(arrow_rows(self._schema, rows, samples))
        else:
            self._parts.append(rows)
            self._samples += samples

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            self._stream.close()
            self._sink.close()
            return
        empty = {layer: np.zeros((0, int(np.prod(shape))), self.dtype) for layer, shape in self.shapes.items()}
        rows = {layer: np.concatenate([empty[layer], *(part[layer] for part in self._parts)]) for layer in self.shapes}
        write_npz_batch(self.folder / BATCH_STEM, rows, self._samples, self.shapes)

    def _stored(self, layer: str, values: np.ndarray, count: int) -> np.ndarray:
        rows = np.asarray(values).reshape(len(values), -1)
        if rows.shape != (count, int(np.prod(self.shapes[layer]))):
            raise ValueError(f"layer {layer} has rows {list(values.shape)}, wanted {count} of shape {list(self.shapes[layer])}")
        with np.errstate(over="ignore"):
            stored = rows.astype(self.dtype)
        if self.dtype == np.float16 and not np.isfinite(stored).all() and np.isfinite(rows).all():
            raise ValueError(f"layer {layer} reaches {np.abs(rows).max():.4g}, more than float16 holds: give --dtype float32")
        return stored


@contextmanager
def open_writer(folder: Path, storage: str, dtype: str, shapes: Mapping[str, Sequence[int]]) -> Iterator[BatchWriter]:
    """A writer into `folder`, whose file is finished where the context ends without an error."""
    writer = BatchWriter(folder, storage, dtype, shapes)
    writer.images.mkdir()
    yield writer
    writer.close()
    if not any(writer.images.iterdir()):
        writer.images.rmdir()
