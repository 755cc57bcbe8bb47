"""data.crops: the field's crops to the pixel, deterministic random views, every mode of picture."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from drift_accel.data.crops import CROPS, ImageCrop, adm_centre_crop, random_resized_crop, resized_centre_crop, to_rgb
from drift_accel.foundation.random_streams import random_stream

SIZES = [(64, 64), (65, 40), (40, 97), (500, 333), (130, 128), (31, 200), (16, 16), (1000, 257)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise."""
    stream = np.random.Generator(np.random.Philox(key=width * 1000 + height))
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 127 + 127 * np.sin(x / 5)], axis=-1)
    pixels = np.clip(pixels + stream.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def reference_adm(image: Image.Image, size: int) -> np.ndarray:
    """openai/guided-diffusion, image_datasets.py, center_crop_arr."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    crop_y = (array.shape[0] - size) // 2
    crop_x = (array.shape[1] - size) // 2
    return array[crop_y : crop_y + size, crop_x : crop_x + size]


@pytest.mark.parametrize("size", SIZES)
def test_adm_crop_is_the_published_one(size):
    image = picture(*size)
    crop = adm_centre_crop(image, 32)
    assert crop.shape == (32, 32, 3) and crop.dtype == np.uint8
    assert np.array_equal(crop, reference_adm(image, 32))
    assert np.array_equal(crop, ImageCrop(size=32)(image))


@pytest.mark.parametrize("size", SIZES)
def test_resize_crop_is_torchvisions(size):
    image = picture(*size)
    expected = np.array(transforms.CenterCrop(33)(transforms.Resize(33)(image)))
    assert np.array_equal(resized_centre_crop(image, 33), expected)
    assert np.array_equal(ImageCrop(kind="resize", size=33)(image), expected)


@pytest.mark.parametrize("size", SIZES)
def test_lanczos_is_pillows_of_the_whole_picture_or_of_its_central_square(size):
    image, side = picture(*size), min(size)
    whole = np.array(image.resize((32, 32), Image.LANCZOS))
    assert np.array_equal(ImageCrop(kind="lanczos", size=32)(image), whole)
    square = functional.to_pil_image(np.array(image)[(size[1] - side) // 2 :, (size[0] - side) // 2 :][:side, :side])
    central = ImageCrop(kind="lanczos_centre", size=32)(image)
    assert np.array_equal(central, np.array(square.resize((32, 32), Image.LANCZOS)))
    assert np.array_equal(central, whole) == (size[0] == size[1])


def test_lanczos_is_the_antialiased_filter_of_three_lobes():
    """A column of steps against the filter's definition in float64: sinc(x) sinc(x / 3), stretched by the factor."""
    levels = np.array([20, 240, 20, 20, 130, 240, 90, 200, 20, 240, 60, 60, 180, 20, 240, 100])
    image = Image.fromarray(np.repeat(levels[None, :, None], 16, axis=0).astype(np.uint8).repeat(3, axis=2))
    expected = []
    for place in range(4):
        distance = (np.arange(16) + 0.5 - 4 * (place + 0.5)) / 4
        weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
        expected.append(np.clip((weights * levels).sum() / weights.sum(), 0, 255))
    result = ImageCrop(kind="lanczos", size=4)(image)
    assert np.abs(result.astype(float) - np.array(expected)[None, :, None]).max() <= 1


@pytest.mark.parametrize("size", SIZES)
def test_random_crop_is_torchvisions_for_its_box(size):
    image = picture(*size)
    boxes = []

    class Noted:
        """The picture, noting how it is cropped."""

        def __init__(self):
            self.size = image.size

        def crop(self, box):
            boxes.append(box)
            return image.crop(box)

    crop = random_resized_crop(Noted(), 24, random_stream(0, "test", 1))
    left, top, right, bottom = boxes[0]
    assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
    tall_or_flat = [right - left, bottom - top, 24, 24]
    expected = np.array(
        functional.resized_crop(image, top, left, *tall_or_flat[1::-1], [24, 24], transforms.InterpolationMode.BICUBIC)
    )
    assert np.array_equal(crop, expected) or np.array_equal(crop, expected[:, ::-1])


def test_random_crops_have_torchvisions_distribution():
    crop, boxes = ImageCrop(kind="random", size=8), []
    from drift_accel.data.crops import _random_box

    for index in range(4000):
        boxes.append(_random_box(300, 200, random_stream(0, "test", index), crop.scale))
    torch.manual_seed(0)
    theirs = [transforms.RandomResizedCrop.get_params(torch.empty(3, 200, 300), [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    areas = np.array([width * height for _, _, width, height in boxes]) / 60000
    their_areas = np.array([height * width for _, _, height, width in theirs]) / 60000
    assert np.allclose(np.quantile(areas, [0.1, 0.5, 0.9]), np.quantile(their_areas, [0.1, 0.5, 0.9]), atol=0.03)
    ratios = np.array([width / height for _, _, width, height in boxes])
    assert ratios.min() >= 0.73 and ratios.max() <= 1.36
    their_ratios = np.array([width / height for _, _, height, width in theirs])
    assert abs(np.log(ratios).mean() - np.log(their_ratios).mean()) < 0.015 and areas.min() > 0.19


@pytest.mark.parametrize(("width", "height"), [(400, 10), (10, 400)])
def test_random_crop_of_an_extreme_picture_takes_a_central_part(width, height):
    from drift_accel.data.crops import _random_box

    left, top, crop_width, crop_height = _random_box(width, height, random_stream(0, "test", 0), (1.0, 1.0))
    assert math.isclose(max(crop_width / crop_height, crop_height / crop_width), 4 / 3, rel_tol=0.1)
    assert (left, top) == ((width - crop_width) // 2, (height - crop_height) // 2)


def test_random_views_depend_on_seed_image_and_view_alone():
    image, crop = picture(90, 70), ImageCrop(kind="random", size=16, seed=3)
    views = [crop(image, index, view) for index in range(4) for view in range(2)]
    for index in (3, 1):
        np.random.seed(index)
        assert np.array_equal(crop(image, index, 1), views[2 * index + 1])
    assert len({view.tobytes() for view in views}) == len(views)
    assert not np.array_equal(ImageCrop(kind="random", size=16, seed=4)(image, 0, 0), views[0])


def test_half_of_the_random_views_are_flipped():
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3)))
    crop = ImageCrop(kind="random", size=8)
    flipped = [pixels[0, 0, 0] > pixels[0, -1, 0] for pixels in (crop(gradient, index) for index in range(400))]
    assert 0.42 < np.mean(flipped) < 0.58


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode):
    image = picture(20, 12).convert(mode)
    rgb = to_rgb(image)
    assert rgb.mode == "RGB" and np.array_equal(np.array(rgb), np.array(image.convert("RGB")))
    assert ImageCrop(size=8)(image).shape == (8, 8, 3)


def test_a_cmyk_jpeg_keeps_its_colours():
    content = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 60)).convert("CMYK").save(content, format="JPEG", quality=100)
    pixels = ImageCrop(size=8)(Image.open(content))
    assert np.abs(pixels.reshape(-1, 3).mean(0) - (200, 40, 60)).max() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    assert np.array_equal(np.array(to_rgb(Image.fromarray(values)))[..., 0].reshape(-1), np.arange(256))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_modes_without_a_range_are_refused(mode):
    with pytest.raises(ValueError, match=f"mode {mode}"):
        to_rgb(Image.new(mode, (8, 8)))


def test_exif_orientation_is_ignored_as_in_the_field():
    content, image = io.BytesIO(), picture(20, 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(content, format="PNG", exif=exif)
    assert np.array_equal(ImageCrop(size=8)(Image.open(content)), ImageCrop(size=8)(image))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "middle"}, "crop is 'middle': choose one of adm, resize, random, lanczos, lanczos_centre"),
        ({"size": 0}, "image size is 0"),
        ({"scale": (0.0, 1.0)}, "crop scale is 0.0 to 1.0"),
        ({"scale": (0.5, 0.2)}, "crop scale is 0.5 to 0.2"),
        ({"scale": (0.5, 1.2)}, "crop scale is 0.5 to 1.2"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageCrop(**settings)


@pytest.mark.parametrize("kind", CROPS)
def test_the_record_names_every_operation(kind):
    words = " | ".join(ImageCrop(kind=kind, size=48).operations())
    assert "EXIF" in words and "RGB" in words and "48x48" in words
    assert ("box filter" in words, "bilinear" in words, "flip" in words) == (kind == "adm", kind == "resize", kind == "random")
    assert ("Lanczos" in words, "central square" in words) == (kind.startswith("lanczos"), kind == "lanczos_centre")
