"""The 2-D toys: a short run reaches both modes and is repeatable; the whole run meets its thresholds (slow)."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from drift_accel.foundation.progress import Progress

TOOL = Path(__file__).parent.parent / "tools" / "toy2d.py"


@pytest.fixture(scope="module")
def toy2d():
    specification = importlib.util.spec_from_file_location("toy2d", TOOL)
    module = importlib.util.module_from_spec(specification)
    sys.modules["toy2d"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["toy2d"]


def test_both_modes_are_populated_after_a_quick_run(toy2d):
    with Progress(300, enabled=False) as progress:
        evolution = toy2d.train("two_modes_collapsed", 1, 300, {0, 300}, progress)
    start = toy2d.mode_shares(evolution.generated[0])
    assert start[0] > 0.99 and start[1] == 0.0
    result = toy2d.measure("two_modes_collapsed", 1, evolution)
    assert all(0.35 <= share <= 0.65 for share in result["mode_shares"]), result["mode_shares"]
    assert result["sliced_wasserstein_fall"] > 5


def test_writes_its_files_and_repeats_itself(toy2d, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy2d, "GIF_FRAMES", 4)
    monkeypatch.setattr(toy2d, "EVALUATION_POINTS", 64)
    torch.manual_seed(1)
    np.random.seed(1)
    cases = ["checkerboard", "swiss_roll"]
    first = toy2d.run(cases, steps=3, seed=4, output_dir=tmp_path / "first", show_progress=False)
    torch.manual_seed(2)
    np.random.seed(2)
    again = toy2d.run(cases, steps=3, seed=4, output_dir=tmp_path / "again", show_progress=False)
    other = toy2d.run(cases, steps=3, seed=5, output_dir=tmp_path / "other", show_progress=False)
    assert first == again and first != other
    record = json.loads((tmp_path / "first" / "results.json").read_text())
    assert set(record["cases"]) == set(cases) and "torch" in record["versions"] and record["command"]
    assert Image.open(tmp_path / "first" / "evolution.png").width > 500
    assert Image.open(tmp_path / "first" / "evolution.gif").n_frames > 1
    toy2d.print_table(first)
    assert "swiss_roll" in capsys.readouterr().out


def test_sliced_wasserstein_of_a_shift(toy2d):
    points = np.random.default_rng(0).standard_normal((500, 2))
    assert toy2d.sliced_wasserstein(points, points[::-1]) == 0.0
    # A shift by d moves every projection by d |cos|, whose mean over directions is 2 / pi.
    assert toy2d.sliced_wasserstein(points, points + [3.0, 4.0]) == pytest.approx(5 * 2 / np.pi, rel=1e-3)


def test_command_line(toy2d, capsys):
    assert toy2d.parse_arguments([]).steps == toy2d.STEPS
    assert toy2d.parse_arguments(["--quick"]).steps == toy2d.QUICK_STEPS
    assert toy2d.parse_arguments(["--quick", "--steps", "7"]).steps == 7
    with pytest.raises(SystemExit):
        toy2d.parse_arguments(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_meets_its_threshold(toy2d, tmp_path):
    results = toy2d.run(list(toy2d.CASES), toy2d.STEPS, 0, tmp_path, show_progress=False)
    for name, result in results.items():
        if result["mode_shares"]:
            assert all(0.35 <= share <= 0.65 for share in result["mode_shares"]), (name, result["mode_shares"])
        assert result["sliced_wasserstein_fall"] >= 10, (name, result)
