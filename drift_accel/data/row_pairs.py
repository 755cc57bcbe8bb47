"""The pictures behind a cache's latents: a second cache, of pixels, with the same rows."""

import numpy as np

from drift_accel.data.cache_format import LATENTS, PIXELS
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.sources import Source
from drift_accel.data.subset import BalancedSubset

ORIGIN_COLUMNS = ("source", "image_index", "view", "label")


def open_row_images(path: str, source: Source, image_shape: tuple[int, int, int], *, max_rows: int | None) -> Source:
    """The cache of pixels at `path`, of which row i is the picture of row i of `source`, a cache of latents or a part of one.

    `image_shape` (3, H, W) is that of decoded latents. Raises ValueError where a row's picture, view, label or crop is another,
    and FileNotFoundError and ValueError as LatentCache.
    """
    latents = source.source if isinstance(source, BalancedSubset) else source
    if not isinstance(latents, LatentCache) or latents.header.kind != LATENTS:
        raise ValueError(f"decoder.real_images is {path}, but the data holds no latents of pictures: leave it out")
    pixels = LatentCache(path)
    problems = _differences(latents, pixels, image_shape)
    if problems:
        raise ValueError(
            f"decoder.real_images {path} does not have the pictures of {latents.path}, row by row: {'; '.join(problems)}. Export "
            "both from the same pictures with the same crop, seed and number of rows (tools/export_latents.py)"
        )
    return pixels if max_rows is None else BalancedSubset(pixels, max_rows)


def _differences(latents: LatentCache, pixels: LatentCache, image_shape: tuple[int, int, int]) -> list[str]:
    problems = []
    if pixels.header.kind != PIXELS:
        return ["it holds latents, not pixels"]
    if tuple(pixels.image_shape) != tuple(image_shape):
        problems.append(f"its images are {tuple(pixels.image_shape)}, decoded latents are {tuple(image_shape)}")
    if dict(pixels.header.crop) != dict(latents.header.crop):
        problems.append(f"its crop is {dict(pixels.header.crop)}, the latents' is {dict(latents.header.crop)}")
    if len(pixels) != len(latents):
        return [*problems, f"it has {len(pixels):,} rows, the latents {len(latents):,}"]
    for name in ORIGIN_COLUMNS:
        mine, theirs = latents.column(name), pixels.column(name)
        if not mine.equals(theirs):
            row = int(np.flatnonzero(mine.to_numpy() != theirs.to_numpy())[0])
            problems.append(f"{name} of row {row} is {theirs[row]}, of the latents {mine[row]}")
    return problems
