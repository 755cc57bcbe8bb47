"""Studies at work: resuming, divergence, failures, stopping with everything that was started, and the whole command."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
from tiny_runs import ROOT, checkpoint_tensors, launch_environment, run_tool, tiny_encoder
from tiny_studies import check, study_writer

from drift_accel import train
from drift_accel.analysis.studies.judges import DigitsJudge
from drift_accel.analysis.studies.launch import Launcher, stop_group
from drift_accel.analysis.studies.runs import (
    DIVERGED,
    DONE,
    FAILED,
    UNFINISHED,
    Outcome,
    TrainingFailedError,
    outcome_of,
    plan_runs,
    run_study,
)
from drift_accel.analysis.studies.study import StudyEvaluation, read_study
from drift_accel.analysis.studies.table import markdown_table, study_rows
from drift_accel.foundation.locks import exclusive_lock, is_held


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("mae"))


@pytest.fixture
def write(tmp_path):
    """Writes a study of a tiny recipe into the test's folder."""
    return study_writer(tmp_path)


# The work.


def train_here(trained, stop_after=None):
    """A training in this process, as `Launcher` does it in others; `stop_after`: so many steps, then the study is stopped."""

    def work(item):
        limits = ["--steps", str(stop_after)] if stop_after else []
        try:
            train.main([*item.arguments, "--output_dir", str(item.run.path), *limits])
        except RuntimeError as error:
            raise TrainingFailedError(str(error)) from error
        finally:
            trained.append(item.name)
        if stop_after:
            raise KeyboardInterrupt

    return work


@pytest.fixture(scope="module")
def finished(encoder, tmp_path_factory):
    """A study of three variants, one of which diverges, that was stopped, resumed, and then run again."""
    folder = tmp_path_factory.mktemp("study")
    variants = [
        {"name": "plain"},
        {"name": "bad", "overrides": {"optimizer": {"lr": 1e38, "warmup_steps": 0}}},
        {"name": "row", "overrides": {"drift.coupling": "row"}},
    ]
    study = read_study(study_writer(folder, encoder)(variants=variants, seeds=[0]))
    runs = plan_runs(study, folder, check)
    judge, state, trained, lines = DigitsJudge(study.evaluation), folder / "mine.state.json", [], []
    with pytest.raises(KeyboardInterrupt):
        run_study(runs, judge, train_here(trained, stop_after=2), state, log=lines.append)
    between = outcome_of(runs[0], judge)
    outcomes = run_study(runs, judge, train_here(trained), state, log=lines.append)
    return SimpleNamespace(runs=runs, judge=judge, state=state, trained=trained, lines=lines, between=between, outcomes=outcomes)


def test_a_stopped_study_goes_on_where_it_was(finished):
    assert finished.between == Outcome(UNFINISHED, "at step 2 of 4")
    assert finished.trained == ["plain-seed_0", "plain-seed_0", "bad-seed_0", "row-seed_0"]
    assert [finished.outcomes[f"{name}-seed_0"].state for name in ("plain", "bad", "row")] == [DONE, DIVERGED, DONE]
    metrics = finished.outcomes["plain-seed_0"].metrics
    assert list(metrics) == ["class_accuracy", "frechet", "precision", "recall"] and metrics["frechet"] > 0
    assert "at step 2 of 4" in finished.lines[1] and "left, about" in finished.lines[3]


def test_what_is_done_or_diverged_is_not_trained_again(finished):
    def refuse(item):
        pytest.fail(f"{item.name} was trained again")

    lines = []
    again = run_study(finished.runs, finished.judge, refuse, finished.state, log=lines.append)
    assert again == finished.outcomes and all(line.endswith(", kept") for line in lines)
    detail = again["bad-seed_0"].detail
    assert "not finite" in detail and "stopped by" not in detail
    state = json.loads(finished.state.read_text())
    assert state["stages"]["plain-seed_0"] == "done" and state["now"].startswith("failed: bad-seed_0")
    bad = [item for item in finished.runs if item.variant.name == "bad"]
    trained, state = [], finished.state.with_name("other.json")
    run_study(bad, finished.judge, train_here(trained), state, again=True, log=lines.append)
    assert trained == ["bad-seed_0"]


def test_numbers_of_other_weights_are_not_taken(finished):
    item, judge = finished.runs[0], finished.judge
    path = next(item.run.exports_dir.glob("*/*.safetensors"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-4] + b"abcd")
        assert judge.result(item.run) is None
    finally:
        path.write_bytes(content)
    assert judge.result(item.run) == finished.outcomes["plain-seed_0"].metrics
    assert DigitsJudge(StudyEvaluation(guidance_scale=1.5)).result(item.run) is None


def test_a_training_that_fails_is_a_row_that_says_so(write, tmp_path):
    def fail(item):
        raise TrainingFailedError("out of memory")

    runs = plan_runs(read_study(write()), tmp_path, check)
    outcomes = run_study(runs, DigitsJudge(StudyEvaluation()), fail, tmp_path / "state.json", log=str)
    assert {outcome.state for outcome in outcomes.values()} == {FAILED}
    assert "out of memory" in outcomes["row-seed_1"].detail
    rows = study_rows(read_study(write()), runs, outcomes)
    table = markdown_table(read_study(write()), rows)
    assert "| row | 0/2, 2 failed |" in table and "row, seed 1, failed: TrainingFailedError: out of memory" in table


# Processes.

STAND_IN = """
import signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
def stop(*_):
    time.sleep(0.3)
    (folder / "saved").touch()
    sys.exit(75)
if "parent" in sys.argv:
    subprocess.run([sys.executable, __file__, *[a for a in sys.argv[1:] if a != "parent"]])
signal.signal(signal.SIGTERM, stop)
(folder / "started").touch()
print("ValueError: the disk is full")
time.sleep(30 if "sleep" in sys.argv else 0)
sys.exit(3)
"""


@pytest.fixture
def stand_in(tmp_path):
    path = tmp_path / "stand_in.py"
    path.write_text(textwrap.dedent(STAND_IN))
    return [sys.executable, str(path)]


def test_a_failing_training_is_told_with_its_last_error(stand_in, write, tmp_path):
    item = plan_runs(read_study(write()), tmp_path, check)[0]
    launcher = Launcher(logs=tmp_path / "logs", launch=stand_in)
    with pytest.raises(TrainingFailedError, match="ended with code 3: ValueError: the disk is full .*plain-seed_0.txt"):
        launcher(item)


def test_stopping_reaches_the_grandchildren_and_waits_for_their_checkpoint(stand_in, tmp_path):
    """A launcher dies of the signal at once, while the trainer below it still saves."""
    command = [*stand_in, "parent", "sleep", "--output_dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (tmp_path / "run/started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stop_group(process)
    assert (tmp_path / "run/saved").exists() and process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_lock_is_seen_without_being_taken(tmp_path):
    assert not is_held(tmp_path / "none") and not (tmp_path / "none").exists()
    with exclusive_lock(tmp_path / "lock", "work"):
        assert is_held(tmp_path / "lock")
    assert not is_held(tmp_path / "lock")


def ablate(study, out, *options):
    environment = {**launch_environment(), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "tools/ablate.py"), str(study), "--output_dir", str(out), *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["asked to stop", "killed"])
def test_an_interrupted_study_ends_with_the_same_weights(encoder, tmp_path, number):
    path = study_writer(tmp_path, encoder)(common={"steps": 30, "checkpoint.every": 5}, seeds=[0])
    whole = ablate(path, tmp_path / "whole")
    assert whole.wait(600) == 0, whole.communicate()[0]
    first = ablate(path, tmp_path / "out")
    run = tmp_path / "out/runs/plain/seed_0"
    wait_for(run / "checkpoints/step_00000005/COMPLETE.json", first)
    first.send_signal(number)
    assert first.wait(120) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGTERM:
        assert not is_held(run / ".lock") and "stopped on request" in (run / "RUN.md").read_text()
    second = ablate(path, tmp_path / "out")
    printed = second.communicate(timeout=600)[0]
    assert second.returncode == 0, printed
    if number == signal.SIGKILL:
        assert "is being trained by a process that is still there" in printed or "trained, not judged" in printed
    for name in ("plain", "row"):
        here, there = (checkpoint_tensors(tmp_path / f"{out}/runs/{name}/seed_0", 30) for out in ("out", "whole"))
        assert here.keys() == there.keys() and all((here[key] == there[key]).all() for key in here)
    tables = [(tmp_path / f"{out}/mine.csv").read_text() for out in ("out", "whole")]
    assert tables[0] == tables[1]
    for suffix in (".md", ".json", ".png"):
        assert (tmp_path / f"out/mine{suffix}").stat().st_size > 100


@pytest.mark.slow
def test_a_study_under_another_protocol(encoder, tmp_path, capsys, monkeypatch):
    """The encoder's protocol, with the digits as reference."""
    options = {"network": str(encoder), "reference_images": "digits", "neighbours": 3, "device": "cpu"}
    evaluation = {"protocol": "encoder", "num_samples": 100, "options": options, "metric": "precision"}
    path = study_writer(tmp_path, encoder)(seeds=[0], evaluation=evaluation)
    launch = ["--launch", sys.executable]
    for name, value in launch_environment().items():
        monkeypatch.setenv(name, value)
    assert run_tool("ablate", path, "--output_dir", tmp_path / "out", *launch) == 0, capsys.readouterr().out
    assert "precision" in capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").rglob("*.json")}
    assert run_tool("ablate", path, "--output_dir", tmp_path / "out", *launch) == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out/runs").rglob("*.json")} == before
