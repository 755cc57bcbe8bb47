"""The ConvNeXt-V2 encoder against the release's records, its keys in the drift's feature dictionary, and what it refuses."""

import json
import shutil

import pytest
import torch
from golden_files import GOLDENS, assert_norm_close, load_arrays
from safetensors.torch import load_file, save_file

from drift_accel.drift import FeatureConfig, multi_scale_features
from drift_accel.models.convnext import ConvNextV2Encoder, load_convnext, normalize_channels

KEYS = {
    *("convenxt_stage_1", "convenxt_stage_2", "convenxt_stage_3", "global_mean", "global_std"),
    *(f"convenxt_stage_{k}_{statistic}" for k in range(4) for statistic in ("mean", "std")),
}
SIZE = 64  # side for what needs no record: stage 3 has 2x2 locations


@pytest.fixture(scope="module")
def encoder():
    return load_convnext(GOLDENS / "convnextv2")


@pytest.fixture(scope="module")
def small(encoder):
    return load_convnext(GOLDENS / "convnextv2", image_size=SIZE)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDENS / "convnextv2", tmp_path / "convnextv2")


def images(dtype=torch.float32, count=2):
    return load_arrays("convnextv2")["image_bchw_01"][:count].to(dtype) * 2 - 1


# Against the release


@pytest.mark.parametrize(("record", "complete"), [("convnextv2", True), ("convnextv2_256", False)])
def test_every_recorded_key_agrees(record, complete, encoder):
    """Images smaller than 224 (no antialiasing) and larger (antialiasing, from uint8)."""
    arrays = load_arrays(record)
    zero_to_one = arrays["image_bchw_01"] if complete else arrays["image_bchw_uint8"].float() / 255
    with torch.no_grad():
        features = multi_scale_features(encoder, zero_to_one * 2 - 1)
    recorded = {name.removeprefix("act/"): value for name, value in arrays.items() if name.startswith("act/")}
    assert set(recorded) == KEYS if complete else set(recorded) < KEYS
    assert set(features) == KEYS
    for key, value in recorded.items():
        assert_norm_close(features[key], value, 2e-5, key)


def test_a_resize_without_antialiasing_would_show(encoder):
    """The record of a large image tells the two apart."""
    arrays = load_arrays("convnextv2_256")
    x = arrays["image_bchw_uint8"].float() / 255 * 2 - 1
    aliased = torch.nn.functional.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    with torch.no_grad():
        got = encoder.feature_maps(aliased, names=["convenxt_stage_2"])["convenxt_stage_2"]
    with pytest.raises(AssertionError):
        assert_norm_close(got, arrays["act/convenxt_stage_2"], 1e-3)


# Keys


def test_keys_are_final_and_norm_x_is_left_to_our_own_encoder(small):
    """Whatever the other settings say, no statistics are pooled from statistics."""
    assert (small.input_space, small.in_channels) == ("pixel", 3)
    plain = multi_scale_features(small, images())
    assert set(plain) == set(small.default_features) == KEYS
    assert torch.equal(plain["global_std"], plain["convenxt_stage_3_std"])  # the release counts both
    bare = multi_scale_features(small, images(), FeatureConfig(vectors=False, statistics=(), windows=()))
    assert set(bare) == KEYS
    assert set(multi_scale_features(small, images(), FeatureConfig(norm_x=True))) == KEYS | {"norm_x"}


def test_shapes(small):
    maps = small.feature_maps(images())
    assert maps["convenxt_stage_1"].shape == (2, 64, 16)
    assert maps["convenxt_stage_3"].shape == (2, 4, 64)
    assert maps["convenxt_stage_0_mean"].shape == maps["convenxt_stage_0_std"].shape == (2, 1, 8)
    assert maps["global_mean"].shape == maps["global_std"].shape == (2, 1, 64)


@pytest.mark.parametrize("names", [["global_std"], ["global_mean"], ["convenxt_stage_0_std", "convenxt_stage_2"]])
def test_a_part_of_the_keys_equals_the_same_of_all(names, small):
    everything, some = small.feature_maps(images()), small.feature_maps(images(), names=names)
    assert set(some) == set(names)
    assert all(torch.equal(some[name], everything[name]) for name in names)


def test_statistics_are_those_of_the_vectors(small):
    maps = small.double().feature_maps(images(torch.float64))
    try:
        for k in (1, 2, 3):
            vectors = maps[f"convenxt_stage_{k}"]
            assert_norm_close(maps[f"convenxt_stage_{k}_mean"], vectors.mean(1, keepdim=True), 1e-12)
            wanted = (vectors.var(1, correction=0, keepdim=True) + 1e-6).sqrt()
            assert_norm_close(maps[f"convenxt_stage_{k}_std"], wanted, 1e-12)
    finally:
        small.float()


def test_channels_are_normalised_at_every_location():
    x = torch.randn(2, 16, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 5
    y = normalize_channels(x)
    deviation = x.std(1, correction=0, keepdim=True)
    assert_norm_close(y, (x - x.mean(1, keepdim=True)) / (deviation + 1e-3), 1e-12)


def test_equal_channels_have_a_finite_gradient():
    x = torch.full((1, 8, 2, 2), 0.3, requires_grad=True)
    y = normalize_channels(x)
    assert not y.any()
    (y.sum() + y.square().sum()).backward()
    assert torch.isfinite(x.grad).all()


# Gradients, types, memory formats


def test_gradients_reach_the_images_and_agree_with_finite_differences(small):
    encoder = small.double()
    try:
        x = images(torch.float64, count=1).requires_grad_()
        generator = torch.Generator().manual_seed(0)
        weights = {key: torch.randn(value.shape, generator=generator) for key, value in encoder.feature_maps(x).items()}

        def objective(x):
            return sum((weights[key] * value).sum() for key, value in multi_scale_features(encoder, x).items())

        objective(x).backward()
        assert all(parameter.grad is None for parameter in encoder.parameters())
        direction = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        with torch.no_grad():
            difference = (objective(x + 1e-5 * direction) - objective(x - 1e-5 * direction)) / 2e-5
        assert (x.grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)
    finally:
        small.float()


def test_bfloat16_keeps_vectors_narrow_and_statistics_wide(small):
    x = images().requires_grad_()
    full = small.feature_maps(x.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = small.feature_maps(x)
    for name, value in maps.items():
        is_vectors = name in ("convenxt_stage_1", "convenxt_stage_2", "convenxt_stage_3")
        assert value.dtype == full[name].dtype or (is_vectors and value.dtype == torch.bfloat16), name
        assert_norm_close(value.float(), full[name], 5e-2, name)
    sum(value.float().square().sum() for value in maps.values()).backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()


def test_channels_last_gives_the_same_features(small):
    plain = small.feature_maps(images())
    try:
        small.to(memory_format=torch.channels_last)
        turned = small.feature_maps(images().to(memory_format=torch.channels_last))
    finally:
        small.to(memory_format=torch.contiguous_format)
    for name, value in plain.items():
        assert_norm_close(turned[name], value, 2e-5, name)


def test_sizes_are_known_without_computing(small):
    """On the meta device, as the cost of a step is estimated."""
    with torch.no_grad():
        shapes = {key: value.shape for key, value in multi_scale_features(small, images()).items()}
        meta = ConvNextV2Encoder(type(small.network)(small.network.config).to("meta"), image_size=SIZE).to("meta")
        features = multi_scale_features(meta, torch.empty(2, 3, 256, 256, device="meta"))
    assert {key: value.shape for key, value in features.items()} == shapes


# Loading


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    load_convnext(GOLDENS / "convnextv2")
    load_convnext(GOLDENS / "convnextv2", random=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_of_the_bare_network_is_read_as_well(small, tmp_path):
    small.network.save_pretrained(tmp_path / "bare")
    bare = load_convnext(tmp_path / "bare", image_size=SIZE)
    for name, value in small.feature_maps(images()).items():
        assert torch.equal(bare.feature_maps(images())[name], value), name


def test_random_weights_need_no_file(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no .*safetensors.*hf download facebook/convnextv2-base"):
        load_convnext(folder)
    first, second = (load_convnext(folder, image_size=SIZE, random=True) for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert all(torch.isfinite(value).all() and value.std() > 1e-3 for value in first.feature_maps(images()).values())


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


GRN = "convnextv2.encoder.stages.2.layers.1.grn.weight"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json: download ConvNeXt-V2"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json describes no model"),
        (lambda f: change_settings(f, model_type="dinov2"), ValueError, "holds a dinov2, wanted a convnextv2"),
        (
            lambda f: change_weights(f, lambda w: w.pop(GRN)),
            ValueError,
            r"missing tensors \['encoder.stages.2.layers.1.grn.weight'\]",
        ),
        (lambda f: change_weights(f, lambda w: w.update(more=torch.zeros(1))), ValueError, r"unknown tensors \['more'\] \(1\)"),
        (lambda f: change_settings(f, hidden_sizes=[8, 16, 32, 48]), ValueError, "do not fit config.json"),
        (lambda f: change_settings(f, depths=[1, 1, 1, 1]), ValueError, "unknown tensors .*stages.2.layers.1"),
    ],
    ids=["no config", "no JSON", "another model", "missing", "unknown", "narrower", "shallower"],
)
def test_a_folder_that_does_not_fit_is_refused(damage, error, message, folder):
    damage(folder)
    with pytest.raises(error, match=message):
        load_convnext(folder)


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin but no safetensors.*save_pretrained"):
        load_convnext(folder)
