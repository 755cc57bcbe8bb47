"""multi_scale_features: which keys there are, their values, types and gradients, and the records of the release."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_evaluation import assert_close, dense_features

from drift_accel.drift import FeatureConfig, multi_scale_features
from drift_accel.models import load_official

GOLDENS = Path(__file__).parent / "goldens"
STATISTICS = ("mean", "std", "mean_2", "std_2", "mean_4", "std_4")
# stage -> (number of blocks, side at a 32x32 input) of the paper's encoder
PAPER_STAGES = {1: (3, 32), 2: (4, 16), 3: (6, 8), 4: (3, 4)}


class StubEncoder:
    """Returns the maps that it is given."""

    def __init__(self, maps, default_features=None):
        self.maps = maps
        self.default_features = tuple(maps) if default_features is None else default_features

    def feature_maps(self, images):
        return self.maps


class PatchifyingEncoder(StubEncoder):
    """Has an input grid of its own: 2x2 pixels become channels."""

    def encoder_input(self, images):
        return torch.nn.functional.pixel_unshuffle(images, 2)


def random_map(*shape, offset=0.0, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape) + offset)


def images(dtype=torch.float64):
    return random_map(2, 4, 8, 8, seed=9).to(dtype)


def arrays(maps):
    return {name: value.detach().double().numpy() for name, value in maps.items()}


def assert_same_features(features, dense, relative):
    assert set(features) == set(dense), f"missing {set(dense) - set(features)}, extra {set(features) - set(dense)}"
    for key, value in features.items():
        assert_close(key, value.detach().double().numpy(), dense[key], relative=relative, absolute=relative)


def paper_maps():
    names = {"conv1": 32} | {f"layer{stage}": side for stage, (_, side) in PAPER_STAGES.items()}
    for stage, (num_blocks, side) in PAPER_STAGES.items():
        names |= {f"layer{stage}_blk{k}": side for k in range(2, num_blocks + 1, 2)}
    return {name: random_map(2, 3, side, side, seed=index) for index, (name, side) in enumerate(names.items())}


def test_paper_encoder_has_85_keys():
    """12 maps of 7 keys and norm_x; with the step's own `global` the 86 keys of the release."""
    maps = paper_maps()
    assert len(maps) == 12
    features = multi_scale_features(StubEncoder(maps), images(), FeatureConfig())
    assert len(features) == 85
    expected = {"norm_x"} | set(maps) | {f"{name}_{statistic}" for name in maps for statistic in STATISTICS}
    assert set(features) == expected
    assert "global" not in features


def test_values_agree_with_the_dense_evaluation():
    maps = paper_maps()
    features = multi_scale_features(StubEncoder(maps), images(), FeatureConfig())
    assert_same_features(features, dense_features(arrays(maps), images().numpy()), relative=1e-12)


def test_default_configuration_may_be_left_out():
    maps = {"a": random_map(2, 3, 8, 8)}
    default = multi_scale_features(StubEncoder(maps), images())
    explicit = multi_scale_features(StubEncoder(maps), images(), FeatureConfig())
    assert list(default) == list(explicit)
    assert all(torch.equal(default[key], explicit[key]) for key in default)


def test_shapes_and_row_major_windows():
    """A map that counts its rows and columns, so that each window's mean tells where it was cut."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(4.0), indexing="ij")
    counting = torch.stack([rows, columns])[None].double()  # [1, 2, 8, 4]
    features = multi_scale_features(StubEncoder({"m": counting}), images()[:1], FeatureConfig())
    assert features["m"].shape == (1, 32, 2)
    assert features["m"][0, 5].tolist() == [1.0, 1.0]
    assert features["m_mean"].shape == features["m_std"].shape == (1, 1, 2)
    assert features["m_mean_2"].shape == features["m_std_2"].shape == (1, 8, 2)
    assert features["m_mean_2"][0].tolist() == [[r + 0.5, c + 0.5] for r in (0, 2, 4, 6) for c in (0, 2)]
    assert features["m_mean_4"][0].tolist() == [[1.5, 1.5], [5.5, 1.5]]


@pytest.mark.parametrize(
    "height, width, windows",
    [(8, 8, (2, 4)), (4, 4, (2, 4)), (6, 6, (2,)), (2, 2, (2,)), (8, 6, (2,)), (7, 7, ()), (1, 1, ()), (8, 7, ()), (3, 4, ())],
)
def test_windows_that_do_not_divide_are_left_out(height, width, windows):
    maps = {"m": random_map(2, 3, height, width)}
    features = multi_scale_features(StubEncoder(maps), images(), FeatureConfig())
    expected = {"norm_x", "m", "m_mean", "m_std"} | {f"m_{s}_{size}" for s in ("mean", "std") for size in windows}
    assert set(features) == expected
    assert_same_features(features, dense_features(arrays(maps), images().numpy()), relative=1e-12)


def test_duplicated_statistics_count():
    """The only window of a 2x2 map is the map: both keys are there, with one value."""
    features = multi_scale_features(StubEncoder({"m": random_map(2, 3, 2, 2)}), images(), FeatureConfig())
    assert_close("m_mean_2", features["m_mean_2"].numpy(), features["m_mean"].numpy(), relative=1e-14)
    assert_close("m_std_2", features["m_std_2"].numpy(), features["m_std"].numpy(), relative=1e-14)


def test_vectors_without_a_grid_have_no_windows():
    maps = {"tokens": random_map(2, 16, 5)}  # 16 would be a 4x4 grid: it must not be guessed
    features = multi_scale_features(StubEncoder(maps), images(), FeatureConfig())
    assert set(features) == {"norm_x", "tokens", "tokens_mean", "tokens_std"}
    assert_same_features(features, dense_features(arrays(maps), images().numpy()), relative=1e-12)


def test_default_features_choose_and_order_the_maps():
    maps = {"a": random_map(2, 3, 4, 4), "b": random_map(2, 5, 4, 4), "c": random_map(2, 6, 4, 4)}
    features = multi_scale_features(StubEncoder(maps, ("c", "a")), images(), FeatureConfig())
    assert [key for key in features if "_" not in key] == ["c", "a"]
    assert not any(key.startswith("b") for key in features)
    turned = dict(reversed(maps.items()))
    assert list(multi_scale_features(StubEncoder(turned, ("c", "a")), images(), FeatureConfig())) == list(features)


def test_norm_x_is_taken_on_the_encoder_grid():
    maps = {"m": random_map(2, 3, 4, 4)}
    features = multi_scale_features(PatchifyingEncoder(maps), images(), FeatureConfig())
    assert features["norm_x"].shape == (2, 1, 16)
    patchified = torch.nn.functional.pixel_unshuffle(images(), 2).numpy()
    assert_same_features(features, dense_features(arrays(maps), patchified), relative=1e-12)


@pytest.mark.parametrize("value", [0.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_map_has_a_finite_gradient(dtype, value):
    """The root of a variance of zero: the epsilon has to be inside it. norm_x of a black image alike."""
    constant = torch.full((2, 3, 4, 4), value, dtype=dtype, requires_grad=True)
    black = torch.zeros(2, 4, 8, 8, dtype=dtype, requires_grad=True)
    features = multi_scale_features(StubEncoder({"m": constant}), black, FeatureConfig())
    for key in ("m_std", "m_std_2", "m_std_4", "norm_x"):
        assert_close(key, features[key].detach().double().numpy(), np.full(features[key].shape, 1e-3), relative=1e-3)
    sum(value.sum() for value in features.values()).backward()
    assert torch.isfinite(constant.grad).all() and torch.isfinite(black.grad).all()


def test_gradient_reaches_the_maps():
    value = random_map(2, 3, 4, 4).requires_grad_()

    def vector(x):
        features = multi_scale_features(StubEncoder({"m": x}), images(), FeatureConfig())
        return torch.cat([features[key].flatten() for key in sorted(features) if key != "norm_x"])

    assert torch.autograd.gradcheck(vector, (value,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_half_precision_maps_are_float32(dtype):
    maps = {"m": random_map(2, 3, 8, 8, offset=4.0).to(dtype), "tokens": random_map(2, 9, 5, offset=4.0).to(dtype)}
    x = images(torch.float32)
    features = multi_scale_features(StubEncoder(maps), x, FeatureConfig())
    assert features["m"].dtype == features["tokens"].dtype == dtype
    assert all(value.dtype == torch.float32 for key, value in features.items() if key not in maps)
    assert_same_features(features, dense_features(arrays(maps), x.numpy()), relative=2e-6)


def test_autocast_does_not_reach_the_statistics():
    maps = {"m": random_map(2, 3, 8, 8, offset=4.0).float()}
    outside = multi_scale_features(StubEncoder(maps), images(torch.float32), FeatureConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = multi_scale_features(StubEncoder(maps), images(torch.float32), FeatureConfig())
    assert all(torch.equal(inside[key], outside[key]) for key in outside)


def test_variance_keeps_its_digits_under_a_large_mean():
    """mean(x^2) - mean(x)^2 would lose a deviation of 1 beside a mean of 3000 in float32."""
    maps = {"m": random_map(2, 3, 8, 8, offset=3000.0).float()}
    features = multi_scale_features(StubEncoder(maps), images(torch.float32), FeatureConfig())
    dense = dense_features(arrays(maps))
    for key in ("m_std", "m_std_2", "m_std_4"):
        assert_close(key, features[key].double().numpy(), dense[key], relative=1e-3)


def test_unknown_map_is_refused():
    encoder = StubEncoder({"m": random_map(2, 3, 4, 4)})
    with pytest.raises(ValueError, match=r"layer9.*m"):
        multi_scale_features(encoder, images(), FeatureConfig(maps=("layer9",)))


# Against the release


@pytest.fixture(scope="module")
def official_features(tmp_path_factory):
    """Features of the recorded small encoder by our code, and the recorded ones."""
    source, directory = GOLDENS / "mae", tmp_path_factory.mktemp("mae")
    metadata = json.loads((source / "metadata.json").read_text())
    weights = directory / metadata.get("path", "ema_params.msgpack")
    weights.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(source / "ema_params.msgpack.gz") as packed, open(weights, "wb") as file:
        shutil.copyfileobj(packed, file)
    if weights.parent != directory:
        shutil.copy(weights, directory / weights.name)
    shutil.copy(source / "metadata.json", directory / "metadata.json")
    with np.load(GOLDENS / "mae.npz") as archive:
        recorded = {name.removeprefix("act/"): archive[name] for name in archive.files if name.startswith("act/")}
        x = torch.from_numpy(archive["x_bhwc"]).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        encoder = load_official(directory)
        features = multi_scale_features(encoder, x, FeatureConfig())
        return features, recorded, arrays(encoder.feature_maps(x)), x.numpy()


def test_official_keys_are_complete(official_features):
    features, recorded, *_ = official_features
    assert set(features) == set(recorded)


def test_official_features_agree(official_features):
    """Norm-wise; `layer1_mean` and `layer1_std` are constant up to rounding, so the limit there is absolute."""
    features, recorded, *_ = official_features
    failures = []
    for key, expected in recorded.items():
        limits = {"relative": 2e-5, "normwise": True}
        if key in ("layer1_mean", "layer1_std"):
            limits = {"relative": 0.0, "absolute": 1e-5}
        try:
            assert_close(key, features[key].double().numpy(), expected, **limits)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)


def test_official_features_agree_with_the_dense_evaluation(official_features):
    features, _, maps, grid = official_features
    names = [name for name in maps if name in features]
    dense = dense_features({name: maps[name] for name in names}, grid)
    assert_same_features(features, dense, relative=2e-5)
