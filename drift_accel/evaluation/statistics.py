"""Means and covariances of features as they stream by, and the reference statistics that results are held against."""

import io
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from drift_accel.foundation.storage import atomic_write_bytes, sha256_file

BLOCK_ROWS = 4096  # rows multiplied at a time: 67 MB of float64 at 2,048 dimensions
_MEANS, _COVARIANCES = ("mu", "ref_mu"), ("sigma", "ref_sigma")


def streamed_statistics(arrays: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean [D], covariance [D, D] (divisor n - 1), both float64, and n, of feature arrays [rows, D] that are seen once.

    Sums are taken about the first block's mean, so that features far from zero lose nothing. The result depends on the order of
    the rows alone, not on how they are cut into arrays. Raises ValueError for fewer than two rows and non-finite values.
    """
    shift, total, products, count = None, None, None, 0
    for block in _blocks(arrays):
        block = block.astype(np.float64)
        if shift is None:
            shift = block.mean(axis=0)
            total, products = np.zeros_like(shift), np.zeros((len(shift), len(shift)))
        block -= shift
        total += block.sum(axis=0)
        products += block.T @ block
        count += len(block)
    if count < 2:
        raise ValueError(f"a covariance needs at least two rows of features, got {count}: pass more pictures")
    if not np.isfinite(products).all():
        raise ValueError("features hold a NaN or an infinite value; check the feature network and the pictures it was given")
    mean = total / count
    covariance = (products - count * np.outer(mean, mean)) / (count - 1)
    return mean + shift, (covariance + covariance.T) / 2, count


def _blocks(arrays: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """The same rows in blocks of BLOCK_ROWS, whatever the arrays' lengths."""
    waiting, rows = [], 0
    for array in arrays:
        waiting.append(array)
        rows += len(array)
        while rows >= BLOCK_ROWS:
            joined = np.concatenate(waiting)
            yield joined[:BLOCK_ROWS]
            waiting, rows = [joined[BLOCK_ROWS:]], rows - BLOCK_ROWS
    if rows:
        yield np.concatenate(waiting)


@dataclass(frozen=True, kw_only=True)
class ReferenceStatistics:
    """What real pictures look like to a network."""

    mean: np.ndarray
    """[D]"""
    covariance: np.ndarray
    """[D, D]"""
    spatial: tuple[np.ndarray, np.ndarray] | None = None
    """Mean and covariance of the mixed_6 map, for sFID."""
    features: np.ndarray | None = None
    """float32 [n, D] of some of the pictures, for precision, recall and KID."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """protocol, network_sha256, num_images, source, ...; empty for a published file, which does not say."""
    file: str = ""
    """Name of the file they were read from."""
    sha256: str = ""
    """Its SHA-256."""

    @property
    def is_stated(self) -> bool:
        """Whether the file says which protocol made it."""
        return "protocol" in self.record

    def require_protocol(self, identity: Mapping[str, Any]) -> None:
        """Raise ValueError, listing what differs, unless these statistics were made as `identity`, a network's, says.

        Of a published file nothing but the dimension can be checked.
        """
        if self.mean.shape != self.covariance.shape[:1]:
            raise ValueError(f"{self.file}: mu {self.mean.shape} does not fit sigma {self.covariance.shape}")
        if not self.is_stated:
            return
        keys = ("protocol", "operations", "network_sha256", "layer")
        wrong = [
            f"{key}: {self.record.get(key)!r} there, {identity.get(key)!r} here"
            for key in keys
            if self.record.get(key) != identity.get(key)
        ]
        if wrong:
            raise ValueError(
                f"the statistics in {self.file} belong to another protocol or network:\n  " + "\n  ".join(wrong) + "\n"
                "Make them with tools/reference_stats.py and the same --protocol and --network"
            )


def save_reference(path: str | os.PathLike, reference: ReferenceStatistics) -> None:
    """Write an `.npz` with mu, sigma (mu_s, sigma_s, features where there are) and the record as JSON; whole or not at all."""
    arrays = {"mu": reference.mean, "sigma": reference.covariance, "record": np.array(json.dumps(dict(reference.record)))}
    if reference.spatial is not None:
        arrays["mu_s"], arrays["sigma_s"] = reference.spatial
    if reference.features is not None:
        arrays["features"] = reference.features
    content = io.BytesIO()
    np.savez(content, **arrays)
    atomic_write_bytes(path, content.getvalue())


def load_reference(path: str | os.PathLike) -> ReferenceStatistics:
    """Read statistics that `save_reference` wrote, or a published `.npz` (mu and sigma, or ref_mu and ref_sigma; mu_s, sigma_s).

    Raises FileNotFoundError, ValueError for a file that holds none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make it with tools/reference_stats.py, or give a published .npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = set(archive.files)
            mean, covariance = (next((n for n in pair if n in names), None) for pair in (_MEANS, _COVARIANCES))
            if mean is None or covariance is None:
                raise ValueError(f"it has {', '.join(sorted(names)) or 'nothing'}, but no mu and sigma (or ref_mu and ref_sigma)")
            spatial = (archive["mu_s"], archive["sigma_s"]) if {"mu_s", "sigma_s"} <= names else None
            return ReferenceStatistics(
                mean=archive[mean],
                covariance=archive[covariance],
                spatial=spatial,
                features=archive["features"] if "features" in names else None,
                record=json.loads(str(archive["record"])) if "record" in names else {},
                file=path.name,
                sha256=sha256_file(path),
            )
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} holds no reference statistics: {error}") from None
