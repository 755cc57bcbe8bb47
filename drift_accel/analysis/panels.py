"""Pictures with a heading over each column and a caption below: several views of the same samples beside each other."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from drift_accel.sampling.grid import BACKGROUND, MARGIN, NOT_FINITE, TEXT

GAP, GROUP_GAP = 6, 26
FONT_PIXELS = 15


def panel_array(columns: dict[str, Tensor], caption: str = "", *, groups: int = 1, cell: int = 96) -> np.ndarray:
    """Return uint8 [height, width, 3]: one row a sample, its views side by side under their names, `groups` such blocks.

    columns: {name: images [N, 1 or 3, H, W] in [-1, 1]}, the same N for all, of any side. caption: lines of text below. cell:
    every image is enlarged by a whole factor until it has about so many pixels a side.
    Raises ValueError for no column, other shapes, another number of images, and groups or cell below 1.
    """
    if not columns or groups < 1 or cell < 1:
        raise ValueError(f"panels need a column, groups and cell of at least 1, got {list(columns)}, {groups} and {cell}")
    views = {name: [_enlarge(image, cell) for image in _pixels(images)] for name, images in columns.items()}
    counts = {name: len(images) for name, images in views.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the columns have different numbers of images: {counts}")
    num = next(iter(counts.values()))
    rows = -(-num // groups)
    side = max(max(image.shape[:2]) for images in views.values() for image in images)
    font, small = ImageFont.load_default(size=FONT_PIXELS), ImageFont.load_default(size=FONT_PIXELS - 2)
    block = len(views) * (side + GAP) - GAP
    width = 2 * MARGIN + groups * (block + GROUP_GAP) - GROUP_GAP
    lines = caption.splitlines()
    width = max(width, 2 * MARGIN + max((int(small.getlength(line)) + 1 for line in lines), default=0))
    top = MARGIN + FONT_PIXELS + 8
    bottom = top + rows * (side + GAP)
    canvas = Image.new("RGB", (width, bottom + MARGIN + len(lines) * (FONT_PIXELS + 4)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for group in range(min(groups, -(-num // rows))):
        for place, (name, images) in enumerate(views.items()):
            left = MARGIN + group * (block + GROUP_GAP) + place * (side + GAP)
            draw.text((left + side / 2, MARGIN + FONT_PIXELS / 2), name, fill=TEXT, font=font, anchor="mm")
            for row, image in enumerate(images[group * rows : (group + 1) * rows]):
                canvas.paste(Image.fromarray(image), (left, top + row * (side + GAP)))
    for place, line in enumerate(lines):
        draw.text((MARGIN, bottom + 6 + place * (FONT_PIXELS + 4)), line, fill=TEXT, font=small)
    return np.asarray(canvas)


def _pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3]; pixels that are not finite are painted as in every other grid."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be [N, 1 or 3, H, W], got {list(images.shape)}; decode latents to images first")
    images = images.detach().float().cpu().permute(0, 2, 3, 1)  # [N, H, W, C]
    levels = ((images.nan_to_num() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    levels = levels.expand(*levels.shape[:3], 3).clone()  # [N, H, W, 3]
    levels[~torch.isfinite(images).all(dim=-1)] = torch.tensor(NOT_FINITE, dtype=torch.uint8)
    return levels.numpy()


def _enlarge(pixels: np.ndarray, cell: int) -> np.ndarray:
    scale = max(1, round(cell / max(pixels.shape[:2])))
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
