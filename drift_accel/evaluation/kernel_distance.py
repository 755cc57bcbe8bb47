"""Kernel Inception distance (Binkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD with a cubic kernel, on subsets.

clean-fid's estimator with its own subsets; it draws them from numpy's global generator, this from one of its own.
"""

import numpy as np


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return mean and population standard deviation over subsets of the squared MMD of features [N, D] and [M, D].

    Kernel (x.y / D + 1)^3; subsets of min(subset_size, N, M) rows without repetition, drawn by numpy RandomState(seed). In
    float64. Raises ValueError for wrong shapes, other dimensions, fewer than two rows and counts below 1.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"{name} must have shape [N, D] with at least two rows, got {list(features.shape)}")
    if real.shape[1] != generated.shape[1]:
        raise ValueError(f"real and generated have different dimensions, {real.shape[1]} and {generated.shape[1]}")
    if num_subsets < 1 or subset_size < 2:
        raise ValueError(f"give at least 1 subset of 2 rows, got {num_subsets} of {subset_size}")
    size = min(subset_size, len(real), len(generated))
    random = np.random.RandomState(seed)
    estimates = []
    for _ in range(num_subsets):
        x = generated[random.choice(len(generated), size, replace=False)].astype(np.float64)
        y = real[random.choice(len(real), size, replace=False)].astype(np.float64)
        within = _kernel(x, x) + _kernel(y, y)
        across = _kernel(x, y)
        estimates.append((within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * across.mean())
    return float(np.mean(estimates)), float(np.std(estimates))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
