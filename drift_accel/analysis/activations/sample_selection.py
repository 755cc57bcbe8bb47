"""Which samples of a set are looked at: chosen classes, so many of each, by a seed."""

from collections.abc import Callable, Sequence

import numpy as np

from drift_accel.foundation.random_streams import random_stream

STREAM = "activations/selection"  # part of the meaning of a seed: renaming it changes every selection


def select_samples(
    labels: np.ndarray,
    *,
    classes: Sequence[int] | None = None,
    per_class: int | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    class_name: Callable[[int], str] = str,
) -> np.ndarray:
    """The indices, ascending, of `per_class` samples of each class, or of `num_samples` in all, classes in turn; int64.

    `classes`: these alone (None: all that are there). Without both counts every sample of these classes is taken. Samples
    within a class are drawn by (seed, class): more of them contain the fewer. With `num_samples` classes differ by at most one
    sample as long as they have them. Samples of no known class (-1) count as one class.
    Raises ValueError for a class without samples, one with fewer than `per_class`, and more samples than there are.
    """
    if per_class is not None and num_samples is not None:
        raise ValueError("--per_class and --num_samples are two ways to say how many: give one")
    for name, count in (("per_class", per_class), ("num_samples", num_samples)):
        if count is not None and count < 1:
            raise ValueError(f"--{name} is {count}: give at least 1")
    there = np.unique(labels).tolist()
    chosen = there if classes is None else list(dict.fromkeys(classes))
    absent = [label for label in chosen if label not in set(there)]
    if absent:
        raise ValueError(f"class {absent[0]} ({class_name(absent[0])}) has no samples here: leave it out of --classes")
    order = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[order], [*there, there[-1] + 1] if there else [])
    rows = {label: order[low:high] for label, low, high in zip(there, bounds[:-1], bounds[1:], strict=True)}
    rows = {label: random_stream(seed, STREAM, label + 1).permutation(rows[label]) for label in chosen}
    if per_class is not None:
        for label, found in rows.items():
            if len(found) < per_class:
                raise ValueError(
                    f"class {label} ({class_name(label)}) has {len(found)} samples, {per_class} were asked for: ask for at most "
                    f"{min(map(len, rows.values()))} a class, or give --num_samples, which takes classes in turn"
                )
        rows = {label: found[:per_class] for label, found in rows.items()}
    if not rows:
        return np.zeros(0, dtype=np.int64)
    picked = np.concatenate(list(rows.values()))
    if num_samples is not None:
        if num_samples > len(picked):
            raise ValueError(f"there are {len(picked)} samples, {num_samples} were asked for: give at most that")
        turns = np.concatenate([np.arange(len(found)) for found in rows.values()])
        picked = picked[np.argsort(turns, kind="stable")][:num_samples]
    return np.sort(picked).astype(np.int64)
