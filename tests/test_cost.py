"""Least work of the drift, against sizes derived by hand from the paper's encoder."""

import pytest
import torch

from drift_accel.drift import FeatureConfig, multi_scale_features
from drift_accel.drift.cost import DriftCost, KeySize, drift_cost, key_sizes
from drift_accel.models import MaskedAutoencoder


def encoder(**changes):
    with torch.device("meta"):
        return MaskedAutoencoder(**{"in_channels": 4, "input_size": 32, "width": 640, "blocks": (3, 4, 6, 3), **changes})


def test_the_latent_recipe_has_the_papers_sizes():
    sizes = key_sizes(encoder(), (4, 32, 32))
    assert len(sizes) == 86
    assert sum(size.locations for size in sizes) == 3 * 1666 + 3 * 418 + 4 * 106 + 2 * 28 + 2
    assert sum(size.locations * size.num_features for size in sizes) == pytest.approx(6.2e6, rel=0.01)
    cost = drift_cost(sizes, labels=1, generated=64, positives=64, negatives=32)
    assert cost.distances == 6734 * 64 * 160
    product = sum(2 * size.locations * size.num_features * 64 * 160 for size in sizes)
    assert cost.flops == pytest.approx(2.45 * product, rel=1e-6)
    assert cost.num_bytes == sum(size.locations * size.num_features for size in sizes) * 2 * (2 * 160 + 64)
    assert cost.exponentials == 9 * cost.distances


def test_pixel_sizes():
    sizes = {size.name: size for size in key_sizes(encoder(in_channels=3, input_size=256, input_patch_size=8), (3, 256, 256))}
    assert sizes["norm_x"] == KeySize("norm_x", 1, 192)
    assert sizes["global"] == KeySize("global", 1, 196_608)


def test_sizes_are_those_of_computed_features():
    small = MaskedAutoencoder(in_channels=3, input_size=8, width=8, blocks=(1, 2, 1, 1))
    config = FeatureConfig(windows=(2,))
    features = multi_scale_features(small, torch.zeros(2, 3, 8, 8), config)
    sizes = key_sizes(small.to("meta"), (3, 8, 8), config)
    assert {size.name: (size.locations, size.num_features) for size in sizes[:-1]} == {
        name: tuple(value.shape[1:]) for name, value in features.items()
    }
    assert sizes[-1] == KeySize("global", 1, 192)


def test_costs_add_up_and_the_slowest_decides():
    total = DriftCost(num_bytes=8, flops=6, exponentials=4, distances=1) + DriftCost(num_bytes=2)
    assert total == DriftCost(num_bytes=10, flops=6, exponentials=4, distances=1)
    assert total.least_seconds(5, 1, 1) == 6
    assert total.least_seconds(1, 1, 1) == 10
