"""tools/preflight.py finds what would stop a run, says what to do, and says nothing where all is well."""

import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from small_caches import write_small_cache
from tiny_models import write_encoder
from tiny_runs import ROOT, launch_environment, load_tool, run_tool

from drift_accel.drift import ops
from drift_accel.foundation import storage
from drift_accel.foundation.command_line import parse_command
from drift_accel.models import MaskedAutoencoder
from drift_accel.train import GeneratorTrainingConfig
from drift_accel.training.rendezvous import meet


@pytest.fixture
def encoder(tmp_path):
    return write_encoder(tmp_path / "encoder")


@pytest.fixture
def check(tmp_path, encoder, capsys):
    """Runs the command on the digits' recipe with changes: (exit code, what it printed, its problems)."""

    def run(*changes, backend: str = "reference"):
        arguments = ["--config", ROOT / "train_configs/digits.yaml", "--encoder.path", encoder, "--output_dir", tmp_path / "run"]
        if "--features.maps" not in changes:
            arguments += ["--features.maps", '["conv1"]']
        status = run_tool("preflight", *arguments, "--device", "cpu", "--drift.backend", backend, *changes)
        printed = capsys.readouterr().out
        return status, printed, [line for line in printed.splitlines() if line.startswith("problem: ")]

    return run


def test_nothing_is_wrong_with_the_digits(check, tmp_path):
    status, printed, problems = check("--encoder_width", "8")
    assert (status, problems) == (0, []), printed
    assert printed.rstrip().endswith("ready")
    for word in ("rank 0", "torch ", "processor", "disk", "data            1,197 images [1, 8, 8] of 10 classes", "width 8"):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_a_missing_cache(check, tmp_path):
    status, _, problems = check("--data.source", "cache", "--data.path", str(tmp_path / "nowhere"))
    assert status == 1
    assert len(problems) == 1 and str(tmp_path / "nowhere") in problems[0] and "export_latents" in problems[0]


def test_a_cache_that_does_not_fit_the_generator(check, tmp_path):
    write_small_cache(tmp_path / "cache")
    status, _, problems = check("--data.source", "cache", "--data.path", str(tmp_path / "cache"))
    assert status == 1 and "generator makes images of shape (1, 8, 8) but the data has (2, 3, 3)" in problems[0]


def test_an_encoder_of_the_wrong_width(check):
    status, _, problems = check("--encoder_width", "640")
    assert status == 1
    assert (
        len(problems) == 1
        and "has width 8, the recipe's encoder has 640" in problems[0]
        and "give the right folder" in problems[0]
    )


def test_an_encoder_whose_weights_are_of_another_width(check, encoder, tmp_path):
    MaskedAutoencoder(input_size=8, in_channels=1, num_classes=4, width=16, blocks=(1, 1, 1, 1)).save_pretrained(
        tmp_path / "wide"
    )
    shutil.copy(tmp_path / "wide/config.json", encoder / "config.json")
    status, _, problems = check()
    assert status == 1 and len(problems) == 1 and "expected shape" in problems[0] and "encoder.path is" in problems[0]


def test_an_encoder_of_other_channels(check, tmp_path):
    write_encoder(tmp_path / "colours", channels=3)
    status, _, problems = check("--encoder.path", str(tmp_path / "colours"))
    assert status == 1 and len(problems) == 1 and "takes 3 channels but the generator makes 1" in problems[0]


def test_a_missing_extension(monkeypatch):
    missing = ops.Extension(None, f"it is not built; build it: {ops.BUILD_COMMAND}")
    for module in ("drift_accel.drift.ops", "drift_accel.doctor"):
        monkeypatch.setattr(f"{module}.load_extension", lambda: missing, raising=False)
    tool = load_tool("preflight")
    monkeypatch.setattr(tool, "load_extension", lambda: missing)
    arguments = ["--config", str(ROOT / "train_configs/digits.yaml"), "--device", "cpu", "--dry_run"]
    for backend, found in (("auto", 1), ("fused", 1), ("reference", 0)):
        config = parse_command(GeneratorTrainingConfig, "", [*arguments, "--drift.backend", backend]).config
        problems = tool.check_machine(config)
        assert len(problems) == found, problems
        if found:
            assert "not built" in problems[0] and ops.BUILD_COMMAND in problems[0] and "--drift.backend reference" in problems[0]


def test_a_full_disk(check, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    status, _, problems = check()
    assert status == 1
    assert len(problems) == 1 and "0.000 GB are free" in problems[0] and "checkpoint.keep_last" in problems[0]


def test_an_evaluation_without_its_reference(check, tmp_path):
    status, _, problems = check("--evaluation.reference", str(tmp_path / "none.npz"))
    assert status == 1 and len(problems) == 1 and "none.npz does not exist" in problems[0]
    assert check("--evaluation.reference", str(tmp_path / "none.npz"), "--evaluation.every", "null")[0] == 0


def test_an_encoders_pretraining_is_checked_with_its_own_data(tmp_path, capsys):
    arguments = ["--config", ROOT / "train_configs/mae_digits.yaml", "--output_dir", tmp_path / "run", "--device", "cpu"]
    assert run_tool("preflight", *arguments) == 0
    pictures = ["--data.source", "images", "--data.path", str(tmp_path / "none"), "--validation.every", "null"]
    assert run_tool("preflight", *arguments, *pictures) == 1
    assert f"problem: data: {tmp_path / 'none'}" in capsys.readouterr().out


def test_labels_that_the_processes_cannot_share(check):
    status, _, problems = check("--num_processes", "2")
    assert status == 1 and "2 processes were asked for, but this run has 1" in problems[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_process_that_never_joins_is_named_after_the_time_limit(check, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr("drift_accel.training.rendezvous._leave", lambda *_: None)
    status, printed, problems = check("--timeout", "1", "--batch.labels", "12")
    assert status == 1
    assert len(problems) == 1 and "2 of 3 processes did not join within 1 s: rank 1, 2" in problems[0]
    assert "rank 0" in printed and "rank 1 " not in printed


def test_an_address_that_nobody_serves(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}.items():
        monkeypatch.setenv(name, value)
    meeting = meet(1)
    assert len(meeting.problems) == 1 and "process 1 cannot reach 127.0.0.1" in meeting.problems[0]


@pytest.mark.multiprocess
def test_two_processes_meet_and_are_mapped(tmp_path, encoder):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "tools/preflight.py")]
    command += ["--config", str(ROOT / "train_configs/digits.yaml"), "--encoder.path", str(encoder), "--num_processes", "2"]
    command += [
        "--features.maps",
        '["conv1"]',
        "--drift.backend",
        "reference",
        "--output_dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    result = subprocess.run(command, env=launch_environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    host = socket.gethostname()
    assert f"rank 0          {host}, process" in result.stdout and f"rank 1          {host}, process" in result.stdout
    assert "16 MB summed over 2 processes" in result.stdout and result.stdout.count("\nready") == 1


# What one process finds stops all of them.


def meet_and_conclude(rank: int, failed: bool, port: int) -> subprocess.Popen:
    """A process of two that meets the other one, and prints whether any of them failed."""
    places = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = f"from drift_accel.training.rendezvous import meet; print(meet(60).conclude({failed}, 60))"
    environment = {**launch_environment(), **places}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.multiprocess
@pytest.mark.parametrize("failed", [(False, False), (True, False)], ids=["none", "the first"])
def test_all_processes_know_of_a_problem_of_one(failed):
    port = _free_port()
    processes = [meet_and_conclude(rank, flag, port) for rank, flag in enumerate(failed)]
    assert [process.communicate(timeout=120)[0].split()[-1] for process in processes] == [str(any(failed))] * 2


FAKE_ACCELERATE = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in *preflight*) exit "${PREFLIGHT_RESULT:-0}" ;; esac
"""


@pytest.fixture
def machine(tmp_path):
    """Runs multi_node.sh as machine `rank` of two in front of a stand-in for accelerate: (result, the calls)."""
    accelerate = tmp_path / "accelerate"
    accelerate.write_text(FAKE_ACCELERATE)
    accelerate.chmod(0o755)

    def run(rank: int, *arguments: str, **variables: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        own = {"MACHINE_RANK": str(rank), "MAIN_ADDRESS": "127.0.0.1", "PROCESSES_PER_MACHINE": "8", "CALLS": str(calls)}
        environment = {"PATH": os.environ["PATH"], "ACCELERATE": str(accelerate), **own, **variables}
        command = ["bash", str(ROOT / "launch_scripts/multi_node.sh"), "train", "--config", "x.yaml", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return result, calls.read_text().splitlines()

    return run


def test_a_job_on_several_machines_is_checked_by_all_processes_before_it_trains(machine):
    result, calls = machine(0, "--seed", "3", MAIN_PORT="29500", PREFLIGHT_OPTIONS="--encoder_width 640")
    assert result.returncode == 0, result.stderr
    check, training = calls
    assert "tools/preflight.py --encoder_width 640 --config x.yaml --seed 3 --num_processes 16" in check
    assert "-m drift_accel.train --config x.yaml --seed 3 --num_processes 16" in training
    assert "--main_process_port 29501" in check and "--main_process_port 29500" in training
    for call in calls:
        assert "--num_machines 2 --num_processes 16 --machine_rank 0" in call and "--rdzv_backend c10d" in call


def test_a_job_that_is_not_ready_does_not_train(machine):
    result, calls = machine(0, PREFLIGHT_RESULT="1")
    assert result.returncode == 1 and len(calls) == 1 and "machine 0 is not ready" in result.stderr
    result, calls = machine(0, PREFLIGHT_RESULT="1", SKIP_PREFLIGHT="1")
    assert result.returncode == 0 and len(calls) == 1 and "-m drift_accel.train" in calls[0]
    _, calls = machine(0, "--dry_run")
    assert len(calls) == 1 and "-m drift_accel.train" in calls[0]


def test_a_machine_waits_for_the_first_one_and_says_so(machine):
    port = _free_port()
    result, calls = machine(1, MAIN_PORT=str(port - 1), WAIT_SECONDS="1")
    assert result.returncode == 1 and calls == []
    assert f"machine 0 did not serve 127.0.0.1:{port} within 1 s" in result.stderr
    with socket.socket() as check, socket.socket() as training:
        for listener, number in ((training, port - 1), (check, port)):
            listener.bind(("127.0.0.1", number))
            listener.listen()
        result, calls = machine(1, MAIN_PORT=str(port - 1), WAIT_SECONDS="5")
    assert result.returncode == 0 and len(calls) == 2, result.stderr


def test_it_reads_no_weights_of_the_run(check):
    before = torch.get_rng_state()
    check()
    assert torch.equal(before, torch.get_rng_state()) and os.environ.get("RANK") is None
