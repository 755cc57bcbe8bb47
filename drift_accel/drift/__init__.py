"""The drift mathematics: guidance, feature keys, the field and its loss."""

from drift_accel.drift.configuration import DriftConfig
from drift_accel.drift.couplings import DIAGNOSTICS
from drift_accel.drift.encoders import EncoderSpec, encoder_features
from drift_accel.drift.features import FeatureConfig, multi_scale_features
from drift_accel.drift.guidance import GuidanceConfig, draw_guidance, negative_weight
from drift_accel.drift.loss import DriftLoss, compute_statistics, drift_loss, drift_losses, measure_distances
from drift_accel.drift.problems import DriftProblems
from drift_accel.drift.reference import distances_and_sums, field_norm_sums, loss_and_gradient
from drift_accel.drift.statistics import DriftStatistics

__all__ = [
    "DIAGNOSTICS",
    "DriftConfig",
    "DriftLoss",
    "DriftProblems",
    "DriftStatistics",
    "EncoderSpec",
    "FeatureConfig",
    "GuidanceConfig",
    "compute_statistics",
    "distances_and_sums",
    "draw_guidance",
    "drift_loss",
    "drift_losses",
    "encoder_features",
    "field_norm_sums",
    "loss_and_gradient",
    "measure_distances",
    "multi_scale_features",
    "negative_weight",
]
