"""The inspector of masked autoencoders: what it measures by hand, what it draws, which weights it takes and what it refuses."""

import json

import numpy as np
import pytest
import torch
from golden_files import unpack_artifact
from PIL import Image
from small_caches import write_small_cache
from tiny_runs import TINY_MAE, run_tool

from drift_accel import train_mae
from drift_accel.analysis.mae_inspection import (
    GREY,
    caption_of,
    feature_energy,
    feature_inventory,
    masked_psnr,
    measure_fillings,
    paint_hidden,
    reconstruct_rows,
)
from drift_accel.analysis.panels import panel_array
from drift_accel.models import MaskedAutoencoder
from drift_accel.models.inpainting import fill_bilinear, fill_hidden, hidden_error
from drift_accel.training.trained_mae import load_trained_mae

SMALL = {"width": 8, "blocks": (1, 1, 1, 1), "in_channels": 1, "input_size": 8, "num_classes": 10}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae") / "run"
    train_mae.main([*TINY_MAE, "--output_dir", str(folder)])
    return folder


# Filling by hand.


def ramp(side=8):
    return (torch.arange(side, dtype=torch.float64)[None, None, None].expand(2, 3, side, side) / side).clone()


def test_bilinear_filling_continues_a_ramp_across_a_hidden_patch():
    grid, mask = ramp(), torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    mask[..., 2:4, 4:6] = 1
    filled = fill_bilinear(grid, mask, 2)
    assert torch.equal(filled[mask.expand_as(grid) == 0], grid[mask.expand_as(grid) == 0])
    inside = filled[..., 2:4, 4:6]
    assert (inside[..., 1] > inside[..., 0]).all() and (inside - grid[..., 2:4, 4:6]).abs().max() < 0.1
    constant = torch.full_like(grid, 0.3)
    torch.testing.assert_close(fill_bilinear(constant, mask, 2), constant)


def test_a_far_visible_cell_is_found_and_an_empty_image_stays_finite():
    grid, mask = ramp(), torch.ones(2, 1, 8, 8, dtype=torch.float64)
    mask[0, 0, 0, 0] = 0
    filled = fill_bilinear(grid + 1, mask, 2)
    torch.testing.assert_close(filled[0], torch.ones_like(filled[0]))
    assert not filled[1].any()


def test_errors_count_hidden_cells_alone():
    grid = torch.zeros(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, :2] = 1
    prediction = torch.full_like(grid, 2.0)
    assert float(hidden_error(prediction, grid, mask)) == pytest.approx(12)  # 3 channels of 2^2
    filled = fill_hidden(grid, prediction, mask)
    assert filled[0, :, :2].eq(2).all() and not filled[0, :, 2:].any() and not filled[1].any()


def test_psnr_follows_its_definition_and_looks_at_hidden_pixels_alone():
    wanted, mask = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)
    mask[..., :2, :] = 1
    pictures = wanted.clone()
    pictures[..., :4, :] = 0.2
    assert masked_psnr(pictures, wanted, mask) == pytest.approx(10 * np.log10(4 / 0.04), rel=1e-5)
    pictures[..., 4:, :] = 0.9
    assert masked_psnr(pictures, wanted, mask) == pytest.approx(20, rel=1e-5)


def test_a_perfect_model_and_the_mean_image_are_measured_as_such():
    model = MaskedAutoencoder(**SMALL)
    images = torch.linspace(-1, 1, 4)[:, None, None, None].expand(4, 1, 8, 8).clone()
    mask = torch.zeros(4, 1, 8, 8)
    mask[..., :4] = 1
    model.reconstruct = lambda pictures, hidden: pictures
    found = reconstruct_rows(model, images, mask)
    assert found.errors["reconstruction"] == 0
    assert found.errors["mean image"] == pytest.approx(float(images.square().mean()))
    assert torch.equal(found.reconstructed, images)
    numbers = measure_fillings(found, lambda pictures: pictures)
    assert numbers["psnr: reconstruction"] > 90 > numbers["psnr: mean image"]
    caption = caption_of(numbers, 4, 0.5, decoded=False)
    assert "50% of 4 images" in caption and f"{numbers['psnr: mean image']:.2f}" in caption
    assert paint_hidden(images, mask)[..., :4].eq(GREY).all() and torch.equal(
        paint_hidden(images, mask)[..., 4:], images[..., 4:]
    )


def test_the_inventory_names_every_key_and_finds_what_is_not_finite():
    model = MaskedAutoencoder(**SMALL).requires_grad_(False)
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    entries = {entry["key"]: entry for entry in feature_inventory(model, images)}
    maps = model.feature_maps(images)
    assert entries["layer2"]["shape"] == [3, 16, 16] and {"norm_x", "conv1_mean", "layer1_std_2"} <= set(entries)
    assert entries["layer2"]["mean"] == pytest.approx(float(maps["layer2"].mean()), abs=1e-6)
    assert all(entry["finite"] for entry in entries.values())
    energy = feature_energy(model, images)
    np.testing.assert_allclose(energy["layer1"], maps["layer1"].square().mean(1).numpy(), rtol=1e-5)
    model.encoder.stem.convolution.weight[0, 0, 1, 1] = float("nan")
    assert not {entry["key"]: entry for entry in feature_inventory(model, images)}["conv1"]["finite"]


def test_panels_hold_every_view_and_refuse_what_does_not_fit():
    columns = {"a": torch.full((5, 1, 8, 8), -1.0), "b": torch.full((5, 3, 16, 16), float("nan"))}
    picture = panel_array(columns, "one line\nand another", groups=2, cell=32)
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert (picture == 0).all(-1).sum() >= 5 * 32 * 32 and (picture == (255, 0, 255)).all(-1).sum() == 5 * 32 * 32
    with pytest.raises(ValueError, match="different numbers"):
        panel_array({"a": columns["a"], "b": columns["b"][:2]})
    with pytest.raises(ValueError, match="decode latents"):
        panel_array({"a": torch.zeros(1, 4, 8, 8)})
    with pytest.raises(ValueError, match="groups"):
        panel_array(columns, groups=0)


# Which weights.


def test_weights_of_a_run_a_checkpoint_an_export_and_the_release(run, tmp_path):
    export = run / "exports/ema_0.99"
    average = MaskedAutoencoder.from_pretrained(export).state_dict()
    for path, ema in ((run, None), (run, "0.99"), (run, "ema_0.99"), (export, None), (run / "checkpoints/step_00000006", None)):
        found = load_trained_mae(path, ema=ema)
        assert all(torch.equal(value, average[name]) for name, value in found.model.state_dict().items()), (path, ema)
        assert found.configuration["mask_ratio"] == 0.5 and not found.model.training
    raw = load_trained_mae(run, ema="none")
    assert "raw weights" in raw.origin
    assert not torch.equal(raw.model.classifier.weight, average["classifier.weight"])
    assert load_trained_mae(unpack_artifact("mae", tmp_path)).model.config.width == 32


def test_models_that_are_none_are_refused(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_trained_mae(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_trained_mae(tmp_path)
    with pytest.raises(ValueError, match="has no average 0.5"):
        load_trained_mae(run, ema="0.5")
    with pytest.raises(ValueError, match="--ema is 'x'"):
        load_trained_mae(run, ema="x")
    with pytest.raises(ValueError, match="--ema chooses nothing"):
        load_trained_mae(run / "exports/ema_0.99", ema="0.99")
    with pytest.raises(ValueError, match="holds a Generator"):
        load_trained_mae(unpack_artifact("generator", tmp_path))


# The command.


def test_the_command_on_digits(run, tmp_path, capsys):
    arguments = [run, "--output_dir", tmp_path / "a", "--rows", "40", "--num", "8", "--mask_ratio", "0.25", "--seed", "3"]
    assert run_tool("inspect_mae", *arguments) == 0
    printed = capsys.readouterr().out
    assert "masked cells (25% of 40 images)" in printed and "layer4_blk1" not in printed and "norm_x" in printed
    record = json.loads((tmp_path / "a/inspection.json").read_text())
    assert (record["rows"], record["mask_ratio"], record["seed"]) == (40, 0.25, 3)
    assert set(record["numbers"]) == {
        f"{kind}: {name}" for kind in ("error", "psnr") for name in ("reconstruction", "mean image", "bilinear")
    }
    for name in ("reconstructions.png", "features.png"):
        assert min(Image.open(tmp_path / "a" / name).size) > 100
    assert run_tool("inspect_mae", *arguments[:2], tmp_path / "b", *arguments[3:]) == 0
    again = json.loads((tmp_path / "b/inspection.json").read_text())
    assert again["numbers"] == record["numbers"]
    assert (tmp_path / "a/reconstructions.png").read_bytes() == (tmp_path / "b/reconstructions.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num is 0"),
        (["--mask_ratio", "1"], "--mask_ratio is 1.0"),
        (["--source", "x"], "--source is for caches"),
    ],
)
def test_wrong_options(arguments, message, run, tmp_path, capsys):
    assert run_tool("inspect_mae", run, "--output_dir", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_cache_of_another_shape_is_refused(run, tmp_path):
    write_small_cache(tmp_path / "cache")
    message = run_tool("inspect_mae", run, "--output_dir", tmp_path / "out", "--data", tmp_path / "cache")
    assert "takes images of shape (1, 8, 8), the data has (2, 3, 3)" in message
