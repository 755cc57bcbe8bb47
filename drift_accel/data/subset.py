"""A small, class-balanced part of a source of real samples, for trial runs of the same code."""

import numpy as np

from drift_accel.foundation.random_streams import random_stream

CHOICE_SEED = 0  # the same part in every run, whatever the run's seed


class BalancedSubset:
    """`max_rows` rows of a source (all of them where it has fewer), spread over its classes as evenly as they allow.

    A class with fewer rows than its share leaves the rest to the others. Which rows is a function of the source's class table and
    `max_rows` alone. Offers what a source offers; rows are numbered anew, class by class.
    Raises ValueError where not every class that has rows would keep one.
    """

    def __init__(self, source, max_rows: int):
        counts = np.bincount(source.labels, minlength=source.num_classes)
        filled = int((counts > 0).sum())
        if max_rows < filled:
            raise ValueError(f"data.max_rows is {max_rows} but the data has {filled} classes with rows: give at least {filled}")
        self.source = source
        self._chosen = np.concatenate(
            [
                np.sort(random_stream(CHOICE_SEED, "max_rows", label).permutation(source.class_rows(label))[:count])
                for label, count in enumerate(balanced_counts(counts, max_rows))
                if count
            ]
        )
        self.labels = source.labels[self._chosen]
        self._starts = np.searchsorted(self.labels, np.arange(source.num_classes + 1))

    def __len__(self) -> int:
        return len(self._chosen)

    def __getattr__(self, name: str):
        # Everything else is the source's own: class names, shape, header, whether rows are drawn when read.
        if name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def rows(self, indices: np.ndarray, *arguments) -> np.ndarray:
        """The images at `indices` of this part; further arguments as the source's own `rows`."""
        return self.source.rows(self._chosen[indices], *arguments)

    def origins(self, indices: np.ndarray):
        """Where the rows come from, as the source's own `origins`."""
        return self.source.origins(self._chosen[indices])

    def class_rows(self, label: int) -> np.ndarray:
        """The rows of one class, ascending. Raises ValueError as the source does."""
        self.source.class_rows(label)
        return np.arange(self._starts[label], self._starts[label + 1])


def balanced_counts(counts: np.ndarray, total: int) -> np.ndarray:
    """How many of `counts` [classes] rows to keep so that they sum to min(total, all) and the largest is as small as can be."""
    kept = np.zeros_like(counts)
    remaining = min(total, int(counts.sum()))
    while remaining:
        open_classes = np.flatnonzero(kept < counts)
        share = max(1, remaining // len(open_classes))
        open_classes = open_classes[:remaining] if share == 1 else open_classes
        added = np.minimum(counts[open_classes] - kept[open_classes], share)
        kept[open_classes] += added
        remaining -= int(added.sum())
    return kept
