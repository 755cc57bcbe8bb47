"""The path of caches end to end: pictures -> export, through the bundled VAE or as pixels -> verify -> encoder -> generator."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_caches import write_digit_pictures
from tiny_runs import TINY_GENERATOR, TINY_MAE, checkpoint_tensors, metrics, run_tool

from drift_accel import train, train_mae
from drift_accel.data.image_sources import ImageFolder
from drift_accel.data.latent_cache import LatentCache
from drift_accel.models.autoencoder import load_vae
from drift_accel.sampling.decoding import decode_latents

NUM_PICTURES = 40


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of coloured digits as PNGs."""
    return write_digit_pictures(tmp_path_factory.mktemp("pictures"), NUM_PICTURES)


def export(pictures, output, *more):
    arguments = ["--source", pictures, "--output_dir", output, "--vae", "digits", "--image_size", 64, "--cpu", *more]
    return run_tool("export_latents", *arguments)


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


def mean_psnr(images, originals):
    """Of pictures [N, 3, H, W] in [-1, 1], in dB."""
    return float((-10 * ((images.clamp(-1, 1) - originals) / 2).square().mean((1, 2, 3)).log10()).mean())


@pytest.mark.parametrize("flipped", [False, True])
def test_decoding_the_cache_gives_the_vaes_own_quality(pictures, cache, flipped):
    opened, source, vae = LatentCache(cache), ImageFolder(pictures), load_vae("digits")
    originals = np.stack([source.load(origin.image_index) for origin in opened.origins(np.arange(NUM_PICTURES))])
    originals = torch.from_numpy(originals).permute(0, 3, 1, 2) / 127.5 - 1  # [N, 3, 64, 64]
    originals = originals.flip(-1) if flipped else originals
    own = mean_psnr(vae.decode(vae.encode(originals).latent_dist.mean).sample, originals)
    decoded = decode_latents(vae, torch.from_numpy(opened.rows(np.arange(NUM_PICTURES), flipped)))
    assert mean_psnr(decoded, originals) == pytest.approx(own, abs=0.02), "float16 costs less than that"
    assert own > 30
    assert opened.rows(np.arange(NUM_PICTURES), flipped).std() == pytest.approx(1, abs=0.2)


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


def test_a_run_follows_its_cache_to_another_place_and_refuses_another_cache(pictures, cache, tmp_path):
    sizes = ("--mae.preset", "null", "--mae.in_channels", "4", "--mae.input_size", "16", "--mae.num_classes", "10")

    def continue_with(folder):
        data = ("--data.source", "cache", "--data.path", str(folder))
        train_mae.main([*TINY_MAE, *sizes, *data, "--output_dir", str(tmp_path / "mae")])

    continue_with(cache)
    continue_with(shutil.copytree(cache, tmp_path / "moved"))
    assert export(pictures, tmp_path / "other", "--sampling", "mean", "--chunk_size", 16, "--batch_size", 8, "--seed", 1) == 0
    with pytest.raises(SystemExit, match="started with other inputs(.|\n)*cache_sha256"):
        continue_with(tmp_path / "other")


def train_on_pixels(cache, run):
    """A few steps of both trainers on 16x16 pixels; the tensors of their last checkpoints."""
    data = ("--data.source", "cache", "--data.path", str(cache), "--data.flip", "true")
    sizes = ("--mae.preset", "null", "--mae.in_channels", "3", "--mae.input_size", "16", "--mae.num_classes", "10")
    train_mae.main([*TINY_MAE, *sizes, *data, "--output_dir", str(run / "mae")])
    shape = ("--generator.in_channels", "3", "--generator.input_size", "16", "--generator.patch_size", "4")
    encoder = ("--encoder.path", str(run / "mae/exports/ema_0.99"))
    train.main([*TINY_GENERATOR, *shape, *data, *encoder, "--steps", "3", "--output_dir", str(run / "generator")])
    assert set(metrics(run / "generator")) == {1, 2, 3}
    with Image.open(run / "generator/samples/step_00000003.png") as picture:
        assert picture.width > 64
    return {**checkpoint_tensors(run / "mae", 6), **checkpoint_tensors(run / "generator", 3)}


def test_both_trainers_train_on_pixels_in_every_encoding(pictures, tmp_path):
    tensors = {}
    for encoding in ("uint8", "png", "jpeg"):
        cache = tmp_path / encoding
        arguments = ["--source", pictures, "--output_dir", cache, "--image_size", 16, "--cpu", "--chunk_size", 16]
        assert run_tool("export_latents", *arguments, "--encoding", encoding) == 0
        assert run_tool("verify_cache", cache, "--mode", "full") == 0
        tensors[encoding] = train_on_pixels(cache, tmp_path / f"runs_{encoding}")
    for name, tensor in tensors["uint8"].items():
        assert torch.equal(tensor, tensors["png"][name]), f"{name}: a lossless picture gave other pixels"
    assert any(not torch.equal(tensor, tensors["jpeg"][name]) for name, tensor in tensors["uint8"].items())


def test_the_trainers_refuse_what_they_cannot_train_on(pictures, tmp_path):
    table = [{"index": label, "wnid": str(label), "names": [f"digit {label}"]} for label in range(11)]
    (tmp_path / "classes.json").write_text(json.dumps({"format": 1, "classes": table}))
    arguments = ["--source", pictures, "--output_dir", tmp_path / "cache", "--image_size", 16, "--cpu", "--encoding", "uint8"]
    assert run_tool("export_latents", *arguments, "--class_table", tmp_path / "classes.json") == 0
    (tmp_path / "unfinished/in_progress").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()

    def train_encoder(run, *, path="cache", **changes):
        sizes = {"preset": "null", "in_channels": 3, "input_size": 16, "num_classes": 11, **changes}
        options = [text for key, value in sizes.items() for text in (f"--mae.{key}", str(value))]
        data = ("--data.source", "cache", "--data.path", str(tmp_path / path))
        train_mae.main([*TINY_MAE, *options, *data, "--output_dir", str(run)])
        return data

    for change, message in (
        ({"in_channels": 4}, r"takes images of shape \(4, 16, 16\) but the data has \(3, 16, 16\)"),
        ({"input_size": 32}, r"takes images of shape \(3, 32, 32\) but the data has \(3, 16, 16\)"),
        ({"num_classes": 10}, "num_classes is 10 but the data has 11 classes"),
        ({"path": "unfinished"}, "still being written, or its export was stopped"),
        ({"path": "pictures"}, "is no cache: it has no manifest.json"),
        ({"path": "nowhere"}, "is no folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            train_encoder(tmp_path / "refused", **change)
        assert not (tmp_path / "refused/checkpoints").exists(), change
    data = train_encoder(tmp_path / "mae")
    shape = ("--generator.in_channels", "3", "--generator.input_size", "16", "--generator.patch_size", "4")
    classes = ("--generator.num_classes", "11", "--encoder.path", str(tmp_path / "mae/exports/ema_0.99"))
    with pytest.raises(SystemExit, match=r"class 10 \(digit 10\) has no rows in .*: export again with pictures of it, or leave"):
        train.main([*TINY_GENERATOR, *shape, *classes, *data, "--steps", "3", "--output_dir", str(tmp_path / "generator")])
    assert not (tmp_path / "generator/checkpoints").exists()
