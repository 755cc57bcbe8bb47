"""What the page's scatter shows: samples, places, classes, neighbours across sets and thumbnails, packed for a script."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_accel.analysis.comparison.compare import Comparison
from drift_accel.analysis.comparison.files import outliers
from drift_accel.analysis.comparison.layer_space import balanced_choice
from drift_accel.analysis.comparison.measures import SetComparison
from drift_accel.analysis.comparison.plots import set_colours
from drift_accel.analysis.comparison.thumbnails import thumbnail_sheets
from drift_accel.evaluation.neighbours import Neighbours, find_neighbours

MAX_POINTS = 20_000  # what a page draws smoothly


def shown_samples(comparison: Comparison, max_points: int) -> list[np.ndarray]:
    """Which rows of each set are shown, int64 ascending: all, or of each set an equal share spread over its classes.

    Raises ValueError for fewer than its neighbours need.
    """
    share = check_shown(max_points, len(comparison.sets), comparison.config.k)
    if sum(map(len, comparison.sets)) <= max_points:
        return [np.arange(len(one)) for one in comparison.sets]
    return [
        np.arange(len(one)) if len(one) <= share else balanced_choice(one.labels, share, comparison.config.seed)
        for one in comparison.sets
    ]


def check_shown(max_points: int, num_sets: int, k: int) -> int:
    """How many samples of each set a page of `max_points` shows. Raises ValueError for fewer than k neighbours need."""
    if max_points // num_sets <= k:
        raise ValueError(
            f"page of {max_points} samples of {num_sets} sets, each with {k} neighbours; give at least {(k + 1) * num_sets}"
        )
    return max_points // num_sets


def scatter_data(comparison: Comparison, chosen: Sequence[np.ndarray], thumbnail: int) -> dict[str, Any]:
    """What page.js gets, as plain values: arrays in base64, the real samples first. `chosen` from `shown_samples`."""
    sets = comparison.sets
    starts = np.cumsum([0, *map(len, chosen)])
    samples = [
        sample for one, rows in zip(sets, chosen, strict=True) for sample in one.source.samples(one.numbers[rows].tolist())
    ]
    labels = np.concatenate([one.labels[rows] for one, rows in zip(sets, chosen, strict=True)])
    classes = sorted(comparison.names)
    place = {label: index for index, label in enumerate(classes)}
    isolation = [comparison.main_sets[0].neighbourhoods.real_isolation[chosen[0]]]
    isolation += [found.neighbourhoods.isolation[rows] for found, rows in zip(comparison.main_sets, chosen[1:], strict=True)]
    sheets = thumbnail_sheets([sample["image_path"] for sample in samples], thumbnail)
    return {
        "sets": [
            {"title": one.title, "first": int(first), "count": len(rows), "of": len(one), "colour": colour}
            for one, first, rows, colour in zip(sets, starts, chosen, set_colours(len(sets)), strict=False)
        ],
        "classes": [{"id": label, "name": comparison.names[label]} for label in classes],
        "labels": _packed(np.array([place.get(int(label), -1) for label in labels]), "<i4"),
        "numbers": _packed(np.concatenate([one.numbers[rows] for one, rows in zip(sets, chosen, strict=True)]), "<u4"),
        "isolation": _packed(np.concatenate(isolation), "<f4"),
        "paths": ["/".join(str(sample["original_path"]).split("/")[-2:]) for sample in samples],
        "views": [_view(comparison, method, chosen) for method in comparison.embedded],
        "neighbours": _neighbours(comparison, chosen, starts),
        "sheets": {
            "tile": sheets.tile,
            "columns": sheets.columns,
            "rows": sheets.rows,
            "sources": list(sheets.sources),
            "present": _packed(sheets.present, "u1"),
        },
        "outliers": [_outlier_places(found, rows) for found, rows in zip(comparison.main_sets, chosen[1:], strict=True)],
    }


def _packed(values: np.ndarray, kind: str) -> str:
    """An array's bytes in base64; little-endian as every browser reads them."""
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()


def _view(comparison: Comparison, method: str, chosen: Sequence[np.ndarray]) -> dict[str, Any]:
    """Coordinates in 16 bits over the range of all shown points: finer than any screen."""
    found = comparison.embedded[method]
    points = np.concatenate([part[rows] for part, rows in zip(found.coordinates, chosen, strict=True)]).astype(np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / np.where(high > low, high - low, 1.0) * 65535
    return {
        "name": method.upper(),
        "statement": found.embedding.facts["statement"],
        "low": low.tolist(),
        "high": high.tolist(),
        "points": _packed(scaled.round(), "<u2"),
    }


def _neighbours(comparison: Comparison, chosen: Sequence[np.ndarray], starts: np.ndarray) -> dict[str, Any]:
    """Across sets, among the shown samples: of every real one in each generated set, of every generated one in the real set."""
    found = [_across(comparison, chosen, place) for place in range(1, len(chosen))]
    of_real = [to_generated.indices + starts[place] for place, (to_generated, _) in enumerate(found, start=1)]
    return {
        "k": comparison.config.k,
        "of_real": _packed(np.stack(of_real, axis=1), "<u4"),  # [real, generated sets, k]
        "real_distances": _packed(np.stack([to_generated.distances for to_generated, _ in found], axis=1), "<f4"),
        "of_generated": _packed(np.concatenate([to_real.indices for _, to_real in found]), "<u4"),  # [all generated, k]
        "generated_distances": _packed(np.concatenate([to_real.distances for _, to_real in found]), "<f4"),
    }


def _across(comparison: Comparison, chosen: Sequence[np.ndarray], place: int) -> tuple[Neighbours, Neighbours]:
    """(of the shown real samples in set `place`, of that set's in the real one), by their places among the shown ones."""
    real, generated = comparison.main.rows[0], comparison.main.rows[place]
    near, k = comparison.main_sets[place - 1].neighbourhoods, comparison.config.k
    if len(chosen[0]) == len(real) and len(chosen[place]) == len(generated):
        return (
            Neighbours(distances=near.nearest_generated_distances, indices=near.nearest_generated),
            Neighbours(distances=near.nearest_real_distances, indices=near.nearest_real),
        )
    real, generated = real[chosen[0]], generated[chosen[place]]
    return find_neighbours(real, [generated], k), find_neighbours(generated, [real], k)


def _outlier_places(found: SetComparison, rows: np.ndarray) -> list[int]:
    """The most isolated shown samples of a set, as places among its shown samples."""
    isolation = found.neighbourhoods.isolation[rows]
    return np.argsort(-isolation, kind="stable")[: len(outliers(found))].tolist()
