"""What the digits' recipes must reach on held-out digits and their latents: `pytest -m slow tests/test_mae_quality.py`."""

import numpy as np
import pytest
from tiny_runs import ROOT, metrics, run_tool

from drift_accel import train_mae
from drift_accel.analysis.mae_inspection import measure_fillings, reconstruct_rows
from drift_accel.data.digit_images import write_digit_images
from drift_accel.data.digits import load_digits
from drift_accel.data.latent_cache import LatentCache
from drift_accel.models.autoencoder import load_vae
from drift_accel.sampling import decode_latents
from drift_accel.training.mae_validation import draw_row_masks, read_held_out
from drift_accel.training.trained_mae import load_trained_mae


def pretrain(recipe, folder, *more):
    train_mae.main(
        ["--config", str(ROOT / f"train_configs/{recipe}.yaml"), "--device", "cpu", *more, "--output_dir", str(folder)]
    )
    return folder


def assert_hidden_cells_are_filled_well(run, source, rows, decode=lambda images: images):
    """Below half of the mean image's error and below bilinear filling from the visible neighbours; 3 dB above the mean image."""
    model = load_trained_mae(run).model
    images = read_held_out(source, rows, 0)
    found = reconstruct_rows(model, images, draw_row_masks(model, 0, rows, 0.5))
    numbers = measure_fillings(found, decode)
    print(numbers)
    assert found.errors["reconstruction"] < found.errors["mean image"] / 2
    assert found.errors["reconstruction"] < found.errors["bilinear"]
    assert numbers["psnr: reconstruction"] >= numbers["psnr: mean image"] + 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return pretrain("mae_digits", tmp_path_factory.mktemp("mae") / "run", "--validation.every", "500")


@pytest.mark.slow
def test_hidden_cells_of_digits_are_filled_far_better_than_by_the_mean_or_the_neighbours(run):
    digits = load_digits("test")
    assert_hidden_cells_are_filled_well(run, digits, np.arange(len(digits)))


@pytest.mark.slow
def test_the_classifier_phase_knows_held_out_digits(run):
    last = metrics(run)[1000]
    print({tag: value for tag, value in last.items() if tag.startswith("val/")})
    assert last["val/accuracy_unmasked_ema_0.99"] >= 0.95
    assert last["val/accuracy_unmasked_raw"] >= 0.95


@pytest.mark.slow
def test_hidden_cells_of_latents_are_filled_far_better_than_by_the_mean_or_the_neighbours(tmp_path):
    for split in ("train", "test"):
        write_digit_images(tmp_path / split, split)
        export = [
            "--source",
            tmp_path / split,
            "--output_dir",
            tmp_path / f"{split}_cache",
            "--vae",
            "digits",
            "--image_size",
            64,
        ]
        assert run_tool("export_latents", *export, "--no_flip", "--device", "cpu") == 0
    run = pretrain("mae_digits_latent", tmp_path / "run", "--data.path", str(tmp_path / "train_cache"))
    held_out, vae = LatentCache(tmp_path / "test_cache"), load_vae("digits")
    assert len(held_out) == 600
    scaling = (held_out.header.scale, held_out.header.shift)
    rows = np.arange(0, len(held_out), 3)
    assert_hidden_cells_are_filled_well(
        run, held_out, rows, lambda latents: decode_latents(vae, latents, chunk=8, scaling=scaling)
    )
