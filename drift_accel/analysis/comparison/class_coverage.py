"""Class by class: how much of the real class is covered, how far the generated class lies from it, and what is missing."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from drift_accel.analysis.activations.batches import NO_CLASS
from drift_accel.evaluation.neighbourhoods import Neighbourhoods, expected_coverage

UNCOVERED_BELOW = 0.1  # of the coverage that real samples in the generated ones' place would have
BY_CHANCE = 0.01  # a class counts as uncovered only where so little coverage is rarer than this among equal distributions
COLLAPSED_BELOW = 0.1  # of the real class's variance
ABSENT, UNCOVERED, COLLAPSED, NOT_REAL, FINE = "absent", "uncovered", "collapsed", "not among the real", ""
MISSING = (ABSENT, UNCOVERED)
STATEMENT = (
    f"A class is absent where no generated sample carries its label; uncovered where its coverage is below {UNCOVERED_BELOW:g} "
    f"of what equal distributions would show, and that is rarer than {BY_CHANCE:g} by chance; collapsed where the variance of "
    f"its generated samples is below {COLLAPSED_BELOW:g} of the real class's. Missing means absent or uncovered."
)


@dataclass(frozen=True, kw_only=True)
class ClassComparison:
    """One class of a generated set against the same class of the real one. None: too few samples to say."""

    label: int
    name: str
    num_real: int
    num_generated: int
    coverage: float | None
    """Share of the class's real samples in whose ball a generated sample of any class lies."""
    centroid_distance: float | None
    """Between the class's two means, over the real class's spread (root mean square distance from its mean)."""
    expected_centroid_distance: float | None
    """What equal distributions would show with so many samples: sqrt(1/n + 1/m)."""
    spread_ratio: float | None
    """Variance of the generated class, summed over dimensions, over that of the real one."""
    label_agreement: float | None
    """Share of the k nearest real neighbours of the class's generated samples that carry its label."""
    state: str
    """absent, uncovered, collapsed, "not among the real", or empty."""


def compare_classes(
    real: np.ndarray,
    real_labels: np.ndarray,
    generated: np.ndarray,
    generated_labels: np.ndarray,
    neighbourhoods: Neighbourhoods,
    names: Mapping[int, str],
) -> list[ClassComparison]:
    """Every class of either set, by label; samples without a class (-1) belong to none.

    real [N, D], generated [M, D] and their labels; `neighbourhoods` of the same rows.
    """
    expected = expected_coverage(len(real), len(generated), neighbourhoods.k)
    agreement = (real_labels[neighbourhoods.nearest_real] == generated_labels[:, None]).mean(axis=1)  # [M]
    labels = np.union1d(real_labels, generated_labels)
    return [
        _compare_class(
            int(label),
            names.get(int(label), str(label)),
            real[real_labels == label],
            generated[generated_labels == label],
            neighbourhoods.covered[real_labels == label],
            agreement[generated_labels == label],
            expected,
        )
        for label in labels
        if label != NO_CLASS
    ]


def missing_classes(classes: list[ClassComparison]) -> list[ClassComparison]:
    """Those of which there is no generated sample, or none near the real ones."""
    return [found for found in classes if found.state in MISSING]


def worst_classes(classes: list[ClassComparison], count: int = 10) -> list[ClassComparison]:
    """The classes that the generated set serves worst: by coverage, then by centroid distance; those that can be judged."""
    judged = [found for found in classes if found.coverage is not None]
    return sorted(judged, key=lambda found: (found.coverage, -(found.centroid_distance or np.inf)))[:count]


def _compare_class(
    label: int,
    name: str,
    real: np.ndarray,
    generated: np.ndarray,
    covered: np.ndarray,
    agreement: np.ndarray,
    expected: float,
) -> ClassComparison:
    coverage = float(covered.mean()) if len(real) else None
    distance = chance = ratio = None
    if len(real) > 1 and len(generated):
        real_mean, real_variance = _mean_and_variance(real)
        generated_mean, generated_variance = _mean_and_variance(generated)
        if real_variance > 0:
            distance = float(np.linalg.norm(generated_mean - real_mean) / np.sqrt(real_variance))
            chance = float(np.sqrt(1 / len(real) + 1 / len(generated)))
            ratio = generated_variance / real_variance if len(generated) > 1 else None
    if not len(real):
        state = NOT_REAL
    elif not len(generated):
        state = ABSENT
    elif ratio is not None and ratio < COLLAPSED_BELOW:
        state = COLLAPSED
    elif coverage < UNCOVERED_BELOW * expected and (1 - expected) ** len(real) < BY_CHANCE:
        state = UNCOVERED
    else:
        state = FINE
    return ClassComparison(
        label=label,
        name=name,
        num_real=len(real),
        num_generated=len(generated),
        coverage=coverage,
        centroid_distance=distance,
        expected_centroid_distance=chance,
        spread_ratio=ratio,
        label_agreement=float(agreement.mean()) if len(generated) else None,
        state=state,
    )


def _mean_and_variance(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean [D] and the sample variance summed over dimensions (of one row 0), in float64."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    return mean, float(np.square(rows - mean).sum() / max(len(rows) - 1, 1))
