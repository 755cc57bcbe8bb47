"""The numbers that compare a generated set with a real one in a given space, and which way is better."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drift_accel.analysis.comparison.class_coverage import COLLAPSED, ClassComparison, compare_classes, missing_classes
from drift_accel.evaluation.frechet import frechet_distance, gaussian_statistics
from drift_accel.evaluation.kernel_distance import kernel_distance
from drift_accel.evaluation.neighbourhoods import Neighbourhoods, expected_coverage, find_neighbourhoods

KERNEL_SUBSETS, KERNEL_ROWS = 20, 1000
LOWER, HIGHER = "lower", "higher"
# In the order of tables. What each says is for readers of the page.
MEASURES: dict[str, tuple[str, str]] = {
    "frechet": (LOWER, "squared Frechet distance of two Gaussians fitted to the samples"),
    "kernel": (LOWER, "squared maximum mean discrepancy, cubic kernel, unbiased: about 0 for equal distributions"),
    "precision": (HIGHER, "share of generated samples in any real ball"),
    "recall": (HIGHER, "share of real samples in any generated ball"),
    "density": (HIGHER, "real balls around a generated sample over k: about 1 for equal distributions"),
    "coverage": (HIGHER, "share of real balls with a generated sample in them"),
    "least_class_coverage": (HIGHER, "coverage of the class that is covered worst"),
    "missing_classes": (LOWER, "classes that are absent or uncovered"),
    "collapsed_classes": (LOWER, "classes whose generated samples hardly vary"),
    "centroid_distance": (LOWER, "distance of class means over the real class's spread, mean over classes with samples in both"),
    "label_agreement": (HIGHER, "share of the k real neighbours that carry the generated sample's label"),
}


@dataclass(frozen=True, kw_only=True)
class SetComparison:
    """One generated set against the real one in one space."""

    title: str
    values: dict[str, float | int | None]
    """By the names of MEASURES, and kernel_std, expected_coverage."""
    classes: list[ClassComparison]
    neighbourhoods: Neighbourhoods
    singular: tuple[str, ...] = ()
    """The sets, this one or the real one, whose covariance is singular, which biases the Frechet distance."""


class RealReference:
    """A real set in one space, against which generated sets are measured one after the other."""

    def __init__(self, rows: np.ndarray, labels: np.ndarray, names: Mapping[int, str], *, k: int, device: torch.device):
        """rows [N, D], labels [N] (-1 where unknown). Raises ValueError for fewer than two rows."""
        self.rows, self.labels, self.names, self.k, self.device = rows, labels, names, k, device
        self.statistics = gaussian_statistics(rows)

    def compare(self, title: str, rows: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> SetComparison:
        """Measure generated rows [M, D] with labels [M]. Raises ValueError for k samples or fewer."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            frechet = frechet_distance(*self.statistics, *gaussian_statistics(rows))
        texts = [str(warning.message) for warning in caught if "singular" in str(warning.message)]
        marks = {"covariance_a": "the real set", "covariance_b": title}
        singular = tuple(name for mark, name in marks.items() if any(mark in text for text in texts))
        # Subsets of everything would all be the same.
        num_subsets = 1 if len(rows) == len(self.rows) <= KERNEL_ROWS else KERNEL_SUBSETS
        kernel, deviation = kernel_distance(self.rows, rows, num_subsets=num_subsets, subset_size=KERNEL_ROWS, seed=seed)
        neighbourhoods = find_neighbourhoods(torch.from_numpy(self.rows).to(self.device), torch.from_numpy(rows), self.k)
        classes = compare_classes(self.rows, self.labels, rows, labels, neighbourhoods, self.names)
        values = {
            "frechet": frechet,
            "kernel": kernel,
            "kernel_std": deviation,
            "precision": neighbourhoods.precision,
            "recall": neighbourhoods.recall,
            "density": neighbourhoods.density,
            "coverage": neighbourhoods.coverage,
            "expected_coverage": expected_coverage(len(self.rows), len(rows), self.k),
            **_class_values(classes),
        }
        return SetComparison(title=title, values=values, classes=classes, neighbourhoods=neighbourhoods, singular=singular)


def rankings(compared: Sequence[SetComparison]) -> dict[str, list[str]]:
    """By measure: the titles of sets that have it, best first, equal ones in the order given."""
    order = {}
    for name, (better, _) in MEASURES.items():
        sign = 1 if better == LOWER else -1
        having = [found for found in compared if found.values[name] is not None]
        order[name] = [found.title for found in sorted(having, key=lambda found, n=name, s=sign: s * found.values[n])]
    return order


def best_sets(compared: Sequence[SetComparison]) -> dict[str, set[str]]:
    """By measure: the titles of all sets that share the best value."""
    values = {found.title: found.values for found in compared}
    return {
        name: {title for title in order if values[title][name] == values[order[0]][name]}
        for name, order in rankings(compared).items()
    }


def _class_values(classes: Sequence[ClassComparison]) -> dict[str, float | int | None]:
    if not classes:  # no sample has a known class
        names = ("least_class_coverage", "missing_classes", "collapsed_classes", "centroid_distance", "label_agreement")
        return dict.fromkeys(names)
    coverages = [found.coverage for found in classes if found.coverage is not None]
    distances = [found.centroid_distance for found in classes if found.centroid_distance is not None]
    counts = np.array([found.num_generated for found in classes if found.label_agreement is not None])
    agreements = np.array([found.label_agreement for found in classes if found.label_agreement is not None])
    return {
        "least_class_coverage": min(coverages, default=None),
        "missing_classes": len(missing_classes(list(classes))),
        "collapsed_classes": sum(found.state == COLLAPSED for found in classes),
        "centroid_distance": float(np.mean(distances)) if distances else None,
        "label_agreement": float(counts @ agreements / counts.sum()) if len(counts) else None,
    }
