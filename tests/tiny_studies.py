"""Study files of a recipe that is small enough for the suite."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from tiny_runs import generator_arguments

from drift_accel import train
from drift_accel.foundation.command_line import configuration_text, parse_command


def check(arguments: Sequence[str]) -> train.GeneratorTrainingConfig:
    """What tools/ablate.py asks of a run's arguments."""
    return parse_command(train.GeneratorTrainingConfig, "", [*arguments, "--dry_run"]).config


def study_writer(folder: Path, encoder: Path | None = None) -> Callable[..., Path]:
    """Writes FOLDER/mine.yaml: two variants of a tiny recipe; keyword arguments replace its keys, None takes one out."""

    def write(**changes) -> Path:
        (folder / "base.yaml").write_text(_base(encoder or Path("encoder")))
        variants = [{"name": "plain"}, {"name": "row", "overrides": {"drift.coupling": "row"}}]
        content = {"title": "A title", "base": "base.yaml", "seeds": [0, 1], "variants": variants, **changes}
        path = folder / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write


@functools.cache
def _base(encoder: Path) -> str:
    return configuration_text(check(generator_arguments(encoder, Path("run"), "--steps", "4", "--checkpoint.every", "2")))
