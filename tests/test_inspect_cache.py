"""tools/inspect_cache.py: rows as labelled pictures, beside their sources, and the numbers of a cache."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_caches import SIZE, small_header, small_pixels, without_rows, write_digit_pictures, write_small_cache, write_tiny_vae
from tiny_runs import run_tool

from drift_accel.data.image_sources import ImageFolder
from drift_accel.data.latent_cache import LatentCache
from drift_accel.foundation.random_streams import random_stream
from drift_accel.models.autoencoder import load_vae
from drift_accel.sampling import class_grid_array, decode_latents

NUM_PICTURES = 24
EXPORT = ("--image_size", 64, "--cpu", "--chunk_size", 16, "--batch_size", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pictures` and the `latents` (their means) and `pixels` made of them."""
    place = tmp_path_factory.mktemp("inspect")
    write_digit_pictures(place / "pictures", NUM_PICTURES)
    common = ("--source", place / "pictures", *EXPORT)
    assert run_tool("export_latents", *common, "--output_dir", place / "latents", "--vae", "digits", "--sampling", "mean") == 0
    assert run_tool("export_latents", *common, "--output_dir", place / "pixels", "--encoding", "png") == 0
    return place


def inspect(cache, out, *more):
    """The numbers that the command writes, after it ended well."""
    assert run_tool("inspect_cache", cache, "--output_dir", out, *more) == 0
    return json.loads((out / "statistics.json").read_text())


def shown_rows(cache: LatentCache, count: int, seed: int = 0) -> np.ndarray:
    return random_stream(seed, "inspect/rows", 0).choice(len(cache), min(count, len(cache)), replace=False)


def assert_shows(path, expected: np.ndarray) -> None:
    """That a picture file is this one, up to the rounding of one level."""
    with Image.open(path) as image:
        shown = np.asarray(image)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("flipped", [False, True])
def test_the_grid_shows_decoded_rows_with_their_class_names(place, tmp_path, capsys, flipped):
    cache, vae = LatentCache(place / "latents"), load_vae("digits")
    numbers = inspect(place / "latents", tmp_path, "--num", 10, "--seed", 3, *(["--flipped"] if flipped else []))
    indices = shown_rows(cache, 10, seed=3)
    rows = cache.rows(indices, flipped)
    images = decode_latents(vae, torch.from_numpy(rows))
    expected = class_grid_array(images, cache.labels[indices], class_names=cache.class_names, columns=8)
    assert_shows(tmp_path / "grid.png", expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes.png", "grid.png", "statistics.json"]
    assert (numbers["rows"], numbers["shown"]) == (NUM_PICTURES, 10)
    assert numbers["mean_of_shown"] == pytest.approx(rows.mean()) and numbers["std_of_shown"] == pytest.approx(rows.std())
    counts = np.bincount(cache.labels, minlength=10).tolist()
    assert numbers["class_rows"] == counts
    assert (numbers["smallest_class"], numbers["largest_class"]) == (min(counts), max(counts))
    assert numbers["header"]["vae"]["name"] == "digits" and numbers["provenance"]["versions"]
    output = capsys.readouterr().out
    assert "rows: 24" in output and f"written: {tmp_path / 'grid.png'}" in output


@pytest.mark.parametrize("flipped", [False, True])
def test_rows_are_compared_with_their_source_pictures(place, tmp_path, flipped):
    more = ["--flipped"] if flipped else []
    numbers = inspect(place / "latents", tmp_path, "--num", 12, "--compare", place / "pictures", *more)
    assert 30 < numbers["psnr_of_shown"] < 45
    cache, source, vae = LatentCache(place / "latents"), ImageFolder(place / "pictures"), load_vae("digits")
    indices = shown_rows(cache, 12)
    decoded = decode_latents(vae, torch.from_numpy(cache.rows(indices, flipped))).clamp(-1, 1)
    originals = np.stack([source.load(origin.image_index) for origin in cache.origins(indices)])
    originals = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1
    originals = originals.flip(-1) if flipped else originals
    pairs = torch.stack([originals, decoded], dim=1).flatten(0, 1)
    labels = np.repeat(cache.labels[indices], 2)
    expected = class_grid_array(pairs, labels, class_names=cache.class_names, columns=8)
    assert_shows(tmp_path / "pairs.png", expected)


@pytest.mark.parametrize("flipped", [False, True])
def test_lossless_pixels_are_their_source_pictures(place, tmp_path, flipped):
    more = ["--flipped"] if flipped else []
    numbers = inspect(place / "pixels", tmp_path, "--source", place / "pictures", *more)
    assert numbers["psnr_of_shown"] == pytest.approx(100) and numbers["shown"] == NUM_PICTURES


def test_a_given_scale_of_the_export_is_undone(place, tmp_path):
    common = ("--source", place / "pictures", *EXPORT, "--vae", "digits", "--sampling", "mean", "--no_flip")
    assert run_tool("export_latents", *common, "--output_dir", tmp_path / "cache", "--scale", 0.3, "--shift", -1) == 0
    compare = ("--compare", place / "pictures")
    usual = inspect(place / "latents", tmp_path / "usual", *compare)
    numbers = inspect(tmp_path / "cache", tmp_path / "out", *compare)
    assert numbers["psnr_of_shown"] == pytest.approx(usual["psnr_of_shown"], abs=0.05)
    assert numbers["std_of_shown"] < 0.8 * usual["std_of_shown"]
    message = run_tool("inspect_cache", tmp_path / "cache", "--output_dir", tmp_path / "flipped", "--flipped")
    assert "holds no flipped views" in message


def test_moments_are_drawn_and_random_crops_found_again(place, tmp_path):
    common = ("--source", place / "pictures", *EXPORT, "--crop", "random", "--views", 2, "--seed", 4)
    assert (
        run_tool("export_latents", *common, "--output_dir", tmp_path / "cache", "--vae", "digits", "--sampling", "moments") == 0
    )
    numbers = inspect(tmp_path / "cache", tmp_path / "out", "--compare", place / "pictures", "--num", 12)
    assert numbers["rows"] == 2 * NUM_PICTURES and numbers["psnr_of_shown"] > 25


def test_what_does_not_belong_to_the_cache_is_refused(place, tmp_path, capsys):
    out = ("--output_dir", tmp_path / "out")
    write_tiny_vae(tmp_path / "vae")
    message = run_tool("inspect_cache", place / "latents", *out, "--vae", tmp_path / "vae")
    assert message == f"inspect_cache: {tmp_path / 'vae'} has other weights than the VAE of this cache: name it with --vae"
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    next((tmp_path / "pictures/0").glob("*.png")).unlink()
    message = run_tool("inspect_cache", place / "latents", *out, "--compare", tmp_path / "pictures")
    assert "in its place: give the folder that was exported" in message
    assert "is no cache" in run_tool("inspect_cache", tmp_path, *out)
    assert run_tool("inspect_cache", place / "latents", *out, "--num", 0) == 2
    assert "--num is 0: give at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_class_without_rows_counts_as_none(tmp_path):
    pixels = {"kind": "pixels", "encoding": "uint8", "image_shape": (3, SIZE, SIZE), "flip_stored": False, "sampling": None}
    header = without_rows(small_header(**pixels, scale=None, shift=None, vae=None), 1)
    write_small_cache(tmp_path / "cache", header, labels=[0, 2] * 6)
    numbers = inspect(tmp_path / "cache", tmp_path / "out")
    assert numbers["class_rows"] == [6, 0, 6] and numbers["smallest_class"] == 0


@pytest.mark.parametrize("encoding", ["uint8", "png"])
def test_pixels_are_shown_as_they_are(tmp_path, encoding):
    pixels = small_pixels(tmp_path / "cache", encoding)
    inspect(tmp_path / "cache", tmp_path / "out", "--num", 12)
    indices = shown_rows(LatentCache(tmp_path / "cache"), 12)
    images, names = torch.from_numpy(pixels[indices]) / 127.5 - 1, LatentCache(tmp_path / "cache").class_names
    assert_shows(tmp_path / "out/grid.png", class_grid_array(images, indices % 3, class_names=names, columns=8))
