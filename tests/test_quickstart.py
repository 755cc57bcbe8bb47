"""The quickstart: its judge on known inputs, and (slow) the whole command with the figures that the README states."""

import json
import resource
import subprocess

import numpy as np
import pytest
import torch
from tiny_runs import ROOT, generator_arguments, load_tool, tiny_encoder

from drift_accel import train
from drift_accel.data.digits import load_digits
from drift_accel.evaluation.digits import judge_digits


@pytest.fixture(scope="module")
def judge():
    return load_tool("evaluate_digits")


def test_real_digits_pass_for_generated_ones():
    train_digits = load_digits("train")
    results = judge_digits(torch.from_numpy(train_digits.images), torch.from_numpy(train_digits.labels))
    assert results["class_accuracy"] > 0.98 and results["frechet"] < 0.2
    assert results["precision"] > 0.8 and results["recall"] > 0.8
    assert results["frechet"] == results["frechet_of_real"] and results["recall"] == results["recall_of_real"]


def test_collapse_is_seen():
    """One digit a class, repeated: right classes, no recall."""
    train_digits = load_digits("train")
    rows = np.array([train_digits.class_rows(k)[0] for k in range(10)])
    images = torch.from_numpy(train_digits.rows(np.tile(rows, 100)))
    results = judge_digits(images, torch.arange(1000) % 10)
    assert results["class_accuracy"] >= 0.9
    assert results["recall"] < 0.05 and results["frechet"] > 0.5


def test_wrong_classes_are_seen():
    train_digits = load_digits("train")
    results = judge_digits(torch.from_numpy(train_digits.images), (torch.from_numpy(train_digits.labels) + 1) % 10)
    assert results["class_accuracy"] < 0.05 and results["frechet"] < 0.2


def test_the_tool_writes_pictures_and_results(judge, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train.main(generator_arguments(tiny_encoder(tmp_path / "mae"), run, "--steps", "2"))
    monkeypatch.setattr("sys.argv", ["evaluate_digits.py", str(run)])
    judge.main()
    for name in ("samples.png", "training_curve.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
        assert str(run / name) in capsys.readouterr().out or name == "training_curve.png"
    record = json.loads((run / "evaluation/digits.json").read_text())
    assert record["export"] == "ema_0.99" and 0 <= record["class_accuracy"] <= 1 and record["num_compared"] == 600


def test_a_run_without_export_is_refused(judge, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate_digits.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        judge.main()
    assert "has no export yet" in capsys.readouterr().err


@pytest.mark.slow
def test_the_quickstart_reaches_its_figures(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["bash", str(ROOT / "launch_scripts/quickstart.sh"), str(tmp_path)], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    record = json.loads((tmp_path / "generator/evaluation/digits.json").read_text())
    assert record["class_accuracy"] >= 0.97
    assert record["frechet"] <= 1.5
    assert record["recall"] > 0.5
    print(f"CPU time {after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime:.0f} s", record)
