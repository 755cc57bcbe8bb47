"""foundation.run_folder: layout, resuming under the same configuration, checkpoints, metrics, notes."""

import json
import logging
import math
import os
import socket
from pathlib import Path

import numpy
import pytest
import torch
import yaml

from drift_accel.foundation.run_folder import RunFolder

CONFIGURATION = {
    "optimizer": {"lr": 1e-5, "betas": (0.9, 0.95), "max_norm": math.inf},
    "checkpoint": {"every": 100, "keep_last": 3},
    "checkpoint_name": "x",
    "steps": 10**6,
    "model": {"name": "tiny", "options": {}},
    "cache": Path("data/cache"),
    "weights": None,
    "nothing": math.nan,
}


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def changed(key: str, value) -> dict:
    configuration = {name: dict(part) if isinstance(part, dict) else part for name, part in CONFIGURATION.items()}
    room, _, name = key.partition(".")
    (configuration[room] if name else configuration)[name or room] = value
    return configuration


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save_checkpoints(run: RunFolder, *steps: int) -> None:
    for step in steps:
        with run.new_checkpoint(step) as folder:
            (folder / "weights.safetensors").write_bytes(b"w" * 100)
            (folder / "state.json").write_text(str(step))


def damage(run: RunFolder, step: int) -> None:
    path = run.checkpoint_dir(step) / "weights.safetensors"
    path.write_bytes(b"w" * 99 + b"v")


# Layout


def test_layout(run, tmp_path):
    root = tmp_path / "run"
    names = {
        run.config_path: "config.yaml",
        run.provenance_path: "provenance.json",
        run.notes_path: "RUN.md",
        run.metrics_path: "metrics.jsonl",
        run.tensorboard_dir: "tensorboard",
        run.samples_dir: "samples",
        run.checkpoints_dir: "checkpoints",
        run.exports_dir: "exports",
        run.evaluation_dir: "evaluation",
        run.sample_path(1000): "samples/step_00001000.png",
        run.checkpoint_dir(0): "checkpoints/step_00000000",
        run.checkpoint_dir(123456789): "checkpoints/step_123456789",
        run.export_dir("ema_0.999"): "exports/ema_0.999",
        run.evaluation_path("fid_50k"): "evaluation/fid_50k.json",
    }
    assert {path: root / name for path, name in names.items()} == {path: path for path in names}
    assert sorted(os.listdir(root)) == ["checkpoints", "evaluation", "exports", "samples", "tensorboard"]
    run.create()


def test_names_outside_of_the_layout_are_refused(run):
    for name in ("", "..", ".hidden", "a/b", "a\\b", "/etc"):
        with pytest.raises(ValueError, match="plain file name"):
            run.export_dir(name)
        with pytest.raises(ValueError, match="plain file name"):
            run.evaluation_path(name)
    for path in (run.sample_path, run.checkpoint_dir):
        with pytest.raises(ValueError, match="0 or more"):
            path(-1)


@pytest.mark.parametrize("name", ["holiday.jpg", "samples/holiday.jpg", "metrics.jsonl", "src/code.py"])
def test_a_foreign_folder_is_refused_untouched(tmp_path, name):
    (tmp_path / "home" / name).parent.mkdir(parents=True)
    (tmp_path / "home" / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    run = RunFolder(tmp_path / "home")
    for open_it in (run.create, lambda: run.open_configuration(CONFIGURATION)):
        with pytest.raises(ValueError, match=f"no run folder .it has {name.split('/')[0]} "):
            open_it()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        RunFolder(tmp_path / "run").create()


def test_an_empty_folder_and_an_interrupted_first_start_are_accepted(run):
    host = socket.gethostname()
    (run.path / f".config.yaml.partial-{os.getpid()}-{host}").write_text("half")
    (run.checkpoints_dir / f".step_00000001.partial-{os.getpid()}-{host}").mkdir()
    run.open_configuration(CONFIGURATION)
    run.create()
    assert not [path for path in run.path.rglob("*") if path.name.startswith(".")]
    empty = run.path.parent / "empty"
    empty.mkdir()
    assert RunFolder(empty).open_configuration(CONFIGURATION) is False


# Configuration


def test_the_same_configuration_resumes(run):
    assert run.open_configuration(CONFIGURATION) is False
    before = contents(run.path)
    assert run.open_configuration(CONFIGURATION, may_change=["steps"]) is True
    assert run.open_configuration(changed("steps", 1e6)) is True  # the same number
    assert contents(run.path) == before
    saved = yaml.safe_load(run.config_path.read_text())
    assert list(saved) == list(CONFIGURATION)
    assert saved["optimizer"] == {"lr": 1e-5, "betas": [0.9, 0.95], "max_norm": math.inf}
    assert saved["cache"] == "data/cache"
    assert run.read_configuration()["model"] == {"name": "tiny", "options": {}}


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("optimizer.lr", 2e-5, "optimizer.lr: 1e-05 -> 2e-05"),
        ("optimizer.betas", [0.9], r"optimizer.betas: \[0.9, 0.95\] -> \[0.9\]"),
        ("optimizer.new", True, "optimizer.new: absent -> true"),
        ("model", None, 'model: absent -> null\n  model.name: "tiny" -> absent\n  model.options: {} -> absent'),
        ("weights", "w", 'weights: null -> "w"'),
        # Not below "checkpoint", although the name starts with it.
        ("checkpoint_name", "y", 'checkpoint_name: "x" -> "y"'),
        ("nothing", 0, "nothing: NaN -> 0"),
    ],
)
def test_a_difference_is_shown_and_refused(run, key, value, line):
    run.open_configuration(CONFIGURATION)
    before = contents(run.path)
    asked = changed(key, value)
    asked["steps"] = 5
    with pytest.raises(ValueError, match=rf"(?s){line}\n.*another --output_dir, or.*: checkpoint, steps") as caught:
        run.open_configuration(asked, may_change=("steps", "checkpoint"))
    assert "steps: 1000000" not in str(caught.value)
    assert contents(run.path) == before


def test_allowed_differences_are_saved(run):
    run.open_configuration(CONFIGURATION)
    asked = changed("checkpoint.every", 7) | {"steps": 5}
    assert run.open_configuration(asked, may_change=("steps", "checkpoint")) is True
    assert run.read_configuration()["checkpoint"]["every"] == 7
    assert run.open_configuration(asked) is True


def test_a_key_that_the_saved_configuration_is_too_old_to_know_has_its_default(run):
    run.open_configuration(CONFIGURATION)
    newer = changed("optimizer.new", True) | {"positives": {"choice": "random", "map": None}}
    defaults = {"optimizer": {"new": True}, "positives": {"choice": "random", "map": None}}
    assert run.open_configuration(newer, defaults=defaults) is True
    newest = newer | {"decoder": {"batch": 4}}
    with pytest.raises(ValueError, match="decoder.batch: 8 -> 4"):
        run.open_configuration(newest, defaults=defaults | {"decoder": {"batch": 8}})
    # What was saved counts, whatever the default: a value, and a null where there is a section now.
    with pytest.raises(ValueError, match='cache: "data/cache" -> "other"'):
        run.open_configuration(newer | {"cache": "other"}, defaults=defaults | {"cache": "other"})
    with pytest.raises(ValueError, match="weights: null -> absent\n  weights.path: absent -> 1"):
        run.open_configuration(newer | {"weights": {"path": 1}}, defaults=defaults | {"weights": {"path": 1}})


def test_true_is_not_one(run):
    run.open_configuration({"flag": True, "deep": [{"a": 1}]})
    with pytest.raises(ValueError, match="flag: true -> 1"):
        run.open_configuration({"flag": 1, "deep": [{"a": 1}]})
    with pytest.raises(ValueError, match="deep:"):
        run.open_configuration({"flag": True, "deep": [{"a": 2}]})


def test_configurations_that_cannot_be_read_or_written(run):
    with pytest.raises(TypeError, match=r"configuration\.model"):
        run.open_configuration({"model": object()})
    assert not run.config_path.exists()
    for text, message in (("a: [", "no YAML"), ("", "no configuration"), ("- 1", "no configuration")):
        run.config_path.write_text(text)
        with pytest.raises(ValueError, match=message):
            run.open_configuration(CONFIGURATION)


# Checkpoints


def test_checkpoint_steps_are_the_completed_ones(run, tmp_path):
    assert RunFolder(tmp_path / "nowhere").checkpoint_steps() == []
    assert run.latest_complete_checkpoint() is None
    save_checkpoints(run, 20, 5, 100)
    for name in ("step_00000200", "step_7", "step_000000009", "other", ".step_00000300.partial-1-host"):
        (run.checkpoints_dir / name).mkdir()
    (run.checkpoints_dir / "step_00000400").write_text("a file")
    assert run.checkpoint_steps() == [5, 20, 100]


def test_damaged_checkpoints_are_named_and_skipped(run, caplog):
    save_checkpoints(run, 10, 20, 30, 40)
    damage(run, 30)
    (run.checkpoint_dir(40) / "COMPLETE.json").unlink()
    messages = []
    assert run.latest_complete_checkpoint(messages.append) == (20, run.checkpoint_dir(20))
    assert len(messages) == 2
    assert "step_00000040" in messages[0] and "COMPLETE.json is missing" in messages[0]
    assert "step_00000030/weights.safetensors: content changed" in messages[1]
    with caplog.at_level(logging.WARNING):
        run.latest_complete_checkpoint()
    assert "step_00000030/weights.safetensors" in caplog.text
    for step in (10, 20):
        damage(run, step)
    assert run.latest_complete_checkpoint(messages.append) is None


def test_pruning_keeps_the_newest(run):
    save_checkpoints(run, 10, 20, 30)
    assert run.prune_checkpoints(None) == []
    assert run.prune_checkpoints(5) == []
    assert run.prune_checkpoints(2) == [10]
    assert run.checkpoint_steps() == [20, 30]
    assert run.prune_checkpoints(1) == [20]
    assert os.listdir(run.checkpoints_dir) == ["step_00000030"]
    for keep_last in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            run.prune_checkpoints(keep_last)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(run):
    save_checkpoints(run, 10, 100)
    damage(run, 100)
    assert run.latest_complete_checkpoint(lambda _: None)[0] == 10
    save_checkpoints(run, 20)
    assert run.prune_checkpoints(1) == [10]
    assert run.latest_complete_checkpoint(lambda _: None)[0] == 20
    save_checkpoints(run, 100)  # reached again: replaced, and counted from now on
    assert run.prune_checkpoints(1) == [20]
    assert run.latest_complete_checkpoint()[0] == 100


def test_a_failed_checkpoint_leaves_the_earlier_one(run):
    save_checkpoints(run, 10)
    with pytest.raises(RuntimeError), run.new_checkpoint(10) as folder:
        (folder / "weights.safetensors").write_bytes(b"")
        raise RuntimeError
    assert run.latest_complete_checkpoint()[0] == 10
    assert os.listdir(run.checkpoints_dir) == ["step_00000010"]


# Metrics


def test_metrics_are_appended_and_read(run):
    assert run.read_metrics() == []
    run.append_metrics({"step": 1, "loss": numpy.float32(0.5), "text": "ä"})
    run.append_metrics({"step": numpy.int64(2), "loss": math.nan})
    assert run.read_metrics() == [{"step": 1, "loss": 0.5, "text": "ä"}, {"step": 2, "loss": None}]
    assert run.metrics_path.read_text("utf-8").count("\n") == 2
    for record in ({"loss": 1}, {"step": 1.5}, {"step": True}):
        with pytest.raises(ValueError, match='integer "step"'):
            run.append_metrics(record)
    with pytest.raises(TypeError, match=r"record\.loss"):
        run.append_metrics({"step": 3, "loss": torch.zeros(())})
    assert len(run.read_metrics()) == 2


def test_truncating_leaves_no_step_to_appear_twice(run):
    for step in range(1, 8):
        run.append_metrics({"step": step})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 8, "lo')
    assert [record["step"] for record in run.read_metrics()] == list(range(1, 8))
    assert run.truncate_metrics(5) == 2
    run.append_metrics({"step": 6})
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    assert run.truncate_metrics(100) == 0
    assert run.truncate_metrics(-1) == 6
    assert run.read_metrics() == []


def test_truncating_without_a_file_does_nothing(run):
    assert run.truncate_metrics(5) == 0
    assert not run.metrics_path.exists()


def test_a_half_written_line_is_not_continued(run):
    run.append_metrics({"step": 1})
    with open(run.metrics_path, "ab") as file:
        file.write(b'{"step": 2, "lo')
    run.append_metrics({"step": 2})
    assert [record["step"] for record in run.read_metrics()] == [1, 2]
    run.metrics_path.write_bytes(b'{"ste')
    run.append_metrics({"step": 3})
    assert run.metrics_path.read_bytes() == b'{"step": 3}\n'


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', ""])
def test_a_broken_line_of_metrics_is_named(run, line):
    run.append_metrics({"step": 1})
    with open(run.metrics_path, "a") as file:
        file.write(f"{line}\n")
    run.append_metrics({"step": 3})
    for read in (run.read_metrics, lambda: run.truncate_metrics(1)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            read()


# Notes


def test_notes_open_and_close(run):
    run.start_notes("first\nstart")
    run.finish_notes("reached step 10")
    run.start_notes("resumed")
    with open(run.notes_path, "a") as file:
        file.write("\nlooks good, by hand, no line end")
    run.start_notes("resumed again")
    run.finish_notes("done")
    lines = [line for line in run.notes_path.read_text().splitlines() if line]
    starts = [
        "# run",
        "- opened 2",
        "- closed 2",
        "- opened 2",
        "looks good",
        "- ended without closing",
        "- opened 2",
        "- closed 2",
    ]
    ends = ["# run", ": first start", ": reached step 10", ": resumed", "line end", "closing", ": resumed again", ": done"]
    assert len(lines) == len(starts)
    for line, start, end in zip(lines, starts, ends, strict=True):
        assert line.startswith(start) and line.endswith(end)
    with pytest.raises(ValueError, match="no open run"):
        run.finish_notes("twice")
