"""The multi-node script's own command, with two machine ranks on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import checkpoint_tensors, generator_arguments, launch_environment, metrics
from trainer_processes import run_trainer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch_scripts/multi_node.sh"
SETTINGS = ("--precision", "float64", "--steps", "6", "--checkpoint.every", "3")


def on_machine(rank: int, port: int, arguments: list[str], log: Path) -> subprocess.Popen:
    """Start the script as machine `rank` of two."""
    own = {"MACHINE_RANK": str(rank), "NUM_MACHINES": "2", "MAIN_ADDRESS": "127.0.0.1", "MAIN_PORT": str(port)}
    own |= {"PROCESSES_PER_MACHINE": "1", "ACCELERATE": str(Path(sys.executable).parent / "accelerate")}
    with open(log, "wb") as file:
        command = ["bash", str(SCRIPT), "train", *arguments]
        return subprocess.Popen(command, env={**launch_environment(), **own}, stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_launchers_train_together_and_equal_one_process(encoder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_trainer("drift_accel.train", generator_arguments(encoder, one, *SETTINGS), tmp_path / "logs")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    logs = [tmp_path / f"machine_{rank}.txt" for rank in range(2)]
    arguments = generator_arguments(encoder, two, *SETTINGS)
    machines = [on_machine(rank, port, arguments, log) for rank, log in enumerate(logs)]
    try:
        codes = [machine.wait(300) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    assert "2 process(es)" in (two / "RUN.md").read_text()
    ours, theirs = checkpoint_tensors(two, 6), checkpoint_tensors(one, 6)
    for name in theirs:
        assert (ours[name] - theirs[name]).norm() <= 1e-9 * theirs[name].norm().clamp_min(1e-12), name
    for step, record in metrics(two).items():
        assert record["loss"] == pytest.approx(metrics(one)[step]["loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "processes", "message"),
    [([], "1", "MACHINE_RANK=0 bash"), (["sample"], "1", "is train or train_mae"), (["train"], "0", "set PROCESSES_PER_MACHINE")],
)
def test_what_the_script_cannot_start_is_refused(arguments, processes, message):
    environment = {**os.environ, "PROCESSES_PER_MACHINE": processes}
    result = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr
