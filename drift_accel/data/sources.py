"""Which real samples a run trains on."""

from dataclasses import dataclass

from drift_accel.data.digits import SPLITS, load_digits
from drift_accel.data.labelled_images import LabelledImages

SOURCES = ("digits",)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The source of real samples. Raises ValueError for an unknown source or split."""

    source: str = "digits"
    """"digits": scikit-learn's handwritten digits, in memory."""
    split: str = "train"
    """Part of the source to train on: "train" or "test"."""

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"data.source is {self.source!r}: choose one of {', '.join(SOURCES)}")
        if self.split not in SPLITS:
            raise ValueError(f"data.split is {self.split!r}: choose one of {', '.join(SPLITS)}")


def open_source(config: DataConfig) -> LabelledImages:
    """Open the configured source."""
    return load_digits(config.split)
