"""The page of a comparison: one HTML file with the scatter, every sample's picture, tables and histograms. It loads nothing.

The scatter is drawn by page.js on a canvas from typed arrays in base64; pictures lie in sheets of thumbnails.
"""

import html
from collections.abc import Mapping, Sequence
from importlib.resources import files

from drift_accel.analysis.activations.batches import NO_CLASS
from drift_accel.analysis.comparison.class_coverage import COLLAPSED, MISSING, ClassComparison
from drift_accel.analysis.comparison.compare import Comparison
from drift_accel.analysis.comparison.files import statements
from drift_accel.analysis.comparison.measures import MEASURES, SetComparison, best_sets
from drift_accel.analysis.comparison.plots import histograms_figure, set_colours, svg
from drift_accel.analysis.comparison.scatter_data import MAX_POINTS, scatter_data, shown_samples
from drift_accel.analysis.page import details, figure, scripted_page, table
from drift_accel.foundation.storage import json_text

_COLUMNS = ("coverage", "centroid_distance", "spread_ratio", "label_agreement")


def comparison_page(comparison: Comparison, *, title: str, max_points: int = MAX_POINTS, thumbnail: int = 32) -> str:
    """The page as text.

    max_points: samples shown, of each set an equal share spread over its classes; thumbnail: largest side of a picture.
    Raises ValueError for fewer shown samples than neighbours of every set need, and as thumbnail_sheets does.
    """
    chosen = shown_samples(comparison, max_points)
    data = scatter_data(comparison, chosen, thumbnail)
    sections = [
        f"<style>{_resource('page.css')}</style>",
        _summary(comparison),
        _explorer(comparison, sum(map(len, chosen))),
        _measures(comparison),
        _classes(comparison),
        '<section><h2>Farthest from the real samples</h2><p class="note">The most isolated generated samples of each set; '
        'click one to see it in the scatter.</p><div id="outliers"></div></section>',
        _histograms(comparison),
        _method(comparison),
        f'<script type="application/json" id="data">{_embedded_json(data)}</script>',
    ]
    return scripted_page(title, "\n".join(filter(None, sections)), _resource("page.js"))


def _embedded_json(data: Mapping) -> str:
    """JSON that cannot close the element that holds it."""
    return json_text(data).replace("<", "\\u003c")


def _resource(name: str) -> str:
    return files("drift_accel.analysis.comparison").joinpath(name).read_text(encoding="utf-8")


def _summary(comparison: Comparison) -> str:
    cards = []
    for found, one, colour in zip(comparison.main_sets, comparison.sets[1:], set_colours(len(comparison.sets))[1:], strict=False):
        missing = [part.name for part in found.classes if part.state in MISSING]
        collapsed = [part.name for part in found.classes if part.state == COLLAPSED]
        lines = [
            f"<b>{html.escape(_number(found.values['frechet']))}</b><span>Frechet</span>",
            f"<b>{_percent(found.values['precision'])}</b><span>precision</span>",
            f"<b>{_percent(found.values['coverage'])}</b><span>coverage</span>",
        ]
        verdicts = [_verdict("missing", missing), _verdict("collapsed", collapsed)]
        said = "".join(filter(None, verdicts)) or '<p class="good">no class is missing or collapsed</p>'
        cards.append(
            f'<article style="--set:{colour}"><h3>{html.escape(found.title)}</h3><small>{len(one):,} samples</small>'
            f'<div class="numbers">{"".join(f"<div>{line}</div>" for line in lines)}</div>{said}</article>'
        )
    real = comparison.sets[0]
    return (
        f'<p class="note">Against <b>{html.escape(real.title)}</b>, {len(real):,} real samples, in the space of '
        f"<b>{html.escape(comparison.main.layer)}</b>: {html.escape(comparison.main.space)}.</p>"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _verdict(kind: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    return f'<p class="bad"><b>{kind}:</b> {html.escape(shown)}</p>'


def _explorer(comparison: Comparison, shown: int) -> str:
    total = sum(map(len, comparison.sets))
    part = f" {shown:,} of {total:,} samples are shown, spread evenly over sets and classes." if shown < total else ""
    if not comparison.embedded:
        return '<section><h2>Samples</h2><p class="note">No embedding was asked for.</p></section>'
    return (
        '<section><h2>Samples</h2><p class="note">Wheel: zoom. Drag: move. Hover: the picture. Click: its neighbours in the '
        f"other sets. Double click: everything again.{part}</p>"
        '<div id="explorer"><div id="controls"></div><div id="stage"><canvas id="points"></canvas><canvas id="overlay"></canvas>'
        '<div id="tooltip" hidden></div><div id="status"></div></div><aside id="detail"></aside></div></section>'
    )


def _measures(comparison: Comparison) -> str:
    spaces = [(f"{name} · {layer.space}", layer.sets) for name, layer in reversed(comparison.layers.items())]
    spaces += [
        (f"{comparison.main.layer} in the plane · {found.embedding.facts['statement']}", found.sets)
        for found in comparison.embedded.values()
    ]
    first, *others = [f"<h3>{html.escape(name)}</h3>{_measure_table(sets)}" for name, sets in spaces]
    folded = details(f"{len(others)} more spaces", "".join(others)) if others else ""
    return f"<section><h2>Measures</h2>{first}{folded}</section>"


def _measure_table(sets: Sequence[SetComparison]) -> str:
    best = best_sets(sets) if len(sets) > 1 else {}
    head = "".join(
        f'<th title="{html.escape(text)}">{name.replace("_", " ")} {"↓" if better == "lower" else "↑"}</th>'
        for name, (better, text) in MEASURES.items()
    )
    rows = []
    for found in sets:
        cells = "".join(
            f"<td{_best_mark(found.title in best.get(name, ()))}>{_number(found.values[name])}</td>" for name in MEASURES
        )
        rows.append(f"<tr><th>{html.escape(found.title)}</th>{cells}</tr>")
    expected = ", ".join(f"{found.title} {_number(found.values['expected_coverage'])}" for found in sets)
    return (
        f'<div class="scroll"><table class="measures"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
        f'<p class="note">Coverage of equal distributions with as many samples: {html.escape(expected)}.</p>'
    )


def _best_mark(is_best: bool) -> str:
    return ' class="best"' if is_best else ""


def _classes(comparison: Comparison) -> str:
    sets = comparison.main_sets
    if not any(found.classes for found in sets):
        return '<section><h2>Classes</h2><p class="note">No sample has a known class.</p></section>'
    by_label: dict[int, dict[str, ClassComparison]] = {}
    for found in sets:
        for one in found.classes:
            by_label.setdefault(one.label, {})[found.title] = one
    top = "".join(f'<th colspan="{len(_COLUMNS) + 1}">{html.escape(found.title)}</th>' for found in sets)
    second = "".join(f"<th>{name.replace('_', ' ')}</th>" for _ in sets for name in ("state", *_COLUMNS))
    rows = "".join(_class_row(label, ones, sets, comparison.names) for label, ones in sorted(by_label.items()))
    return (
        '<section><h2>Classes</h2><p class="note">Click a heading to sort, a name to see the class alone in the scatter. '
        "Coverage is of the class's real samples; centroid distance and spread ratio are relative to the real class's spread.</p>"
        f'<div class="scroll tall"><table id="classes" class="measures"><thead><tr><th></th><th></th>{top}</tr>'
        f"<tr><th>class</th><th>real</th>{second}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _class_row(label: int, ones: Mapping[str, ClassComparison], sets: Sequence[SetComparison], names: Mapping[int, str]) -> str:
    cells = []
    for found in sets:
        one = ones.get(found.title)
        state = "" if one is None else one.state
        cells.append(f'<td class="edge {"bad" if state else ""}">{html.escape(state)}</td>')
        for name in _COLUMNS:
            value = None if one is None else getattr(one, name)
            shade = (
                f' style="--v:{value:.3f}" class="share"' if value is not None and name in ("coverage", "label_agreement") else ""
            )
            cells.append(f'<td data-v="{"" if value is None else f"{value:.6g}"}"{shade}>{_number(value)}</td>')
    num_real = max((one.num_real for one in ones.values()), default=0)
    name = names.get(label, str(label)) if label != NO_CLASS else "-"
    return f'<tr><th data-class="{label}">{html.escape(name)}</th><td data-v="{num_real}">{num_real:,}</td>{"".join(cells)}</tr>'


def _histograms(comparison: Comparison) -> str:
    parts = []
    for name, layer in reversed(comparison.layers.items()):
        found = layer.histograms
        rows = [
            (title, *(f"{value:.3f}" for value in found.wasserstein[place])) for place, title in enumerate(found.titles) if place
        ]
        head = ("", *(f"{first}" if first == last else f"{first} to {last}" for first, last in found.channels))
        content = figure(svg(histograms_figure(found)), f"values of {name}, all positions, by group of channels") + details(
            "1-Wasserstein distance from the real values, in real standard deviations", table(head, rows)
        )
        parts.append(f"<h3>{html.escape(name)}</h3>{content}" if name == comparison.main.layer else details(name, content))
    return f"<section><h2>Values by channel</h2>{''.join(parts)}</section>"


def _method(comparison: Comparison) -> str:
    texts = "".join(f"<li>{html.escape(text)}</li>" for text in statements(comparison))
    notes = "".join(f'<li class="bad">{html.escape(text)}</li>' for text in comparison.notes)
    return f"<section><h2>How these numbers were made</h2><ul>{texts}{notes}</ul></section>"


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
