"""Steps that are not finite, in one process of two: both stop or skip, and no weight moves."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import checkpoint_tensors, generator_arguments, metrics
from trainer_processes import Trainer, run_trainer

BAD_STEP = 5  # counted from 1
SETTINGS = ("--steps", "9", "--checkpoint.every", "1", "--checkpoint.keep_last", "null", "--precision", "float64")


def spoil_one_process(rank: int) -> None:
    """Tamper: in process 1 the features of one key become NaN at one step. What the weights are after each step is kept."""
    from drift_accel.training import loop, step

    all_features, train_step = step.all_features, loop.train_step
    logs = Path(os.readlink("/proc/self/fd/1")).parent
    done = [0]

    def spoiled_features(*arguments):
        features = all_features(*arguments)
        if rank == 1 and done[0] == BAD_STEP - 1:
            features["layer1_blk1"] = features["layer1_blk1"] * float("nan")
        return features

    def kept_step(state, config, batch, **options):
        done[0] = state.step
        result = train_step(state, config, batch, **options)
        torch.save({"step": state.step, "weights": state.task.model.state_dict()}, logs / f"after_{rank}.pt")
        return result

    step.all_features, loop.train_step = spoiled_features, kept_step


@pytest.mark.multiprocess
def test_both_processes_stop_within_two_steps_with_the_weights_of_before(encoder, tmp_path):
    run = tmp_path / "run"
    trainer = Trainer(
        "drift_accel.train",
        generator_arguments(encoder, run, *SETTINGS),
        tmp_path / "logs",
        num_processes=2,
        tamper=spoil_one_process,
    )
    assert trainer.wait() == [1, 1]
    for rank in range(2):
        assert f"NonFiniteError: step {BAD_STEP}: not finite:" in trainer.text(rank)
        assert "process 1: " in trainer.text(rank) and "key_loss/layer1_blk1" in trainer.text(rank)
    assert max(metrics(run)) < BAD_STEP
    before = load_file(run / f"checkpoints/step_{BAD_STEP - 1:08d}/model.safetensors")
    assert not (run / f"checkpoints/step_{BAD_STEP:08d}").exists()
    for rank in range(2):
        kept = torch.load(tmp_path / f"logs/after_{rank}.pt", weights_only=True)
        assert BAD_STEP <= kept["step"] <= BAD_STEP + 1
        assert all(torch.equal(before[name], tensor) for name, tensor in kept["weights"].items())
    assert f"stopped by NonFiniteError: step {BAD_STEP}" in (run / "RUN.md").read_text()


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP2"])
def test_a_tolerated_step_changes_nothing_but_the_count(encoder, tmp_path, fsdp):
    run = tmp_path / "run"
    arguments = generator_arguments(encoder, run, *SETTINGS, "--nonfinite", "skip:1", "--ema.decays", "[0.9,0.99]")
    trainer = run_trainer("drift_accel.train", arguments, tmp_path / "logs", num_processes=2, tamper=spoil_one_process, fsdp=fsdp)
    assert "The step is skipped (1 in a row, 1 are tolerated)" in trainer.text(0)
    before, after = checkpoint_tensors(run, BAD_STEP - 1), checkpoint_tensors(run, BAD_STEP)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(
        after["model/patch_embedding.weight"], checkpoint_tensors(run, BAD_STEP + 1)["model/patch_embedding.weight"]
    )
    records = metrics(run)
    assert list(records) == list(range(1, 10))
    assert [records[step]["skipped_steps"] for step in range(1, 10)] == [0] * 4 + [1] * 5
    assert records[BAD_STEP]["loss"] is None
