"""Real samples: where they come from and which of them a step uses."""

from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.sources import DataConfig, make_sampler, open_source

__all__ = ["DataConfig", "LabelledImages", "make_sampler", "open_source"]
