"""Which real samples a run trains on."""

from dataclasses import dataclass

from drift_accel.data.digits import SPLITS, load_digits
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.queue import QueueConfig, SampleQueue
from drift_accel.data.samplers import DirectSampler

SOURCES = ("digits",)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of real samples. Raises ValueError for an unknown source or split."""

    source: str = "digits"
    """"digits": scikit-learn's handwritten digits, in memory."""
    split: str = "train"
    """Part of the source to train on: "train" or "test"."""
    flip: bool = False
    """Mirror each drawn image left to right with probability one half."""
    queue: QueueConfig | None = None
    """null: positives and negatives from the whole source; else the paper's queue of recent samples."""

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"data.source is {self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.split not in SPLITS:
            raise ValueError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")


def open_source(config: DataConfig) -> LabelledImages:
    """Open the configured source."""
    return load_digits(config.split)


def make_sampler(
    config: DataConfig, source: LabelledImages, seed: int, *, positives: int, negatives: int
) -> DirectSampler | SampleQueue:
    """The configured sampler of P positives and N negatives a label. Raises ValueError for queues that are too small."""
    if config.queue is None:
        return DirectSampler(source, seed, positives=positives, negatives=negatives)
    return SampleQueue(source, config.queue, seed, positives=positives, negatives=negatives)
