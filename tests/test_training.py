"""The real trainers, end to end on tiny models: resume, several processes, non-finite steps, what a run leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import (
    checkpoint_tensors,
    generator_arguments,
    launch,
    launch_command,
    launch_environment,
    metrics,
    tiny_encoder,
)

from drift_accel import train
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.training.generator_task import GeneratorTask
from drift_accel.training.loop import NonFiniteError

TIMING = ("steps_per_second", "samples_per_second", "data_wait_share", "memory_gb")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("mae"))


def run_generator(encoder, run, *more):
    train.main(generator_arguments(encoder, run, *more))


def assert_same_tensors(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} of {len(first)} tensors differ, first {different[:3]}"


def without_timing(record):
    return {name: value for name, value in record.items() if name not in TIMING}


def test_a_run_leaves_what_it_promises(encoder, tmp_path):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "4", "--log.sample_every", "2", "--checkpoint.every", "1")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]
    assert {path.name for path in (run / "samples").iterdir()} == {"step_00000002.png", "step_00000004.png"}
    records = metrics(run)
    assert list(records) == [1, 2, 3, 4]
    wanted = {"loss", "learning_rate", "gradient_norm", "samples_per_second", "scale", "drift_sqnorm_0.02", "scale/global"}
    wanted |= {"drift_sqnorm_0.2/norm_x", "key_loss/conv1", "floor_share_0.02", "positive_sample_size_0.05/conv1"}
    assert wanted <= records[4].keys()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert wanted <= set(events.Tags()["scalars"]) and events.Tags()["images"] == ["samples"]
    exported = Generator.from_pretrained(run / "exports/ema_0.99")
    averaged = {
        name.removeprefix("ema_0.99/"): tensor
        for name, tensor in checkpoint_tensors(run, 4).items()
        if name.startswith("ema_0.99/")
    }
    assert_same_tensors(dict(exported.named_parameters()), averaged)
    assert "finished" in (run / "RUN.md").read_text()


def test_encoder_export_has_a_trained_classifier(encoder):
    mae = MaskedAutoencoder.from_pretrained(encoder)
    fresh = MaskedAutoencoder(**{k: v for k, v in mae.config.items() if not k.startswith("_")})
    assert not torch.equal(mae.classifier.weight, fresh.classifier.weight)


def test_resuming_is_bitwise_the_same_as_never_stopping(encoder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_generator(encoder, whole, "--steps", "6")
    run_generator(encoder, parts, "--steps", "4", "--checkpoint.every", "2")
    shutil.rmtree(parts / "checkpoints/step_00000004")  # as if killed between the checkpoint of step 2 and the end
    run_generator(encoder, parts, "--steps", "6", "--checkpoint.every", "2")
    assert_same_tensors(checkpoint_tensors(whole, 6), checkpoint_tensors(parts, 6))
    first, second = metrics(whole), metrics(parts)
    assert list(second) == [1, 2, 3, 4, 5, 6]
    assert {step: without_timing(r) for step, r in first.items()} == {step: without_timing(r) for step, r in second.items()}
    scalars = EventAccumulator(str(parts / "tensorboard")).Reload().Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]


def test_a_killed_process_goes_on_from_its_last_checkpoint(encoder, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ("--steps", "24", "--checkpoint.every", "3")
    command = launch_command(1, "drift_accel.train", generator_arguments(encoder, killed, *settings))
    process = subprocess.Popen(command, env=launch_environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(list((killed / "checkpoints").glob("step_*"))) < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "exports/ema_0.99").exists(), "the run finished before it could be killed"
    for run in (killed, whole):
        result = launch(1, "drift_accel.train", generator_arguments(encoder, run, *settings))
        assert result.returncode == 0, result.stderr[-2000:]
    assert_same_tensors(checkpoint_tensors(whole, 24), checkpoint_tensors(killed, 24))
    assert list(metrics(killed)) == list(range(1, 25))
    assert "ended without closing" in (killed / "RUN.md").read_text()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(encoder, tmp_path):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "2")
    records = (run / "metrics.jsonl").read_bytes()
    for folder in (run / "checkpoints").iterdir():
        (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="all checkpoints in .* are damaged"):
        run_generator(encoder, run, "--steps", "3")
    assert (run / "metrics.jsonl").read_bytes() == records


def test_a_damaged_checkpoint_is_named_and_skipped(encoder, tmp_path, capsys):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "4", "--checkpoint.every", "2")
    weights = run / "checkpoints/step_00000004/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run_generator(encoder, run, "--steps", "5", "--checkpoint.every", "2")
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "after 2 steps" in printed


def test_a_changed_configuration_is_refused(encoder, tmp_path):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "1")
    with pytest.raises(SystemExit, match=r"optimizer\.lr: 0\.\d+ -> 0\.5"):
        run_generator(encoder, run, "--steps", "2", "--optimizer.lr", "0.5")


def test_the_drifts_backend_may_change_as_it_does_not_change_the_mathematics(encoder, tmp_path):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "1", "--drift.backend", "reference")
    run_generator(encoder, run, "--steps", "2", "--drift.backend", "auto")
    assert "backend: auto" in (run / "config.yaml").read_text() and list(metrics(run)) == [1, 2]
    with pytest.raises(SystemExit, match='drift.coupling: "two_sided" -> "row"'):
        run_generator(encoder, run, "--steps", "3", "--drift.coupling", "row")


def test_a_non_finite_loss_stops_with_untouched_weights(encoder, tmp_path, monkeypatch):
    run, compute = tmp_path / "run", GeneratorTask.compute

    def poisoned(self, model, batch, step, *, diagnostics):
        loss, values = compute(self, model, batch, step, diagnostics=diagnostics)
        bad = float("nan") if step == 3 else 1.0
        return loss * bad, {**values, "scale/conv1": values["scale/conv1"] * bad}

    monkeypatch.setattr(GeneratorTask, "compute", poisoned)
    seen = {}
    monkeypatch.setattr(train, "finish_run", lambda *_: pytest.fail("a run that failed exported weights"))
    start_state = train.start_state
    monkeypatch.setattr(train, "start_state", lambda *args: seen.setdefault("state", start_state(*args)))
    with pytest.raises(NonFiniteError, match=r"step 4: not finite: scale/conv1"):
        run_generator(encoder, run, "--steps", "6", "--checkpoint.every", "3")
    saved = checkpoint_tensors(run, 3)
    weights = seen["state"].task.model.state_dict()
    # The step after the bad one may already have run when the flag is read, but never from spoiled weights.
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert "NonFiniteError" in (run / "RUN.md").read_text()
    assert not list((run / "checkpoints").glob("step_0000000[456]")) and saved


def test_bfloat16_keeps_float32_weights(encoder, tmp_path):
    arguments = generator_arguments(encoder, tmp_path / "run", "--steps", "2", "--precision", "bfloat16")
    result = launch(1, "drift_accel.train", arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    tensors = checkpoint_tensors(tmp_path / "run", 2)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_an_encoder_that_changed_is_refused_and_one_that_moved_is_not(encoder, tmp_path):
    run, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    run_generator(encoder, run, "--steps", "2")
    shutil.copytree(encoder, moved)
    run_generator(moved, run, "--steps", "3")
    mae = MaskedAutoencoder.from_pretrained(encoder)
    with torch.no_grad():
        next(mae.encoder.parameters()).mul_(1.5)
    mae.save_pretrained(other)
    with pytest.raises(SystemExit, match="encoder_weights_sha256"):
        run_generator(other, run, "--steps", "4")
    assert max(metrics(run)) == 3


def test_fewer_steps_than_are_done_and_unknown_maps_are_refused_before_anything_changes(encoder, tmp_path):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "3")
    saved = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit, match="has 3 steps already but steps is 2"):
        run_generator(encoder, run, "--steps", "2")
    assert (run / "config.yaml").read_bytes() == saved
    with pytest.raises(SystemExit, match=r"features.maps names conv9, but the encoder has conv1, layer1"):
        run_generator(encoder, tmp_path / "new", "--steps", "2", "--features.maps", '["conv9"]')
    assert not (tmp_path / "new").exists()


def test_a_finished_run_is_left_alone_and_remembers_its_sessions(encoder, tmp_path):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "2")
    exported = (run / "exports/ema_0.99/provenance.json").read_bytes()
    run_generator(encoder, run, "--steps", "2")
    assert (run / "exports/ema_0.99/provenance.json").read_bytes() == exported
    assert len(json.loads((run / "provenance.json").read_text())["sessions"]) == 2
    shutil.rmtree(run / "exports/ema_0.99")
    run_generator(encoder, run, "--steps", "2")
    assert (run / "exports/ema_0.99/config.json").exists()


def test_a_lengthened_run_without_its_last_export_makes_it(encoder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run_generator(encoder, run, "--steps", "2")
    short = load_file(run / "exports/ema_0.99/diffusion_pytorch_model.safetensors")
    with monkeypatch.context() as killed:  # between the last checkpoint and the export
        killed.setattr(train, "finish_run", lambda *_: None)
        run_generator(encoder, run, "--steps", "4")
    run_generator(encoder, run, "--steps", "4")
    exported = load_file(run / "exports/ema_0.99/diffusion_pytorch_model.safetensors")
    saved = checkpoint_tensors(run, 4)
    assert any(not torch.equal(exported[name], short[name]) for name in exported)
    assert all(torch.equal(exported[name], saved[f"ema_0.99/{name}"]) for name in exported)


def test_gradient_checkpointing_changes_memory_only(encoder, tmp_path):
    run_generator(encoder, tmp_path / "plain", "--steps", "3")
    run_generator(encoder, tmp_path / "recomputed", "--steps", "3", "--gradient_checkpointing", "true")
    assert_same_tensors(checkpoint_tensors(tmp_path / "plain", 3), checkpoint_tensors(tmp_path / "recomputed", 3))


def test_gradient_accumulation_of_the_environment_does_not_reach_the_loss(encoder, tmp_path, monkeypatch):
    run_generator(encoder, tmp_path / "plain", "--steps", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run_generator(encoder, tmp_path / "set", "--steps", "2")
    assert_same_tensors(checkpoint_tensors(tmp_path / "plain", 2), checkpoint_tensors(tmp_path / "set", 2))


@pytest.mark.multiprocess
def test_processes_that_see_different_checkpoints_are_refused(encoder, tmp_path):
    """As with a folder that is not shared by all machines: the second process reads another checkpoint."""
    run, script = tmp_path / "run", tmp_path / "separate.py"
    run_generator(encoder, run, "--steps", "2")
    script.write_text(
        "import os, sys\n"
        "from drift_accel.training import state\n"
        "if os.environ['RANK'] == '1':\n"
        "    state.sha256_file = lambda path: 'another'\n"
        "from drift_accel.train import main\n"
        "main(sys.argv[1:])\n"
    )
    command = launch_command(2, "drift_accel.train", generator_arguments(encoder, run, "--steps", "4"))
    module = command.index("drift_accel.train")
    command[module - 1 : module + 1] = [str(script)]
    result = subprocess.run(command, env=launch_environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode != 0
    assert "is the folder shared by all machines?" in result.stderr
    assert max(metrics(run)) == 2


@pytest.mark.multiprocess
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_two_processes_equal_one(encoder, tmp_path, precision):
    """Ten steps on the same global batch, from a generator whose output layer has left its zero start."""
    settings = ("--precision", precision, "--checkpoint.every", "5")
    start = tmp_path / "start"
    run_generator(encoder, start, "--steps", "5", *settings)
    runs = {}
    for num_processes in (1, 2):
        runs[num_processes] = shutil.copytree(start, tmp_path / f"run{num_processes}")
        arguments = generator_arguments(encoder, runs[num_processes], "--steps", "15", *settings)
        result = launch(num_processes, "drift_accel.train", [*arguments, "--num_processes", str(num_processes)])
        assert result.returncode == 0, result.stderr[-3000:]
    one, two = metrics(runs[1]), metrics(runs[2])
    initial = checkpoint_tensors(start, 5)
    first, second = checkpoint_tensors(runs[1], 15), checkpoint_tensors(runs[2], 15)
    assert initial["model/final_layer.output.weight"].abs().max() > 0
    assert list(one) == list(two) == list(range(1, 16))
    if precision == "float64":
        for step in range(6, 16):
            for tag, value in without_timing(one[step]).items():
                assert two[step][tag] == pytest.approx(value, rel=1e-9, abs=1e-15), f"step {step}, {tag}"
        for name in first:
            difference = (first[name] - second[name]).norm() / first[name].norm().clamp_min(1e-12)
            assert difference < 1e-9, f"{name}: {difference:.1e}"
    else:
        for step in range(6, 16):
            assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-3)
        names = [name for name in first if name.startswith("model/")]
        error = sum((first[n] - second[n]).square().sum() for n in names).sqrt()
        update = sum((first[n] - initial[n]).square().sum() for n in names).sqrt()
        assert error / update < 0.03


@pytest.mark.multiprocess
def test_a_wrong_number_of_processes_is_refused(encoder, tmp_path):
    result = launch(1, "drift_accel.train", generator_arguments(encoder, tmp_path / "run", "--num_processes", "2"))
    assert result.returncode != 0
    assert "2 processes were asked for, but this run has 1" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_best_checkpoint_by_an_evaluation_is_kept_and_the_hook_sees_each_one_complete(encoder, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    distances = {2: 5.0, 4: 1.0, 6: 3.0, 8: 4.0, 10: 2.0}

    def evaluate(step, folder):
        seen.append((step, (folder / "COMPLETE.json").exists()))
        return {"fid": distances[step]}

    monkeypatch.setattr(train, "make_hooks", lambda *_: train.Hooks(on_checkpoint=evaluate))
    settings = ("--checkpoint.every", "2", "--checkpoint.keep_last", "1", "--checkpoint.keep_best", "fid")
    run_generator(encoder, run, "--steps", "6", *settings)
    run_generator(encoder, run, "--steps", "10", *settings)
    assert seen == [(step, True) for step in distances]
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000010"]
