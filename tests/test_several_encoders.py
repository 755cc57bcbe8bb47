"""A step with several encoders: masked autoencoder and ConvNeXt-V2 on pixels, and pixels judged behind a VAE's decoder."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from golden_files import GOLDENS
from small_caches import write_digit_pictures
from tiny_runs import TINY_GENERATOR, TINY_MAE, checkpoint_tensors, launch, metrics, run_tool

from drift_accel import train, train_mae
from drift_accel.data import LatentCache
from drift_accel.data.sources import latent_scaling
from drift_accel.drift import FeatureConfig
from drift_accel.drift.encoders import EncoderSpec, encoder_features
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.models.configuration import DecoderConfig, load_decoder
from drift_accel.models.convnext import load_convnext
from drift_accel.models.pixel_encoder import draw_weights
from drift_accel.models.vae_decoder import VaeDecoder
from drift_accel.training import DriftBatch, drift_step
from drift_accel.training.generator_task import GeneratorTask
from drift_accel.training.step import step_loss, step_problems

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


@pytest.fixture(scope="module")
def latent_arguments(tmp_path_factory):
    """A folder with caches of the same 40 digits as latents and as pixels, and arguments of a generator of the latents."""
    place = tmp_path_factory.mktemp("latents")
    pictures = write_digit_pictures(place / "pictures", 40)
    for name, how in (("latents", ("--vae", "digits")), ("pixels", ("--encoding", "png"))):
        export = ("--source", pictures, "--output_dir", place / name, *how, "--image_size", 64, "--device", "cpu")
        assert run_tool("export_latents", *export) == 0
    data = ("--data.source", "cache", "--data.path", str(place / "latents"))
    shape = ("--generator.in_channels", "4", "--generator.input_size", "16", "--generator.patch_size", "4")
    encoder = ("--encoder.kind", "convnextv2", "--encoder.path", CONVNEXT["path"], "--encoder.image_size", "32")
    return place, [*TINY_GENERATOR, *shape, *data, *encoder, "--features.maps", "null", "--batch.generated", "3"]


def test_pixels_behind_the_decoder_train_a_generator_of_latents(latent_arguments, tmp_path):
    _, arguments = latent_arguments
    with pytest.raises(SystemExit, match="takes pixels and the generator makes latents: set decoder.vae"):
        train.main([*arguments, "--steps", "1", "--output_dir", str(tmp_path / "refused")])
    train.main([*arguments, "--decoder.vae", "digits", "--steps", "2", "--output_dir", str(tmp_path / "run")])
    assert metrics(tmp_path / "run")[2]["drift_sqnorm_0.2/convenxt_stage_3"] > 0
    assert "decoder_weights_sha256" in json.loads((tmp_path / "run/provenance.json").read_text())["identity"]


# Real samples as pictures instead of decoded latents


def test_pictures_take_the_place_of_decoded_real_latents(networks):
    """Of the encoder behind the decoder alone: `global` and encoders of latents see the latents; generated ones are decoded."""
    _, _, convnext = networks
    calls = []

    def decoder(latents):
        calls.append(len(latents))
        return latents[:, :3] * 0.5

    latent_mae = MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=4, input_size=16).eval().requires_grad_(False)
    specs = [EncoderSpec("mae", latent_mae, FeatureConfig(maps=("conv1",))), EncoderSpec("convnext", convnext, decoder=decoder)]
    sizes = {"input_size": 16, "in_channels": 4, "patch_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
    generator = Generator(**sizes, num_classes=2, num_style_tokens=4, num_context_tokens=2)
    plain = small_batch()
    positives, negatives = (torch.cat([x, x[:, :, :1]], dim=2) for x in (plain.positives, plain.negatives))
    latents = replace(plain, positives=positives, negatives=negatives, noise=torch.cat([plain.noise, plain.noise[:, :1]], dim=1))
    same = {"positive_images": positives[:, :, :3] * 0.5, "negative_images": negatives[:, :, :3] * 0.5}
    decoded = drift_step(generator, specs, latents).metrics
    assert calls == [12, 6]  # real, generated
    read = drift_step(generator, specs, replace(latents, **same)).metrics
    assert calls == [12, 6, 6]
    assert all(torch.equal(read[name], value) for name, value in decoded.items())
    other = drift_step(generator, specs, replace(latents, **{name: -images for name, images in same.items()})).metrics
    changed = {name.removeprefix("scale/") for name in decoded if name.startswith("scale/") and other[name] != decoded[name]}
    of_pixels = {name.removeprefix("scale/") for name in decoded if name.startswith("scale/convnext/")}
    assert changed == of_pixels - {"convnext/convenxt_stage_3_std", "convnext/global_std"}  # one location has no deviation
    parts = [replace(latents, **same).labels_from(label, label + 1) for label in (0, 1)]
    assert all(torch.equal(part.positive_images, same["positive_images"][k : k + 1]) for k, part in enumerate(parts))
    with pytest.raises(ValueError, match="give positive_images and negative_images, or neither"):
        replace(latents, positive_images=same["positive_images"])
    with pytest.raises(ValueError, match=r"negative_images has shape \[2, 1, .*wanted one image for each of \[2, 2\]"):
        replace(latents, positive_images=same["positive_images"], negative_images=same["negative_images"][:, :1])


def tiny_decoder() -> VaeDecoder:
    """The decoder of a tiny VAE in float64: 4x8x8 latents to 16x16 images."""
    sizes = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**sizes, **blocks, scaling_factor=0.7, shift_factor=0.1)
    draw_weights(vae, torch.Generator().manual_seed(1))
    return VaeDecoder(vae.double(), batch=2).double()


def test_the_path_through_the_decoder_agrees_with_finite_differences(networks):
    """From latents to every feature key of an encoder of pixels, all keys at once along random directions."""
    convnext = load_convnext(CONVNEXT["path"], image_size=32).double()
    specs = (EncoderSpec("convnext", convnext, decoder=tiny_decoder()),)
    draws = torch.Generator().manual_seed(2)
    latents = torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=draws)
    weights = {key: torch.randn(value.shape, dtype=torch.float64, generator=draws)
               for key, value in encoder_features(specs, latents).items()}  # fmt: skip

    def value(x):
        return sum((weights[key] * features).sum() for key, features in encoder_features(specs, x).items())

    x = latents.clone().requires_grad_()
    value(x).backward()
    with torch.no_grad():
        for _ in range(3):
            direction = torch.randn(latents.shape, dtype=torch.float64, generator=draws)
            difference = (value(latents + 1e-5 * direction) - value(latents - 1e-5 * direction)) / 2e-5
            assert (x.grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-6)


def test_gradients_pass_the_decoder_and_reach_the_generator_alone():
    convnext, decoder = load_convnext(CONVNEXT["path"], image_size=32).double(), tiny_decoder()
    sizes = {"input_size": 8, "in_channels": 4, "patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}
    generator = Generator(**sizes, num_classes=2, num_style_tokens=4, num_context_tokens=2).double()
    with torch.no_grad():  # the last layer starts at zero
        for parameter in generator.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plain, draws = small_batch().to("cpu", torch.float64), torch.Generator().manual_seed(3)
    shapes = {"positives": (2, 4), "negatives": (2, 2), "noise": (6,)}
    drawn = {name: torch.randn(*shape, 4, 8, 8, dtype=torch.float64, generator=draws) for name, shape in shapes.items()}
    batch, spec = replace(plain, **drawn), EncoderSpec("convnext", convnext, decoder=decoder)
    problems = step_problems(generator, spec, batch)
    behind = step_loss({key: members for key, members in problems.items() if key != "global"}, batch).loss
    behind.backward()  # without `global`, which needs no decoder
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in generator.parameters())
    assert all(parameter.grad is None for frozen in (convnext, decoder) for parameter in frozen.parameters())


def test_a_run_reads_the_pictures_of_its_real_samples(latent_arguments, tmp_path, monkeypatch):
    """Those of the very rows that are drawn, mirrored with them; a run keeps to what it began with."""
    place, arguments = latent_arguments
    drawn = []
    transfer = GeneratorTask.transfer
    monkeypatch.setattr(GeneratorTask, "transfer", lambda task, batch: drawn.append(batch) or transfer(task, batch))
    flags = ("--decoder.vae", "digits", "--data.flip", "--data.max_rows", "30", "--steps", "2")
    images = ("--decoder.real_images", str(place / "pixels"))
    train.main([*arguments, *flags, *images, "--output_dir", str(tmp_path / "run")])
    decoder = load_decoder(DecoderConfig(vae="digits"), scaling=latent_scaling(LatentCache(place / "latents")))
    assert len(drawn) == 2
    for batch in drawn:
        for latents, pictures in ((batch.positives, batch.positive_images), (batch.negatives, batch.negative_images)):
            wanted = decoder(latents.flatten(0, 1))
            errors = (wanted[:, None] - pictures.flatten(0, 1)[None]).square().mean((2, 3, 4))  # [decoded, pictures]
            assert (errors.diagonal() <= errors.min(dim=1).values + 1e-7).all()  # each decoded latent is nearest to its picture
            assert errors.diagonal().max() < 0.01
    with pytest.raises(SystemExit, match="decoder.real_images"):
        train.main([*arguments, *flags, "--output_dir", str(tmp_path / "run")])
    assert "real_images_sha256" in json.loads((tmp_path / "run/provenance.json").read_text())["identity"]


def test_pictures_that_are_not_those_of_the_rows_are_refused(latent_arguments, tmp_path):
    place, arguments = latent_arguments
    behind = [*arguments, "--decoder.vae", "digits", "--steps", "1", "--output_dir", str(tmp_path / "run")]

    def pixels(name, *how):
        export = ("--source", place / "pictures", "--output_dir", tmp_path / name, "--encoding", "png", "--device", "cpu", *how)
        assert run_tool("export_latents", *export) == 0
        return tmp_path / name

    cases = [
        (place / "latents", "it holds latents, not pixels"),
        (tmp_path / "none", "none"),
        (pixels("small", "--image_size", 32), r"its images are \(3, 32, 32\), decoded latents are \(3, 64, 64\); its crop is"),
        (pixels("few", "--image_size", 64, "--max_rows", 39), "it has 39 rows, the latents 40"),
        (pixels("other", "--image_size", 64, "--seed", 1), "source of row . is "),
    ]
    for path, message in cases:
        with pytest.raises(SystemExit, match=message):
            train.main([*behind, "--decoder.real_images", str(path)])
    latent_only = ("--encoder.kind", "mae", "--encoder.image_size", "null", "--encoder.random", "true")
    (tmp_path / "mae").mkdir()
    (tmp_path / "mae/config.json").write_text(
        json.dumps({"width": 8, "blocks": [1, 1, 1, 1], "in_channels": 4, "input_size": 16})
    )
    with pytest.raises(SystemExit, match="no encoder takes pixels: leave it out"):
        train.main(
            [*behind, *latent_only, "--encoder.path", str(tmp_path / "mae"), "--decoder.real_images", str(place / "pixels")]
        )
    assert not (tmp_path / "run").exists()
