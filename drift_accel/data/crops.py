"""From a picture of any size and mode to the square RGB pixels of a model, as a function of (seed, image index, view).

The orientation in EXIF data is ignored, as ADM, torchvision's ImageFolder and with them the published ImageNet numbers do:
pixels are taken as they are stored.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from drift_accel.foundation.random_streams import random_stream

CROPS = ("adm", "resize", "random", "lanczos", "lanczos_centre")
# torchvision's RandomResizedCrop: the range of width / height, and how often it tries before it takes a central crop.
RATIO = (3 / 4, 4 / 3)
TRIES = 10
CROP_STREAM = "export/crop"  # part of the meaning of a seed: renaming it changes every random crop


@dataclass(frozen=True, kw_only=True)
class ImageCrop:
    """How a picture becomes `size` x `size` RGB pixels. Raises ValueError for an unknown kind or values out of range."""

    kind: str = "adm"
    """"adm": halve with a box filter while the short side is at least twice the size, then bicubic, then the centre (the crop
    of ADM, DiT and the published ImageNet numbers). "resize": short side to the size with an antialiased bilinear filter, then
    the centre (torchvision's Resize and CenterCrop). "random": a random part of the area at a random ratio, resized bicubically
    (torchvision's RandomResizedCrop), then flipped with probability 0.5; another one for each view. "lanczos": the whole picture,
    squeezed to the square with an antialiased Lanczos filter; "lanczos_centre": the same of the largest central square."""
    size: int = 256
    """Side of the result in pixels."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the part of the area that a random crop keeps, within (0, 1]."""
    seed: int = 0
    """Seed of the random crops."""

    def __post_init__(self):
        if self.kind not in CROPS:
            raise ValueError(f"crop is {self.kind!r}: choose one of {', '.join(CROPS)}")
        if self.size < 1:
            raise ValueError(f"image size is {self.size}: give the side of the crop in pixels, at least 1")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop scale is {low} to {high}: wanted 0 < low <= high <= 1")

    @property
    def is_random(self) -> bool:
        """Whether the views of one image differ."""
        return self.kind == "random"

    def __call__(self, image: Image.Image, image_index: int = 0, view: int = 0) -> np.ndarray:
        """The pixels uint8 [size, size, 3] of one view; the same for the same (seed, image index, view).

        Raises ValueError for a picture whose mode has no defined range of values.
        """
        image = to_rgb(image)
        if self.kind == "adm":
            return adm_centre_crop(image, self.size)
        if self.kind == "resize":
            return resized_centre_crop(image, self.size)
        if self.kind in ("lanczos", "lanczos_centre"):
            return lanczos_square(central_square(image) if self.kind == "lanczos_centre" else image, self.size)
        return random_resized_crop(image, self.size, random_stream(self.seed, CROP_STREAM, image_index, view), self.scale)

    def operations(self) -> list[str]:
        """What is done to the pixels, in this order, in words for the record of an export."""
        first = "as stored (EXIF orientation ignored), converted to RGB (alpha dropped)"
        size = f"{self.size}x{self.size}"
        if self.kind == "adm":
            return [
                first,
                f"box filter to half the size while the short side is at least {2 * self.size}",
                f"bicubic resize of the short side to {self.size}",
                f"centre crop {size}",
            ]
        if self.kind == "resize":
            return [first, f"antialiased bilinear resize of the short side to {self.size}", f"centre crop {size}"]
        if self.kind in ("lanczos", "lanczos_centre"):
            crop = ["crop of the largest central square"] if self.kind == "lanczos_centre" else []
            return [first, *crop, f"antialiased Lanczos resize of both sides to {size}"]
        low, high = self.scale
        return [
            first,
            f"random crop of {low:g} to {high:g} of the area at ratio 3/4 to 4/3, seed {self.seed}",
            f"bicubic resize to {size}",
            "horizontal flip with probability 0.5",
        ]


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB: grey and CMYK converted, palettes looked up, alpha dropped, 16-bit grey scaled to 8 bits.

    Raises ValueError for 32-bit integers and floats: nothing says which value is white.
    """
    if image.mode.startswith("I;16"):
        # Pillow clips these at 255, which would turn nearly every pixel white.
        values = np.asarray(image).astype(np.float32) / 257
        return Image.fromarray(np.round(values).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pictures of mode {image.mode} have no defined range of values; save it with 8 or 16 bits a pixel")
    return image.convert("RGB")


def adm_centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop of an RGB picture, uint8 [size, size, 3] (openai/guided-diffusion, `center_crop_arr`)."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)  # [H, W, 3]
    top, left = ((side - size) // 2 for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def resized_centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """torchvision's Resize(size) and CenterCrop(size) of an RGB picture, uint8 [size, size, 3]."""
    width, height = image.size
    short = min(width, height)
    # The long side is cut to an integer, not rounded, and the crop's corner is rounded: as torchvision does.
    target = (size, int(size * height / short)) if width <= height else (int(size * width / short), size)
    pixels = np.array(image.resize(target, resample=Image.Resampling.BILINEAR))
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def central_square(image: Image.Image) -> Image.Image:
    """The largest central square of a picture; of an odd margin, the smaller part is on the left or on top."""
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    return image.crop((left, top, left + side, top + side))


def lanczos_square(image: Image.Image, size: int) -> np.ndarray:
    """An RGB picture squeezed to uint8 [size, size, 3] with Pillow's Lanczos filter, whatever its ratio."""
    return np.array(image.resize((size, size), resample=Image.Resampling.LANCZOS))


def random_resized_crop(
    image: Image.Image, size: int, stream: np.random.Generator, scale: tuple[float, float] = (0.2, 1.0)
) -> np.ndarray:
    """torchvision's RandomResizedCrop, bicubic, and a flip with probability 0.5, uint8 [size, size, 3], drawn from `stream`."""
    left, top, width, height = _random_box(*image.size, stream, scale)
    image = image.crop((left, top, left + width, top + height)).resize((size, size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return pixels[:, ::-1].copy() if stream.random() < 0.5 else pixels


def _random_box(width: int, height: int, stream: np.random.Generator, scale: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random part of a picture."""
    for _ in range(TRIES):
        area = width * height * stream.uniform(*scale)
        ratio = math.exp(stream.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = stream.integers(width - crop_width + 1), stream.integers(height - crop_height + 1)
            return int(left), int(top), crop_width, crop_height
    # Too long or too tall for every try: the largest central part with an allowed ratio.
    if width / height < RATIO[0]:
        crop_width, crop_height = width, round(width / RATIO[0])
    elif width / height > RATIO[1]:
        crop_width, crop_height = round(height * RATIO[1]), height
    else:
        crop_width, crop_height = width, height
    return (width - crop_width) // 2, (height - crop_height) // 2, crop_width, crop_height
