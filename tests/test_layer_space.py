"""The space of a layer, and histograms of its channels: what is read, reduced and counted."""

import numpy as np
import pytest
from digit_activations import write_set

from drift_accel.analysis.activations.store import ActivationSet
from drift_accel.analysis.comparison.channel_histograms import channel_histograms
from drift_accel.analysis.comparison.layer_space import balanced_choice, choose_reduction, read_layer, sample_set

LABELS = np.repeat([0, 1, 2], [60, 20, 10])


@pytest.fixture(scope="module")
def maps():
    """Two sets of maps [N, 6, 4, 4] whose variance lies in few directions."""
    random = np.random.default_rng(0)
    mixing = random.standard_normal((5, 96)) * np.array([8, 4, 2, 1, 0.5])[:, None]
    return [(random.standard_normal((90, 5)) @ mixing + 3).reshape(90, 6, 4, 4).astype(np.float32) for _ in range(2)]


@pytest.fixture(scope="module")
def sets(maps, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    paths = [write_set(folder, name, {"map": values}, LABELS) for name, values in zip("ab", maps, strict=True)]
    return [sample_set(ActivationSet.open(folder, path.name), path.name) for path in paths]


def test_whole_and_pooled(sets, maps):
    whole, pooled = read_layer(sets, "map", "whole"), read_layer(sets, "map", "pooled")
    for place, values in enumerate(maps):
        np.testing.assert_array_equal(whole.rows[place], values.reshape(90, 96))
        np.testing.assert_allclose(pooled.rows[place], values.mean(axis=(2, 3)), rtol=1e-5)
    assert whole.space == "as stored, 96 numbers a sample"
    assert pooled.space == "map 6x4x4 averaged over its 16 positions, 6 numbers a sample"


def test_principal_components_keep_distances_and_say_how_much_they_keep(sets, maps, monkeypatch):
    monkeypatch.setattr("drift_accel.analysis.comparison.layer_space.READ_BYTES", 16 * 96 * 4)  # many blocks, the last one small
    found = read_layer(sets, "map", "pca", components=5)
    flat = maps[0].reshape(90, 96).astype(np.float64)
    exact = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False)
    assert "5 principal components of the real set's 96 numbers a sample, with 100.0 % of its variance" in found.space
    np.testing.assert_allclose(found.rows[0].std(axis=0) * np.sqrt(90), exact[:5], rtol=1e-3)
    for rows, values in zip(found.rows, maps, strict=True):
        apart = np.linalg.norm(rows[:40] - rows[40:80], axis=1)
        np.testing.assert_allclose(apart, np.linalg.norm((values[:40] - values[40:80]).reshape(40, -1), axis=1), rtol=1e-3)
    kept = 100 * float((exact[:2] ** 2).sum() / (exact**2).sum())
    assert (
        f"2 principal components of the real set's 96 numbers a sample, with {kept:.1f} %"
        in read_layer(sets, "map", "pca", 2).space
    )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [((2048,), "whole"), ((8, 16, 16), "whole"), ((9, 16, 16), "pooled"), ((2049,), "pca"), ((3000, 1, 1), "pca")],
)
def test_wide_layers_are_reduced(shape, kind):
    assert choose_reduction("layer", shape, "auto") == kind


def test_samples_are_chosen_evenly_over_classes_and_always_the_same(sets):
    chosen = sample_set(sets[0].source, "a", max_samples=36)
    assert np.bincount(chosen.labels).tolist() == [13, 13, 10]
    np.testing.assert_array_equal(chosen.indices, balanced_choice(LABELS, 36))
    assert not np.array_equal(chosen.indices, balanced_choice(LABELS, 36, seed=1))
    np.testing.assert_array_equal(np.concatenate(list(chosen.iterate("map"))), sets[0].source.rows("map")[chosen.indices])
    assert sample_set(sets[0].source, "a", max_samples=900).indices is None


def test_histograms_count_every_value(sets, maps):
    found = channel_histograms(sets, "map", groups=4, bins=20)
    assert [channel for first, last in found.channels for channel in range(first, last + 1)] == list(range(6))
    assert len(found.channels) == 4
    for group, (first, last) in enumerate(found.channels):
        values = [array[:, first : last + 1].astype(np.float64).ravel() for array in maps]
        edges = np.linspace(values[0].mean() - 4 * values[0].std(), values[0].mean() + 4 * values[0].std(), 21)
        np.testing.assert_allclose(found.edges[group], edges, rtol=1e-6)
        for place in (0, 1):
            counts, _ = np.histogram(np.clip(values[place], edges[0], edges[-1]), edges)
            np.testing.assert_allclose(found.shares[place, group], counts / len(values[place]), atol=2 / len(values[place]))
    np.testing.assert_allclose(found.overlap[0], 1)
    assert (found.wasserstein[0] == 0).all()


def test_a_shift_by_whole_bins_is_that_wasserstein_distance(tmp_path):
    values = np.random.default_rng(0).uniform(-1, 1, (4000, 2)).astype(np.float32)
    width = 8 * values.astype(np.float64).std() / 64  # of a bin
    paths = [write_set(tmp_path, n, {"x": values + shift}, [0] * 4000) for n, shift in (("a", 0), ("b", 5 * width))]
    sets = [sample_set(ActivationSet.open(tmp_path, path.name), path.name) for path in paths]
    found = channel_histograms(sets, "x", groups=1)
    assert found.wasserstein[1, 0] * found.deviations[0] == pytest.approx(5 * width, rel=1e-3)


def test_a_constant_channel_has_a_histogram(tmp_path):
    path = write_set(tmp_path, "a", {"x": np.full((7, 2), 3.0)}, [0] * 7)
    found = channel_histograms([sample_set(ActivationSet.open(tmp_path, path.name), "a")] * 2, "x")
    assert (found.shares.max(axis=2) == 1).all() and (found.wasserstein == 0).all()
