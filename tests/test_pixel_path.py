"""Pixel generation without a VAE: README's commands as they stand there, with both encoders, and what the recipes share."""

import json
import re

import numpy as np
import pytest
from golden_files import GOLDENS
from PIL import Image
from test_own_images import SMALLER, program, run
from tiny_runs import ROOT, metrics

from drift_accel.drift.encoders import EncoderEntryConfig
from drift_accel.foundation.command_line import parse_command
from drift_accel.models import Generator
from drift_accel.models.exports import load_export
from drift_accel.train import GeneratorTrainingConfig

README = (ROOT / "README.md").read_text(encoding="utf-8")
# A tiny ConvNeXt-V2 beside the masked autoencoder, as in the published pixel recipes.
CONVNEXT = {"name": "convnext", "kind": "convnextv2", "path": str(GOLDENS / "convnextv2"), "image_size": 32, "random": True}


def commands() -> list[str]:
    """The lines of the section's block of commands."""
    section = README.split("### Pixels without a VAE", 1)[1].split("\n#", 1)[0]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL).group(1)
    return block.replace("\\\n", " ").strip().splitlines()


def test_the_recipes_lead_from_pictures_to_samples():
    named = re.findall(r"train_configs/(\w+)\.yaml", "\n".join(commands()))
    assert named == ["mae_digits_pixels", "digits_pixels"]
    assert not [command for command in commands() if "--vae" in command]


def test_the_small_recipe_is_the_published_path_in_small():
    """Patchified encoder, blocks computed again, no decoder, pictures shown as they are."""

    def recipe(name):
        return parse_command(
            GeneratorTrainingConfig, "", ["--config", str(ROOT / f"train_configs/{name}.yaml"), "--dry_run"]
        ).config

    small, large = recipe("digits_pixels"), recipe("pixel_l16")
    for config in (small, large):
        assert config.gradient_checkpointing and config.decoder.vae is None and config.sample.vae is None
        assert config.generator.resolved()["in_channels"] == 3 and config.encoder.kind == "mae"
    assert [entry.kind for entry in large.more_encoders] == ["convnextv2"]
    commented = (ROOT / "train_configs/digits_pixels.yaml").read_text()
    assert "# more_encoders: [{name: convnext, kind: convnextv2" in commented
    assert EncoderEntryConfig(**CONVNEXT).random


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_commands_lead_from_pictures_to_samples_and_a_distance(tmp_path):
    for name in ("tools", "train_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert run("python tools/write_digit_images.py PICTURES", tmp_path).returncode == 0
    smaller = {
        **SMALLER,
        "drift_accel.train": f"{SMALLER['drift_accel.train']} --more_encoders '{json.dumps([CONVNEXT])}' --checkpoint.every 1 "
        "--batch.labels_per_slice 2",
        "reference_stats.py": "--cpu",
        "evaluate.py": "--num_samples 64 --cpu",
    }
    for command in commands():
        tool = next((name for name in ("reference_stats.py", "evaluate.py") if name in command), None) or program(command)
        result = run(f"{command} {smaller[tool]}", tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        if tool == "drift_accel.train":
            assert "RANDOM WEIGHTS" in result.stderr
    runs = tmp_path / "runs/digits_pixels"
    last = metrics(runs / "generator")[3]
    assert last["drift_sqnorm_0.2/mae/conv1"] > 0 and last["drift_sqnorm_0.2/convnext/convenxt_stage_1"] > 0
    assert last["drift_sqnorm_0.2/global"] > 0 and last["drift_sqnorm_0.2/mae/norm_x"] > 0
    generator = load_export(runs / "generator/exports/ema_0.99", Generator)
    assert (generator.config.in_channels, generator.config.input_size) == (3, 32)
    with Image.open(runs / "generator/samples/step_00000003.png") as picture:
        assert np.asarray(picture).std() > 0
    with Image.open(tmp_path / "pixel_samples.png") as picture:
        assert picture.height > 10 * 32 and picture.width > 2 * 32
    (result,) = (runs / "generator/evaluation").glob("*.json")
    assert json.loads(result.read_text())["metrics"]["frechet_encoder"] > 0
