"""README's five commands from a folder of pictures to samples, as they stand there, on the digits written as PNGs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import ROOT, launch_environment, metrics

from drift_accel.data.cache_checks import verify_cache

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What keeps each command small; everything else is README's.
SMALLER = {
    "export_latents.py": "--max_rows 150 --cpu",
    "verify_cache.py": "",
    "drift_accel.train_mae": "--mae.width 8 --mae.blocks [1,1,1,1] --batch_size 16 --steps 6 --classifier.steps 2 "
    "--optimizer.warmup_steps 2 --log.every 1 --device cpu",
    "drift_accel.train": "--generator.hidden_size 32 --generator.depth 1 --generator.num_heads 2 --batch.labels 4 "
    "--batch.generated 6 --batch.positives 5 --batch.negatives 3 --optimizer.warmup_steps 2 --steps 3 --log.every 1 "
    "--log.sample_every 3 --sample.columns 2 --features.maps [conv1,layer1_blk1,layer2_blk1] --device cpu",
    "sample.py": "--per_class 2",
}


def own_images_section() -> str:
    return README.split("## Your own images", 1)[1].split("\n## ", 1)[0]


def commands() -> list[str]:
    """The lines of the section's block of commands."""
    block = re.search(r"```bash\n(.*?)```", own_images_section(), re.DOTALL).group(1)
    return block.replace("\\\n", " ").strip().splitlines()


def program(command: str) -> str:
    """The tool or module that a command runs."""
    return next(name for name in SMALLER if re.search(rf"(^|[/ ]){re.escape(name)}( |$)", command))


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """A command line in a folder, with this environment's python and accelerate."""
    environment = launch_environment()
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_there_are_five_commands_from_pictures_to_samples():
    assert [program(command) for command in commands()] == list(SMALLER)
    assert "python tools/write_digit_images.py PICTURES" in own_images_section()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_five_commands_lead_from_pictures_to_samples(tmp_path):
    for name in ("tools", "train_configs"):
        (tmp_path / name).symlink_to(ROOT / name)  # the commands are relative to the repository, and so is what they write
    written = run("python tools/write_digit_images.py PICTURES", tmp_path)
    assert written.returncode == 0 and "1197 pictures written" in written.stdout, written.stderr
    for command in commands():
        result = run(f"{command} {SMALLER[program(command)]}", tmp_path)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        if program(command) == "verify_cache.py":
            assert "runs/digits_latent/cache: good (full)" in result.stdout and "warning" not in result.stdout
    runs = tmp_path / "runs/digits_latent"
    report = verify_cache(runs / "cache", "full")
    assert report.findings == [] and report.statistics["rows"] == 150 and min(report.statistics["class_rows"]) > 0
    assert set(metrics(runs / "mae")) == set(range(1, 7)) and set(metrics(runs / "generator")) == {1, 2, 3}
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height > 10 * 64 and picture.width > 2 * 64  # two decoded 64x64 pictures of each of ten classes
        assert len(picture.getcolors(1 << 24)) > 500
