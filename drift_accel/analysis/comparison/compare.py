"""Generated sets of activations against a real one: every layer in feature space, one layer in its embeddings too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from drift_accel.analysis.activations.batches import NO_CLASS
from drift_accel.analysis.activations.store import ActivationSet, require_same_layers
from drift_accel.analysis.comparison.channel_histograms import ChannelHistograms, channel_histograms
from drift_accel.analysis.comparison.embedding import METHODS, Embedding, fit_embedding
from drift_accel.analysis.comparison.layer_space import REDUCTIONS, LayerRows, SampledSet, read_layer
from drift_accel.analysis.comparison.measures import RealReference, SetComparison
from drift_accel.foundation.devices import find_device


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    """How sets are compared. Raises ValueError for values that cannot work."""

    layers: tuple[str, ...] | None = None
    """Layers to compare; None: all that every set has."""
    main_layer: str | None = None
    """The layer of embeddings, samples' scores and the page; None: the last of `layers`."""
    k: int = 5
    """Neighbours: a ball reaches to the k-th in its own set."""
    reduction: str = "auto"
    """The space of wide layers; see layer_space.read_layer."""
    components: int = 256
    """Principal components where the space is made of them."""
    embeddings: tuple[str, ...] = METHODS
    """Of the main layer; empty for none."""
    groups: int = 8
    """Histograms a layer, each of so many neighbouring channels as make that number."""
    seed: int = 0
    """Of embeddings and of the kernel distance's subsets."""
    device: str = "auto"

    def __post_init__(self):
        for name in ("k", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")
        if self.components < 2:
            raise ValueError(f"--components is {self.components}: give at least 2")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"--space is {self.reduction!r}: choose one of {', '.join(REDUCTIONS)}")
        unknown = [name for name in self.embeddings if name not in METHODS]
        if unknown:
            raise ValueError(f"--embeddings has {', '.join(unknown)}: choose of {', '.join(METHODS)}")
        if self.layers is not None and self.main_layer is not None and self.main_layer not in self.layers:
            raise ValueError(f"--main_layer is {self.main_layer!r}, which is not among --layers {', '.join(self.layers)}")


@dataclass(frozen=True, kw_only=True)
class LayerComparison:
    """One layer: its space, its numbers, its histograms."""

    layer: str
    shape: tuple[int, ...]
    space: str
    sets: list[SetComparison]
    histograms: ChannelHistograms


@dataclass(frozen=True, kw_only=True)
class EmbeddedSets:
    """The main layer in the plane."""

    embedding: Embedding
    coordinates: tuple[np.ndarray, ...]
    """float32 [n, 2] of each set, the real one first."""
    sets: list[SetComparison]
    """Measured in units of the real coordinates' spread."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that was found."""

    config: ComparisonConfig
    sets: tuple[SampledSet, ...]
    """The real one first."""
    names: Mapping[int, str]
    layers: dict[str, LayerComparison]
    main: LayerRows
    embedded: dict[str, EmbeddedSets] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def main_sets(self) -> list[SetComparison]:
        """The generated sets in the main layer's space."""
        return self.layers[self.main.layer].sets


def compare_sets(
    real: SampledSet,
    generated: Sequence[SampledSet],
    config: ComparisonConfig | None = None,
    *,
    saved: Mapping[str, Embedding] | None = None,
    log: Callable[[str], None] = print,
) -> Comparison:
    """Compare every generated set with the real one; everything that can be checked is checked before anything is computed.

    saved: embeddings by method that are used instead of fitted ones (fitted before, on the same layer and space).
    Raises ValueError for no generated set, sets of k samples or fewer, no common layer, layers of different shapes, classes that
    mean different things, values that are not finite; ModuleNotFoundError where an embedding's library is missing.
    """
    config = config or ComparisonConfig()
    sets = (real, *generated)
    layers = check_sets(sets, config)
    main_layer = config.main_layer or layers[-1]
    for method, embedding in (saved or {}).items():
        if embedding.facts.get("layer") != main_layer:
            raise ValueError(
                f"the saved embedding {method} is of layer {embedding.facts.get('layer')!r}, the main layer is {main_layer!r}: "
                "choose it by --main_layer, or fit a new one"
            )
    names = {label: name for chosen in reversed(sets) for label, name in chosen.source.class_names().items()}
    device = find_device(config.device)
    compared, main = {}, None
    for layer in layers:
        log(f"{layer}: reading")
        rows = read_layer(sets, layer, config.reduction, config.components)
        found = _compare_rows(rows.rows, sets, names, config, device, lambda text, layer=layer: log(f"{layer}: {text}"))
        histograms = channel_histograms(sets, layer, config.groups)
        compared[layer] = LayerComparison(layer=layer, shape=rows.shape, space=rows.space, sets=found, histograms=histograms)
        main = rows if layer == main_layer else main
    embedded = {}
    for method in config.embeddings:
        log(f"{main_layer}: {method}")
        embedding = (saved or {}).get(method) or fit_embedding(method, main.rows[0], config.seed)
        embedding.facts["layer"] = main_layer
        # Each set by itself: its place must not depend on which others are shown beside it.
        coordinates = tuple(_project(embedding, rows, method) for rows in main.rows)
        unit = max(float(np.sqrt(coordinates[0].var(axis=0, dtype=np.float64).sum())), 1e-12)
        centred = tuple(((points - coordinates[0].mean(axis=0)) / unit).astype(np.float32) for points in coordinates)
        found = _compare_rows(centred, sets, names, config, device, lambda text: None)
        embedded[method] = EmbeddedSets(embedding=embedding, coordinates=coordinates, sets=found)
    notes = [note for layer in compared.values() for note in _singular_note(layer)]
    return Comparison(
        config=config, sets=sets, names=names, layers=compared, main=main, embedded=embedded, notes=notes
    )  # fmt: skip


def check_sets(sets: Sequence[SampledSet], config: ComparisonConfig) -> tuple[str, ...]:
    """The layers to compare. Raises ValueError as `compare_sets` does, before anything is computed."""
    real, generated = sets[0], sets[1:]
    if not generated:
        raise ValueError("there is no generated set: give at least one beside the real one")
    titles = [chosen.title for chosen in sets]
    doubled = sorted({title for title in titles if titles.count(title) > 1})
    if doubled:
        raise ValueError(f"two sets are called {doubled[0]!r}: give each its own title")
    for chosen in sets:
        if len(chosen) <= config.k:
            raise ValueError(
                f"{chosen.title!r} has {len(chosen)} samples; a {config.k}-th neighbour needs at least {config.k + 1}: "
                "extract more, or give a smaller --k"
            )
        _check_origins(real, chosen)
    common = config.layers
    for chosen in generated:
        common = require_same_layers(real.source, chosen.source, common)
        if config.layers is None and chosen is not generated[-1]:
            common = tuple(layer for layer in common if all(layer in other.source.layers for other in generated))
            if not common:
                raise ValueError(f"no layer is in all of the sets {', '.join(titles)}: extract them through one model")
    if config.main_layer is not None and config.main_layer not in common:
        raise ValueError(f"--main_layer is {config.main_layer!r}: the sets have {', '.join(common)} in common")
    return common


def _check_origins(real: SampledSet, chosen: SampledSet) -> None:
    """Raise ValueError where two sets come from different models, or a class number stands for two different classes."""
    models = [found.source.metadata.get("model") for found in (real, chosen)]
    hashes = [model.get("weights_sha256") if isinstance(model, Mapping) else None for model in models]
    if all(hashes) and hashes[0] != hashes[1]:
        raise ValueError(
            f"{real.title!r} and {chosen.title!r} were extracted through models of different weights ({hashes[0][:8]} and "
            f"{hashes[1][:8]}): their activations cannot be compared; extract both through one model"
        )
    for label in np.intersect1d(real.source.labels, chosen.source.labels):
        if label == NO_CLASS:
            continue
        keys = [_class_key(found.source, int(label)) for found in (real, chosen)]
        if all(keys) and keys[0] != keys[1]:
            raise ValueError(
                f"class {label} is {keys[0]!r} in {real.title!r} and {keys[1]!r} in {chosen.title!r}: their labels come from "
                "different orders of classes; extract one of them again with the other's class table"
            )


def _class_key(source: ActivationSet, label: int) -> str:
    return str(source.sample(int(source.class_rows(label)[0])).get("synset_id") or "")


def _compare_rows(
    rows: Sequence[np.ndarray], sets: Sequence[SampledSet], names, config: ComparisonConfig, device, log
) -> list[SetComparison]:
    reference = RealReference(rows[0], sets[0].labels, names, k=config.k, device=device)
    found = []
    for chosen, its_rows in zip(sets[1:], rows[1:], strict=True):
        log(f"comparing {chosen.title}")
        found.append(reference.compare(chosen.title, its_rows, chosen.labels, seed=config.seed))
    return found


def _project(embedding: Embedding, rows: np.ndarray, method: str) -> np.ndarray:
    points = embedding.transform(rows)
    if not np.isfinite(points).all():
        raise ValueError(f"{method} gives no place to {int((~np.isfinite(points).all(axis=1)).sum())} samples: leave it out")
    return points


def _singular_note(layer: LayerComparison) -> list[str]:
    titles = list(dict.fromkeys(title for found in layer.sets for title in found.singular))
    if not titles:
        return []
    return [
        f"{layer.layer}: the covariance of {', '.join(titles)} is singular (numbers that never vary, or too few samples); "
        "where samples are too few the Frechet distance is too large, so compare sets of equally many samples"
    ]


def facts_of(chosen: SampledSet) -> dict[str, Any]:
    """What a record says of a set."""
    return {
        "title": chosen.title,
        "set": chosen.source.name,
        "samples": len(chosen),
        "of": len(chosen.source),
        "classes": int((np.unique(chosen.labels) != NO_CLASS).sum()),
        "model": chosen.source.metadata.get("model"),
        "source": chosen.source.metadata.get("source"),
    }
