"""A study as a picture: a panel a number, a line a variant, a point a run."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from drift_accel.evaluation.results import LOWER_IS_BETTER
from drift_accel.foundation.storage import atomic_write_bytes

PANEL_WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 2.9, 0.32, 1.3  # inches
LOG_FROM = 20.0  # ratio of the largest to the smallest value


def plot_study(
    rows: Sequence[Mapping[str, Any]], path: Path, *, title: str, metric: str, reference: Mapping[str, float] | None = None
) -> None:
    """Draw every number of the rows of `study_rows`: points are runs, the bar is their mean, dashed is `reference` by number.

    Rows without a number say so in the first panel. Raises ValueError where no row has one.
    """
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    if not names:
        raise ValueError("nothing to plot: no run of the study is done")
    names.sort(key=lambda name: name != metric)
    figure = Figure(figsize=(PANEL_WIDTH * len(names) + 1.2, ROW_HEIGHT * len(rows) + FRAME_HEIGHT), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    colours = matplotlib.colormaps["viridis"]([0.15, 0.6])
    for panel, name in zip(panels, names, strict=True):
        for place, row in enumerate(rows):
            values = list(row["metrics"].get(name, {}).get("values", {}).values())
            colour = colours[0 if place == 0 else 1]
            if values:
                panel.plot(values, [place] * len(values), "o", markersize=5, color=colour, alpha=0.75)
                panel.plot([row["metrics"][name]["mean"]] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2)
            elif name == names[0]:
                text = ", ".join(sorted(set(row["states"].values()))) or "not run"
                panel.annotate(
                    text, (0.02, place), xycoords=("axes fraction", "data"), va="center", fontsize="small", color="0.4"
                )
        if reference and name in reference:
            panel.axvline(reference[name], color="0.4", linewidth=1, linestyle="--")
        everything = [value for row in rows for value in row["metrics"].get(name, {}).get("values", {}).values()]
        if min(everything) > 0 and max(everything) > LOG_FROM * min(everything):
            panel.set_xscale("log")
        better = "lower" if name.startswith(LOWER_IS_BETTER) else "higher"
        panel.set(title=f"{name.replace('_', ' ')} ({better} is better)")
        panel.title.set_fontsize("medium")
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    dashed = "; dashed: real images in their place" if reference else ""
    figure.suptitle(f"{title}\npoints: runs; bars: their means{dashed}", fontsize="medium")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    atomic_write_bytes(path, picture.getvalue())
