"""Labelled images in memory, addressed by row: the interface that every source of real samples offers."""

from collections.abc import Sequence

import numpy as np


class LabelledImages:
    """Images [rows, C, H, W] float32 in model space and one class index a row, with the rows of each class at hand.

    Raises ValueError for shapes that do not fit, values that are not finite, or labels that are no index of a class.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
        images = np.ascontiguousarray(images, dtype=np.float32)
        labels = np.asarray(labels)
        if labels.size and labels.dtype.kind not in "iu":
            raise ValueError(f"labels are {labels.dtype}: wanted integers, the class of each row")
        labels = labels.astype(np.int64)
        if images.ndim != 4 or labels.shape != images.shape[:1]:
            raise ValueError(f"images {images.shape} and labels {labels.shape}: wanted [rows, C, H, W] and [rows]")
        if not np.isfinite(images).all():
            row = int(np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))[0])
            raise ValueError(f"image {row} holds values that are not finite: repair or remove it")
        if len(labels) and not (labels.min() >= 0 and labels.max() < len(class_names)):
            raise ValueError(
                f"labels reach from {labels.min()} to {labels.max()} but there are {len(class_names)} classes, "
                f"0 to {len(class_names) - 1}"
            )
        self.images = images
        self.labels = labels
        self.class_names = tuple(class_names)
        # Rows sorted by class, and where each class begins: class k holds order[starts[k]:starts[k + 1]].
        self._order = np.argsort(labels, kind="stable")
        self._starts = np.searchsorted(labels[self._order], np.arange(self.num_classes + 1))

    is_sampled_at_read = False  # a cache of posterior moments is

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.images.shape[1:]

    def rows(self, indices: np.ndarray, flipped: np.ndarray | None = None) -> np.ndarray:
        """The images at `indices` (any shape): [*indices.shape, C, H, W], mirrored left to right where `flipped` is True."""
        images = self.images[indices]
        if flipped is not None:
            images[flipped] = images[flipped][..., ::-1]
        return images

    def class_rows(self, label: int) -> np.ndarray:
        """The row indices of one class, ascending. Raises ValueError for a class that does not exist or has no rows."""
        if not 0 <= label < self.num_classes:
            raise ValueError(f"class {label} does not exist: there are {self.num_classes} classes, from 0")
        rows = self._order[self._starts[label] : self._starts[label + 1]]
        if not len(rows):
            raise ValueError(f"class {label} ({self.class_names[label]}) has no images: add some, or leave the class out")
        return rows
