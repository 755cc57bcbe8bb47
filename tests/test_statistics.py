"""Streamed statistics and reference files: equal to the two-pass form, published files, other protocols refused."""

import json

import numpy as np
import pytest

from drift_accel.evaluation import gaussian_statistics
from drift_accel.evaluation.statistics import BLOCK_ROWS, ReferenceStatistics, load_reference, save_reference, streamed_statistics

IDENTITY = {"protocol": "clean", "operations": ["a"], "network_sha256": "aa"}


def features(count: int, dimension: int = 6, offset: float = 3.0) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, dimension)).astype(np.float32) * 0.5 + np.float32(offset)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_streamed_statistics_equal_two_passes(offset):
    rows = features(2 * BLOCK_ROWS + 77, offset=offset)
    mean, covariance, count = streamed_statistics(np.array_split(rows, 100))
    expected = gaussian_statistics(rows)
    assert count == len(rows) and mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, expected[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(covariance, expected[1], rtol=1e-10, atol=1e-13)


def test_streamed_statistics_do_not_depend_on_the_cut():
    rows = features(BLOCK_ROWS + 300)
    whole = streamed_statistics([rows])
    for cut in (np.array_split(rows, 61), np.split(rows, [5]), np.split(rows, range(64, len(rows), 64))):
        got = streamed_statistics(iter(cut))
        assert np.array_equal(got[0], whole[0]) and np.array_equal(got[1], whole[1])


@pytest.mark.parametrize(("arrays", "message"), [([], "got 0"), ([features(1)], "got 1"), ([np.full((3, 2), np.nan)], "NaN")])
def test_too_few_or_broken_features_are_refused(arrays, message):
    with pytest.raises(ValueError, match=message):
        streamed_statistics(arrays)


def make_reference(**changes) -> ReferenceStatistics:
    mean, covariance = gaussian_statistics(features(50))
    values = {"mean": mean, "covariance": covariance, "features": features(20), "record": {**IDENTITY, "num_images": 50}}
    return ReferenceStatistics(**{**values, **changes})


def test_a_file_comes_back(tmp_path):
    reference = make_reference(spatial=(np.zeros(3), np.eye(3)))
    save_reference(tmp_path / "real.npz", reference)
    again = load_reference(tmp_path / "real.npz")
    for name in ("mean", "covariance", "features"):
        assert np.array_equal(getattr(again, name), getattr(reference, name))
    assert np.array_equal(again.spatial[1], np.eye(3)) and again.record == reference.record
    assert again.file == "real.npz" and len(again.sha256) == 64 and again.is_stated
    again.require_protocol(IDENTITY)
    with np.load(tmp_path / "real.npz") as archive:  # as others read it
        assert {"mu", "sigma"} <= set(archive.files)


@pytest.mark.parametrize("names", [("mu", "sigma"), ("ref_mu", "ref_sigma")])
def test_published_files_are_read_and_do_not_state_a_protocol(tmp_path, names):
    mean, covariance = gaussian_statistics(features(50))
    extra = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "published.npz", **dict(zip(names, (mean, covariance), strict=True)), **extra)
    reference = load_reference(tmp_path / "published.npz")
    assert np.array_equal(reference.covariance, covariance) and reference.spatial is not None and reference.features is None
    assert not reference.is_stated
    reference.require_protocol(IDENTITY)


@pytest.mark.parametrize(("key", "value"), [("protocol", "release"), ("network_sha256", "bb"), ("operations", ["b"])])
def test_statistics_of_another_protocol_are_refused(tmp_path, key, value):
    save_reference(tmp_path / "real.npz", make_reference())
    reference = load_reference(tmp_path / "real.npz")
    with pytest.raises(ValueError, match=f"belong to another protocol or network:\n  {key}: .* there, .* here"):
        reference.require_protocol({**IDENTITY, key: value})


def test_files_without_statistics_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it with tools/reference_stats.py"):
        load_reference(tmp_path / "none.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(ValueError, match="it has arr_0, but no mu and sigma"):
        load_reference(tmp_path / "images.npz")
    (tmp_path / "text.npz").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load_reference(tmp_path / "text.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(ValueError, match="holds no reference statistics"):
        load_reference(tmp_path / "objects.npz")
