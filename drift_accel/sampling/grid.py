"""Labelled grids of images, one row a class, for the eye: samples during training, the README, TensorBoard."""

import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from drift_accel.foundation.storage import atomic_write_bytes

BACKGROUND = (255, 255, 255)
TEXT = (40, 40, 46)
# No image has this colour by accident: a broken pixel must not pass for a dark or a bright one.
NOT_FINITE = (255, 0, 255)
# Images are enlarged by whole factors until a cell has about this many pixels a side.
CELL_PIXELS = 64
MARGIN = 14
SMALLEST_FONT, LARGEST_FONT = 15, 26
# Names get this many times the font's size, then they are cut.
LONGEST_NAME = 13

ClassNames = Mapping[int, str] | Sequence[str]


def class_grid_array(
    images: Tensor,
    labels: Tensor | Sequence[int],
    *,
    class_names: ClassNames | None = None,
    columns: int = 10,
    scale: int | None = None,
) -> np.ndarray:
    """Return a labelled grid as uint8 [height, width, 3]: one row a class, ascending, its name at the left.

    images [N, C, H, W] in [-1, 1], clipped, C = 1 (grey) or 3; pixels that are not finite are painted magenta.
    labels [N]. class_names: by label; None writes the label's number. columns: at most so many images a class, in the
    order given. scale: every pixel becomes scale x scale pixels (None: until a cell is about 64 pixels wide).
    Raises ValueError for other shapes, no image, a label without a name, and columns or scale below 1.
    """
    pixels = _to_pixels(images)
    labels = torch.as_tensor(labels).cpu().reshape(-1).tolist()
    if len(labels) != len(pixels):
        raise ValueError(f"there are {len(pixels)} images but {len(labels)} labels; pass one label an image")
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    height, width = pixels.shape[1:3]
    scale = max(1, round(CELL_PIXELS / max(height, width))) if scale is None else scale
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)

    rows = {label: [] for label in sorted(set(labels))}
    for image, label in zip(pixels, labels, strict=True):
        if len(rows[label]) < columns:
            rows[label].append(image)
    names = {label: _class_name(label, class_names) for label in rows}
    return _draw_grid(rows, names)


def save_class_grid(
    images: Tensor,
    labels: Tensor | Sequence[int],
    path: str | os.PathLike,
    *,
    class_names: ClassNames | None = None,
    columns: int = 10,
    scale: int | None = None,
) -> None:
    """Write the grid of `class_grid_array` as a PNG; the file appears whole or not at all.

    Arguments and ValueErrors as there. Raises OSError when the file cannot be written.
    """
    save_grid(class_grid_array(images, labels, class_names=class_names, columns=columns, scale=scale), path)


def save_grid(grid: np.ndarray, path: str | os.PathLike) -> None:
    """Write a picture uint8 [height, width, 3] as a PNG; the file appears whole or not at all. Raises OSError."""
    png = io.BytesIO()
    Image.fromarray(grid).save(png, format="PNG", optimize=True)
    atomic_write_bytes(path, png.getvalue())


def _to_pixels(images: Tensor) -> np.ndarray:
    """Return uint8 [N, H, W, 3], rounded to the nearest of 256 levels."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images must be [N, 1 or 3, H, W] with N, H, W >= 1, got {list(images.shape)}; decode latents to images first"
        )
    images = images.detach().float().cpu().permute(0, 2, 3, 1)  # [N, H, W, C]
    broken = ~torch.isfinite(images).all(dim=-1)
    levels = ((images.nan_to_num() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    levels = levels.expand(*levels.shape[:3], 3).clone()
    levels[broken] = torch.tensor(NOT_FINITE, dtype=torch.uint8)
    return levels.numpy()


def _class_name(label: int, class_names: ClassNames | None) -> str:
    if class_names is None:
        return str(label)
    try:
        if label < 0:
            raise IndexError
        return str(class_names[label])
    except (KeyError, IndexError):
        raise ValueError(f"class_names has no name for label {label}; it names {len(class_names)} classes") from None


def _draw_grid(rows: dict[int, list[np.ndarray]], names: dict[int, str]) -> np.ndarray:
    cell_height, cell_width = next(iter(rows.values()))[0].shape[:2]
    gap = max(4, cell_width // 28)
    font_pixels = min(max(SMALLEST_FONT, cell_height // 10), LARGEST_FONT)
    font = ImageFont.load_default(size=font_pixels)
    names = {label: _shorten(name, font, LONGEST_NAME * font_pixels) for label, name in names.items()}
    text_width = max(int(np.ceil(font.getlength(name))) for name in names.values())
    left = MARGIN + text_width + MARGIN
    # Rows stay readable when the cells are lower than a line of text.
    row_height = max(cell_height, font_pixels + 2)
    num_columns = max(len(images) for images in rows.values())
    width = left + num_columns * (cell_width + gap) - gap + MARGIN
    height = MARGIN + len(rows) * (row_height + gap) - gap + MARGIN

    canvas = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for label, images in rows.items():
        draw.text((left - MARGIN, top + row_height / 2), names[label], fill=TEXT, font=font, anchor="rm")
        for column, image in enumerate(images):
            corner = (left + column * (cell_width + gap), top + (row_height - cell_height) // 2)
            canvas.paste(Image.fromarray(image), corner)
        top += row_height + gap
    return np.asarray(canvas)


def _shorten(name: str, font: ImageFont.FreeTypeFont, longest: float) -> str:
    """Fit a name into `longest` pixels: first without its synonyms ("tench, Tinca tinca"), then cut at its end."""
    name = " ".join(name.split())
    if font.getlength(name) <= longest:
        return name
    name = name.partition(",")[0]
    if font.getlength(name) <= longest:
        return name
    while name and font.getlength(name + "...") > longest:
        name = name[:-1]
    return name.rstrip() + "..."
