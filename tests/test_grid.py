"""Labelled grids: every pixel where it belongs, grey and colour, names, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from drift_accel.sampling import class_grid_array, save_class_grid


def make_images(count: int, channels: int, side: int) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def enlarged(image: torch.Tensor, scale: int) -> np.ndarray:
    levels = ((image + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()
    return levels.repeat(scale, axis=0).repeat(scale, axis=1)


def find(grid: np.ndarray, cell: np.ndarray) -> list[tuple[int, int]]:
    """Places (top, left) at which the cell lies in the grid, pixel by pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(grid, cell.shape)[:, :, 0]
    return [tuple(place) for place in np.argwhere((windows == cell).all(axis=(2, 3, 4)))]


@pytest.mark.parametrize(("channels", "side", "scale"), [(1, 4, 5), (3, 4, 5), (1, 8, None), (3, 24, 1)])
def test_every_image_is_in_the_row_of_its_class(channels, side, scale):
    images, labels = make_images(7, channels, side), [2, 0, 2, 5, 0, 2, 0]
    grid = class_grid_array(images, labels, scale=scale)
    assert grid.dtype == np.uint8 and grid.ndim == 3 and grid.shape[2] == 3
    places = [find(grid, enlarged(image, scale or 64 // side)) for image in images]
    assert all(len(place) == 1 for place in places)
    tops, lefts = np.array(places)[:, 0].T
    assert tops[0] == tops[2] == tops[5] and tops[1] == tops[4] == tops[6]
    assert tops[1] < tops[0] < tops[3]
    assert lefts[0] < lefts[2] < lefts[5] and lefts[0] == lefts[1] == lefts[3]


def test_rows_are_cut_at_the_number_of_columns():
    images = make_images(6, 1, 8)
    grid = class_grid_array(images, [0] * 6, columns=4, scale=1)
    assert [len(find(grid, enlarged(image, 1))) for image in images] == [1, 1, 1, 1, 0, 0]


def test_names_are_drawn_and_long_ones_are_cut():
    images = make_images(2, 1, 8)
    numbers, names = (class_grid_array(images, [0, 1], class_names=given) for given in (None, ["zero", "one"]))
    assert names.shape[1] > numbers.shape[1]
    by_label = class_grid_array(images, torch.tensor([0, 1]), class_names={0: "zero", 1: "one"})
    assert np.array_equal(by_label, names)
    long = class_grid_array(images, [0, 1], class_names=["great white shark, " + "w" * 500, "v" * 500])
    assert long.shape[1] < 64 + 14 * 20


def test_values_are_clipped_and_broken_pixels_are_magenta():
    images = torch.tensor([[[[-7.0, 7.0], [float("nan"), float("inf")]]]])
    grid = class_grid_array(images, [0], scale=20)
    expected = np.array([[[0, 0, 0], [255, 255, 255]], [[255, 0, 255], [255, 0, 255]]], dtype=np.uint8)
    assert len(find(grid, expected.repeat(20, axis=0).repeat(20, axis=1))) == 1


def test_the_file_holds_the_array(tmp_path):
    images = make_images(4, 3, 16)
    path = tmp_path / "new" / "grid.png"
    save_class_grid(images, [0, 1, 0, 1], path, class_names=["a", "b"])
    assert np.array_equal(np.asarray(Image.open(path)), class_grid_array(images, [0, 1, 0, 1], class_names=["a", "b"]))
    assert [entry.name for entry in path.parent.iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("shape", "labels", "options", "message"),
    [
        ((2, 4, 8, 8), [0, 1], {}, "decode latents to images first"),
        ((2, 8, 8), [0, 1], {}, "images must be"),
        ((0, 1, 8, 8), [], {}, "N, H, W >= 1"),
        ((2, 1, 8, 8), [0], {}, "2 images but 1 labels"),
        ((2, 1, 8, 8), [0, 1], {"class_names": ["zero"]}, "no name for label 1; it names 1 classes"),
        ((2, 1, 8, 8), [0, -1], {"class_names": ["zero"]}, "no name for label -1"),
        ((2, 1, 8, 8), [0, 1], {"columns": 0}, "at least 1, got 0"),
        ((2, 1, 8, 8), [0, 1], {"scale": 0}, "at least 1"),
    ],
)
def test_refuses_bad_input(shape, labels, options, message):
    with pytest.raises(ValueError, match=message):
        class_grid_array(torch.zeros(shape), labels, **options)
