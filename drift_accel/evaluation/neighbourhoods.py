"""Who is near whom in two sets of features: balls around real and generated points, counted point by point.

The ball of a point reaches to its k-th neighbour in its own set, itself not counted, and owns its border. From one pass over all
pairs come precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020, arXiv
2002.09797, equations 3 and 4) and the nearest neighbours across the sets. Distances as in precision_recall: float64, in tiles.
"""

from dataclasses import dataclass

import numpy as np
import torch

from drift_accel.evaluation.precision_recall import ArrayLike, check_features, squared_distances, squared_radii, tiles

EXACT_BYTES = 1 << 28  # differences of neighbours held at a time


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """Real points [N] and generated ones [M], seen from each other. All arrays are numpy."""

    k: int
    """Which neighbour a ball reaches to."""
    real_radii: np.ndarray
    """float64 [N]"""
    generated_radii: np.ndarray
    """float64 [M]"""
    real_balls: np.ndarray
    """int64 [M]: how many real balls each generated point lies in."""
    generated_balls: np.ndarray
    """int64 [N]: how many generated balls each real point lies in."""
    covered: np.ndarray
    """bool [N]: whether a generated point lies in the ball of the real one."""
    nearest_real: np.ndarray
    """int64 [M, k]: the real points nearest to each generated one, nearest first."""
    nearest_real_distances: np.ndarray
    """float64 [M, k]"""
    nearest_generated: np.ndarray
    """int64 [N, k]: the generated points nearest to each real one."""
    nearest_generated_distances: np.ndarray
    """float64 [N, k]"""

    @property
    def precision(self) -> float:
        """Share of generated points in any real ball."""
        return float((self.real_balls > 0).mean())

    @property
    def recall(self) -> float:
        """Share of real points in any generated ball."""
        return float((self.generated_balls > 0).mean())

    @property
    def density(self) -> float:
        """Mean number of real balls around a generated point, over k; about 1 for equal distributions, not bounded by 1."""
        return float(self.real_balls.mean() / self.k)

    @property
    def coverage(self) -> float:
        """Share of real balls with a generated point in them; `expected_coverage` for equal distributions."""
        return float(self.covered.mean())

    @property
    def isolation(self) -> np.ndarray:
        """float64 [M]: distance to the k-th nearest real point, over the median of that distance among real points.

        1 where a generated point lies as a typical real one does; infinite or NaN where half of the real points are copies.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.nearest_real_distances[:, -1] / np.median(self.real_radii)

    @property
    def real_isolation(self) -> np.ndarray:
        """float64 [N]: the same of the real points among themselves."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.real_radii / np.median(self.real_radii)


def find_neighbourhoods(real: ArrayLike, generated: ArrayLike, k: int = 5, tile_size: int = 4096) -> Neighbourhoods:
    """Balls and neighbours of real features [N, D] and generated ones [M, D].

    Memory beside the features: a few times tile_size^2 x 8 bytes. Runs on the device of `real`. Raises ValueError for wrong
    shapes, non-finite values, and sets of k points or fewer.
    """
    real = check_features(real, "real", k)
    generated = check_features(generated, "generated", k).to(real.device)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real and generated have different dimensions, {real.shape[1]} and {generated.shape[1]}")
    centre = real.mean(dim=0, dtype=torch.float64)
    squared_real = squared_radii(real, centre, k, tile_size)  # [N]
    squared_generated = squared_radii(generated, centre, k, tile_size)  # [M]
    num_real, num_generated, device = len(real), len(generated), real.device
    real_balls = torch.zeros(num_generated, dtype=torch.int64, device=device)
    generated_balls = torch.zeros(num_real, dtype=torch.int64, device=device)
    covered = torch.zeros(num_real, dtype=torch.bool, device=device)
    to_real, to_generated = _Nearest(num_generated, k, device), _Nearest(num_real, k, device)
    for row, points, point_norms in tiles(generated, centre, tile_size):
        here = slice(row, row + len(points))
        for column, centres, centre_norms in tiles(real, centre, tile_size):
            there = slice(column, column + len(centres))
            squared, allowance = squared_distances(points, point_norms, centres, centre_norms)  # [m, n]
            to_real.merge(here, squared, column)
            to_generated.merge(there, squared.T, row)
            lowest = squared.sub_(allowance)
            in_real = lowest <= squared_real[None, there]
            real_balls[here] += in_real.sum(dim=1)
            covered[there] |= in_real.any(dim=0)
            generated_balls[there] += (lowest <= squared_generated[here, None]).sum(dim=0)
    real_indices, real_distances = to_real.exact(generated, real)
    generated_indices, generated_distances = to_generated.exact(real, generated)
    return Neighbourhoods(
        k=k,
        real_radii=squared_real.sqrt().cpu().numpy(),
        generated_radii=squared_generated.sqrt().cpu().numpy(),
        real_balls=real_balls.cpu().numpy(),
        generated_balls=generated_balls.cpu().numpy(),
        covered=covered.cpu().numpy(),
        nearest_real=real_indices,
        nearest_real_distances=real_distances,
        nearest_generated=generated_indices,
        nearest_generated_distances=generated_distances,
    )


def expected_coverage(num_real: int, num_generated: int, k: int) -> float:
    """The coverage that generated points of the real distribution would have (Naeem et al. 2020, lemma 2)."""
    steps = np.arange(1, k + 1, dtype=np.float64)
    return float(1 - np.prod((num_real - steps) / (num_real + num_generated - steps)))


class _Nearest:
    """The k nearest columns of each row, as tiles of squared distances come by."""

    def __init__(self, num_rows: int, k: int, device: torch.device):
        self.squared = torch.full((num_rows, k), torch.inf, dtype=torch.float64, device=device)
        self.indices = torch.zeros((num_rows, k), dtype=torch.int64, device=device)

    def merge(self, rows: slice, squared: torch.Tensor, first_column: int) -> None:
        """Take in squared distances [rows, columns] whose columns begin at `first_column`."""
        k = self.squared.shape[1]
        values, places = squared.topk(min(k, squared.shape[1]), dim=1, largest=False)
        both = torch.cat([self.squared[rows], values], dim=1)
        which = torch.cat([self.indices[rows], places + first_column], dim=1)
        self.squared[rows], order = both.topk(k, dim=1, largest=False)
        self.indices[rows] = which.gather(1, order)

    def exact(self, rows: torch.Tensor, columns: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(indices, distances) [rows, k], by differences: a copy is at distance zero. Smaller indices first where equal."""
        k, dimension = self.squared.shape[1], rows.shape[1]
        distances = torch.empty_like(self.squared)
        step = max(1, EXACT_BYTES // (8 * k * dimension))
        indices = self.indices.sort(dim=1).values
        for start in range(0, len(rows), step):
            here = slice(start, start + step)
            differences = columns[indices[here]].double() - rows[here, None].double()  # [rows, k, D]
            distances[here] = differences.square_().sum(dim=2).sqrt_()
        distances, order = distances.sort(dim=1, stable=True)
        return indices.gather(1, order).cpu().numpy(), distances.cpu().numpy()
