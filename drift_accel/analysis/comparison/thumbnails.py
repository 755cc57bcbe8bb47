"""Many small pictures in a few sheets that a page carries: tiles of one size, row by row."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SHEET_COLUMNS, SHEET_ROWS = 64, 32
LOSSLESS_UP_TO = 16  # pixels a side: smaller pictures are shown enlarged, where every artefact would show
QUALITY = 80
BACKGROUND = (236, 236, 240)


@dataclass(frozen=True, kw_only=True)
class Sheets:
    """Tiles in the order of the pictures."""

    tile: int
    """Side of a tile in pixels."""
    columns: int
    rows: int
    """Of tiles in a full sheet."""
    sources: tuple[str, ...]
    """A data address for each sheet."""
    present: np.ndarray
    """bool [N]: which pictures could be had; the others' tiles are empty."""


def thumbnail_sheets(paths: Sequence[Path | None], largest: int = 32) -> Sheets:
    """Sheets of the pictures at `paths`; a tile has their own size, at most `largest` pixels a side.

    Pictures keep their proportions, centred. Missing (None) and unreadable ones leave an empty tile. Raises ValueError for
    `largest` below 4.
    """
    if largest < 4:
        raise ValueError(f"thumbnails of {largest} pixels: give at least 4")
    tile = _tile_side(paths, largest)
    present = np.zeros(len(paths), dtype=bool)
    sources = []
    for first in range(0, len(paths), SHEET_COLUMNS * SHEET_ROWS):
        part = paths[first : first + SHEET_COLUMNS * SHEET_ROWS]
        sheet = Image.new("RGB", (SHEET_COLUMNS * tile, -(-len(part) // SHEET_COLUMNS) * tile), BACKGROUND)
        for place, path in enumerate(part):
            picture = _thumbnail(path, tile)
            if picture is not None:
                present[first + place] = True
                left, top = place % SHEET_COLUMNS * tile, place // SHEET_COLUMNS * tile
                sheet.paste(picture, (left + (tile - picture.width) // 2, top + (tile - picture.height) // 2))
        sources.append(_address(sheet, lossless=tile <= LOSSLESS_UP_TO))
    return Sheets(tile=tile, columns=SHEET_COLUMNS, rows=SHEET_ROWS, sources=tuple(sources), present=present)


def _tile_side(paths: Sequence[Path | None], largest: int) -> int:
    """The side of the first readable picture, at most `largest`."""
    for path in paths:
        try:
            if path is not None:
                with Image.open(path) as picture:
                    return min(largest, max(picture.size))
        except OSError:
            continue
    return 4  # there is no picture at all


def _thumbnail(path: Path | None, tile: int) -> Image.Image | None:
    if path is None:
        return None
    try:
        with Image.open(path) as picture:
            picture.draft("RGB", (2 * tile, 2 * tile))  # a JPEG is decoded at a fraction of its size
            small = picture.convert("RGB")
    except OSError:
        return None
    small.thumbnail((tile, tile), Image.LANCZOS)
    return small


def _address(sheet: Image.Image, *, lossless: bool) -> str:
    content = io.BytesIO()
    sheet.save(content, format="WEBP", lossless=lossless, quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
