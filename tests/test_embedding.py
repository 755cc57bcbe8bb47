"""Embeddings: components by another way, the same again after saving, real places untouched by what is projected."""

import sys

import numpy as np
import pytest

from drift_accel.analysis.comparison.embedding import available_methods, fit_embedding, load_embedding

CENTRES = np.array([[0.0, 0, 0, 0, 7], [30, 0, 0, 30, 7], [0, 30, 30, 0, 7]])


def draw(seed: int, count: int = 40) -> np.ndarray:
    random = np.random.default_rng(seed)
    rows = CENTRES[np.arange(count) % 3] + random.standard_normal((count, 5))
    rows[:, 4] = 7  # a number that never varies
    return rows.astype(np.float32)


def test_principal_components_are_those_of_the_standardised_features():
    real, other = draw(0), draw(1)
    found = fit_embedding("pca", real)
    scale = np.where(real.std(axis=0) > 0, real.std(axis=0), 1)
    standardised = (real.astype(np.float64) - real.mean(axis=0)) / scale
    _, singular, right = np.linalg.svd(standardised, full_matrices=False)
    signs = np.sign((right[:2] * found.components).sum(axis=1))
    np.testing.assert_allclose(found.coordinates, standardised @ right[:2].T * signs, atol=1e-4)
    np.testing.assert_allclose(found.transform(other), (other - real.mean(axis=0)) / scale @ right[:2].T * signs, atol=1e-4)
    np.testing.assert_allclose(found.facts["explained_variance"], (singular**2 / (singular**2).sum())[:2], rtol=1e-4)
    np.testing.assert_allclose(found.transform(real), found.coordinates, atol=1e-6)


@pytest.mark.parametrize("method", ["pca", pytest.param("umap", marks=pytest.mark.slow)])
def test_saved_and_loaded_it_projects_to_the_same_places(method, tmp_path):
    if method not in available_methods():
        pytest.skip(f"the library of {method} is not installed")
    real, other = draw(0, 90), draw(1, 30)
    found = fit_embedding(method, real, seed=3)
    np.testing.assert_array_equal(found.coordinates, fit_embedding(method, real, seed=3).coordinates)
    places = found.transform(other)
    found.save(tmp_path / "saved.safetensors")
    again = load_embedding(tmp_path / "saved.safetensors")
    assert again.facts == found.facts and again.method == method
    np.testing.assert_array_equal(again.coordinates, found.coordinates)
    np.testing.assert_array_equal(again.transform(other), places)
    # The three groups are apart in the plane, and others fall among their own.
    centres = np.stack([found.coordinates[group::3].mean(axis=0) for group in range(3)])
    nearest = np.linalg.norm(places[:, None] - centres, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, np.arange(30) % 3)


@pytest.mark.slow
def test_umap_of_many_samples_is_restored_with_its_search_index(tmp_path):
    pytest.importorskip("umap")
    random = np.random.default_rng(0)
    real, other = (random.standard_normal((count, 8)).astype(np.float32) for count in (4200, 50))  # above 4,096 it is approximate
    found = fit_embedding("umap", real)
    places = found.transform(other)
    found.save(tmp_path / "saved.safetensors")
    np.testing.assert_array_equal(load_embedding(tmp_path / "saved.safetensors").transform(other), places)


def test_missing_libraries_are_named_and_components_work_without_umap(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ModuleNotFoundError, match=r"UMAP needs umap-learn: pip install 'drift_accel\[analysis\]', or choose"):
        fit_embedding("umap", draw(0))
    assert fit_embedding("pca", draw(0)).coordinates.shape == (40, 2)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="principal components need scikit-learn"):
        fit_embedding("pca", draw(0))


def test_refuses_bad_input(tmp_path):
    with pytest.raises(ValueError, match="'tsne': choose one of pca, umap"):
        fit_embedding("tsne", draw(0))
    with pytest.raises(ValueError, match="needs 4 real samples of 2 numbers, got 3 of 5"):
        fit_embedding("pca", draw(0, 3))
    with pytest.raises(ValueError, match="no number of the real samples ever varies"):
        fit_embedding("pca", np.ones((9, 4)))
    with pytest.raises(ValueError, match="fitted on 5 numbers a sample"):
        fit_embedding("pca", draw(0)).transform(np.ones((2, 4)))
    with pytest.raises(FileNotFoundError, match="give an embedding that"):
        load_embedding(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="is no saved embedding"):
        load_embedding(tmp_path / "text.safetensors")
