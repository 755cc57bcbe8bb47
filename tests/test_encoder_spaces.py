"""Chosen feature spaces: our encoder, timm, DINOv2, on small random models, against the models called directly."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import write_encoder

from drift_accel.evaluation.networks import open_network
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.evaluation.protocols import get_protocol
from drift_accel.models import MaskedAutoencoder
from drift_accel.sampling.pictures import PictureBatch


@pytest.fixture(scope="module")
def batch():
    pixels = np.random.default_rng(0).integers(256, size=(3, 20, 24, 3), dtype=np.uint8)
    return PictureBatch(pixels, None, 0)


def by_pillow(pixels: np.ndarray, side: int, mean, deviation) -> torch.Tensor:
    """The documented operations, one picture and channel at a time."""
    pictures = []
    for picture in pixels:
        channels = [Image.fromarray(picture[:, :, c].astype(np.float32)).resize((side, side), Image.BICUBIC) for c in range(3)]
        pictures.append([(np.asarray(channel).clip(0, 255) / 255 - mean[c]) / deviation[c] for c, channel in enumerate(channels)])
    return torch.from_numpy(np.array(pictures, dtype=np.float32))


def test_our_encoder_is_the_mean_of_a_map(tmp_path):
    network = open_network(get_protocol("encoder"), write_encoder(tmp_path), batch=4, layer="layer2_blk1")
    batch = open_pictures("digits").batch(range(6))
    features = network(batch)["features"]
    encoder = MaskedAutoencoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = encoder.feature_maps(torch.from_numpy(batch.model_space), ["layer2_blk1"])["layer2_blk1"].mean(dim=(2, 3))
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert network.identity()["layer"] == "layer2_blk1"
    last = open_network(get_protocol("encoder"), tmp_path)
    assert last.identity()["layer"] == encoder.map_names[-1]
    with pytest.raises(ValueError, match="--layer is 'nowhere': the encoder in .* has conv1"):
        open_network(get_protocol("encoder"), tmp_path, layer="nowhere")
    with pytest.raises(ValueError, match=r"takes images \(1, 8, 8\), these are \(3, 20, 24\)"):
        network(PictureBatch(np.zeros((1, 20, 24, 3), np.uint8), None, 0))


def test_dinov2_is_the_class_token_of_normalised_pictures(tmp_path, batch):
    from transformers import Dinov2Config, Dinov2Model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(
            Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)
        ).eval()
    model.save_pretrained(tmp_path)
    features = open_network(get_protocol("dinov2"), tmp_path, batch=2)(batch)["features"]
    with torch.no_grad():
        inputs = by_pillow(batch.pixels, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        expected = model(inputs).last_hidden_state[:, 0]
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="only latents: name their VAE"):
        open_network(get_protocol("dinov2"), tmp_path)(PictureBatch(None, np.zeros((1, 4, 8, 8), np.float32), 0))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no DINOv2 model"):
        open_network(get_protocol("dinov2"), tmp_path)


def test_timm_is_the_pooled_features(tmp_path, batch):
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path, model_config={"num_classes": 5}, safe_serialization=True)
    features = open_network(get_protocol("timm"), tmp_path, batch=2)(batch)["features"]
    config = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        inputs = by_pillow(batch.pixels, config["input_size"][-1], config["mean"], config["std"])
        expected = model.forward_head(model.forward_features(inputs), pre_logits=True)
    np.testing.assert_allclose(features, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_timm_that_is_not_installed_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ImportError, match="needs the package timm: pip install"):
        open_network(get_protocol("timm"), tmp_path)
