"""From [-1, 1] to 256 levels: both rules, clipping, NaN, refusals."""

import numpy as np
import pytest
import torch

from drift_accel.sampling.quantization import count_non_finite, to_rgb, to_uint8


def levels(values: list[float], quantizer: str) -> list[int]:
    return to_uint8(torch.tensor(values).view(1, 1, 1, -1), quantizer).reshape(-1).tolist()


def test_rounding_and_truncation():
    values = [-1.0, 1.0, 0.0, (2 * 10.6 / 255) - 1, (2 * 10.4 / 255) - 1]
    assert levels(values, "round") == [0, 255, 128, 11, 10]  # 127.5 goes to the even one
    assert levels(values, "truncate") == [0, 255, 127, 10, 10]


def test_every_level_comes_back():
    for quantizer in ("round",):
        assert levels([2 * level / 255 - 1 for level in range(256)], quantizer) == list(range(256))


def test_truncation_is_the_releases_formula():
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    expected = np.clip(((images.numpy() / 2 + 0.5).astype(np.float32) * 255), 0, 255).astype(np.uint8)
    assert np.array_equal(to_uint8(images, "truncate"), expected.transpose(0, 2, 3, 1))


def test_outside_values_are_clipped_and_nan_is_black():
    assert levels([-9.0, 9.0, float("nan"), float("inf"), -float("inf")], "round") == [0, 255, 0, 255, 0]
    images = torch.zeros(4, 3, 2, 2)
    images[1, 0, 0, 0], images[3, 2, 1, 1] = float("nan"), float("inf")
    assert count_non_finite(images) == 2 and count_non_finite(images[:0]) == 0


def test_shapes():
    assert to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    grey = np.arange(8, dtype=np.uint8).reshape(2, 2, 2, 1)
    assert np.array_equal(to_rgb(grey), np.stack([grey[..., 0]] * 3, axis=-1))
    with pytest.raises(ValueError, match="quantiser is 'floor': choose one of round, truncate"):
        to_uint8(torch.zeros(1, 1, 1, 1), "floor")
    with pytest.raises(ValueError, match="must be .N, C, H, W."):
        to_uint8(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="N, H, W, 1 or 3"):
        to_rgb(np.zeros((1, 2, 2, 4), np.uint8))
