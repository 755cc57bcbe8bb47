"""tools/clean.py: what goes, what stays because something names it, and that nothing happens without being asked for."""

import json

import pytest
import yaml
from tiny_models import call_tool, write_checkpoint, write_run

from drift_accel.foundation.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "runs/first", steps=(10, 20, 30, 40))


def steps(run) -> list[int]:
    return RunFolder(run).checkpoint_steps()


def clean(run, *arguments) -> str:
    return call_tool("clean", run, *arguments)


def test_a_dry_run_prints_bytes_and_removes_nothing(run):
    before = {path: path.stat().st_size for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    printed = clean(run)
    assert {path: path.stat().st_size for path in before} == before
    gone = sum(size for path, size in before.items() if any(f"step_000000{step}" in str(path) for step in (10, 20, 30)))
    assert f"{gone:,} bytes would be given back" in printed
    assert printed.count("older checkpoint") == 3 and "step_00000040" not in printed


def test_on_request_older_checkpoints_go_and_the_newest_stays(run):
    assert "bytes given back" in clean(run, "--delete")
    assert steps(run) == [40]
    assert "0 bytes" in clean(run, "--delete")
    assert steps(run) == [40]


def test_more_may_be_kept(run):
    clean(run, "--delete", "--keep_last", "2")
    assert steps(run) == [30, 40]
    assert "at least the newest" in call_tool("clean", run, "--keep_last", "0", status=2)


def test_the_newest_that_is_whole_stays_also_behind_a_damaged_one(run):
    (run / "checkpoints/step_00000040/model.safetensors").write_bytes(b"torn")
    clean(run, "--delete")
    assert steps(run) == [30, 40], "a damaged newest is not taken for the one to go on from"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("../second/config.yaml", "init_from: runs/first/checkpoints/step_00000020\n"),
        ("../second/provenance.json", json.dumps({"identity": {"weights": "/data/first/checkpoints/step_00000020"}})),
        ("exports/ema_0.9/provenance.json", json.dumps({"checkpoint": {"step": 20}})),
        ("exports/ema_0.9_step_20/config.json", "{}"),
        ("evaluation/fid.json", json.dumps({"subject": {"checkpoint_step": 20}})),
        ("evaluation/step_00000020.json", "{}"),
        ("report.html", "<p>drawn from checkpoints/step_00000020</p>"),
        ("../summary/report.html", "<a href='../first/checkpoints/step_00000020'>"),
    ],
)
def test_what_something_names_stays(run, name, text):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(text)
    printed = clean(run, "--delete")
    assert steps(run) == [20, 40], printed
    assert "stays" in printed and name.rpartition("/")[2] in printed


def test_more_folders_can_be_searched(run, tmp_path):
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "table.md").write_text("| L/2 | first/checkpoints/step_00000010 |")
    clean(run, "--delete", "--references", papers)
    assert steps(run) == [10, 40]


def test_another_runs_steps_are_not_ours(run):
    other = run.parent / "second"
    other.mkdir()
    (other / "results.json").write_text(json.dumps({"step": 20, "from": "runs/second/checkpoints/step_00000020"}))
    clean(run, "--delete")
    assert steps(run) == [40]


def test_what_the_runs_own_configuration_keeps_stays(run):
    configuration = yaml.safe_load((run / "config.yaml").read_text())
    configuration["checkpoint"] = {"keep_every": 20}
    (run / "config.yaml").write_text(yaml.safe_dump(configuration))
    clean(run, "--delete")
    assert steps(run) == [20, 40]


def test_the_best_checkpoint_stays(run):
    configuration = yaml.safe_load((run / "config.yaml").read_text())
    configuration["checkpoint"] = {"keep_best": "fid", "best_is": "min"}
    (run / "config.yaml").write_text(yaml.safe_dump(configuration))
    values = {"metric": "fid", "values": {"10": 9.0, "20": 8.0, "30": 8.5, "40": 8.7}}
    (run / "checkpoints/values.json").write_text(json.dumps(values))
    assert "best fid (8)" in clean(run, "--delete")
    assert steps(run) == [20, 40]


def test_leftovers_and_traces_go(run):
    half = run / "checkpoints/.step_00000050.partial-999999999-elsewhere"
    half.mkdir()
    (half / "model.safetensors").write_bytes(bytes(1000))
    (run / "profiles").mkdir()
    (run / "profiles/step_00000001_to_00000002.json.gz").write_bytes(bytes(500))
    printed = clean(run, "--delete", "--keep_last", "4")
    assert "half-written" in printed and "profiler trace" in printed and "1,500 bytes given back" in printed
    assert not half.exists() and steps(run) == [10, 20, 30, 40]


def test_a_living_run_is_left_alone(run):
    living = RunFolder(run)
    living.lock()
    try:
        assert "is running, left alone" in clean(run, "--delete")
    finally:
        living.unlock()
    assert steps(run) == [10, 20, 30, 40]


def test_weights_samples_and_records_are_never_listed(run):
    for name in ("samples/step_00000010.png", "exports/ema_0.9/model.safetensors", "metrics.jsonl", "tensorboard/events"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"x")
    write_checkpoint(run, 50)
    clean(run, "--delete")
    for name in ("samples/step_00000010.png", "exports/ema_0.9/model.safetensors", "metrics.jsonl", "tensorboard/events"):
        assert (run / name).exists()


def test_what_is_no_run_is_refused(tmp_path):
    assert "is no run" in call_tool("clean", tmp_path, status=2)
