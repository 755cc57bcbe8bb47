"""Which rows, labels and styles a step uses: pure functions of (seed, step, slot).

A slot is a position in the GLOBAL batch, so the draws do not depend on how the batch is split over processes.
"""

import numpy as np

from drift_accel.data.labelled_images import LabelledImages
from drift_accel.foundation.random_streams import integer_draws, random_stream

LABEL_ORDERS = ("independent", "shuffled")


def draw_labels(seed: int, step: int, num_labels: int, num_classes: int, order: str = "independent") -> np.ndarray:
    """The class indices [num_labels] of a step's global batch.

    "independent": each drawn on its own, repeats included, as the release does. "shuffled": every class comes once before any
    comes again, in a new random order each round. Raises ValueError for another order.
    """
    if order == "independent":
        return integer_draws(seed, "labels", step, range(num_labels), (), num_classes)
    if order != "shuffled":
        raise ValueError(f"label order is {order!r}: choose one of {', '.join(LABEL_ORDERS)}")
    position = step * num_labels + np.arange(num_labels)
    return _shuffled_rounds(seed, "labels/round", position, num_classes)


def draw_class_rows(
    source: LabelledImages, seed: int, step: int, slots: np.ndarray, labels: np.ndarray, count: int
) -> np.ndarray:
    """Rows [len(slots), count] of real samples of each slot's class, without repeats within a slot.

    Only a class with fewer than `count` rows repeats some of them.
    """
    rows = np.empty((len(slots), count), dtype=np.int64)
    for i, (slot, label) in enumerate(zip(slots, labels, strict=True)):
        members = source.class_rows(int(label))
        stream = random_stream(seed, "positives", step, int(slot))
        rows[i] = members[stream.choice(len(members), count, replace=len(members) < count)]
    return rows


def draw_any_rows(source: LabelledImages, seed: int, step: int, slots: np.ndarray, count: int) -> np.ndarray:
    """Rows [len(slots), count] of real samples of any class, without repeats within a slot where there are enough."""
    rows = np.empty((len(slots), count), dtype=np.int64)
    for i, slot in enumerate(slots):
        stream = random_stream(seed, "negatives", step, int(slot))
        rows[i] = stream.choice(len(source), count, replace=len(source) < count)
    return rows


def draw_epoch_rows(seed: int, step: int, slots: np.ndarray, batch_size: int, num_rows: int) -> np.ndarray:
    """Rows [len(slots)] of one step of an endless pass over shuffled epochs: every row once before any comes again."""
    return _shuffled_rounds(seed, "epoch", step * batch_size + np.asarray(slots), num_rows)


def small_classes(source: LabelledImages, count: int) -> list[str]:
    """Names of the classes with fewer than `count` rows, for which positives repeat within a draw."""
    return [source.class_names[k] for k in range(source.num_classes) if len(source.class_rows(k)) < count]


def _shuffled_rounds(seed: int, stream: str, positions: np.ndarray, size: int) -> np.ndarray:
    """Element `position % size` of the permutation that belongs to round `position // size`."""
    rounds = positions // size
    drawn = np.empty(len(positions), dtype=np.int64)
    for number in np.unique(rounds):
        here = rounds == number
        drawn[here] = random_stream(seed, stream, int(number)).permutation(size)[positions[here] % size]
    return drawn
