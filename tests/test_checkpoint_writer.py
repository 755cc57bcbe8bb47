"""training.snapshot and training.checkpoint_writer: training goes on while a checkpoint is written, and cannot reach into it."""

import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.training import checkpoint_writer
from drift_accel.training.averages import WeightAverages
from drift_accel.training.checkpoint import CheckpointConfig, load_checkpoint, read_record
from drift_accel.training.checkpoint_writer import CheckpointError, CheckpointWriter
from drift_accel.training.optimizer import OptimizerConfig, make_optimizer
from drift_accel.training.retention import Retention
from drift_accel.training.snapshot import HostBuffers, take_snapshot

DECAYS = (0.5, 0.9)


class State:
    """A tiny model that has taken some steps, with what belongs to it."""

    def __init__(self, steps: int = 2):
        self.model = nn.Linear(3, 2)
        with torch.no_grad():
            for number, parameter in enumerate(self.model.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + number)
        self.optimizer = make_optimizer(self.model, OptimizerConfig(lr=0.1, warmup_steps=0))
        self.averages = WeightAverages(self.model, DECAYS)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.model(torch.ones(1, 3)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.averages.update(self.model)

    def snapshot(self, step: int, buffers: HostBuffers):
        state = {"data_state": {"pushes": torch.tensor(step)}, "record": {"note": "x"}, "buffers": buffers}
        return take_snapshot(step, self.model, self.optimizer, self.averages, **state)


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create()
    return run


def writer_of(run, export=lambda snapshot: None, **options) -> CheckpointWriter:
    config = CheckpointConfig(every=1, **options)
    return CheckpointWriter(run, config, Retention(config), export)


def test_what_is_saved_is_the_state_of_the_snapshot_whatever_follows(run, monkeypatch):
    write, go_on = checkpoint_writer.write_snapshot, threading.Event()

    def held_back(*arguments):
        assert go_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "write_snapshot", held_back)
    state, writer = State(), writer_of(run)
    wanted = {name: value.clone() for name, value in state.model.state_dict().items()}
    writer.submit(state.snapshot(2, writer.buffers))
    state.step()  # training has gone on although nothing is written yet
    assert writer.is_busy and run.checkpoint_steps() == [] and writer.take_finished() == []
    go_on.set()
    writer.wait()
    assert not writer.is_busy and writer.take_finished() == [(2, run.checkpoint_dir(2))] and writer.take_finished() == []
    restored = State(0)
    data = load_checkpoint(run.checkpoint_dir(2), restored.model, restored.optimizer, restored.averages)
    assert data["pushes"] == 2 and read_record(run.checkpoint_dir(2))["note"] == "x"
    assert all(torch.equal(wanted[name], value) for name, value in restored.model.state_dict().items())
    restored.step()
    assert all(torch.equal(value, restored.model.state_dict()[name]) for name, value in state.model.state_dict().items())
    for decay in DECAYS:
        assert all(torch.equal(v, restored.averages.averages[decay][n]) for n, v in state.averages.averages[decay].items())


def test_buffers_are_used_again_and_one_checkpoint_waits_for_the_other(run):
    state, writer = State(), writer_of(run)
    writer.reserve(state.model, state.averages)
    writer.wait()
    taken = {tensor.data_ptr() for tensor in writer.buffers._buffers.values()}
    first = state.snapshot(1, writer.buffers)
    assert {tensor.data_ptr() for tensor in first.tensors["model.safetensors"].values()} <= taken
    moments = first.tensors["optimizer.safetensors"]
    assert all(moments[name].data_ptr() in taken for name in moments if not name.startswith("step"))
    writer.submit(first)
    writer.wait()
    second = state.snapshot(2, writer.buffers)
    for file, group in first.tensors.items():
        assert all(second.tensors[file][name].data_ptr() == tensor.data_ptr() for name, tensor in group.items())
    writer.submit(second)
    writer.submit(second)  # the second submit waits for the first one
    writer.wait()
    assert run.checkpoint_steps() == [1, 2] and writer.failure is None


def test_a_failure_is_kept_for_the_loop_and_earlier_checkpoints_are_named(run, monkeypatch):
    state, writer = State(), writer_of(run)
    writer.submit(state.snapshot(1, writer.buffers))
    writer.wait()
    monkeypatch.setattr(checkpoint_writer, "write_snapshot", lambda *_: (_ for _ in ()).throw(OSError("no such luck")))
    writer.submit(state.snapshot(2, writer.buffers))
    writer.wait()
    assert isinstance(writer.failure, CheckpointError)
    assert "step 2 could not be written (OSError: no such luck). The checkpoint of step 1 is whole" in str(writer.failure)


def test_exports_and_pruning_belong_to_the_write(run):
    exported = []
    writer = writer_of(run, lambda snapshot: exported.append(snapshot.step), keep_last=1, keep_every=2, export_every=3)
    state = State()
    for step in range(7):
        writer.submit(state.snapshot(step, writer.buffers))
    writer.wait()
    assert run.checkpoint_steps() == [2, 4, 6] and exported == [3, 6]


def test_a_checkpoint_of_another_model_is_refused_by_name(run):
    state, writer = State(), writer_of(run)
    writer.submit(state.snapshot(1, writer.buffers))
    writer.wait()
    other = State(0)
    other.model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=r"does not fit the configured model: weight has shape \[2, 3\], wanted \[2, 4\]"):
        load_checkpoint(run.checkpoint_dir(1), other.model, other.optimizer, other.averages)
    more = WeightAverages(state.model, (0.5, 0.7))
    with pytest.raises(ValueError, match=r"none of decay \[0.7\]"):
        load_checkpoint(run.checkpoint_dir(1), state.model, state.optimizer, more)
    assert load_file(run.checkpoint_dir(1) / "ema_0.5.safetensors").keys() == {"weight", "bias"}
