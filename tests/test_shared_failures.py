"""Evaluations by several processes: what fails on one ends for all, with its message, and nobody waits for ever."""

import json

import pytest
from tiny_models import write_encoder, write_run
from tiny_runs import launch_tool

from drift_accel.evaluation.results import load_result

pytestmark = pytest.mark.multiprocess
SECONDS = 240  # far more than two processes need under load; a process that waits for ever is killed then


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "mae")


def options(encoder) -> tuple:
    network = ("--protocol", "encoder", "--network", encoder, "--layer", "layer1_blk1")
    return (*network, "--reference_images", "digits", "--num_reference_images", 60, "--metrics", "frechet")


def test_a_watcher_goes_on_together_after_an_error_of_its_first_process(encoder, tmp_path):
    """What lies in the way of one checkpoint is seen by process 0 alone; the next checkpoint needs both."""
    run = write_run(tmp_path / "run")
    in_the_way = run / "evaluation/encoder_step_00000010_guidance_1_n70.in_progress"
    in_the_way.mkdir(parents=True)
    (in_the_way / "mine.txt").write_text("not yours")
    done = launch_tool("watch", run, *options(encoder), "--num_samples", 70, "--poll_seconds", 0.1, timeout=SECONDS)
    assert done.returncode != 0
    state = json.loads((run / "evaluation/watch/state.json").read_text())
    assert state["now"] == "failed: checkpoint 10"
    assert (
        "process 0, ValueError" in state["stages"]["checkpoint 10"] and "holds other things" in state["stages"]["checkpoint 10"]
    )
    assert state["stages"]["checkpoint 20"] == "done"
    assert load_result(run / "evaluation/encoder_step_00000020_guidance_1_n70.json")["num_generated"] == 70
    assert (in_the_way / "mine.txt").read_text() == "not yours"


@pytest.mark.slow
def test_an_evaluation_ends_on_all_processes_with_the_message(encoder, tmp_path):
    run = write_run(tmp_path / "run")
    output = tmp_path / "result.json"
    (tmp_path / "result.in_progress").write_text("a file where the chunks would go")
    done = launch_tool("evaluate", run, *options(encoder), "--num_samples", 70, "--output", output, timeout=SECONDS)
    assert done.returncode != 0 and not output.exists()
    assert "result.in_progress" in done.stderr
    assert "process 0, " in done.stderr  # said by a process that would have waited for it


@pytest.mark.slow
def test_a_bundle_notes_what_fails_and_the_rest_is_refused_together(encoder, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "evaluation/bundle_checkpoints.csv").mkdir(parents=True)  # the first process cannot write its table
    command = (run, *options(encoder), "--num_samples", 70, "--poll_seconds", 0.1, "--then", "bundle", "--full_samples", 80)
    done = launch_tool("watch", *command, "--bundle_guidance", "1.0,2.0", timeout=SECONDS)
    assert done.returncode != 0
    state = json.loads((run / "evaluation/watch/state.json").read_text())
    assert state["now"].startswith("failed: last_checkpoints")
    assert "process 0" in state["stages"]["last_checkpoints"]
    assert set(state["stages"]) == {"checkpoint 10", "checkpoint 20", "last_checkpoints", "guidance_sweep", "full_set"}
