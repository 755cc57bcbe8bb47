"""The paper's sample queue: positives and negatives come from the most recent samples of a shuffled pass over the data.

Each class keeps its last `per_class` pushed rows and the whole stream its last `unconditional` ones; a step pushes `push`
new rows and draws from what the queues hold. Only row numbers are kept: the images stay in the memory-mapped source.
Every process holds the same queue, because what is pushed is a function of (seed, push number).
Source: arXiv 2602.04770, appendix A.8.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.samplers import draw_epoch_rows
from drift_accel.foundation.random_streams import random_stream

EMPTY = -1
NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """Sizes of the queues, in samples. Raises ValueError for sizes below 1."""

    per_class: int = 128
    """Most recent samples kept of each class."""
    unconditional: int = 1000
    """Most recent samples kept of all classes together."""
    push: int = 64
    """New samples a step."""

    def __post_init__(self):
        for name in ("per_class", "unconditional", "push"):
            if getattr(self, name) < 1:
                raise ValueError(f"queue.{name} is {getattr(self, name)}: give a number of samples of at least 1")


@dataclass(frozen=True)
class QueueState:
    """What the queues hold: rows of each class [classes, per_class] and of all [unconditional], after `pushes` pushes.

    `steps` counts the training steps among them; the others were the warm-up.

    A ring is filled from its start; EMPTY marks places without a sample. `class_counts` and `count` are how many samples each
    ring has ever received. States are never changed in place, so a checkpoint can keep one while training goes on.
    """

    class_rings: np.ndarray
    class_counts: np.ndarray
    ring: np.ndarray
    count: int
    pushes: int
    steps: int

    def arrays(self) -> dict[str, np.ndarray]:
        """The state as int64 arrays."""
        numbers = {name: np.array(getattr(self, name)) for name in ("count", "pushes", "steps")}
        return {"class_rings": self.class_rings, "class_counts": self.class_counts, "ring": self.ring, **numbers}

    @staticmethod
    def from_arrays(arrays: dict[str, np.ndarray]) -> "QueueState":
        """The state that `arrays` were made of."""
        values = {name: np.asarray(array, dtype=np.int64) for name, array in arrays.items()}
        return QueueState(**{name: value if value.ndim else int(value) for name, value in values.items()})


class SampleQueue:
    """Draws positives and negatives from the queues; the interface of `DirectSampler`.

    Raises ValueError for queues that cannot hold what a label draws.
    """

    def __init__(self, source: LabelledImages, config: QueueConfig, seed: int, *, positives: int, negatives: int):
        if positives > config.per_class:
            raise ValueError(f"queue.per_class is {config.per_class}, fewer than the {positives} positives a label: raise it")
        if negatives > config.unconditional:
            raise ValueError(
                f"queue.unconditional is {config.unconditional}, fewer than the {negatives} negatives a label: raise it"
            )
        self.source, self.config, self.seed = source, config, seed
        self.num_positives, self.num_negatives = positives, negatives
        self.state = QueueState(
            class_rings=np.full((source.num_classes, config.per_class), EMPTY, dtype=np.int64),
            class_counts=np.zeros(source.num_classes, dtype=np.int64),
            ring=np.full(config.unconditional, EMPTY, dtype=np.int64),
            count=0,
            pushes=0,
            steps=0,
        )

    def warm_up(self, on_push: Callable[[int, int], None] = lambda done, wanted: None) -> None:
        """Push until every class can serve a draw; `on_push(classes ready, classes)` is called after each push.

        Raises ValueError naming the classes that have no samples at all.
        """
        sizes = np.bincount(self.source.labels, minlength=self.source.num_classes)
        self._refuse_empty(sizes)
        # A class with fewer samples than a draw is ready when all of them are there.
        wanted = np.minimum(sizes, self.num_positives)
        while not self._is_ready(wanted):
            self.push()
            on_push(int((np.minimum(self.state.class_counts, self.config.per_class) >= wanted).sum()), len(wanted))

    def push(self) -> None:
        """Take the next `push` rows of the shuffled pass into the queues."""
        state, config = self.state, self.config
        rows = draw_epoch_rows(self.seed, state.pushes, np.arange(config.push), config.push, len(self.source), "queue")
        labels = self.source.labels[rows]
        class_rings, class_counts, ring = state.class_rings.copy(), state.class_counts.copy(), state.ring.copy()
        for offset, (row, label) in enumerate(zip(rows, labels, strict=True)):
            class_rings[label, class_counts[label] % config.per_class] = row
            class_counts[label] += 1
            ring[(state.count + offset) % config.unconditional] = row
        self.state = QueueState(class_rings, class_counts, ring, state.count + config.push, state.pushes + 1, state.steps)

    def advance(self, step: int) -> None:
        """Bring the queues to what they hold at `step`: one push a step. Raises RuntimeError for a step out of turn."""
        if step != self.state.steps:
            raise RuntimeError(f"the queue stands at step {self.state.steps} and cannot serve step {step}: restore its state")
        self.push()
        self.state = replace(self.state, steps=step + 1)

    def state_arrays(self) -> dict[str, np.ndarray]:
        """The queues' state for a checkpoint."""
        return self.state.arrays()

    def load_state_arrays(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from a saved state. Raises ValueError for one of other sizes."""
        wanted = {name: array.shape for name, array in self.state.arrays().items()}
        given = {name: array.shape for name, array in arrays.items()}
        if given != wanted:
            raise ValueError(f"the checkpoint's sample queue has arrays {given} but the configuration wants {wanted}")
        self.state = QueueState.from_arrays(arrays)

    def positives(self, step: int, slots: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Rows [len(slots), P] of each slot's class, without repeats within a slot where the class has enough samples."""
        rows = np.empty((len(slots), self.num_positives), dtype=np.int64)
        for i, (slot, label) in enumerate(zip(slots, labels, strict=True)):
            held = min(int(self.state.class_counts[label]), self.config.per_class)
            if held == 0:
                self._refuse_empty(self.state.class_counts)
            rows[i] = _choose(self.state.class_rings[label, :held], self.num_positives, self.seed, "positives", step, slot)
        return rows

    def negatives(self, step: int, slots: np.ndarray) -> np.ndarray:
        """Rows [len(slots), N] of any class, without repeats within a slot."""
        held = self.state.ring[: min(self.state.count, self.config.unconditional)]
        rows = [_choose(held, self.num_negatives, self.seed, "negatives", step, slot) for slot in slots]
        return np.stack(rows) if rows else np.empty((0, self.num_negatives), dtype=np.int64)

    def _is_ready(self, wanted: np.ndarray) -> bool:
        return bool((self.state.class_counts >= wanted).all()) and self.state.count >= self.num_negatives

    def _refuse_empty(self, counts: np.ndarray) -> None:
        empty = [self.source.class_names[k] for k in np.flatnonzero(counts == 0)]
        if empty:
            more = f" and {len(empty) - NAMES_SHOWN} more" if len(empty) > NAMES_SHOWN else ""
            raise ValueError(
                f"no samples of class {', '.join(empty[:NAMES_SHOWN])}{more}: add images of them, or leave the classes out"
            )


def _choose(members: np.ndarray, count: int, seed: int, stream: str, step: int, slot: int) -> np.ndarray:
    """`count` of `members` without repeats where there are enough.

    A ring that spans the end of a pass can hold a row twice; it counts once.
    """
    members = np.unique(members)
    chosen = random_stream(seed, stream, step, int(slot)).choice(len(members), count, replace=len(members) < count)
    return members[chosen]
