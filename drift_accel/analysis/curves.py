"""Curves of a run as SVG text that an HTML page can hold."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drift_accel.evaluation.results import main_metric

SIZE = (5.2, 3.2)  # inches
_NOT_CURVES = ("step", "time", "seconds")
_LOGARITHMIC = ("drift_sqnorm", "gradient_norm", "learning_rate")


def metric_groups(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The curves that a run's records give: {name of the picture: tags}; temperatures of one quantity share a picture.

    Tags of single feature keys ("drift_sqnorm_0.2/layer1") are left out: there are hundreds.
    """
    tags = {tag for record in records for tag, value in record.items() if isinstance(value, int | float)}
    groups: dict[str, list[str]] = {}
    for tag in sorted(tags - set(_NOT_CURVES)):
        if "/" not in tag:
            head, _, last = tag.rpartition("_")
            groups.setdefault(head if head and _is_number(last) else tag, []).append(tag)
    first = [name for name in ("loss", "drift_sqnorm", "gradient_norm", "learning_rate") if name in groups]
    return {name: groups[name] for name in (*first, *(name for name in groups if name not in first))}


def training_curve(records: Sequence[Mapping[str, Any]], name: str, tags: Sequence[str]) -> str:
    """One picture, one line a tag, over steps, as SVG."""
    panel_figure, axes = _panel()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(tags)))
    positive = True
    for tag, colour in zip(tags, colours, strict=True):
        points = [(record["step"], record[tag]) for record in records if record.get(tag) is not None]
        x, y = zip(*points, strict=True)
        positive &= min(y) > 0
        axes.plot(x, y, color=colour, linewidth=1.2, label=tag.removeprefix(f"{name}_"))
    if name in _LOGARITHMIC and positive:
        axes.set_yscale("log")
    axes.set(xlabel="step")
    if len(tags) > 1:
        axes.legend(frameon=False, fontsize="small", title="temperature" if name == "drift_sqnorm" else None)
    return _svg(panel_figure)


def result_curve(results: Sequence[Mapping[str, Any]]) -> str | None:
    """The main number over steps, one line for each average and guidance scale that has two steps; None where none has."""
    lines: dict[tuple, list[tuple[int, float]]] = {}
    name = main_metric(results[0]["metrics"])
    for result in results:
        model = result.get("model") or {}
        if model.get("step") is not None and name in result["metrics"]:
            key = (model.get("ema"), result["generated"].get("guidance_scale"))
            lines.setdefault(key, []).append((model["step"], result["metrics"][name]))
    lines = {key: points for key, points in lines.items() if len({step for step, _ in points}) > 1}
    if not lines:
        return None
    panel_figure, axes = _panel()
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(lines)))
    for ((ema, scale), points), colour in zip(lines.items(), colours, strict=True):
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", markersize=4, color=colour, label=f"{ema}, guidance {scale}")
    axes.set(xlabel="step", ylabel=name)
    axes.legend(frameon=False, fontsize="small")
    return _svg(panel_figure)


def _panel() -> tuple[Figure, Any]:
    panel_figure = Figure(figsize=SIZE, layout="constrained")
    axes = panel_figure.add_subplot()
    axes.grid(alpha=0.3)
    return panel_figure, axes


def _svg(panel_figure: Figure) -> str:
    text = io.StringIO()
    # A fixed salt: the same records give the same page.
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        panel_figure.savefig(text, format="svg", metadata={"Date": None})
    content = text.getvalue()
    return content[content.index("<svg") :]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
