"""Which rows belong to each class: built once, kept beside the cache, memory-mapped.

One int64 array [num_classes + 1 + rows]: where each class begins, then all rows sorted by class, ascending within one.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from drift_accel.data.cache_format import CLASS_INDEX_NAME
from drift_accel.foundation.storage import atomic_write_bytes


class ClassIndex:
    """Rows by class. Raises ValueError for an array that is no class index of so many rows and classes."""

    def __init__(self, array: np.ndarray, num_classes: int, num_rows: int):
        if array.dtype != np.int64 or array.shape != (num_classes + 1 + num_rows,):
            raise ValueError(f"class index is {array.dtype} {array.shape}, wanted int64 ({num_classes + 1 + num_rows},)")
        self.array = array
        self.starts = np.array(array[: num_classes + 1])
        self.order = array[num_classes + 1 :]
        if self.starts[0] != 0 or self.starts[-1] != num_rows or (np.diff(self.starts) < 0).any():
            raise ValueError(f"class index does not begin each class after the one before and end at row {num_rows}")

    @property
    def counts(self) -> np.ndarray:
        """Rows of each class, int64 [num_classes]."""
        return np.diff(self.starts)

    def rows(self, label: int) -> np.ndarray:
        """The rows of one class, ascending, int64; a view."""
        return self.order[self.starts[label] : self.starts[label + 1]]

    def labels(self) -> np.ndarray:
        """The label of every row, int64 [rows]."""
        labels = np.empty(len(self.order), dtype=np.int64)
        labels[self.order] = np.repeat(np.arange(len(self.starts) - 1), self.counts)
        return labels


def build_class_index(labels: np.ndarray, num_classes: int) -> ClassIndex:
    """The index of labels int [rows]. Raises ValueError for a label outside of the classes."""
    labels = np.asarray(labels)
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(outside):
        row = int(outside[0])
        raise ValueError(f"row {row} has label {labels[row]}, but there are {num_classes} classes, from 0")
    # A stable sort of few distinct small integers is a radix sort: 16 bits are enough for any real number of classes.
    order = np.argsort(labels.astype(np.uint16) if num_classes <= 2**16 else labels, kind="stable")
    starts = np.zeros(num_classes + 1, dtype=np.int64)
    np.cumsum(np.bincount(labels, minlength=num_classes), out=starts[1:])
    return ClassIndex(np.concatenate([starts, order.astype(np.int64)]), num_classes, len(labels))


def write_class_index(folder: str | os.PathLike, index: ClassIndex) -> None:
    """Write the index into a cache's folder; it appears whole or not at all. Raises OSError."""
    content = io.BytesIO()
    np.save(content, index.array)
    atomic_write_bytes(Path(folder) / CLASS_INDEX_NAME, content.getvalue())


def read_class_index(folder: str | os.PathLike, num_classes: int, num_rows: int) -> ClassIndex:
    """The index that lies in a cache's folder, memory-mapped. Raises ValueError for a file that is missing or unfit."""
    path = Path(folder) / CLASS_INDEX_NAME
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # numpy reads the head of a file as Python: damaged bytes lead to TokenError and what else the language knows.
    except Exception as error:
        raise ValueError(f"{path} is no array that can be read ({error})") from error
    return ClassIndex(array, num_classes, num_rows)


def open_class_index(folder: str | os.PathLike, num_classes: int, num_rows: int, labels: Callable[[], np.ndarray]) -> ClassIndex:
    """The index that lies in a cache's folder, memory-mapped; built from `labels()` and kept there if it is missing or unfit.

    Where the folder cannot be written it is built in memory. Raises ValueError for a label outside of the classes.
    """
    try:
        return read_class_index(folder, num_classes, num_rows)
    except ValueError:
        index = build_class_index(labels(), num_classes)
    try:
        write_class_index(folder, index)
    except OSError:
        return index  # a read-only copy: every process builds its own
    return read_class_index(folder, num_classes, num_rows)
