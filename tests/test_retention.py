"""training.retention and checkpoint configuration: which checkpoints stay."""

import math

import pytest

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training.checkpoint import CheckpointConfig
from drift_accel.training.retention import Retention


def kept_of(config: CheckpointConfig, values: dict[int, dict], checkpoints: list[int]) -> set[int]:
    retention = Retention(config)
    for step in sorted({*values, *checkpoints}):
        if step in values:
            retention.report(step, values[step])
        if step in checkpoints:
            retention.add_checkpoint(step)
    return retention.kept(checkpoints)


def test_multiples_are_kept():
    config = CheckpointConfig(every=5, keep_every=10)
    assert Retention(config).kept([0, 5, 10, 15, 20]) == {10, 20}
    assert Retention(CheckpointConfig(every=5)).kept([5, 10]) == set()


@pytest.mark.parametrize(("best_is", "best"), [("min", 20), ("max", 10)])
def test_the_best_value_since_the_checkpoint_before_decides(best_is, best):
    config = CheckpointConfig(every=10, keep_best="fid", best_is=best_is)
    values = {5: {"fid": 1.0}, 10: {"fid": 9.0}, 17: {"fid": 2.0}, 30: {"other": 0.0}, 40: {"fid": math.nan}}
    assert kept_of(config, values, [10, 20, 30, 40]) == {best}


def test_an_equal_value_keeps_the_newer_one():
    config = CheckpointConfig(every=10, keep_best="fid")
    assert kept_of(config, {10: {"fid": 1.0}, 20: {"fid": 1.0}}, [10, 20]) == {20}
    assert kept_of(CheckpointConfig(every=10, keep_best="fid", best_is="max"), {10: {"fid": 1}, 20: {"fid": 1}}, [10, 20]) == {20}


def test_an_evaluation_after_the_checkpoint_replaces_its_value():
    retention = Retention(CheckpointConfig(every=10, keep_best="fid"))
    for step in (10, 20):
        retention.report(step, {"fid": 5.0})
        retention.add_checkpoint(step)
    retention.report(10, {"fid": 1.0})
    assert retention.kept([10, 20]) == {10}


def test_values_outlive_the_process_and_those_of_lost_steps_and_other_metrics_do_not(tmp_path):
    path, config = tmp_path / "values.json", CheckpointConfig(every=10, keep_best="fid")
    first = Retention(config, path)
    first.add_checkpoint(10)
    first.report(10, {"fid": 3.0})  # an evaluation after the checkpoint
    first.report(20, {"fid": 1.0})
    first.add_checkpoint(20)
    assert Retention(config, path, newest=20).kept([10, 20]) == {20}
    resumed = Retention(config, path, newest=10)  # the checkpoint of step 20 was damaged
    resumed.report(20, {"fid": 4.0})
    resumed.add_checkpoint(20)
    assert resumed.kept([10, 20]) == {10}
    assert Retention(CheckpointConfig(every=10, keep_best="loss"), path, newest=20).kept([10, 20]) == set()
    for content in ("{", "[]", '{"metric": "fid", "values": {"x": 1}}'):
        path.write_text(content)
        told = []
        assert Retention(config, path, 20, told.append).kept([10, 20]) == set()
        assert len(told) == 1 and "cannot be read" in told[0]


def test_an_unknown_metric_is_told_once():
    told = []
    retention = Retention(CheckpointConfig(every=1, keep_best="fidd"), log=told.append)
    for step in (1, 2):
        retention.report(step, {"fid": 1.0})
        retention.add_checkpoint(step)
    assert len(told) == 1 and "'fidd'" in told[0]


def test_pruning_spares_what_is_kept(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    for step in (10, 20, 30, 40):
        with run.new_checkpoint(step) as folder:
            (folder / "weights").write_text(str(step))
    assert run.prune_checkpoints(1, {20}) == [10, 30]
    assert run.checkpoint_steps() == [20, 40]
