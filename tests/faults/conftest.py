"""Lets these tests use the helpers beside the other ones, and trains the encoder that all of them use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """The export of a tiny encoder."""
    from tiny_runs import TINY_MAE
    from trainer_processes import run_trainer

    folder = tmp_path_factory.mktemp("mae")
    run_trainer("drift_accel.train_mae", [*TINY_MAE, "--steps", "3", "--output_dir", str(folder / "run")], folder / "logs")
    return folder / "run/exports/ema_0.99"
