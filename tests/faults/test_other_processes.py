"""The same run with other processes: one, two, FSDP2, one after the other from each other's checkpoints, all equal in float64."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY_MAE, checkpoint_tensors, generator_arguments, metrics
from trainer_processes import Trainer, run_trainer

from drift_accel.models import Generator

DECAYS = ("--ema.decays", "[0.9,0.99]")
FLOAT64 = ("--precision", "float64", *DECAYS, "--checkpoint.keep_last", "null", "--checkpoint.export_every", "3")
QUEUE = ("--data.queue.per_class", "16", "--data.queue.unconditional", "40", "--data.queue.push", "8")
LEGS = {3: (1, False), 6: (2, True), 9: (2, False), 12: (1, False)}  # last step of the leg -> (processes, FSDP2)


def largest_difference(ours, theirs) -> float:
    assert ours.keys() == theirs.keys()
    ours, theirs = ({name: value.double() for name, value in tensors.items()} for tensors in (ours, theirs))
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-12)).item() for n in ours)


@pytest.mark.multiprocess
def test_legs_with_one_two_and_split_processes_equal_one_process_throughout(encoder, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    settings = (*FLOAT64, *QUEUE, "--checkpoint.every", "3", "--log.sample_every", "6")
    run_trainer("drift_accel.train", generator_arguments(encoder, whole, *settings, "--steps", "12"), tmp_path / "whole_logs")
    for last, (num_processes, fsdp) in LEGS.items():
        arguments = generator_arguments(encoder, run, *settings, "--steps", str(last))
        run_trainer("drift_accel.train", arguments, tmp_path / f"logs_{last}", num_processes=num_processes, fsdp=fsdp)
        difference = largest_difference(checkpoint_tensors(run, last), checkpoint_tensors(whole, last))
        assert difference < 1e-9, f"after step {last}: {difference:.1e}"
    ours, theirs = metrics(run), metrics(whole)
    assert list(ours) == list(range(1, 13))
    for step, record in ours.items():
        assert record["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-9)
        assert record["gradient_norm"] == pytest.approx(theirs[step]["gradient_norm"], rel=1e-9)
    assert (run / "samples/step_00000006.png").read_bytes() == (whole / "samples/step_00000006.png").read_bytes()
    saved = load_file(run / "checkpoints/step_00000006/ema_0.99.safetensors")
    for name in ("ema_0.99_step_00000006", "ema_0.9_step_00000006"):
        exported = Generator.from_pretrained(run / "exports" / name)
        assert type(exported) is Generator
    exported = Generator.from_pretrained(run / "exports/ema_0.99_step_00000006", torch_dtype=torch.float64)
    assert all(torch.equal(saved[name], value) for name, value in exported.named_parameters())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp2_goes_on_bitwise_and_its_final_export_loads_alone(encoder, tmp_path):
    for name, legs in {"whole": [6], "parts": [3, 6]}.items():
        for last in legs:
            arguments = generator_arguments(encoder, tmp_path / name, *DECAYS, "--checkpoint.every", "3", "--steps", str(last))
            run_trainer("drift_accel.train", arguments, tmp_path / f"{name}_{last}", num_processes=2, fsdp=True)
    first, second = (checkpoint_tensors(tmp_path / name, 6) for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    exported = Generator.from_pretrained(tmp_path / "whole/exports/ema_0.9")
    assert all(torch.equal(first[f"ema_0.9/{name}"], value) for name, value in exported.named_parameters())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_fsdp2_with_bfloat16_computes_what_data_parallelism_does(encoder, tmp_path):
    """fully_shard's own casts stay out: autocast alone decides, so the two differ by the order of sums only."""
    losses = []
    for fsdp in (False, True):
        run = tmp_path / f"run_{fsdp}"
        arguments = generator_arguments(encoder, run, "--steps", "3", "--precision", "bfloat16")
        run_trainer("drift_accel.train", arguments, tmp_path / f"logs_{fsdp}", num_processes=2, fsdp=fsdp)
        assert {tensor.dtype for tensor in checkpoint_tensors(run, 3).values()} == {torch.float32}
        losses.append([record["loss"] for record in metrics(run).values()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_encoders_trainer_equals_one_process_under_fsdp2(tmp_path):
    # Three steps: group norms of one channel multiply rounding errors with every step, whatever the processes.
    settings = ("--precision", "float64", "--steps", "3", "--classifier.steps", "1")
    for num_processes in (1, 2):
        run = tmp_path / f"run_{num_processes}"
        arguments = [*TINY_MAE, *settings, "--output_dir", str(run)]
        options = {"num_processes": num_processes, "fsdp": num_processes == 2}
        run_trainer("drift_accel.train_mae", arguments, tmp_path / f"logs_{num_processes}", **options)
    assert largest_difference(checkpoint_tensors(tmp_path / "run_2", 3), checkpoint_tensors(tmp_path / "run_1", 3)) < 1e-9


def ask_for_fsdp(rank: int) -> None:
    """Tamper: the environment that `accelerate launch --use_fsdp --fsdp_version 2` leaves, without its GPUs."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


def ask_for_fsdp1(rank: int) -> None:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="1")


def ask_for_offload(rank: int) -> None:
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS="true")


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (ask_for_fsdp, "FSDP was asked for, but accelerate started"),
        (ask_for_fsdp1, "FSDP version 1 was asked for: give accelerate --fsdp_version 2"),
        (ask_for_offload, "weights on the processor are not supported"),
    ],
)
def test_fsdp_that_would_not_be_what_was_asked_for_is_refused(tamper, message, encoder, tmp_path):
    trainer = Trainer(
        "drift_accel.train", generator_arguments(encoder, tmp_path / "run", "--steps", "2"), tmp_path / "logs", tamper=tamper
    )
    assert trainer.wait() == [1]
    assert message in trainer.text() and not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path / "logs")
