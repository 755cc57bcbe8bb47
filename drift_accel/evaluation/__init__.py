"""Metrics of generated images: pure functions of features and logits, light to import."""

from drift_accel.evaluation.frechet import frechet_distance, gaussian_statistics
from drift_accel.evaluation.inception_score import inception_score
from drift_accel.evaluation.precision_recall import precision_recall

__all__ = ["frechet_distance", "gaussian_statistics", "inception_score", "precision_recall"]
