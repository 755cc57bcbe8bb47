"""A step with several encoders: masked autoencoder and ConvNeXt-V2 on pixels, and pixels judged behind a VAE's decoder."""

import json

import pytest
import torch
from golden_files import GOLDENS
from small_caches import write_digit_pictures
from tiny_runs import TINY_GENERATOR, TINY_MAE, checkpoint_tensors, launch, metrics, run_tool

from drift_accel import train, train_mae
from drift_accel.drift import FeatureConfig
from drift_accel.drift.encoders import EncoderSpec
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.models.convnext import load_convnext
from drift_accel.training import DriftBatch, drift_step

CONVNEXT = {"path": str(GOLDENS / "convnextv2"), "kind": "convnextv2", "name": "convnext", "image_size": 32, "weight": 0.5}


def small_batch() -> DriftBatch:
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    return DriftBatch(
        labels=torch.tensor([0, 1]), guidance_scale=torch.tensor([1.0, 2.0]), positives=normal(2, 4, 3, 16, 16),
        negatives=normal(2, 2, 3, 16, 16), noise=normal(6, 3, 16, 16), style_indices=torch.zeros(6, 4, dtype=torch.long),
    )  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    sizes = {"input_size": 16, "in_channels": 3, "patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
    generator = Generator(**sizes, num_classes=2, num_style_tokens=4, num_context_tokens=2)
    generator.initialize_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():  # the last layer starts at zero
        for parameter in generator.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    mae = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=3, input_size=16).eval().requires_grad_(False)
    convnext = load_convnext(CONVNEXT["path"], image_size=32).eval().requires_grad_(False)
    return generator, mae, convnext


def test_losses_of_all_encoders_add_up_with_their_weights(networks):
    generator, mae, convnext = networks
    maps = FeatureConfig(maps=("conv1", "layer2"))
    specs = [EncoderSpec("mae", mae, maps), EncoderSpec("convnext", convnext, weight=0.5)]
    together = drift_step(generator, specs, small_batch()).metrics
    first = drift_step(generator, mae, small_batch(), features=maps).metrics
    second = drift_step(generator, convnext, small_batch()).metrics
    keys = {name.removeprefix("key_loss/") for name in together if name.startswith("key_loss/")}
    assert {"mae/conv1", "mae/norm_x", "convnext/convenxt_stage_1", "convnext/global_std", "global"} <= keys
    assert not {key for key in keys if key.startswith("convnext/norm_x")}
    for key in keys:
        part, name = key.split("/", 1) if "/" in key else ("mae", key)
        alone = second if part == "convnext" else first
        torch.testing.assert_close(together[f"key_loss/{key}"], alone[f"key_loss/{name}"], rtol=1e-4, atol=0)
    weights = {key: 0.5 if key.startswith("convnext/") else 1.0 for key in keys}
    torch.testing.assert_close(together["loss"], sum(weights[key] * together[f"key_loss/{key}"] for key in keys))


def test_gradients_reach_the_generator_alone(networks):
    generator, mae, convnext = networks
    generator.zero_grad()
    maps = FeatureConfig(maps=("conv1",))
    drift_step(generator, [EncoderSpec("mae", mae, maps), EncoderSpec("convnext", convnext)], small_batch()).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in generator.parameters())
    assert all(parameter.grad is None for encoder in (mae, convnext) for parameter in encoder.parameters())


@pytest.fixture(scope="module")
def pixel_arguments(tmp_path_factory):
    """Arguments of a generator of 16x16 pixels with both encoders."""
    place = tmp_path_factory.mktemp("pixels")
    pictures = write_digit_pictures(place / "pictures", 40)
    assert run_tool("export_latents", "--source", pictures, "--output_dir", place / "cache", "--encoding", "uint8",
                    "--image_size", 16, "--device", "cpu") == 0  # fmt: skip
    data = ("--data.source", "cache", "--data.path", str(place / "cache"))
    sizes = ("--mae.preset", "null", "--mae.in_channels", "3", "--mae.input_size", "16", "--mae.num_classes", "10")
    train_mae.main([*TINY_MAE, *sizes, *data, "--output_dir", str(place / "mae")])
    shape = ("--generator.in_channels", "3", "--generator.input_size", "16", "--generator.patch_size", "4")
    encoders = ("--encoder.path", str(place / "mae/exports/ema_0.99"), "--more_encoders", json.dumps([CONVNEXT]))
    return [*TINY_GENERATOR, *shape, *data, *encoders]


@pytest.mark.multiprocess
def test_two_processes_equal_one_with_both_encoders_on_pixels(pixel_arguments, tmp_path):
    exact = [*pixel_arguments, "--precision", "float64", "--steps", "4", "--optimizer.lr", "1e-3"]
    for processes in (1, 2):
        done = launch(processes, "drift_accel.train", [*exact, "--output_dir", str(tmp_path / str(processes))])
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (metrics(tmp_path / str(processes)) for processes in (1, 2))
    for step, values in one.items():
        for name, value in values.items():
            if name.startswith(("loss", "key_loss", "scale", "drift_sqnorm")):
                assert two[step][name] == pytest.approx(value, rel=1e-9), f"{name} in step {step}"
    others = checkpoint_tensors(tmp_path / "2", 4)
    for name, tensor in checkpoint_tensors(tmp_path / "1", 4).items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_a_changed_second_encoder_is_another_run(pixel_arguments, tmp_path):
    run = ["--steps", "1", "--output_dir", str(tmp_path / "run")]
    train.main([*pixel_arguments, *run])
    recorded = json.loads((tmp_path / "run/provenance.json").read_text())["identity"]
    assert {"encoder_weights_sha256", "encoder_convnext_weights_sha256"} <= set(recorded)
    changed = json.dumps([{**CONVNEXT, "weight": 0.25}])
    with pytest.raises(SystemExit, match="more_encoders"):
        train.main([*pixel_arguments, "--more_encoders", changed, *run])


def test_pixels_behind_the_decoder_train_a_generator_of_latents(tmp_path):
    pictures = write_digit_pictures(tmp_path / "pictures", 40)
    assert run_tool("export_latents", "--source", pictures, "--output_dir", tmp_path / "cache", "--vae", "digits",
                    "--image_size", 64, "--device", "cpu") == 0  # fmt: skip
    data = ("--data.source", "cache", "--data.path", str(tmp_path / "cache"))
    shape = ("--generator.in_channels", "4", "--generator.input_size", "16", "--generator.patch_size", "4")
    encoder = ("--encoder.kind", "convnextv2", "--encoder.path", CONVNEXT["path"], "--encoder.image_size", "32")
    arguments = [*TINY_GENERATOR, *shape, *data, *encoder, "--features.maps", "null", "--batch.generated", "3"]
    with pytest.raises(SystemExit, match="takes pixels and the generator makes latents: set decoder.vae"):
        train.main([*arguments, "--steps", "1", "--output_dir", str(tmp_path / "refused")])
    train.main([*arguments, "--decoder.vae", "digits", "--steps", "2", "--output_dir", str(tmp_path / "run")])
    assert metrics(tmp_path / "run")[2]["drift_sqnorm_0.2/convenxt_stage_3"] > 0
    assert "decoder_weights_sha256" in json.loads((tmp_path / "run/provenance.json").read_text())["identity"]
