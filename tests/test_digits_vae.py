"""The bundled VAE of coloured digits keeps what its record promises, and the command that trained it works."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from drift_accel.data.digit_images import coloured_digits
from drift_accel.foundation.storage import verify_folder
from drift_accel.models import bundled
from drift_accel.models.bundled import bundled_vae_path
from drift_accel.sampling.decoding import decode_latents

TOOL = Path(__file__).parent.parent / "tools" / "train_digits_vae.py"
FILES = {"config.json", "diffusion_pytorch_model.safetensors", "provenance.json", "COMPLETE.json"}


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(bundled_vae_path("digits"), local_files_only=True).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def record():
    return json.loads((bundled_vae_path() / "provenance.json").read_text())


def to_model(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [N, 64, 64, 3] as [N, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def scaled(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents in model space."""
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def mean_psnr(images: torch.Tensor, others: torch.Tensor) -> float:
    """Mean over images, both in [-1, 1]."""
    errors = ((images - others.clamp(-1, 1)) / 2).square().mean((1, 2, 3))
    return (-10 * errors.log10()).mean().item()


# The bundled folder.


def test_the_folder_is_whole_small_and_says_where_it_came_from(record):
    folder = bundled_vae_path("digits")
    assert {path.name for path in folder.iterdir()} == FILES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    assert verify_folder(folder) == []
    assert record["command"].startswith("python tools/train_digits_vae.py drift_accel/models/digits_vae")
    assert {"steps", "seed", "psnr", "latent_mean", "latent_std", "versions"} <= record.keys()
    assert record["psnr"] >= 30


def test_it_makes_latents_4x16x16_of_64x64_images(vae):
    assert (vae.config.latent_channels, vae.config.sample_size) == (4, 64)
    assert all(parameter.dtype == torch.float32 for parameter in vae.parameters())
    latents = vae.encode(torch.zeros(2, 3, 64, 64)).latent_dist.mean
    assert latents.shape == (2, 4, 16, 16)
    assert vae.decode(latents).sample.shape == (2, 3, 64, 64)


def test_held_out_digits_survive_the_way_through_model_space(vae, record):
    images = to_model(coloured_digits("test", record["seed"])[0][::6])
    posterior = vae.encode(images).latent_dist
    assert len(images) == 100
    psnr = mean_psnr(images, decode_latents(vae, scaled(vae, posterior.mean), chunk=50))
    assert psnr >= 30
    assert psnr == pytest.approx(record["psnr"], abs=0.7)
    sample = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(0))
    assert mean_psnr(images, decode_latents(vae, scaled(vae, sample), chunk=50)) == pytest.approx(
        record["psnr_of_samples"], abs=0.7
    )


def test_other_colours_survive_as_well(vae, record):
    images = to_model(coloured_digits("test", record["seed"] + 1)[0][:60])
    assert mean_psnr(images, vae.decode(vae.encode(images).latent_dist.mean).sample) >= 30


def test_training_latents_have_mean_0_and_deviation_1_in_model_space(vae, record):
    images = to_model(coloured_digits("train", record["seed"])[0][::6])
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    latents = scaled(vae, posterior.mean + posterior.std * noise)
    assert 0.9 <= latents.std().item() <= 1.1
    assert abs(latents.mean().item()) < 0.1
    # No channel is left out and none dominates: one noise level fits all.
    deviations = latents.std((0, 2, 3))
    assert deviations.min() > 0.4 and deviations.max() < 2.0, deviations
    assert vae.config.scaling_factor == pytest.approx(1 / record["latent_std"])
    assert vae.config.shift_factor == pytest.approx(record["latent_mean"])


def test_a_little_noise_in_model_space_changes_the_image_a_little(vae, record):
    images = to_model(coloured_digits("test", record["seed"])[0][:60])
    latents = scaled(vae, vae.encode(images).latent_dist.mean)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    assert mean_psnr(images, decode_latents(vae, latents + 0.1 * noise, chunk=60)) >= 28


def test_a_name_that_is_not_bundled_or_weights_left_out_are_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no bundled VAE 'faces': choose one of digits"):
        bundled_vae_path("faces")
    monkeypatch.setattr(bundled, "__file__", str(tmp_path / "bundled.py"))
    with pytest.raises(FileNotFoundError, match="install the package again"):
        bundled_vae_path("digits")


# The command.


@pytest.fixture(scope="module")
def tool():
    specification = importlib.util.spec_from_file_location("train_digits_vae", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def run(tool, monkeypatch):
    """Runs the command on a few digits only, on the threads that the tests have."""
    whole = tool.coloured_digits
    monkeypatch.setattr(tool, "coloured_digits", lambda split, seed: tuple(part[:60] for part in whole(split, seed)))

    def command(*arguments):
        threads = torch.get_num_threads()
        monkeypatch.setattr(sys, "argv", ["train_digits_vae.py", *map(str, arguments)])
        try:
            tool.main()
        finally:
            torch.set_num_threads(threads)

    return command


def test_a_tiny_run_writes_what_it_promises_and_repeats_itself(tool, run, tmp_path, capsys):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    size = ("--steps", 3, "--batch_size", 4, "--seed", 7)
    run(tmp_path / "first", *size, "--picture", tmp_path / "pairs.png")
    output = capsys.readouterr()
    assert "PSNR on 60 held-out digits" in output.out and "step 3/3" in output.err and "steps/s" in output.err
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"
    first = tmp_path / "first"
    assert {path.name for path in first.iterdir()} == FILES
    record = json.loads((first / "provenance.json").read_text())
    assert (record["steps"], record["seed"], record["num_held_out"]) == (3, 7, 60)
    assert record["command"] == f"python tools/train_digits_vae.py {first} " + " ".join(
        map(str, (*size, "--picture", tmp_path / "pairs.png"))
    )
    loaded = AutoencoderKL.from_pretrained(first, local_files_only=True)
    assert loaded.config.scaling_factor == pytest.approx(1 / record["latent_std"])
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.width > 640

    torch.manual_seed(2)
    run(tmp_path / "again", *size)
    weights, again = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("first", "again"))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    begin = tool.build(7).state_dict()
    assert all(not torch.equal(weights[name], begin[name]) for name in weights if name.endswith("conv.weight"))


def test_an_existing_folder_is_replaced_only_on_demand_and_only_its_own(tool, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for arguments, message in (
        ([tmp_path / "photos"], "photos exists: choose another folder, or say --replace"),
        ([tmp_path / "photos", "--replace"], "photos is no folder of this command"),
        ([tmp_path / "new", "--steps", "0"], "must be at least 1"),
        ([tmp_path / "new", "--seed", "-1"], "--seed is -1"),
    ):
        with pytest.raises(SystemExit):
            tool.parse_arguments([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err
    (tmp_path / "photos" / "provenance.json").write_text("{}")
    assert tool.parse_arguments([str(tmp_path / "photos"), "--replace"]).replace


def test_psnr_is_the_mean_over_images_of_pixels_in_0_to_1(tool):
    pixels = np.full((2, 64, 64, 3), 100, dtype=np.uint8)
    images = to_model(pixels)
    images[0] += 0.02  # 0.01 of the range: 40 dB
    images[1] -= 0.2  # 0.1: 20 dB
    assert tool.psnr(pixels, images) == pytest.approx(30, abs=1e-3)
    # What leaves the range is clipped, as a picture is.
    assert tool.psnr(np.full((1, 4, 4, 3), 255, dtype=np.uint8), torch.full((1, 3, 4, 4), 9.0)) > 100


def test_the_untrained_vae_is_a_function_of_the_seed(tool):
    torch.manual_seed(1)
    first = tool.build(3).state_dict()
    torch.manual_seed(2)
    again, other = tool.build(3).state_dict(), tool.build(4).state_dict()
    assert all(torch.equal(first[name], again[name]) and first[name].isfinite().all() for name in first)
    assert not torch.equal(first["encoder.conv_in.weight"], other["encoder.conv_in.weight"])
