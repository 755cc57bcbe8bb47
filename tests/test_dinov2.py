"""The DINOv2 encoder: which tokens its maps are, checked against the network run block by block."""

import pytest
import torch
from golden_files import assert_norm_close
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

from drift_accel.drift import multi_scale_features
from drift_accel.models.dinov2 import load_dinov2
from drift_accel.models.pixel_encoder import draw_weights

SETTINGS = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny network, trained (as if) at 28 pixels."""
    network = Dinov2Model(Dinov2Config(**SETTINGS))
    draw_weights(network, torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("dinov2")
    network.save_pretrained(path)
    return path


def images(size=40, dtype=torch.float32):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1


@pytest.mark.parametrize("image_size", [28, 56])
def test_maps_are_the_patch_tokens_of_the_blocks(image_size, folder):
    """Also at another size than the network was trained at, where positions are interpolated."""
    encoder = load_dinov2(folder, image_size=image_size)
    network, patches = encoder.network, (image_size // 14) ** 2
    with torch.no_grad():
        maps = encoder.feature_maps(images())
        x = network.embeddings(encoder.network_input(images()))
        for k, block in enumerate(network.encoder.layer, start=1):
            x = block(x)
            assert maps[f"block{k}"].shape == (2, patches, 32)
            assert_norm_close(maps[f"block{k}"], network.layernorm(x)[:, 1:], 1e-6, f"block{k}")
    assert len(maps) == 6


def test_default_blocks_and_chosen_ones(folder):
    assert load_dinov2(folder, image_size=28).default_features == ("block1", "block3", "block4", "block6")
    encoder = load_dinov2(folder, image_size=28, blocks=(6, 2))
    assert encoder.default_features == ("block6", "block2")
    features = multi_scale_features(encoder, images())
    assert set(features) == {f"block{k}{suffix}" for k in (2, 6) for suffix in ("", "_mean", "_std")}


def test_gradients_reach_the_images_alone(folder):
    encoder = load_dinov2(folder, image_size=28)
    x = images().requires_grad_()
    encoder.feature_maps(x)["block6"].square().mean(2)[:, 0].sum().backward()
    assert x.grad.any() and torch.isfinite(x.grad).all()
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_bfloat16_and_float64(folder):
    encoder = load_dinov2(folder, image_size=28)
    full = encoder.feature_maps(images())["block6"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder.feature_maps(images())["block6"]
    assert_norm_close(half.float(), full, 5e-2)
    wide = encoder.double().feature_maps(images(dtype=torch.float64))["block6"]
    assert wide.dtype == torch.float64
    assert_norm_close(full, wide, 1e-5)


def test_a_classifier_on_top_is_left_out(folder, tmp_path):
    classifier = Dinov2ForImageClassification(Dinov2Config(**SETTINGS, num_labels=3))
    classifier.dinov2.load_state_dict(load_dinov2(folder, image_size=28).network.state_dict())
    classifier.save_pretrained(tmp_path)
    same = load_dinov2(tmp_path, image_size=28).feature_maps(images())["block6"]
    assert torch.equal(same, load_dinov2(folder, image_size=28).feature_maps(images())["block6"])


def test_what_cannot_work_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="image_size is 30: DINOv2 needs a multiple of its patch size 14, for example 28"):
        load_dinov2(folder, image_size=30)
    with pytest.raises(ValueError, match=r"encoder.blocks holds \[0, 7\]: this DINOv2 has the blocks 1 to 6"):
        load_dinov2(folder, blocks=(0, 3, 7))
    with pytest.raises(FileNotFoundError, match="no config.json: download DINOv2.*hf download facebook/dinov2-base"):
        load_dinov2(tmp_path)
