"""Frechet distance between two Gaussians, in float64 with symmetric eigenvalues (FID: Heusel et al. 2017).

d^2 = |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)

The last trace is the sum of the singular values of A^1/2 B^1/2. Taken so, a zero eigenvalue costs an error near eps;
square roots of the eigenvalues of A^1/2 B A^1/2 would cost sqrt(eps) for each of them, which a singular covariance
(fewer samples than dimensions) makes visible.
"""

import warnings

import numpy as np
import torch

# Float32 covariances are symmetric to about 1e-7 of their largest entry; more than this is a wrong matrix, not rounding.
SYMMETRY_TOLERANCE = 1e-6
# Rows centred and multiplied at a time: bounds the float64 copy of the features (4,096 x 2,048 takes 67 MB).
ROWS_AT_A_TIME = 4096

ArrayLike = np.ndarray | torch.Tensor


def gaussian_statistics(features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D] and the sample covariance [D, D] (divisor n - 1) of features [N, D], both float64.

    Raises ValueError when features are not two-dimensional, hold fewer than two rows or a non-finite value.
    """
    features = _to_numpy(features)
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(
            f"features must have shape [N, D] with at least two rows, got {list(features.shape)}; pass one row an image"
        )
    num_rows, dimension = features.shape
    mean = features.mean(axis=0, dtype=np.float64)
    if not np.isfinite(mean).all():
        raise ValueError("features hold a NaN or an infinite value; check the feature network and the images it was given")
    covariance = np.zeros((dimension, dimension))
    for start in range(0, num_rows, ROWS_AT_A_TIME):
        centred = features[start : start + ROWS_AT_A_TIME] - mean  # float64 [rows, D]
        covariance += centred.T @ centred
    covariance /= num_rows - 1
    return mean, (covariance + covariance.T) / 2


def frechet_distance(mean_a: ArrayLike, covariance_a: ArrayLike, mean_b: ArrayLike, covariance_b: ArrayLike) -> float:
    """Return the squared Frechet distance of two Gaussians, the number known as FID.

    Means are [D], covariances [D, D], in the squared unit of the features. Everything is computed in float64; rounding
    below zero is cut. Warns (RuntimeWarning) when a covariance is singular or has a negative eigenvalue beyond rounding,
    which is then taken as zero. Raises ValueError for wrong shapes, non-finite values and an asymmetric covariance.
    Source: FID, Heusel et al. 2017 (arXiv 1706.08500).
    """
    mean_a, covariance_a = _check_gaussian(mean_a, covariance_a, "a")
    mean_b, covariance_b = _check_gaussian(mean_b, covariance_b, "b")
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"the two Gaussians have different dimensions, {mean_a.shape[0]} and {mean_b.shape[0]}; "
            "take both statistics from the same feature network"
        )
    root_a = _square_root_factor(covariance_a, "a")
    root_b = _square_root_factor(covariance_b, "b")
    cross = float(np.linalg.svd(root_a.T @ root_b, compute_uv=False).sum())
    # Squared factors, not the given traces: the clipped part must vanish from both terms, or equal Gaussians differ.
    traces = float((root_a**2).sum() + (root_b**2).sum())
    difference = mean_a - mean_b
    return max(float(difference @ difference) + traces - 2.0 * cross, 0.0)


def _to_numpy(values: ArrayLike) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        # numpy has no bfloat16; float32 holds every value of the half types.
        values = values.detach().cpu()
        values = values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
        return values.numpy()
    return np.asarray(values)


def _check_gaussian(mean: ArrayLike, covariance: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and symmetrised covariance in float64, or raise ValueError that says what is wrong with them."""
    mean = np.asarray(_to_numpy(mean), dtype=np.float64)
    covariance = np.asarray(_to_numpy(covariance), dtype=np.float64)
    if mean.ndim != 1 or mean.size == 0 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"mean_{name} must be [D] and covariance_{name} [D, D], got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"mean_{name} or covariance_{name} holds a NaN or an infinite value; check the features")
    asymmetry = float(np.abs(covariance - covariance.T).max())
    largest = float(np.abs(covariance).max())
    if asymmetry > SYMMETRY_TOLERANCE * largest:
        raise ValueError(
            f"covariance_{name} is not symmetric: entries differ by {asymmetry:.3g} across the diagonal "
            f"(largest entry {largest:.3g}); pass a covariance, as gaussian_statistics returns it"
        )
    return mean, (covariance + covariance.T) / 2


def _square_root_factor(covariance: np.ndarray, name: str) -> np.ndarray:
    """Return F [D, rank] with F F^T = covariance, negative eigenvalues taken as zero; warn where they or zeros matter."""
    eigenvalues, vectors = np.linalg.eigh(covariance)
    rounding = len(eigenvalues) * np.finfo(np.float64).eps * max(float(np.abs(eigenvalues).max()), 0.0)
    smallest = float(eigenvalues[0])
    # A covariance stored in float32 has eigenvalues wrong by float32 rounding, hence the wider border for "negative".
    if smallest < -SYMMETRY_TOLERANCE * float(np.abs(eigenvalues).max()):
        warnings.warn(
            f"covariance_{name} is not positive semi-definite: its smallest eigenvalue is {smallest:.3g}, taken as 0",
            RuntimeWarning,
            stacklevel=3,
        )
    elif smallest <= rounding:
        rank = int((eigenvalues > rounding).sum())
        warnings.warn(
            f"covariance_{name} is singular (rank {rank} of {len(eigenvalues)}): some features never vary, or there are too few "
            "samples, which biases the distance strongly; use more than dimensions",
            RuntimeWarning,
            stacklevel=3,
        )
    # What is zero up to rounding is left out: its square root would be noise, and the product is smaller without it.
    kept = eigenvalues > rounding
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])
