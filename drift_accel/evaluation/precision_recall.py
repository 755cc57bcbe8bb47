"""Improved precision and recall on k-nearest-neighbour balls (Kynkaanniemi et al. 2019), in tiles of bounded memory.

Distances are squared and in float64, by |x|^2 + |y|^2 - 2 x.y after the common mean is taken off. What is left is a
rounding error near 1e-15 (|x|^2 + |y|^2); comparisons allow ROUNDING times that, so that a point exactly on a radius,
duplicates included, is inside whatever the tile size.
"""

import numpy as np
import torch

# Far above the rounding of the expanded distance, far below what two different float32 features can differ by.
ROUNDING = 1e-13

ArrayLike = np.ndarray | torch.Tensor


def precision_recall(real: ArrayLike, generated: ArrayLike, k: int = 3, tile_size: int = 4096) -> tuple[float, float]:
    """Return (precision, recall) of generated features [M, D] against real features [N, D].

    Precision: share of generated points inside the ball of any real point. Recall: share of real points inside the ball
    of any generated point. The ball of a point reaches to its k-th neighbour in its own set, the point itself not
    counted; the border belongs to it. Memory beside the features: a few times tile_size^2 x 8 bytes; the result does not
    depend on tile_size. Runs on the device of `real`. Raises ValueError for wrong shapes, non-finite values, and sets of
    k points or fewer. Source: arXiv 1904.06991.
    """
    real = _check_features(real, "real", k)
    generated = _check_features(generated, "generated", k).to(real.device)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real and generated have different dimensions, {real.shape[1]} and {generated.shape[1]}; "
            "take both from the same feature network"
        )
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got {tile_size}")
    centre = real.mean(dim=0, dtype=torch.float64)
    real_radii = _squared_radii(real, centre, k, tile_size)
    generated_radii = _squared_radii(generated, centre, k, tile_size)
    precision = _share_inside(generated, real, real_radii, centre, tile_size)
    recall = _share_inside(real, generated, generated_radii, centre, tile_size)
    return precision, recall


def _check_features(features: ArrayLike, name: str, k: int) -> torch.Tensor:
    features = torch.as_tensor(features).detach()
    if features.ndim != 2 or features.shape[1] == 0:
        raise ValueError(f"{name} must have shape [points, dimension], got {list(features.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if features.shape[0] <= k:
        raise ValueError(f"{name} has {features.shape[0]} points; the {k}-th neighbour needs at least {k + 1}, pass more")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name} holds a NaN or an infinite value; check the feature network and its images")
    return features


def _tiles(features: torch.Tensor, centre: torch.Tensor, tile_size: int):
    """Yield (first row, centred float64 rows [t, D], their squared norms [t])."""
    for start in range(0, features.shape[0], tile_size):
        rows = features[start : start + tile_size].double() - centre
        yield start, rows, rows.square().sum(dim=1)


def _squared_distances(
    x: torch.Tensor, x_norms: torch.Tensor, y: torch.Tensor, y_norms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared distances [X, Y] and the rounding allowed for each."""
    norms = x_norms[:, None] + y_norms[None, :]
    return torch.addmm(norms, x, y.T, alpha=-2.0).clamp_(min=0.0), norms.mul_(ROUNDING)


def _squared_radii(features: torch.Tensor, centre: torch.Tensor, k: int, tile_size: int) -> torch.Tensor:
    """Return the squared distance [N] of each point to its k-th neighbour in the same set, itself not counted."""
    radii = []
    for row_start, rows, row_norms in _tiles(features, centre, tile_size):
        nearest = rows.new_full((rows.shape[0], k), torch.inf)
        for column_start, columns, column_norms in _tiles(features, centre, tile_size):
            squared, _ = _squared_distances(rows, row_norms, columns, column_norms)
            if column_start == row_start:
                # By position, not by distance zero: a duplicate of the point is a neighbour like any other.
                squared.fill_diagonal_(torch.inf)
            nearest_here = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
            nearest = torch.cat([nearest, nearest_here], dim=1).topk(k, dim=1, largest=False).values
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def _share_inside(
    points: torch.Tensor, centres: torch.Tensor, squared_radii: torch.Tensor, centre: torch.Tensor, tile_size: int
) -> float:
    """Return the share of points [M, D] that lie in the ball of at least one of centres [N, D]."""
    inside = 0
    for _, rows, row_norms in _tiles(points, centre, tile_size):
        row_inside = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
        for start, columns, column_norms in _tiles(centres, centre, tile_size):
            squared, allowance = _squared_distances(rows, row_norms, columns, column_norms)
            reached = squared - allowance <= squared_radii[None, start : start + columns.shape[0]]
            row_inside |= reached.any(dim=1)
        inside += int(row_inside.sum())
    return inside / points.shape[0]
