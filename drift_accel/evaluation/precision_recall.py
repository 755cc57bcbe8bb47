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
    real = check_features(real, "real", k)
    generated = check_features(generated, "generated", k).to(real.device)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"real and generated have different dimensions, {real.shape[1]} and {generated.shape[1]}; "
            "take both from the same feature network"
        )
    if tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, got {tile_size}")
    centre = real.mean(dim=0, dtype=torch.float64)
    real_radii = squared_radii(real, centre, k, tile_size)
    generated_radii = squared_radii(generated, centre, k, tile_size)
    return _shares_inside(real, real_radii, generated, generated_radii, centre, tile_size)


def check_features(features: ArrayLike, name: str, k: int) -> torch.Tensor:
    """Return features [N, D] as a tensor; ValueError for another shape, a value that is not finite, and k points or fewer."""
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


def tiles(features: torch.Tensor, centre: torch.Tensor, tile_size: int):
    """Yield (first row, centred float64 rows [t, D], their squared norms [t])."""
    for start in range(0, features.shape[0], tile_size):
        rows = features[start : start + tile_size].double() - centre
        yield start, rows, rows.square().sum(dim=1)


def squared_distances(
    x: torch.Tensor, x_norms: torch.Tensor, y: torch.Tensor, y_norms: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared distances [X, Y] and the rounding allowed for each."""
    norms = x_norms[:, None] + y_norms[None, :]
    return torch.addmm(norms, x, y.T, alpha=-2.0).clamp_(min=0.0), norms.mul_(ROUNDING)


def squared_radii(features: torch.Tensor, centre: torch.Tensor, k: int, tile_size: int) -> torch.Tensor:
    """Return the squared distance [N] of each point to its k-th neighbour in the same set, itself not counted."""
    nearest = torch.full((features.shape[0], k), torch.inf, dtype=torch.float64, device=features.device)
    for row_start, rows, row_norms in tiles(features, centre, tile_size):
        # Distances are symmetric: each pair of tiles is computed once and serves the points of both.
        for start, columns, column_norms in tiles(features[row_start:], centre, tile_size):
            squared, _ = squared_distances(rows, row_norms, columns, column_norms)
            if start == 0:
                # By position, not by distance zero: a duplicate of the point is a neighbour like any other.
                squared.fill_diagonal_(torch.inf)
            else:
                _keep_nearest(nearest[row_start + start :][: len(columns)], squared.T)
            _keep_nearest(nearest[row_start:][: len(rows)], squared)
    return nearest[:, -1]


def _keep_nearest(nearest: torch.Tensor, squared: torch.Tensor) -> None:
    """Replace the k rising distances `nearest` [n, k], a view, by the k smallest of them and of `squared` [n, m]."""
    k = nearest.shape[1]
    here = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
    nearest.copy_(torch.cat([nearest, here], dim=1).topk(k, dim=1, largest=False).values)


def _shares_inside(
    real: torch.Tensor,
    real_radii: torch.Tensor,
    generated: torch.Tensor,
    generated_radii: torch.Tensor,
    centre: torch.Tensor,
    tile_size: int,
) -> tuple[float, float]:
    """Return the share of generated points in the ball of a real one, and that of real points in the ball of a generated one."""
    real_inside, generated_inside = (torch.zeros(len(p), dtype=torch.bool, device=real.device) for p in (real, generated))
    for row_start, rows, row_norms in tiles(generated, centre, tile_size):
        row_span = slice(row_start, row_start + len(rows))
        for start, columns, column_norms in tiles(real, centre, tile_size):
            span = slice(start, start + len(columns))
            squared, allowance = squared_distances(rows, row_norms, columns, column_norms)
            squared -= allowance
            generated_inside[row_span] |= (squared <= real_radii[None, span]).any(dim=1)
            real_inside[span] |= (squared <= generated_radii[row_span, None]).any(dim=0)
    return float(generated_inside.double().mean()), float(real_inside.double().mean())
