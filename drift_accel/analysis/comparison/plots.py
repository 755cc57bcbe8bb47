"""Pictures of a comparison: measures, classes, histograms and embeddings, as PNG files or as SVG for the page."""

import io
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from drift_accel.analysis.comparison.channel_histograms import ChannelHistograms
from drift_accel.analysis.comparison.class_coverage import worst_classes
from drift_accel.analysis.comparison.compare import Comparison
from drift_accel.analysis.comparison.measures import MEASURES

REAL_COLOUR = "#9aa0aa"
SET_COLOURS = ("#d1495b", "#2e6f95", "#e9a23b", "#3c8d5a", "#7b5ea7", "#b5651d", "#1b9aaa", "#c86fc9")
SHOWN_CLASSES = 40
_DRAWN = ("frechet", "kernel", "precision", "recall", "density", "coverage", "least_class_coverage", "centroid_distance")


def set_colours(count: int) -> list[str]:
    """A colour for each set, the real one first."""
    return [REAL_COLOUR, *(SET_COLOURS[place % len(SET_COLOURS)] for place in range(count - 1))]


def plots(comparison: Comparison) -> Iterator[tuple[str, bytes]]:
    """(file name, PNG) of every picture."""
    yield "measures.png", _png(measures_figure(comparison))
    if any(found.classes for found in comparison.main_sets):
        yield "classes.png", _png(classes_figure(comparison))
    for place, layer in enumerate(comparison.layers.values()):
        name = "".join(letter if letter.isalnum() else "_" for letter in layer.layer)
        yield f"histograms_{place:02d}_{name}.png", _png(histograms_figure(layer.histograms))
    for method in comparison.embedded:
        yield f"embedding_{method}.png", _png(embedding_figure(comparison, method))


def measures_figure(comparison: Comparison) -> Figure:
    """One panel a measure, a bar a set, in the main layer's space."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    panels = figure.subplots(2, 4).reshape(-1)
    titles = [found.title for found in comparison.main_sets]
    colours = set_colours(len(titles) + 1)[1:]
    for panel, name in zip(panels, _DRAWN, strict=True):
        values = [found.values[name] for found in comparison.main_sets]
        panel.bar(titles, [np.nan if value is None else value for value in values], color=colours)
        if name == "coverage":
            expected = [found.values["expected_coverage"] for found in comparison.main_sets]
            panel.plot(titles, expected, "_", color="#24242a", markersize=18, label="equal distributions")
            panel.legend(frameon=False, fontsize="small", loc="lower right")
        panel.set_title(f"{name.replace('_', ' ')} ({MEASURES[name][0]} is better)", fontsize="medium")
        panel.tick_params(axis="x", rotation=30 if len(titles) > 3 else 0)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{comparison.main.layer}: {comparison.main.space}", fontsize="medium")
    return figure


def classes_figure(comparison: Comparison) -> Figure:
    """Coverage of each class by each set; of many classes those that any set serves worst."""
    sets = comparison.main_sets
    worst = {one.label for found in sets for one in worst_classes(found.classes, SHOWN_CLASSES // len(sets) or 1)}
    every = [one for one in sets[0].classes if one.coverage is not None]
    shown = every if len(every) <= SHOWN_CLASSES else [one for one in every if one.label in worst]
    coverage = np.array(
        [[{one.label: one for one in found.classes}[shown_one.label].coverage for shown_one in shown] for found in sets]
    )
    figure = Figure(figsize=(max(6, 1.8 + 0.42 * len(shown)), 1.6 + 0.42 * len(sets)), layout="constrained")
    panel = figure.add_subplot()
    image = panel.imshow(coverage, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    panel.set_xticks(range(len(shown)), [one.name[:20] for one in shown], rotation=60 if len(shown) > 10 else 30, ha="right")
    panel.set_yticks(range(len(sets)), [found.title for found in sets])
    panel.set_title(f"coverage of each class's real samples, {comparison.main.layer}", fontsize="medium")
    figure.colorbar(image, ax=panel, fraction=0.05)
    return figure


def histograms_figure(found: ChannelHistograms) -> Figure:
    """One panel a group of channels, a line a set; the real one filled."""
    count = len(found.channels)
    columns = min(4, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.1 * columns, 2.2 * rows + 0.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).reshape(-1)
    for panel in panels[count:]:
        panel.set_axis_off()
    for group, panel in enumerate(panels[:count]):
        edges, (first, last) = found.edges[group], found.channels[group]
        for place, (title, colour) in enumerate(zip(found.titles, set_colours(len(found.titles)), strict=True)):
            panel.stairs(
                found.shares[place, group], edges, color=colour, fill=place == 0, alpha=0.45 if place == 0 else 1, label=title
            )
        panel.set_title(f"channel {first}" if first == last else f"channels {first} to {last}", fontsize="small")
        panel.set_yticks([])
        panel.tick_params(labelsize="x-small")
        panel.spines[["top", "right", "left"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False, fontsize="small")
    return figure


def embedding_figure(comparison: Comparison, method: str) -> Figure:
    """One panel a set: the real samples in grey, the generated ones on top."""
    found, titles = comparison.embedded[method], [chosen.title for chosen in comparison.sets]
    count = len(titles) - 1
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4.2 * columns, 4.0 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).reshape(-1)
    for panel in panels[count:]:
        panel.set_axis_off()
    colours = set_colours(len(titles))
    real = found.coordinates[0]
    for place, panel in enumerate(panels[:count], start=1):
        points = found.coordinates[place]
        panel.scatter(*real.T, s=5, color=colours[0], alpha=0.5, linewidths=0, rasterized=True)
        panel.scatter(*points.T, s=5, color=colours[place], alpha=0.7, linewidths=0, rasterized=True)
        panel.set_title(titles[place], fontsize="medium")
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle(f"{comparison.main.layer}: {found.embedding.facts['statement']}; real samples grey", fontsize="medium")
    return figure


def svg(figure: Figure) -> str:
    """The figure as markup; the same content gives the same text."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "comparison", "svg.fonttype": "path"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    content = text.getvalue()
    return content[content.index("<svg") :]


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    return content.getvalue()
