"""Pictures encoded while the run goes on: what is drawn belongs to (seed, step, slot), what is encoded to the picture alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY_MAE, checkpoint_tensors, metrics, run_tool

from drift_accel import train_mae
from drift_accel.data.crops import random_resized_crop
from drift_accel.data.digit_images import coloured_digit
from drift_accel.data.digits import load_digits
from drift_accel.data.online_images import CropEncoder, OnlineImages, OnlineImagesConfig
from drift_accel.foundation.random_streams import random_stream
from drift_accel.models.autoencoder import load_vae, vae_scaling
from drift_accel.training.mae_task import ClassifierConfig
from drift_accel.training.online_mae_task import OnlineMaeTask

SLOTS = np.arange(6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three coloured digits of each class."""
    root = tmp_path_factory.mktemp("pictures")
    digits = load_digits("train")
    for label in range(10):
        (root / str(label)).mkdir()
        for row in digits.class_rows(label)[:3]:
            Image.fromarray(coloured_digit(digits.images[row, 0], 0, int(row))).save(root / f"{label}/{row}.png")
    return root


@pytest.fixture(scope="module")
def vae():
    return load_vae("digits")


def opened(folder, vae, **changes):
    config = OnlineImagesConfig(vae=None if vae is None else "digits", image_size=64, vae_batch=4, **changes)
    return OnlineImages(str(folder), CropEncoder(config, vae))


def test_crops_are_the_random_resized_crop_of_their_slot(folder, vae):
    source, rows = opened(folder, vae), np.array([3, 3, 7, 29, 0, 1])
    crops = source.random_crops(rows, 5, 2, SLOTS)
    assert crops.shape == (6, 3, 64, 64) and crops.dtype == np.uint8
    for place in (0, 3):
        stream = random_stream(5, "images/crop", 2, int(SLOTS[place]))
        wanted = random_resized_crop(source.pictures.load(int(rows[place])), 64, stream, (0.2, 1.0))
        assert np.array_equal(crops[place], wanted.transpose(2, 0, 1))
    assert not np.array_equal(crops[0], crops[1]), "one picture in two slots is cropped twice"
    assert np.array_equal(crops[2:4], source.random_crops(rows[2:4], 5, 2, SLOTS[2:4]))
    assert not np.array_equal(crops, source.random_crops(rows, 5, 3, SLOTS))


def test_latents_are_sampled_from_the_posterior_in_model_space(folder, vae):
    source = opened(folder, vae)
    pixels = torch.from_numpy(source.random_crops(np.arange(6), 0, 0, SLOTS))
    noise = torch.from_numpy(source.posterior_noise(0, 0, SLOTS))
    with torch.no_grad():
        posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
    scale, shift = vae_scaling(vae.config)
    wanted = (posterior.mean + posterior.std * noise - shift) * scale
    torch.testing.assert_close(source.encoder.encode(pixels, noise), wanted, rtol=1e-4, atol=1e-4)
    assert source.image_shape == tuple(wanted.shape[1:]) == (4, 16, 16)
    assert source.header.kind == "latents" and source.header.vae["weights_sha256"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_latents_do_not_depend_on_how_slots_are_shared(folder, dtype):
    source = opened(folder, load_vae("digits"), dtype=dtype)
    pixels = torch.from_numpy(source.random_crops(np.arange(6), 0, 0, SLOTS))
    noise = torch.from_numpy(source.posterior_noise(0, 0, SLOTS))
    together = source.encoder.encode(pixels, noise)
    apart = [source.encoder.encode(pixels[part], noise[part], part.start) for part in (slice(0, 3), slice(3, 6))]
    assert torch.equal(together, torch.cat(apart)) and together.dtype == torch.float32
    assert not together.requires_grad


def test_pixels_without_a_vae(folder):
    source = opened(folder, None)
    pixels = torch.from_numpy(source.random_crops(np.arange(2), 0, 0, SLOTS[:2]))
    assert torch.equal(source.encoder.encode(pixels, None), pixels.float() / 127.5 - 1)
    assert source.posterior_noise(0, 0, SLOTS) is None and source.header.vae is None
    assert source.rows(np.array([0, 5])).shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match="are not mirrored"):
        source.rows(np.array([0]), np.array([True]))


def test_a_size_that_the_vae_cannot_take(vae):
    with pytest.raises(ValueError, match="image_size is 66: this VAE takes multiples of 4"):
        CropEncoder(OnlineImagesConfig(vae="digits", image_size=66), vae)


def task_of(source, model, rank=0, num_processes=1):
    return OnlineMaeTask(
        model, source, batch_size=8, mask_ratio=0.5, classifier=ClassifierConfig(), total_steps=5, seed=3,
        device=torch.device("cpu"), rank=rank, num_processes=num_processes,
    )  # fmt: skip


def test_two_processes_draw_and_encode_the_rows_of_one(folder, vae):
    from drift_accel.models import MaskedAutoencoder

    source, model = opened(folder, vae), MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), input_size=16, num_classes=10)
    whole = task_of(source, model)
    halves = [task_of(source, model, rank, 2) for rank in (0, 1)]
    for step in (0, 4):
        one = whole.transfer(whole.draw(step))
        parts = [half.transfer(half.draw(step)) for half in halves]
        for name in ("images", "labels", "mask"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(part, name) for part in parts])), name


def online(folder, *more):
    images = ["--data.source", "images", "--data.path", str(folder), "--data.images.vae", "digits"]
    model = ["--mae.in_channels", "4", "--mae.input_size", "16", "--data.images.image_size", "64"]
    validation = ["--validation.every", "2", "--validation.path", str(folder), "--validation.max_rows", "10"]
    short = ["--steps", "2", "--classifier.steps", "1", "--batch_size", "8", "--data.images.vae_batch", "4"]
    return [*TINY_MAE, *images, *model, *validation, *short, *more]


def test_a_run_says_what_it_trains_on_and_what_the_vae_takes(folder, tmp_path, capsys):
    train_mae.main(online(folder, "--output_dir", str(tmp_path / "run")))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("data: 30 pictures of ") and first.endswith(
        "encoded on line by the VAE digits (float32, sampled posterior)"
    )
    records = metrics(tmp_path / "run")
    assert all(0 < record["vae_share"] <= 1 for record in records.values())
    assert np.isfinite(records[2]["val/reconstruction_ema_0.99"])
    data = json.loads((tmp_path / "run/exports/ema_0.99/data.json").read_text())
    assert data["kind"] == "latents" and data["vae"]["name"] == "digits" and len(data["classes"]) == 10
    identity = json.loads((tmp_path / "run/provenance.json").read_text())["identity"]
    assert identity["vae_sha256"] == data["vae"]["weights_sha256"]


def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path):
    more = ["--checkpoint.every", "1", "--classifier.steps", "0"]
    train_mae.main(online(folder, *more, "--output_dir", str(tmp_path / "whole")))
    train_mae.main(online(folder, *more, "--steps", "1", "--output_dir", str(tmp_path / "cut")))
    train_mae.main(online(folder, *more, "--output_dir", str(tmp_path / "cut")))
    first, second = checkpoint_tensors(tmp_path / "whole", 2), checkpoint_tensors(tmp_path / "cut", 2)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_vaes_part_of_a_step_is_measured_apart(folder, tmp_path):
    arguments = [text for text in online(folder) if text not in ("--device", "cpu")]
    report = tmp_path / "report.json"
    measured = ["--device", "cpu", "--measured", 1, "--warmup", 0, "--report", report]
    assert run_tool("benchmark_step", *arguments, *measured) == 0
    results = json.loads(report.read_text())
    seconds = results["part_seconds"]
    assert seconds["vae"] > seconds["transfer"] > 0 and seconds["encoder"] > 0
    assert results["flops"]["vae"] > 1e8
