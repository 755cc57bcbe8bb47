"""What a comparison leaves on disk beside its page: one JSON record, tables as CSV, embeddings as safetensors."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from drift_accel.analysis.comparison.channel_histograms import REACH
from drift_accel.analysis.comparison.class_coverage import STATEMENT, ClassComparison, missing_classes, worst_classes
from drift_accel.analysis.comparison.compare import Comparison, LayerComparison, facts_of
from drift_accel.analysis.comparison.measures import KERNEL_ROWS, KERNEL_SUBSETS, MEASURES, SetComparison, rankings
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json

FORMAT = 1
RECORD_NAME = "comparison.json"
NUM_OUTLIERS = 12


def statements(comparison: Comparison) -> list[str]:
    """How the numbers were made, in sentences."""
    k = comparison.config.k
    radii = comparison.main_sets[0].neighbourhoods.real_radii
    return [
        f"A sample's ball reaches to its {k}-th neighbour in its own set: the threshold comes from the data's own distances. "
        f"In {comparison.main.layer} the real balls have radii of {np.median(radii):.4g} (median; 5 % below "
        f"{np.quantile(radii, 0.05):.4g}, 5 % above {np.quantile(radii, 0.95):.4g}).",
        "Precision and recall after Kynkaanniemi et al. 2019, density and coverage after Naeem et al. 2020, Euclidean distances. "
        "Few far-off generated samples have large balls and can make recall high; coverage does not have that weakness.",
        f"Kernel distance: mean over {KERNEL_SUBSETS} subsets of at most {KERNEL_ROWS:,} samples (Binkowski et al. 2018). "
        "Frechet and kernel distances depend on the scale of the features: compare them within a layer only.",
        STATEMENT,
        f"Isolation: distance to the {k}-th nearest real sample over the median of that distance among real samples; about 1 is "
        "as typical as real samples are.",
        f"Histograms: {REACH:g} real standard deviations to either side of the real mean; the outermost bins hold the rest.",
        "Embeddings are fitted on the standardised real samples alone, generated ones are projected; numbers there are in units "
        "of the real coordinates' spread and say less than those in feature space.",
    ]


def comparison_record(comparison: Comparison, command: Sequence[str] = ()) -> dict[str, Any]:
    """Everything but single samples, as plain values."""
    return {
        "format": FORMAT,
        "sets": [facts_of(chosen) for chosen in comparison.sets],
        "configuration": asdict(comparison.config),
        "statements": statements(comparison),
        "notes": comparison.notes,
        "main_layer": comparison.main.layer,
        "layers": {name: _layer_record(layer) for name, layer in comparison.layers.items()},
        "embeddings": {
            method: {"facts": found.embedding.facts, "layer": comparison.main.layer, **_sets_record(found.sets)}
            for method, found in comparison.embedded.items()
        },
        "outliers": {
            found.title: [
                {"sample": int(chosen.numbers[place]), "isolation": float(found.neighbourhoods.isolation[place])}
                for place in outliers(found)
            ]
            for found, chosen in zip(comparison.main_sets, comparison.sets[1:], strict=True)
        },
        "provenance": collect_provenance(command=command),
    }


def outliers(found: SetComparison, count: int = NUM_OUTLIERS) -> np.ndarray:
    """The most isolated generated samples, int64, most isolated first."""
    return np.argsort(-found.neighbourhoods.isolation, kind="stable")[:count]


def write_tables(comparison: Comparison, folder: Path, command: Sequence[str] = ()) -> None:
    """Write comparison.json, the CSV tables and the embeddings into `folder`."""
    atomic_write_json(folder / RECORD_NAME, comparison_record(comparison, command))
    _write_csv(folder / "measures.csv", ("space", "set", *_value_names(comparison)), _measure_rows(comparison))
    names = [part.name for part in fields(ClassComparison)]
    _write_csv(folder / "classes.csv", ("layer", "set", *names), _class_rows(comparison))
    _write_csv(folder / "histograms.csv", _HISTOGRAM_COLUMNS, _histogram_rows(comparison))
    places = [f"{method}_{axis}" for method in comparison.embedded for axis in "xy"]
    _write_csv(folder / "generated_samples.csv", (*_SAMPLE_COLUMNS, *_GENERATED_COLUMNS, *places), _generated_rows(comparison))
    _write_csv(folder / "real_samples.csv", (*_SAMPLE_COLUMNS, *_REAL_COLUMNS, *places), _real_rows(comparison))
    for method, found in comparison.embedded.items():
        found.embedding.save(folder / embedding_name(method))


def embedding_name(method: str) -> str:
    """The file of a saved embedding."""
    return f"embedding_{method}.safetensors"


_SAMPLE_COLUMNS = ("set", "sample", "class_id", "class_name", "original_path", "isolation")
_GENERATED_COLUMNS = ("real_balls", "nearest_real", "nearest_real_distance")
_REAL_COLUMNS = ("against", "covered", "generated_balls", "nearest_generated", "nearest_generated_distance")
_HISTOGRAM_COLUMNS = ("layer", "set", "first_channel", "last_channel", "bin_from", "bin_to", "share")


def _layer_record(layer: LayerComparison) -> dict[str, Any]:
    record = {"shape": list(layer.shape), "space": layer.space, **_sets_record(layer.sets)}
    histograms = layer.histograms
    record["histograms"] = {
        "channels": [list(span) for span in histograms.channels],
        "overlap": dict(zip(histograms.titles, histograms.overlap.tolist(), strict=True)),
        "wasserstein": dict(zip(histograms.titles, histograms.wasserstein.tolist(), strict=True)),
    }
    return record


def _sets_record(sets: Sequence[SetComparison]) -> dict[str, Any]:
    return {
        "sets": {found.title: found.values for found in sets},
        "best_first": rankings(sets),
        "missing_classes": {found.title: [_class_text(one) for one in missing_classes(found.classes)] for found in sets},
        "collapsed_classes": {
            found.title: [_class_text(one) for one in found.classes if one.state == "collapsed"] for found in sets
        },
        "worst_classes": {found.title: [_class_text(one) for one in worst_classes(found.classes)] for found in sets},
    }


def _class_text(found: ClassComparison) -> dict[str, Any]:
    return {"class_id": found.label, "name": found.name, "coverage": found.coverage, "state": found.state}


def _value_names(comparison: Comparison) -> list[str]:
    return [*MEASURES, "kernel_std", "expected_coverage"]


def _measure_rows(comparison: Comparison) -> Iterator[tuple]:
    spaces = [(name, layer.sets) for name, layer in comparison.layers.items()]
    spaces += [(f"{comparison.main.layer} {method}", found.sets) for method, found in comparison.embedded.items()]
    for space, sets in spaces:
        for found in sets:
            yield (space, found.title, *(found.values[name] for name in _value_names(comparison)))


def _class_rows(comparison: Comparison) -> Iterator[tuple]:
    for name, layer in comparison.layers.items():
        for found in layer.sets:
            for one in found.classes:
                yield (name, found.title, *asdict(one).values())


def _histogram_rows(comparison: Comparison) -> Iterator[tuple]:
    for name, layer in comparison.layers.items():
        found = layer.histograms
        for set_place, title in enumerate(found.titles):
            for group, (first, last) in enumerate(found.channels):
                edges = found.edges[group]
                for low, high, share in zip(edges[:-1], edges[1:], found.shares[set_place, group], strict=True):
                    yield (name, title, first, last, float(low), float(high), float(share))


def _generated_rows(comparison: Comparison) -> Iterator[tuple]:
    real_numbers = comparison.sets[0].numbers
    for place, (found, chosen) in enumerate(zip(comparison.main_sets, comparison.sets[1:], strict=True), start=1):
        near = found.neighbourhoods
        for row, known in enumerate(_known(comparison, place)):
            nearest = (int(real_numbers[near.nearest_real[row, 0]]), float(near.nearest_real_distances[row, 0]))
            where = [float(v) for one in comparison.embedded.values() for v in one.coordinates[place][row]]
            yield (chosen.title, *known, float(near.isolation[row]), int(near.real_balls[row]), *nearest, *where)


def _real_rows(comparison: Comparison) -> Iterator[tuple]:
    known = list(_known(comparison, 0))
    for found, chosen in zip(comparison.main_sets, comparison.sets[1:], strict=True):
        near = found.neighbourhoods
        for row, facts in enumerate(known):
            nearest = (int(chosen.numbers[near.nearest_generated[row, 0]]), float(near.nearest_generated_distances[row, 0]))
            where = [float(v) for one in comparison.embedded.values() for v in one.coordinates[0][row]]
            counts = (bool(near.covered[row]), int(near.generated_balls[row]))
            isolation = float(near.real_isolation[row])
            yield (comparison.sets[0].title, *facts, isolation, found.title, *counts, *nearest, *where)


def _known(comparison: Comparison, place: int) -> Iterator[tuple]:
    """sample, class_id, class_name, original_path of every sample of a set."""
    chosen = comparison.sets[place]
    numbers = chosen.numbers.tolist()
    for number, sample in zip(numbers, chosen.source.samples(numbers), strict=True):
        yield (number, sample["class_id"], sample["class_name"], sample["original_path"])


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
