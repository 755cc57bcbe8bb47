"""Histograms of activations, real beside generated, a panel a layer."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from drift_accel.foundation.storage import atomic_write_bytes

COLUMNS = 3
TAIL = 0.0005  # share of values at each end that the axis leaves out: single outliers would squeeze the rest into one bin


def plot_activation_histograms(
    real_acts: Mapping[str, np.ndarray],
    gen_acts: Mapping[str, np.ndarray],
    layers: Sequence[str] | None = None,
    *,
    bins: int = 80,
    path: str | Path | None = None,
    names: tuple[str, str] = ("real", "generated"),
) -> Figure:
    """Draw the densities of all numbers of each layer, and write them as PNG to `path` where one is given.

    `real_acts`, `gen_acts`: arrays [n, D] by layer, as `load_batch_activations` gives them; `layers` None: all that both have.
    Both are counted on the same bins; values beyond the axis are in the outermost bins.
    Raises ValueError for a layer that one of them lacks, layers of unequal width, without numbers or with numbers that are
    not finite, and fewer than one bin.
    """
    layers = [layer for layer in real_acts if layer in gen_acts] if layers is None else list(layers)
    if not layers or bins < 1:
        raise ValueError(f"{names[0]} and {names[1]} activations have no layer in common, or bins ({bins}) is below 1")
    for layer in layers:
        _require_comparable(layer, real_acts, gen_acts, names)
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, layer in zip(axes, layers, strict=False):
        pair = [np.asarray(values[layer], dtype=np.float32).ravel() for values in (real_acts, gen_acts)]
        edges = np.linspace(*_span(pair), bins + 1)
        for values, name, colour in zip(pair, names, ("#3b6ea8", "#d1603d"), strict=True):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            axis.stairs(counts / (len(values) * np.diff(edges)), edges, fill=True, alpha=0.45, color=colour, label=name)
        axis.set_title(f"{layer}  ({np.shape(real_acts[layer])[1]} numbers)", fontsize=10)
        axis.set(xlabel="activation", ylabel="density")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    if path is not None:
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=110)
        atomic_write_bytes(path, content.getvalue())
    return figure


def _require_comparable(layer: str, real_acts, gen_acts, names: tuple[str, str]) -> None:
    for acts, name in zip((real_acts, gen_acts), names, strict=True):
        if layer not in acts:
            raise ValueError(f"{name} activations have no layer {layer!r}: they have {', '.join(acts)}")
        values = np.asarray(acts[layer])
        if values.ndim != 2 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"layer {layer!r} of {name} activations is {list(values.shape)}: wanted [n, D], all numbers finite")
    widths = np.shape(real_acts[layer])[1], np.shape(gen_acts[layer])[1]
    if widths[0] != widths[1]:
        raise ValueError(
            f"layer {layer!r} has {widths[0]} numbers a sample in {names[0]} and {widths[1]} in {names[1]} activations: extract "
            "both with the same model and size, both pooled or both not"
        )


def _span(pair: Sequence[np.ndarray]) -> tuple[float, float]:
    ends = [np.quantile(values, (TAIL, 1 - TAIL)) for values in pair]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)
