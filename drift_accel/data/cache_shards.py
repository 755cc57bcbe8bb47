"""The Arrow files of a cache as memory-mapped rows: nothing is copied and nothing is read before a row is asked for.

A record batch is one segment of rows; an export makes one a file. Random rows are gathered by joining slices of the mapped
bytes, which costs little more than a gather from one np.memmap, however many files there are.
"""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from drift_accel.data.cache_format import CacheHeader, ShardEntry

ADVICE = "copy the file again from where the cache was made, or export the cache again"


def arrow_schema(header: CacheHeader) -> pa.Schema:
    """The plain schema of the shards (without the metadata that `datasets` adds)."""
    types = {"string": pa.string(), "int64": pa.int64(), "int32": pa.int32(), "float16": pa.float16(), "uint8": pa.uint8()}
    types["image"] = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields = []
    for name, (kind, length) in header.features().items():
        fields.append((name, types[kind] if length is None else pa.list_(types[kind], length)))
    return pa.schema(fields)


def open_shard(folder: Path, entry: ShardEntry, schema: pa.Schema) -> list[pa.RecordBatch]:
    """The record batches of one shard, memory-mapped.

    Raises ValueError naming the file if it is missing, has another size, another table, another number of rows or empty places.
    """
    path = folder / entry.file
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise ValueError(f"{path} is missing ({error.strerror}): {ADVICE}") from None
    if size != entry.bytes:
        raise ValueError(f"{path} has {size} bytes, the manifest says {entry.bytes}: {ADVICE}")
    try:
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            found = reader.schema
            batches = [batch for batch in reader if batch.num_rows]
        for batch in batches:
            batch.validate()  # damaged lengths reach beyond the bytes, and Arrow ends the process where they are used
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Arrow file that can be read ({error}): {ADVICE}") from None
    if not found.equals(schema, check_metadata=False):
        raise ValueError(f"{path} has the columns {found.to_string(show_schema_metadata=False)!r}, not the header's: {ADVICE}")
    rows = sum(batch.num_rows for batch in batches)
    if rows != entry.rows:
        raise ValueError(f"{path} has {rows} rows, the manifest says {entry.rows}: {ADVICE}")
    empty = {name for batch in batches for name in batch.schema.names if _empty_places(batch.column(name))}
    if empty:
        raise ValueError(f"{path} has empty places in column {', '.join(sorted(empty))}: {ADVICE}")
    return batches


def column_values(batch: pa.RecordBatch, column: str) -> np.ndarray:
    """The numbers of a column of fixed-size lists or of plain numbers as a flat array, without a copy.

    Raises ValueError for a column with empty places.
    """
    array = batch.column(column)
    if pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    try:
        return array.to_numpy(zero_copy_only=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"column {column} cannot be read in place ({error}): {ADVICE}") from None


class RowBytes:
    """The stored bytes of all rows of a cache, by row index and orientation.

    `columns` holds one or two columns of equal rows, the flipped one second.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], columns: Sequence[str], row_bytes: int | None, in_memory: bool = False):
        self.num_rows = sum(batch.num_rows for batch in batches)
        self._row_bytes = row_bytes
        if row_bytes is None:
            self._segments, offsets = _picture_segments(batches, columns[0])
            self._ends = np.concatenate([np.zeros(0, np.int64), *offsets])  # [rows]: where each picture ends in its segment
        else:
            self._segments = [memoryview(column_values(batch, column).view(np.uint8)) for column in columns for batch in batches]
        counts = [batch.num_rows for batch in batches]
        if in_memory and row_bytes is not None:
            per_column = len(batches)
            self._segments = [
                memoryview(bytearray().join(self._segments[i * per_column : (i + 1) * per_column])) for i in range(len(columns))
            ]
            counts = [self.num_rows]
        elif in_memory:
            self._segments = [memoryview(bytes(segment)) for segment in self._segments]
        self._starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64) if counts else np.zeros(1, np.int64)

    def gather(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """The bytes of rows [n], a new array uint8 [n, row bytes]; `flipped` [n] chooses the second column."""
        size = self._row_bytes
        if not len(indices):
            return np.empty((0, size), dtype=np.uint8)
        if flipped is None and len(self._starts) == 1:
            return np.asarray(self._segments[0]).reshape(-1, size)[indices]
        segments = np.searchsorted(self._starts, indices, side="right") - 1
        offsets = (indices - self._starts[segments]) * size
        if flipped is not None:
            segments = segments + flipped * len(self._starts)
        views = self._segments
        places = zip(segments.tolist(), offsets.tolist(), strict=True)
        joined = bytearray().join([views[segment][offset : offset + size] for segment, offset in places])
        return np.frombuffer(joined, dtype=np.uint8).reshape(-1, size)

    def pictures(self, indices: np.ndarray) -> list[memoryview]:
        """The compressed pictures of rows [n]."""
        segments = np.searchsorted(self._starts, indices, side="right") - 1
        ends = self._ends[indices]
        begins = np.where(indices == self._starts[segments], 0, self._ends[indices - 1])
        views = self._segments
        return [
            views[segment][begin:end]
            for segment, begin, end in zip(segments.tolist(), begins.tolist(), ends.tolist(), strict=True)
        ]


def picture_bytes(batch: pa.RecordBatch) -> list[memoryview]:
    """The compressed pictures of one batch, without a copy."""
    ((segment,), (ends,)) = _picture_segments([batch], "image")
    return [segment[begin:end] for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True)]


def decode_picture(content: memoryview, image_shape: Sequence[int]) -> np.ndarray:
    """A compressed picture as uint8 [C, H, W]. Raises ValueError if it cannot be decoded to this shape."""
    try:
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).transpose(2, 0, 1)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise ValueError("its bytes are no picture") from None
    # Pillow's decoders raise whatever damaged bytes lead them to: struct.error, SyntaxError, KeyError, zlib.error, ...
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error
    if pixels.shape != tuple(image_shape):
        raise ValueError(f"it is {pixels.shape}, the header says {tuple(image_shape)}")
    return pixels


def _empty_places(array: pa.Array) -> int:
    """How many rows of a column, or numbers in its lists, are null."""
    return array.null_count + (array.values.null_count if pa.types.is_fixed_size_list(array.type) else 0)


def _picture_segments(batches: Sequence[pa.RecordBatch], column: str) -> tuple[list[memoryview], list[np.ndarray]]:
    """Bytes of each batch's pictures and the ends of its pictures in them."""
    segments, ends = [], []
    for batch in batches:
        contents = batch.column(column).flatten()[0]
        _, offsets, data = contents.buffers()
        offsets = np.frombuffer(offsets, dtype=np.int32, count=batch.num_rows + 1, offset=4 * contents.offset)
        segments.append(memoryview(data)[offsets[0] : offsets[-1]] if data is not None else memoryview(b""))
        ends.append((offsets[1:] - offsets[0]).astype(np.int64))
    return segments, ends
