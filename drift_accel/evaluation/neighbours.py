"""Memorisation: how near generated pictures come to the training set, beside how near held-out real ones do.

A generator that copies is nearer to its training pictures than real pictures of the same data are.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from drift_accel.data.class_table import ClassTable
from drift_accel.sampling.quantization import to_rgb

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
CELL, GAP, MARGIN, TEXT_HEIGHT = 64, 4, 14, 16
TEXT, QUIET, BACKGROUND = (40, 40, 46), (120, 120, 128), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest training pictures of some queries."""

    distances: np.ndarray
    """float64 [Q, k], Euclidean, rising."""
    indices: np.ndarray
    """int64 [Q, k]: which training pictures."""


def find_neighbours(queries: np.ndarray, arrays: Iterable[np.ndarray], k: int = 10) -> Neighbours:
    """The k nearest rows to each of `queries` [Q, D] among training features that stream by as arrays [rows, D].

    Distances in float64; of equal ones the smaller index comes first. Memory: one array and its distances. Raises ValueError for
    fewer than k training rows, other dimensions, and values that are not finite.
    """
    if queries.ndim != 2 or not len(queries) or k < 1:
        raise ValueError(f"queries must be [Q, D] with at least one row and k at least 1, got {list(queries.shape)} and {k}")
    if not np.isfinite(queries).all():
        raise ValueError("queries hold a NaN or an infinite value; check the feature network and its pictures")
    queries_64 = torch.from_numpy(queries).double()
    distances = torch.full((len(queries), k), torch.inf, dtype=torch.float64)
    indices = torch.full((len(queries), k), -1, dtype=torch.int64)
    start = 0
    for array in arrays:
        if array.ndim != 2 or array.shape[1] != queries.shape[1]:
            raise ValueError(
                f"training features have shape {list(array.shape)}, the queries {list(queries.shape)}: use one network"
            )
        rows = torch.from_numpy(array).double()
        # By differences, not by the expanded square: a copy must be at distance zero.
        here = torch.cdist(queries_64, rows, compute_mode="donot_use_mm_for_euclid_dist")
        if not torch.isfinite(here).all():
            raise ValueError("training features hold a NaN or an infinite value; check the feature network and its pictures")
        numbers = torch.arange(start, start + len(rows)).expand(len(queries), -1)
        both, which = torch.cat([distances, here], dim=1), torch.cat([indices, numbers], dim=1)
        order = both.sort(dim=1, stable=True).indices[:, :k]
        distances, indices = both.gather(1, order), which.gather(1, order)
        start += len(rows)
    if start < k:
        raise ValueError(f"there are {start} training pictures, {k} neighbours were asked for: give more pictures or a smaller k")
    return Neighbours(distances=distances.numpy(), indices=indices.numpy())


def summarise(generated: np.ndarray, held_out: np.ndarray | None) -> dict[str, Any]:
    """What distances to the nearest training picture [Q] say: quantiles of both sets, and the share of very near ones.

    `share_nearer_than_real`: generated ones that are nearer than the nearest hundredth of the held-out real ones; about 0.01
    where nothing was memorised.
    """
    summary = {"generated": _quantiles(generated), "held_out": None, "share_nearer_than_real": None}
    if held_out is not None:
        summary["held_out"] = _quantiles(held_out)
        summary["share_nearer_than_real"] = float((generated < np.quantile(held_out, 0.01)).mean())
    return summary


def neighbour_picture(
    samples: np.ndarray,
    labels: Sequence[int],
    neighbours: Neighbours,
    load: Callable[[int], np.ndarray],
    table: ClassTable | None = None,
) -> np.ndarray:
    """A picture uint8 [height, width, 3]: one row a sample, its nearest training pictures beside it, distances below.

    samples uint8 [Q, H, W, 1 or 3]; `load(index)` gives a training picture uint8 [H, W, 1 or 3].
    """
    count, k = neighbours.indices.shape
    font = ImageFont.load_default(size=12)
    names = [str(label) if table is None else table.by_index(int(label)).name[:18] for label in labels]
    left = MARGIN + int(max(font.getlength(name) for name in names)) + MARGIN
    row_height = CELL + TEXT_HEIGHT + GAP
    width = left + CELL + 3 * MARGIN + k * (CELL + GAP) - GAP + MARGIN
    canvas = Image.new("RGB", (width, MARGIN + TEXT_HEIGHT + count * row_height + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    first = left + CELL + 3 * MARGIN
    draw.text((left, MARGIN - 4), "sample", fill=QUIET, font=font)
    draw.text((first, MARGIN - 4), f"its {k} nearest training pictures and their distances", fill=QUIET, font=font)
    for row in range(count):
        top = MARGIN + TEXT_HEIGHT + row * row_height
        draw.text((left - MARGIN, top + CELL / 2), names[row], fill=TEXT, font=font, anchor="rm")
        canvas.paste(_cell(samples[row]), (left, top))
        for place in range(k):
            x = first + place * (CELL + GAP)
            canvas.paste(_cell(load(int(neighbours.indices[row, place]))), (x, top))
            text = f"{neighbours.distances[row, place]:.3g}"
            draw.text((x + CELL / 2, top + CELL + 1), text, fill=QUIET, font=font, anchor="ma")
    return np.asarray(canvas)


def _cell(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(to_rgb(pixels[None])[0])
    small = max(picture.size) <= CELL
    return picture.resize((CELL, CELL), Image.NEAREST if small else Image.LANCZOS)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {f"{quantile:g}": float(value) for quantile, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}
