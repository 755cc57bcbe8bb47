"""The latent path end to end: pictures -> export through the bundled VAE -> verify -> encoder -> generator."""

import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import TINY_GENERATOR, TINY_MAE, checkpoint_tensors, load_tool

from drift_accel import train, train_mae
from drift_accel.data.digit_images import coloured_digit
from drift_accel.data.digits import load_digits
from drift_accel.data.latent_cache import LatentCache
from drift_accel.models.autoencoder import load_vae

NUM_PICTURES = 40


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of coloured digits as PNGs."""
    folder, digits = tmp_path_factory.mktemp("pictures"), load_digits("train")
    for row in range(NUM_PICTURES):
        target = folder / str(digits.labels[row])
        target.mkdir(exist_ok=True)
        Image.fromarray(coloured_digit(digits.images[row, 0], 0, row)).save(target / f"{row:05d}.png")
    return folder


def export(pictures, output, *more):
    arguments = ["--source", pictures, "--output_dir", output, "--vae", "digits", "--image_size", 64, "--cpu", *more]
    return run_tool("export_latents", *arguments)


def run_tool(name, *arguments):
    """Exit status of a tool's main in this process."""
    tool = load_tool(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        try:
            return tool.main() or 0
        except SystemExit as stop:
            return stop.code or 0


@pytest.fixture(scope="module")
def cache(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "cache"
    assert export(pictures, folder, "--sampling", "mean", "--chunk_size", 16, "--batch_size", 8) == 0
    return folder


def test_rows_are_the_posterior_means_of_their_pictures(pictures, cache):
    opened, table = LatentCache(cache), datasets.load_from_disk(str(cache))
    assert len(opened) == len(table) == NUM_PICTURES and opened.image_shape == (4, 16, 16)
    vae = load_vae("digits")
    for row in range(0, NUM_PICTURES, 7):
        name = table[row]["source"]
        pixels = np.asarray(Image.open(next(pictures.rglob(name.rsplit("/", 1)[-1]))).convert("RGB"), dtype=np.float32)
        image = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        mean = vae.encode(image).latent_dist.mean
        wanted = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
        assert np.allclose(opened.rows(np.array([row]))[0], wanted[0].numpy(), atol=4e-3), f"row {row}, {name}"
        assert opened.class_names[opened.labels[row]] == name.split("/")[0]
    order = [table[row]["image_index"] for row in range(NUM_PICTURES)]
    assert sorted(order) == list(range(NUM_PICTURES)) and order != sorted(order), "rows are not shuffled"


def test_the_same_export_gives_the_same_rows_and_another_seed_does_not(pictures, cache, tmp_path):
    settings = ("--sampling", "mean", "--chunk_size", 16, "--batch_size", 8)
    assert export(pictures, tmp_path / "again", *settings) == 0
    rows = np.arange(NUM_PICTURES)
    assert np.array_equal(LatentCache(tmp_path / "again").rows(rows), LatentCache(cache).rows(rows))
    assert export(pictures, tmp_path / "other", *settings, "--seed", 1) == 0
    assert not np.array_equal(LatentCache(tmp_path / "other").labels, LatentCache(cache).labels)


def test_flipped_latents_are_those_of_mirrored_pictures(pictures, cache):
    opened, vae = LatentCache(cache), load_vae("digits")
    name = datasets.load_from_disk(str(cache))[0]["source"]
    pixels = np.asarray(Image.open(next(pictures.rglob(name.rsplit("/", 1)[-1]))).convert("RGB"), dtype=np.float32)[:, ::-1]
    mean = vae.encode(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist.mean
    wanted = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert np.allclose(opened.rows(np.array([0]), np.array([True]))[0], wanted[0].numpy(), atol=4e-3)


def test_verify_passes_a_good_cache_and_names_a_flipped_byte(cache, tmp_path, capsys):
    assert run_tool("verify_cache", cache, "--mode", "full") == 0
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    shard = next(damaged.glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert run_tool("verify_cache", damaged, "--mode", "full") != 0
    assert shard.name in "".join(capsys.readouterr())


def test_what_is_no_complete_cache_is_refused(cache, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=str(tmp_path)):
        LatentCache(tmp_path)
    partial = shutil.copytree(cache, tmp_path / "partial")
    next(partial.glob("*.arrow")).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="arrow"):
        LatentCache(partial)


def test_encoder_and_generator_train_on_the_cache_and_refuse_another_space(cache, tmp_path):
    data = ("--data.source", "cache", "--data.path", str(cache), "--data.flip", "true")
    sizes = ("--mae.preset", "null", "--mae.in_channels", "4", "--mae.input_size", "16", "--mae.num_classes", "10")
    train_mae.main([*TINY_MAE, *sizes, *data, "--output_dir", str(tmp_path / "mae")])
    shape = ("--generator.in_channels", "4", "--generator.input_size", "16", "--generator.patch_size", "4")
    encoder = tmp_path / "mae/exports/ema_0.99"
    arguments = [*TINY_GENERATOR, *shape, *data, "--encoder.path", str(encoder), "--sample.vae", "digits"]
    train.main([*arguments, "--steps", "2", "--output_dir", str(tmp_path / "run")])
    assert checkpoint_tensors(tmp_path / "run", 2)
    assert (tmp_path / "run/samples/step_00000002.png").exists()
    description = (encoder / "data.json").read_text()
    (encoder / "data.json").write_text(description.replace('"scale": ', '"scale": 2.0, "was": '))
    with pytest.raises(SystemExit, match="was trained with VAE scale 2.0"):
        train.main([*arguments, "--steps", "2", "--output_dir", str(tmp_path / "other")])
