"""How a layer's values are distributed, group of channels by group, for several sets over the same bins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from drift_accel.analysis.comparison.layer_space import SampledSet

REACH = 4.0  # standard deviations of the real values to either side of their mean; the outermost bins hold what lies beyond


@dataclass(frozen=True, kw_only=True)
class ChannelHistograms:
    """Shares of values in bins, the real set first."""

    layer: str
    titles: tuple[str, ...]
    channels: tuple[tuple[int, int], ...]
    """First and last channel of each group, both belonging to it."""
    edges: np.ndarray
    """float64 [groups, bins + 1]"""
    shares: np.ndarray
    """float64 [sets, groups, bins]; each histogram sums to 1."""
    deviations: np.ndarray
    """float64 [groups]: standard deviation of the real values."""

    @property
    def overlap(self) -> np.ndarray:
        """float64 [sets, groups]: shared area of each set's histogram with the real one, 1 for equal ones."""
        return np.minimum(self.shares, self.shares[:1]).sum(axis=2)

    @property
    def wasserstein(self) -> np.ndarray:
        """float64 [sets, groups]: 1-Wasserstein distance of the histograms from the real one, in real standard deviations."""
        difference = np.abs(np.cumsum(self.shares - self.shares[:1], axis=2)[:, :, :-1]).sum(axis=2)
        width = np.diff(self.edges, axis=1)[:, 0]
        return difference * width / np.where(self.deviations > 0, self.deviations, 1.0)


def channel_histograms(sets: Sequence[SampledSet], layer: str, groups: int = 8, bins: int = 64) -> ChannelHistograms:
    """Histograms of all values of `layer` (all positions of a map) in `groups` runs of neighbouring channels.

    Two passes over the real set, one over the others; memory is that of one block. Raises ValueError for groups below 1 and
    fewer than 3 bins.
    """
    if groups < 1 or bins < 3:
        raise ValueError(f"histograms need at least 1 group and 3 bins, got {groups} and {bins}")
    num_channels = sets[0].source.layers[layer][0]
    borders = np.linspace(0, num_channels, min(groups, num_channels) + 1).round().astype(int)
    spans = list(zip(borders[:-1], borders[1:], strict=True))
    means, deviations = _moments(_blocks(sets[0], layer), spans)
    half = np.where(deviations > 0, REACH * deviations, 1.0)
    edges = np.linspace(means - half, means + half, bins + 1, axis=1)  # [groups, bins + 1]
    shares = np.stack([_shares(_blocks(chosen, layer), spans, edges) for chosen in sets])
    return ChannelHistograms(
        layer=layer,
        titles=tuple(chosen.title for chosen in sets),
        channels=tuple((int(first), int(after) - 1) for first, after in spans),
        edges=edges,
        shares=shares,
        deviations=deviations,
    )


def _blocks(chosen: SampledSet, layer: str) -> Iterator[np.ndarray]:
    """The layer block by block as [n, channels, positions]."""
    channels = chosen.source.layers[layer][0]
    for block in chosen.iterate(layer):
        yield block.reshape(len(block), channels, -1)


def _moments(blocks: Iterator[np.ndarray], spans) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each group's values, both float64 [groups]; sums are taken about the first block's mean."""
    shift = None
    count, total, squares = (np.zeros(len(spans)) for _ in range(3))
    for block in blocks:
        values = [block[:, first:after].astype(np.float64) for first, after in spans]
        if shift is None:
            shift = np.array([group.mean() for group in values])
        for place, group in enumerate(values):
            group -= shift[place]
            count[place] += group.size
            total[place] += group.sum()
            squares[place] += np.square(group).sum()
    mean = total / count
    return shift + mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))


def _shares(blocks: Iterator[np.ndarray], spans, edges: np.ndarray) -> np.ndarray:
    bins = edges.shape[1] - 1
    counts = np.zeros((len(spans), bins))
    for block in blocks:
        for place, (first, after) in enumerate(spans):
            low, high = edges[place, 0], edges[place, -1]
            places = (block[:, first:after].reshape(-1) - low) * (bins / (high - low))
            counts[place] += np.bincount(np.clip(places, 0, bins - 1).astype(np.int64), minlength=bins)
    return counts / counts.sum(axis=1, keepdims=True)
