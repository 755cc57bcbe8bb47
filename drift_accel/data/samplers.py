"""Which rows, labels and styles a step uses: pure functions of (seed, step, slot).

A slot is a position in the GLOBAL batch, so the draws do not depend on how the batch is split over processes.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from drift_accel.data.class_neighbours import ClassNeighbours
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


def draw_epoch_rows(seed: int, step: int, slots: np.ndarray, batch_size: int, num_rows: int, stream: str = "epoch") -> np.ndarray:
    """Rows [len(slots)] of one step of an endless pass over shuffled epochs: every row once before any comes again."""
    return _shuffled_rounds(seed, stream, step * batch_size + np.asarray(slots), num_rows)


def draw_flips(seed: int, stream: str, step: int, slots: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` images of each slot are mirrored, bool [len(slots), count], each with probability one half."""
    return integer_draws(seed, f"{stream}/flip", step, slots, (count,), 2).astype(bool)


def draw_neighbour_rows(
    source: LabelledImages, neighbours: ClassNeighbours, seed: int, step: int, slots: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Rows [len(slots), P] around one row of each slot's class, every row of the class being equally likely to be that one."""
    rows = np.empty((len(slots), neighbours.count), dtype=np.int64)
    for i, (slot, label) in enumerate(zip(slots, labels, strict=True)):
        place = random_stream(seed, "positives/anchor", step, int(slot)).integers(len(source.class_rows(int(label))))
        rows[i] = neighbours.order(int(label), int(place))
    return rows


class DirectSampler:
    """Draws positives from their whole class and negatives from the whole source: no warm-up, nothing to restore."""

    def __init__(self, source: LabelledImages, seed: int, *, positives: int, negatives: int):
        self.source, self.seed = source, seed
        self.num_positives, self.num_negatives = positives, negatives

    def warm_up(self, on_push: Callable[[int, int], None] | None = None) -> None:
        """Nothing to fill."""

    def advance(self, step: int) -> None:
        """Nothing: every step's draws are functions of the step."""

    def state_arrays(self) -> dict[str, np.ndarray]:
        """Nothing to save."""
        return {}

    def load_state_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Nothing to restore. Raises ValueError for a state, which only a queue leaves behind."""
        if arrays:
            raise ValueError("the checkpoint holds a sample queue but the configuration asks for none: restore data.queue")

    def positives(self, step: int, slots: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Rows [len(slots), P] of each slot's class."""
        return draw_class_rows(self.source, self.seed, step, slots, labels, self.num_positives)

    def negatives(self, step: int, slots: np.ndarray) -> np.ndarray:
        """Rows [len(slots), N] of any class."""
        return draw_any_rows(self.source, self.seed, step, slots, self.num_negatives)


class NeighbourSampler(DirectSampler):
    """Draws positives around one row of their class, as a table of `neighbours` has them; negatives from the whole source."""

    def __init__(self, source: LabelledImages, seed: int, neighbours: ClassNeighbours, *, negatives: int):
        super().__init__(source, seed, positives=neighbours.count, negatives=negatives)
        self.neighbours = neighbours

    def positives(self, step: int, slots: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Rows [len(slots), P] of each slot's class."""
        return draw_neighbour_rows(self.source, self.neighbours, self.seed, step, slots, labels)


def small_classes(source: LabelledImages, count: int) -> list[str]:
    """Names of the classes with fewer than `count` rows, for which positives repeat within a draw."""
    return [source.class_names[k] for k in range(source.num_classes) if len(source.class_rows(k)) < count]


def _shuffled_rounds(seed: int, stream: str, positions: np.ndarray, size: int) -> np.ndarray:
    """Element `position % size` of the permutation that belongs to round `position // size`."""
    rounds = positions // size
    drawn = np.empty(len(positions), dtype=np.int64)
    for number in np.unique(rounds):
        here = rounds == number
        drawn[here] = _permutation(seed, stream, int(number), size)[positions[here] % size]
    return drawn


@lru_cache(maxsize=4)
def _permutation(seed: int, stream: str, number: int, size: int) -> np.ndarray:
    """One round's order; kept because the steps of an epoch share it, and 1.3 M rows take longer to shuffle than to draw."""
    order = random_stream(seed, stream, number).permutation(size)
    order.flags.writeable = False
    return order
