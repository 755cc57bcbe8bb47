"""Real samples: where they come from and which of them a step uses."""

from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.sources import DataConfig, open_source

__all__ = ["DataConfig", "LabelledImages", "open_source"]
