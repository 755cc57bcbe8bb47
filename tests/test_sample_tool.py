"""tools/sample.py: a run, an export, classes by name and number, latents through a VAE, refusals."""

import json

import pytest
from diffusers import AutoencoderKL
from PIL import Image
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
    ],
)
def test_refusals(export, tmp_path, sample, arguments, message):
    status, _, error = sample(export, *arguments, "--output", tmp_path / "x.png")
    assert status == 2 and message in error
    assert not (tmp_path / "x.png").exists()
