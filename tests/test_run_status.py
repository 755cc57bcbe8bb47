"""tools/run_status.py and RUN.md: what a reader learns about a run, also one that was killed."""

import re
import time

import pytest
from tiny_models import call_tool
from tiny_runs import generator_arguments, tiny_encoder

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.run_records import duration_text
from drift_accel.train import main as train_generator


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    encoder = tiny_encoder(folder / "mae")
    train_generator(generator_arguments(encoder, folder / "generator", "--steps", "4"))
    return folder


def write_run(path, *, steps: int = 1000, last: int = 400, **values) -> RunFolder:
    run = RunFolder(path)
    run.create()
    run.open_configuration({"steps": steps, "optimizer": {"warmup_steps": 0}})
    run.start_notes("a command")
    for step in range(100, last + 1, 100):
        run.append_metrics({"step": step, "steps_per_second": 2.0, "samples_per_second": 128.0, "loss": 5.0, **values})
    return run


def test_a_finished_run_is_explained_by_its_notes(finished):
    notes = (finished / "generator/RUN.md").read_text()
    assert notes.startswith("# generator\n\n**What**: a one-step generator (tiny, ") and "## Diary" in notes
    for part in (
        "4 steps of 4 labels with 6 generated, 5 real and 3 unconditional",
        "scikit-learn's digits",
        "temperatures 0.02, 0.05",
    ):
        assert part in notes
    for part in ("**Encoder**: mae ", "drift_accel 0", "torch ", "encoder_weights_sha256 "):
        assert part in notes
    assert re.search(r"- closed .* UTC after 0:\d\d:\d\d: finished \(step 4: loss [\d.]+, drift_sqnorm_0.2 ", notes)
    assert "a masked autoencoder" in (finished / "mae/RUN.md").read_text()


def test_the_head_is_written_once(tmp_path):
    run = RunFolder(tmp_path)
    run.start_notes("first", "**What**: this")
    run.finish_notes("done")
    run.start_notes("second", "**What**: that")
    notes = run.notes_path.read_text()
    assert "this" in notes and "that" not in notes and notes.count("## Diary") == 1


def test_a_killed_run_is_completed_by_the_next_command(tmp_path):
    run = write_run(tmp_path / "run")
    printed = call_tool("run_status", tmp_path / "run")
    assert "ended without closing: last record of step 400" in printed and "the same command goes on" in printed
    line = run.notes_path.read_text().splitlines()[-1]
    assert re.fullmatch(r"- ended without closing: last record of step 400, .* UTC, 0:00:\d\d after its start", line)
    call_tool("run_status", tmp_path / "run")
    assert run.notes_path.read_text().count("ended without closing") == 1
    run.start_notes("again")
    assert run.notes_path.read_text().splitlines()[-2] == line


def test_a_living_run_is_left_alone(tmp_path):
    run = write_run(tmp_path / "run")
    run.lock()
    try:
        printed = call_tool("run_status", tmp_path / "run")
    finally:
        run.unlock()
    assert "running, opened" in printed and "ended" not in run.notes_path.read_text()


def test_a_start_that_recorded_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    run.finish_notes("done")
    time.sleep(2.1)  # later than the records, in whole seconds as the diary counts
    run.start_notes("again")
    assert run.complete_notes()
    assert run.notes_path.read_text().splitlines()[-1].endswith("nothing was recorded after its start")


def test_step_pace_time_left_and_values(tmp_path):
    run = write_run(tmp_path / "run", gradient_norm=None, **{"drift_sqnorm_0.2": 0.03})
    run.lock()
    try:
        printed = call_tool("run_status", tmp_path / "run")
    finally:
        run.unlock()
    assert "step 400 of 1,000 (40.0%)" in printed
    assert "2 steps a second, 0:05:00 left, 128 samples a second" in printed
    assert re.search(r"drift_sqnorm_0.2 +0.03", printed) and re.search(r"gradient_norm +not finite", printed)
    assert "no alarms" in printed


def test_the_newest_evaluation_is_shown(tmp_path):
    run = write_run(tmp_path / "run", last=200, **{"evaluation/fid": 12.5, "evaluation/kid": 0.25, "evaluation/kid_std": 0.1})
    run.append_metrics({"step": 300, "loss": 5.0})
    run.finish_notes("finished")
    assert "\nevaluation after step 200: fid 12.5, kid 0.25\n" in call_tool("run_status", tmp_path / "run")


def test_lasting_alarms_are_shown(tmp_path):
    write_run(tmp_path / "run", last=500, data_wait_share=0.9).finish_notes("finished")
    assert "ALARM data_starvation at step 400" in call_tool("run_status", tmp_path / "run")


def test_watching_ends_with_the_run(finished):
    printed = call_tool("run_status", finished / "generator", "--watch", "0.1")
    assert printed.count("step 4 of 4") == 1 and "finished" in printed


def test_what_is_no_run_is_refused(tmp_path):
    assert "is no run" in call_tool("run_status", tmp_path, status=2)


def test_durations():
    assert [duration_text(seconds) for seconds in (0, 59.9, 3723, 400_000, -1)] == [
        "0:00:00",
        "0:00:59",
        "1:02:03",
        "111:06:40",
        "0:00:00",
    ]
