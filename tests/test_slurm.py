"""launch_scripts/slurm.sh under stand-ins for srun, scontrol and sbatch: two nodes on this machine, a signal, a second turn."""

import os
import re
import shutil
import socket
import subprocess
import textwrap

import pytest
from tiny_runs import ROOT, generator_arguments, launch_environment, metrics, tiny_encoder

STAND_INS = {
    # A job: environment, a copy of the script elsewhere, SIGUSR1 to it alone once the run has a few records, and again after a
    # requeue.
    "sbatch": r"""
        script=$1; shift
        grep -q '^#SBATCH --signal=B:USR1@' "$script" && grep -q '^#SBATCH --requeue' "$script" || exit 9
        export SLURM_JOB_ID=$JOB_ID SLURM_NNODES=2 SLURM_JOB_NODELIST='node[0-1]' SLURM_SUBMIT_DIR=$PWD
        copy=$SPOOL/slurm_script; cp "$script" "$copy"
        for turn in 0 1 2; do
          rm -f "$SPOOL/requeued"
          (cd "$SPOOL" && exec bash "$copy" "$@") & job=$!
          if [ "$turn" = 0 ]; then
            for _ in $(seq 2400); do
              [ -e "$METRICS" ] && [ "$(wc -l < "$METRICS")" -ge 5 ] && break
              kill -0 "$job" 2>/dev/null || break
              sleep 0.1
            done
            kill -USR1 "$job"
          fi
          wait "$job"; code=$?
          echo "turn $turn ended with $code"
          [ -e "$SPOOL/requeued" ] || exit "$code"
        done
    """,
    "srun": r"""
        echo "srun $*" >> "$SPOOL/calls"
        while [[ $1 == --* ]]; do shift; done
        pids=()
        trap 'kill -USR1 "${pids[@]}"' USR1
        for node in $(seq 0 $((SLURM_NNODES - 1))); do
          SLURM_NODEID=$node SLURM_PROCID=$node "$@" & pids+=($!)
        done
        worst=0
        for pid in "${pids[@]}"; do
          code=0
          while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
          [ "$code" -le "$worst" ] || worst=$code
        done
        exit "$worst"
    """,
    "scontrol": r"""
        case "$1 $2" in
          "show hostnames") echo 127.0.0.1; echo 127.0.0.1 ;;
          "requeue $JOB_ID") touch "$SPOOL/requeued" ;;
          *) exit 8 ;;
        esac
    """,
}


@pytest.fixture
def cluster(tmp_path):
    """An environment in which SLURM's commands are the stand-ins above."""
    programs = tmp_path / "bin"
    spool = tmp_path / "spool"
    programs.mkdir()
    spool.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text("#!/usr/bin/env bash\nset -u\n" + textwrap.dedent(text))
        (programs / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{programs}:{os.environ['PATH']}"
    more = {"SPOOL": str(spool), "JOB_ID": "4711", "MAIN_PORT": str(port), "METRICS": str(tmp_path / "run/metrics.jsonl")}
    return {**launch_environment(), "PATH": path, "PROCESSES_PER_MACHINE": "1", **more}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_nodes_train_stop_at_the_signal_and_go_on_in_the_next_turn(cluster, tmp_path):
    encoder = tiny_encoder(tmp_path / "mae")
    arguments = generator_arguments(encoder, tmp_path / "run", "--steps", "150", "--checkpoint.every", "1000")
    command = ["sbatch", "launch_scripts/slurm.sh", "train", *arguments]
    result = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "turn 0 ended with 0" in result.stdout and "turn 1 ended with 0" in result.stdout and "turn 2" not in result.stdout
    # Each turn begins with a sum over all processes of the job.
    assert result.stdout.count("16 MB summed over 2 processes") == 2 and result.stdout.count("\nready\n") == 2
    assert re.search(r"rank 1 +\S+, process \d+, processor", result.stdout)
    records = metrics(tmp_path / "run")
    assert sorted(records) == list(range(1, 151)), "no step is missing, none appears twice"
    notes = (tmp_path / "run/RUN.md").read_text()
    diary = [line for line in notes.splitlines() if line.startswith("- ")]
    assert len(diary) == 4 and "on 2 process(es)" in diary[0]
    assert re.search(r"stopped on request \(SIGUSR1", diary[1]) and "finished" in diary[3]
    calls = (tmp_path / "spool/calls").read_text().splitlines()
    assert len(calls) == 2 and all("--ntasks=2 --ntasks-per-node=1" in call for call in calls), "one task a node"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_job_that_is_not_ready_trains_on_no_node_and_is_not_queued_again(cluster, tmp_path):
    arguments = generator_arguments(tmp_path / "nowhere", tmp_path / "run", "--steps", "150")
    command = ["sbatch", "launch_scripts/slurm.sh", "train", *arguments]
    result = subprocess.run(command, env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 1 and "turn 0 ended with 1" in result.stdout and "turn 1" not in result.stdout
    assert f"problem: encoder: encoder.path {tmp_path / 'nowhere'}" in result.stdout and "not ready" in result.stdout
    for machine in (0, 1):
        assert f"multi_node: machine {machine} is not ready, or another one" in result.stderr
    assert not (tmp_path / "run").exists()


def submit(cluster, *arguments, cwd=ROOT):
    environment = {**cluster, "SLURM_JOB_ID": "1", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "x", "SLURM_SUBMIT_DIR": str(cwd)}
    command = ["bash", str(ROOT / "launch_scripts/slurm.sh"), *arguments]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_a_job_without_a_run_or_outside_of_the_project_is_refused(cluster, tmp_path):
    assert submit(cluster).returncode == 2
    result = submit(cluster, "train", "--config", "x.yaml")
    assert result.returncode == 2 and "--output_dir is missing" in result.stderr
    result = submit(cluster, "train", "--output_dir", "run", cwd=tmp_path)
    assert result.returncode == 2 and "submit from the project's folder" in result.stderr


@pytest.mark.parametrize(
    ("outcome", "requeued"),
    [("stopped on request (SIGUSR1)", True), ("stopped by ValueError: no", False), (None, False)],
    ids=["asked to stop", "failed", "killed without a word"],
)
def test_only_a_run_that_was_asked_to_stop_is_queued_again(cluster, tmp_path, outcome, requeued):
    run = tmp_path / "run"
    run.mkdir()
    (run / "RUN.md").write_text("# run\n\n- opened 1\n- closed 1: stopped on request (SIGTERM)\n- opened 2\n")
    srun = tmp_path / "bin/srun"
    closing = "" if outcome is None else f"echo '- closed 2: {outcome}' >> '{run}/RUN.md'\n"
    srun.write_text(f"#!/usr/bin/env bash\n{closing}exit 1\n")
    result = submit({**cluster, "JOB_ID": "1"}, "train", "--output_dir", str(run))
    assert (tmp_path / "spool/requeued").exists() == requeued
    assert result.returncode == (0 if requeued else 1), result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(str(path) for path in (ROOT / "launch_scripts").glob("*.sh"))
    result = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
