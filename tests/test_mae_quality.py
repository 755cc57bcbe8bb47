"""What the digits' recipe must reach on held-out digits: `python -m pytest -m slow tests/test_mae_quality.py`."""

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, metrics

from drift_accel import train_mae
from drift_accel.analysis.mae_inspection import measure_fillings, reconstruct_rows
from drift_accel.data.digits import load_digits
from drift_accel.training.mae_validation import draw_row_masks
from drift_accel.training.trained_mae import load_trained_mae


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "run"
    recipe = ["--config", str(ROOT / "train_configs/mae_digits.yaml"), "--validation.every", "500", "--device", "cpu"]
    train_mae.main([*recipe, "--output_dir", str(folder)])
    return folder


@pytest.mark.slow
def test_hidden_cells_are_filled_far_better_than_by_the_mean_or_the_neighbours(run):
    model, digits = load_trained_mae(run).model, load_digits("test")
    mask = draw_row_masks(model, 0, np.arange(len(digits)), 0.5)
    found = reconstruct_rows(model, torch.from_numpy(digits.images), mask)
    numbers = measure_fillings(found, lambda images: images)
    print(numbers)
    assert found.errors["reconstruction"] < found.errors["mean image"] / 2
    assert found.errors["reconstruction"] < found.errors["bilinear"]
    assert numbers["psnr: reconstruction"] >= numbers["psnr: mean image"] + 3


@pytest.mark.slow
def test_the_classifier_phase_knows_held_out_digits(run):
    last = metrics(run)[1000]
    print({tag: value for tag, value in last.items() if tag.startswith("val/")})
    assert last["val/accuracy_unmasked_ema_0.99"] >= 0.95
    assert last["val/accuracy_unmasked_raw"] >= 0.95
