"""Curves of a sweep: every number over guidance, one line a checkpoint and average; the main one over steps."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drift_accel.evaluation.results import LOWER_IS_BETTER
from drift_accel.foundation.storage import atomic_write_bytes

PANEL = (4.2, 3.4)  # inches
_KEYS = ("step", "ema", "guidance_scale", "num_samples")


def plot_guidance(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each number over the guidance scale, one line for each step and average. Raises ValueError for a single scale."""
    scales = sorted({row["guidance_scale"] for row in rows})
    if len(scales) < 2:
        raise ValueError(f"a curve over guidance needs at least two scales, got {scales}")
    _plot(rows, path, "guidance_scale", ("step", "ema"), "guidance scale")


def plot_steps(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each number over the steps, one line for each average and guidance scale. Raises ValueError for a single step."""
    steps = sorted({row["step"] for row in rows if row["step"] is not None})
    if len(steps) < 2:
        raise ValueError(f"a curve over steps needs at least two checkpoints, got {steps}")
    _plot([row for row in rows if row["step"] is not None], path, "step", ("ema", "guidance_scale"), "step")


def _plot(rows: Sequence[Mapping[str, Any]], path: Path, x_name: str, groups: tuple[str, ...], label: str) -> None:
    names = [
        name for name in dict.fromkeys(key for row in rows for key in row) if name not in _KEYS and not name.endswith("_std")
    ]
    lines: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[group] for group in groups), []).append(row)
    columns = min(3, len(names))
    height = -(-len(names) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * height), layout="constrained")
    panels = np.atleast_1d(figure.subplots(height, columns)).reshape(-1)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(lines)))
    for panel, name in zip(panels, names, strict=False):
        for (key, points), colour in zip(lines.items(), colours, strict=True):
            points = sorted(points, key=lambda row: row[x_name])
            x, y = [row[x_name] for row in points], [row.get(name, np.nan) for row in points]
            panel.plot(x, y, marker="o", markersize=4, color=colour, label=_line_name(groups, key))
            best = int(np.nanargmin(y) if name.startswith(LOWER_IS_BETTER) else np.nanargmax(y))
            panel.plot(x[best], y[best], marker="o", markersize=9, markerfacecolor="none", color=colour)
        panel.set(xlabel=label, title=name)
        panel.grid(alpha=0.3)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    if len(lines) > 1:
        panels[0].legend(frameon=False, fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    atomic_write_bytes(path, picture.getvalue())


def _line_name(groups: tuple[str, ...], key: tuple) -> str:
    words = {"step": "step {}", "ema": "{}", "guidance_scale": "guidance {:g}"}
    return ", ".join(words[group].format(value) for group, value in zip(groups, key, strict=True) if value is not None)
