"""tools/sample.py: a run, an export, classes by name and number, latents through a VAE, every format, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tiny_models import call_tool, write_export, write_run
from tiny_runs import load_tool

from drift_accel.models import Generator


@pytest.fixture
def sample(monkeypatch, capsys):
    """Runs the tool in this process: (exit status, output, error output)."""
    tool = load_tool("sample")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
        try:
            tool.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A run folder's export of an untrained latent generator with a class table, and a tiny VAE for it."""
    folder = tmp_path_factory.mktemp("run")
    export = folder / "exports/ema_0.9"
    sizes = {"input_size": 4, "in_channels": 4, "patch_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 1}
    Generator(**sizes, num_classes=3, num_style_tokens=0).save_pretrained(export)
    classes = [{"index": i, "id": str(i), "name": name} for i, name in enumerate(["ant", "bee", "cat"])]
    (export / "data.json").write_text(json.dumps({"classes": classes}))
    AutoencoderKL(latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4).save_pretrained(folder / "vae")
    return folder


def test_latents_of_a_run_are_decoded_into_a_labelled_grid(export, tmp_path, sample):
    output = tmp_path / "grid.png"
    settings = ("--vae", export / "vae", "--classes", "cat, 0", "--per_class", 2)
    status, printed, _ = sample(export, *settings, "--output", output)
    assert status == 0 and "4 images of" in printed and Image.open(output).size[0] > 100
    assert sample(export / "exports/ema_0.9", *settings, "--output", tmp_path / "again.png")[0] == 0
    assert (tmp_path / "again.png").read_bytes() == output.read_bytes()
    assert "add --overwrite" in sample(export, *settings, "--output", output)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "makes latents of 4 channels: name their VAE with --vae"),
        (["--export", "ema_0.5"], "has no export 'ema_0.5': it has ema_0.9"),
        (["--classes", "dog"], "--classes holds 'dog'"),
        (["--classes", "3"], "give labels from 0 to 2"),
        (["--vae", "./nowhere"], "is no folder"),
        (["--guidance_scale", "0.5"], "guidance starts at 1"),
        (["--per_class", "0"], "--per_class is 0"),
        (["--per_class", "2", "--num_samples", "5"], "leave out --num_samples"),
        (["--max_grid_classes", "0"], "--max_grid_classes is 0"),
        (["--labels", "nowhere.txt"], "--labels nowhere.txt does not exist"),
        (["--classes", "0,0"], "names a class twice"),
    ],
)
def test_refusals(export, tmp_path, sample, arguments, message):
    status, _, error = sample(export, *arguments, "--output", tmp_path / "x.png")
    assert status == 2 and message in error
    assert not (tmp_path / "x.png").exists()


# Files of pixels.

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    """An export of a generator of pixels of four classes."""
    return write_export(tmp_path_factory.mktemp("pixels") / "export")


def test_every_format_holds_the_same_samples(pixels, tmp_path):
    common = (pixels, "--num_samples", 90, "--classes", "goldfish,0,n02012849", "--seed", 5, "--cpu")
    call_tool("sample", *common, "--output", tmp_path / "s.npz")
    call_tool("sample", *common, "--output", tmp_path / "folder")
    call_tool("sample", *common, "--output", tmp_path / "set", "--format", "dataset")
    with np.load(tmp_path / "s.npz") as archive:
        images, labels, record = archive["arr_0"], archive["arr_1"], json.loads(str(archive["record"]))
    assert images.shape == (90, 8, 8, 3) and labels.tolist() == [1, 0, 2] * 30
    keys = {0: "n01440764", 1: "n01443537", 2: "n02012849"}
    for index in (0, 1, 47, 89):
        picture = Image.open(tmp_path / "folder" / keys[labels[index]] / f"{index:06d}.png")
        assert np.array_equal(np.asarray(picture), images[index][:, :, 0])
    saved = datasets.load_from_disk(tmp_path / "set")
    assert saved["label"] == labels.tolist() and saved["index"] == list(range(90))
    assert np.array_equal(np.asarray(saved[47]["image"]), images[47][:, :, 0])
    for other in (tmp_path / "folder/samples.json", tmp_path / "set/samples.json"):
        described = json.loads(other.read_text())
        assert described["seed"] == 5 and described["quantizer"] == "round" and described["model"] == record["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "s.npz", "set"]
    for name in ("s.npz", "folder"):
        assert "add --overwrite" in call_tool("sample", *common, "--output", tmp_path / name, status=2)
    call_tool("sample", *common[:-2], 6, "--cpu", "--output", tmp_path / "folder", "--overwrite")


def test_labels_of_a_file_and_the_quantiser(pixels, tmp_path):
    (tmp_path / "labels.txt").write_text("3\n1\n3\n")
    command = (pixels, "--labels", tmp_path / "labels.txt", "--cpu")
    call_tool("sample", *command, "--output", tmp_path / "a.npz")
    call_tool("sample", *command, "--output", tmp_path / "b.npz", "--quantizer", "truncate")
    a, b = (np.load(tmp_path / f"{name}.npz") for name in "ab")
    assert a["arr_1"].tolist() == [3, 1, 3]
    difference = a["arr_0"].astype(int) - b["arr_0"]
    assert set(np.unique(difference)) == {0, 1}
    (tmp_path / "labels.txt").write_text("3\nfour\n")
    assert "is no list of integers" in call_tool("sample", *command, "--output", tmp_path / "c.npz", status=2)


def test_a_grid_shows_so_many_classes_and_a_checkpoint_is_chosen(tmp_path):
    run = write_run(tmp_path / "run")
    for name, more in (("two", ("--max_grid_classes", 2)), ("all", ()), ("early", ("--step", 10))):
        call_tool("sample", run, "--output", tmp_path / f"{name}.png", "--per_class", 2, "--cpu", *more)
    sizes = {name: Image.open(tmp_path / f"{name}.png").size for name in ("two", "all", "early")}
    assert sizes["two"][1] < sizes["all"][1] == sizes["early"][1]
    assert (tmp_path / "all.png").read_bytes() != (tmp_path / "early.png").read_bytes()


@pytest.mark.multiprocess
def test_two_launched_processes_write_the_same_bytes(pixels, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the launched ones: rounding depends on it
    try:
        call_tool("sample", pixels, "--num_samples", 200, "--output", tmp_path / "one.npz", "--cpu")
    finally:
        torch.set_num_threads(threads)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [
        str(ROOT / "tools/sample.py"),
        str(pixels),
        "--num_samples",
        "200",
        "--output",
        str(tmp_path / "two.npz"),
        "--cpu",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    assert np.array_equal(one["arr_0"], two["arr_0"]) and one["arr_0"].std() > 0
    assert json.loads(str(two["record"]))["provenance"]["num_processes"] == 2
