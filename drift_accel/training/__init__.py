"""Training: the step, the loop, the update, averages, checkpoints and records."""

from drift_accel.training.step import DriftBatch, StepResult, drift_step

__all__ = ["DriftBatch", "StepResult", "drift_step"]
