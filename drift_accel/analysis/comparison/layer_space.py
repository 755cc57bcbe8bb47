"""The space in which sets are compared: a layer as it is stored, averaged over its positions, or its principal components.

A full map has far more numbers than there are samples, and a covariance over all of them says little and does not fit memory.
What was done instead stands in a sentence beside every number.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from drift_accel.analysis.activations.store import ActivationSet
from drift_accel.data.subset import balanced_counts
from drift_accel.foundation.random_streams import random_stream

REDUCTIONS = ("auto", "whole", "pooled", "pca")
WIDEST = 2048  # numbers a sample that "auto" takes as they are: a covariance of 34 MB in float64
READ_BYTES = 1 << 26  # of a layer in float32, read at a time


@dataclass(frozen=True, kw_only=True)
class SampledSet:
    """A set, or a class-balanced part of it: what is compared."""

    title: str
    """What tables and plots call it."""
    source: ActivationSet
    indices: np.ndarray | None
    """int64 [n], ascending, in the set; None for all of it."""

    def __len__(self) -> int:
        return len(self.source) if self.indices is None else len(self.indices)

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]; -1 where the class is not known."""
        return self.source.labels if self.indices is None else self.source.labels[self.indices]

    @property
    def numbers(self) -> np.ndarray:
        """int64 [n]: which samples of the set these are."""
        return np.arange(len(self.source)) if self.indices is None else self.indices

    def iterate(self, layer: str) -> Iterator[np.ndarray]:
        """A layer in order, float32 [some, D]. Raises ValueError for a value that is not finite, naming the sample."""
        step = max(16, min(1024, READ_BYTES // (4 * prod(self.source.layers[layer]))))
        if self.indices is None:
            blocks = self.source.iterate(layer, step)
        else:
            starts = range(0, len(self.indices), step)
            blocks = (self.source.rows(layer, self.indices[start : start + step]) for start in starts)
        first = 0
        for block in blocks:
            wrong = ~np.isfinite(block).all(axis=1)
            if wrong.any():
                number = int(self.numbers[first + int(wrong.argmax())])
                path = self.source.sample(number)["original_path"]
                raise ValueError(
                    f"layer {layer!r} of {self.title!r} holds a NaN or an infinite value in sample {number} ({path}) and "
                    f"{int(wrong.sum()) - 1} more of its batch: look at that picture and the model, then extract the set again"
                )
            yield block
            first += len(block)


def sample_set(source: ActivationSet, title: str, max_samples: int | None = None, seed: int = 0) -> SampledSet:
    """`source`, or `max_samples` of it spread evenly over its classes, drawn by `seed`. Raises ValueError below 1."""
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}: give at least 1")
    if max_samples is None or max_samples >= len(source):
        return SampledSet(title=title, source=source, indices=None)
    return SampledSet(title=title, source=source, indices=balanced_choice(source.labels, max_samples, seed))


def balanced_choice(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """`count` places of `labels` [N], ascending, spread over the labels as evenly as they allow."""
    classes, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = balanced_counts(counts, count)
    chosen = [
        random_stream(seed, "analysis/samples", place).permutation(np.flatnonzero(places == place))[: kept[place]]
        for place in range(len(classes))
    ]
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """One layer of several sets in one space."""

    layer: str
    shape: tuple[int, ...]
    """Of one sample as it is stored."""
    space: str
    """The space in a sentence."""
    rows: tuple[np.ndarray, ...]
    """float32 [n, D] of each set, in the order given."""


def read_layer(sets: Sequence[SampledSet], layer: str, reduction: str = "auto", components: int = 256) -> LayerRows:
    """Read a layer of `sets`, the real one first, into one space.

    reduction: "whole"; "pooled" (maps averaged over their positions); "pca" (`components` principal components of the real
    set); "auto": whole up to WIDEST numbers, else pooled where that brings it below, else pca. Memory: n x D float32 of what the
    space holds. Raises ValueError for another reduction, maps that have no positions to average, fewer than 2 components.
    """
    shape = sets[0].source.layers[layer]
    kind = choose_reduction(layer, shape, reduction)
    if kind == "whole":
        space = f"as stored, {prod(shape):,} numbers a sample"
        return LayerRows(layer=layer, shape=shape, space=space, rows=tuple(_joined(chosen.iterate(layer)) for chosen in sets))
    if kind == "pooled":
        rows = tuple(
            _joined(block.reshape(len(block), shape[0], -1).mean(axis=2) for block in chosen.iterate(layer)) for chosen in sets
        )
        space = f"map {'x'.join(map(str, shape))} averaged over its {prod(shape[1:]):,} positions, {shape[0]:,} numbers a sample"
        return LayerRows(layer=layer, shape=shape, space=space, rows=rows)
    model = _fit_components(sets[0], layer, components)
    rows = tuple(_joined(model.transform(block).astype(np.float32) for block in chosen.iterate(layer)) for chosen in sets)
    kept = 100 * float(model.explained_variance_ratio_.sum())
    space = (
        f"{model.n_components_:,} principal components of the real set's {prod(shape):,} numbers a sample, with {kept:.1f} % of "
        "its variance; what generated samples do outside of them is not seen"
    )
    return LayerRows(layer=layer, shape=shape, space=space, rows=rows)


def choose_reduction(layer: str, shape: Sequence[int], reduction: str) -> str:
    """What "auto" means for a layer of this shape; the other reductions are checked against it. Raises ValueError."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"the space is {reduction!r}: choose one of {', '.join(REDUCTIONS)}")
    if reduction == "pooled" and len(shape) < 2:
        raise ValueError(f"layer {layer!r} has shape {tuple(shape)}, no positions to average: choose whole or pca")
    if reduction != "auto":
        return reduction
    if prod(shape) <= WIDEST:
        return "whole"
    return "pooled" if len(shape) > 1 and shape[0] <= WIDEST else "pca"


def _fit_components(real: SampledSet, layer: str, components: int):
    """scikit-learn's IncrementalPCA of the real set's layer, block by block."""
    try:
        from sklearn.decomposition import IncrementalPCA
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("principal components need scikit-learn: pip install 'drift_accel[analysis]'") from error

    if components < 2:
        raise ValueError(f"components is {components}: give at least 2")
    model = IncrementalPCA(n_components=min(components, len(real), prod(real.source.layers[layer])))
    for rows in _groups(real.iterate(layer), model.n_components):
        model.partial_fit(rows.astype(np.float64))
    return model


def _groups(blocks: Iterable[np.ndarray], least: int) -> Iterator[np.ndarray]:
    """Blocks joined until they have `least` rows; what is left at the end joins the last group."""
    ready: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(len, waiting)) >= least:
            if ready:
                yield np.concatenate(ready)
            ready, waiting = waiting, []
    yield np.concatenate([*ready, *waiting])


def _joined(blocks: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(blocks))
