"""launch_scripts/imagenet256.sh: what it prints and refuses, and (slow) the whole on generated archives, killed and damaged."""

import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ROOT, metrics

from drift_accel.analysis.reproduction.stages import STAGES

SCRIPT = ["bash", str(ROOT / "launch_scripts/imagenet256.sh")]


def environment(work: Path, **variables: str) -> dict[str, str]:
    """Only what the script needs of the caller's variables."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WORK": str(work), **variables}


def call(work: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*SCRIPT, *arguments], env=environment(work, **variables), capture_output=True, text=True, check=False, timeout=1800
    )


def gates(work: Path) -> dict:
    return json.loads((work / "gates.json").read_bytes())["stages"]


def test_it_prints_the_commands_of_the_real_thing(tmp_path):
    result = call(
        tmp_path / "run", "all", "--print", NUM_GPUS="8", PROTOCOL="release", NETWORK="/nets", OPTIONS="--compile blocks"
    )
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    tools = [re.search(r"tools/\w+\.py|launch_scripts/\w+\.sh", " ".join(line))[0] for line in lines]
    assert tools == [
        "tools/prepare_imagenet.py", "tools/prepare_imagenet.py", "tools/reference_stats.py", "tools/export_latents.py",
        "tools/verify_cache.py", "launch_scripts/mae_recipe.sh", "launch_scripts/train_recipe.sh", "tools/sample.py",
        "tools/evaluate.py", "tools/report.py",
    ]  # fmt: skip
    assert all((ROOT / tool).exists() for tool in tools)
    commands = dict(zip(STAGES, map(" ".join, lines), strict=True))
    assert "--skip_md5" not in commands["archives"] and "--expect" not in commands["archives"]
    for stage in ("reference", "export", "sample", "evaluate"):
        assert "--multi_gpu" in commands[stage] and "--num_processes 8" in commands[stage]
    assert "train_configs/latent_l2.yaml 640" in commands["train"] and commands["train"].endswith("--compile blocks")
    assert (
        "train_configs/mae_latent_640.yaml" in commands["mae"]
        and "--data.images.vae stabilityai/sd-vae-ft-mse" in commands["mae"]
    )
    assert "--num_samples 50000" in commands["sample"] and "--quantizer truncate" in commands["sample"]
    assert "--protocol release --network /nets --run_torchscript" in commands["evaluate"]
    assert not (tmp_path / "run").exists()


def test_it_takes_files_of_the_launcher_and_what_is_there_already(tmp_path):
    given = {"ACCELERATE_CONFIG": "mine.yaml", "REFERENCE": "published.npz", "ENCODER": "release/mae"}
    result = call(tmp_path, "all", "--print", NUM_GPUS="1", **given)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--config_file mine.yaml") == 3  # export, sample, evaluate
    assert "reference_stats" not in result.stdout and "mae_recipe" not in result.stdout
    assert "--reference published.npz" in result.stdout and "ENCODER=release/mae" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "variables", "wanted"),
    [
        (["trian"], {}, "there is no stage trian"),
        ([], {}, "imagenet256.sh all"),
        (["all", "train"], {}, "imagenet256.sh all"),
        (["all", "--smok"], {}, "unknown option --smok"),
        (["all"], {"NUM_GPUS": "0"}, "no GPU found; set NUM_GPUS"),
        (["all"], {"NUM_GPUS": "1"}, "set RUN_TORCHSCRIPT=1 if you trust the file"),
        (["all"], {"PYTHON": "/nowhere/python"}, "no /nowhere/python"),
    ],
    ids=["stage", "none", "two", "option", "gpu", "torchscript", "python"],
)
def test_it_refuses_what_cannot_work(tmp_path, arguments, variables, wanted):
    result = call(tmp_path / "run", *arguments, **variables)
    assert result.returncode in (1, 2) and wanted in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_missing_archives_and_networks_are_said_before_anything_is_done(tmp_path):
    variables = {"NUM_GPUS": "1", "PROTOCOL": "legacy_pytorch", "ARCHIVES": str(tmp_path / "none")}
    folders = {"IMAGES": str(tmp_path / "images"), "CACHE": str(tmp_path / "cache"), "DRIFT_ACCEL_NETWORKS": str(tmp_path)}
    result = call(tmp_path / "run", "all", **variables, **folders)
    assert result.returncode != 0 and "ILSVRC2012_img_train.tar" in result.stderr and "ARCHIVES" in result.stderr
    assert not (tmp_path / "images").exists() and not (tmp_path / "run/gates.json").exists()


STAND_IN = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case "$*" in
  *check_stage.py*--look) case " ${PASSED:-} " in *" $2 "*) exit 0 ;; *) exit 3 ;; esac ;;
  *check_stage.py*--failed*) exit 1 ;;
  *check_stage.py*) [ "$2" != "${BAD:-}" ] || exit 1 ;;
  *prepare_imagenet.py*) [ -z "${SLEEP:-}" ] || { trap 'exit 75' TERM; touch "$CALLS.ready"; sleep 60 & wait $!; } ;;
  *export_latents.py*) exit "${EXPORT_CODE:-0}" ;;
esac
"""


@pytest.fixture
def stand_in(tmp_path):
    """Variables by which the script runs a stand-in for Python that writes down its calls, and the file of these."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    calls.write_text("")
    return {"PYTHON": str(python), "CALLS": str(calls), "NUM_GPUS": "1", "PROTOCOL": "encoder"}, calls


def called(calls: Path) -> list[str]:
    """What was called: a tool's name, with the stage and the question where it is that of the gates."""
    lines = [line.split() for line in calls.read_text().splitlines()]
    return [
        f"{words[1]} {words[-2] if words[-2] == '--failed' else words[-1] if words[-1] == '--look' else ''}".strip()
        if "check_stage" in words[0]
        else Path(words[1] if words[0] == "-m" else words[0]).stem
        for words in lines
    ]


def test_each_stage_is_looked_at_run_and_checked(tmp_path, stand_in):
    variables, calls = stand_in
    passed = " ".join(STAGES[2:])
    assert call(tmp_path / "run", "all", PASSED=passed, **variables).returncode == 0
    first = [
        "all",
        "archives --look",
        "prepare_imagenet",
        "archives",
        "verify_images --look",
        "prepare_imagenet",
        "verify_images",
    ]
    assert called(calls) == [*first, *(f"{stage} --look" for stage in STAGES[2:])]


def test_a_failed_command_and_a_failed_gate_end_it(tmp_path, stand_in):
    variables, calls = stand_in
    result = call(tmp_path / "run", "export", EXPORT_CODE="7", **variables)
    assert result.returncode == 7 and called(calls) == ["export --look", "export_latents", "export --failed"]
    calls.write_text("")
    result = call(tmp_path / "run", "all", BAD="export", PASSED="archives verify_images reference", **variables)
    assert result.returncode == 1 and called(calls)[-3:] == ["export --look", "export_latents", "export"]
    calls.write_text("")
    assert call(tmp_path / "run", "all", BAD="all", **variables).returncode == 1 and called(calls) == ["all"]


def test_a_signal_reaches_the_command_and_is_recorded(tmp_path, stand_in):
    variables, calls = stand_in
    process = subprocess.Popen([*SCRIPT, "archives"], env=environment(tmp_path / "run", SLEEP="yes", **variables))
    while not calls.with_name("calls.ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 75
    assert called(calls)[-1] == "archives --failed" and calls.read_text().rstrip().endswith("--failed 75")


# The whole.


@pytest.mark.slow
def test_the_whole_survives_a_kill_skips_what_is_done_and_names_what_is_damaged(tmp_path):
    """One run: killed while the encoder trains, started again to its end, started again with nothing to do, then damaged."""
    work = tmp_path / "run"
    kill_in_the_middle(work, work / "mae/checkpoints")
    assert gates(work)["export"]["status"] == "passed" and "mae" not in gates(work)

    second = call(work, "all", "--smoke")
    assert second.returncode == 0, second.stdout + second.stderr
    assert [line for line in second.stdout.splitlines() if line.endswith(", skipped")] == [
        f"{stage}: passed on {gates(work)[stage]['time']}, skipped" for stage in STAGES[: STAGES.index("mae")]
    ]
    record = gates(work)
    assert list(record) == list(STAGES) and {entry["status"] for entry in record.values()} == {"passed"}
    notes = (work / "mae/RUN.md").read_text()
    assert notes.count("- opened") == 2 and "ended without closing" in notes
    assert max(metrics(work / "mae")) == 40  # metrics() refuses a step that is there twice
    first = json.loads((work / "generator/evaluation/encoder_final.json").read_bytes())
    assert first["num_generated"] == 200 and first["model"]["step"] == 20 and first["generated"]["guidance_scale"] == 1.0
    assert "encoder_final" in (work / "generator/report.html").read_text()

    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file() and path.name != ".lock"}
    third = call(work, "all", "--smoke")
    assert third.returncode == 0, third.stderr
    assert third.stdout.count(", skipped") == len(STAGES) and "==" not in third.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before

    damage(work / "samples.npz", 5000)
    result = call(work, "all", "--smoke")
    assert result.returncode == 1 and str(work / "samples.npz") in result.stderr
    assert "imagenet256.sh --smoke sample" in result.stderr and gates(work)["sample"]["status"] == "failed"
    blocked = call(work, "evaluate", "--smoke")
    assert blocked.returncode == 1
    (work / "samples.npz").unlink()
    mended = call(work, "all", "--smoke")
    assert mended.returncode == 0, mended.stderr
    done_again = re.findall(r"^== (\w+):", mended.stdout, re.M)
    assert done_again == ["sample", "evaluate", "report"]
    again = json.loads((work / "generator/evaluation/encoder_final.json").read_bytes())
    assert again["metrics"] == first["metrics"]

    shard = next((work / "cache").glob("data-*.arrow"))
    damage(shard, shard.stat().st_size // 2)
    result = call(work, "export", "--smoke")
    assert result.returncode == 1 and shard.name in result.stderr and "--smoke export" in result.stderr
    assert call(work, "all", "--list", "--smoke").returncode == 1


def kill_in_the_middle(work: Path, checkpoints: Path) -> None:
    """Kill the script and all that it has started, with -9, once the first checkpoint is in `checkpoints`."""
    with open(work.parent / "first.log", "w") as log:
        process = subprocess.Popen(
            [*SCRIPT, "all", "--smoke"], env=environment(work), stdout=log, stderr=log, start_new_session=True
        )
        end = time.monotonic() + 1500
        while not list(checkpoints.glob("step_*/COMPLETE.json")):
            assert process.poll() is None and time.monotonic() < end, (work.parent / "first.log").read_text()
            time.sleep(0.05)
        busy = call(work, "all", "--smoke")
        assert busy.returncode == 1 and "still works in" in busy.stderr
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    with open(work / ".lock", "w") as lock:  # the trainer, too, takes a moment to die
        while time.monotonic() < end:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
    pytest.fail("a process outlived the kill")


def damage(file: Path, place: int) -> None:
    """Change one byte, the size stays."""
    content = np.memmap(file, dtype=np.uint8, mode="r+")
    content[place] ^= 0xFF
    content.flush()
