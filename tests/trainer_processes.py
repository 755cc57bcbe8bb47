"""The real trainers as processes that a test can signal, kill and tamper with.

They are forked from one server that has imported everything, so that a start takes a fraction of a second and a kill can hit any
instant of a run. Several processes of a run find each other as under torchrun.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = (
    "drift_accel.train", "drift_accel.train_mae", "drift_accel.sampling", "drift_accel.models.masked_autoencoder",
    "sklearn.datasets", "tensorboard", "trainer_processes",
)  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Trainer:
    """A run of `module` (drift_accel.train) with `arguments` on `num_processes` processes, started at once.

    `tamper(rank)` is called in each process before the trainer's main; it must be a function of a module. `fsdp` splits the model
    as `accelerate launch --use_fsdp --fsdp_version 2` does on GPUs.
    """

    def __init__(
        self,
        module: str,
        arguments: list[str],
        folder: Path,
        *,
        num_processes: int = 1,
        tamper: Callable[[int], None] | None = None,
        fsdp: bool = False,
    ):
        self._logs = [folder / f"output_{rank}.txt" for rank in range(num_processes)]
        folder.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.processes = []
        for rank, log in enumerate(self._logs):
            environment = _environment(rank, num_processes, port, fsdp)
            options = (module, [str(argument) for argument in arguments], rank, environment, str(log), tamper, fsdp)
            self.processes.append(_context.Process(target=_main, args=options, daemon=True))
            self.processes[-1].start()

    @property
    def is_alive(self) -> bool:
        """Whether any process still runs."""
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to processes that still run; to all of them without ranks."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                if self.processes[rank].is_alive():
                    os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit codes of all processes; minus the signal's number for one that a signal ended."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.is_alive:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"the processes did not end in {seconds} s:\n{self.text()}")
        return [process.exitcode for process in self.processes]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 120) -> bool:
        """Wait until `condition()`; False where all processes ended before it came true."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.is_alive:
                return condition()
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"the condition did not come true in {seconds} s:\n{self.text()}")
            time.sleep(0.001)
        return True

    def text(self, rank: int | None = None) -> str:
        """What the processes wrote, or one of them."""
        logs = self._logs if rank is None else [self._logs[rank]]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in logs if log.exists())


def run_trainer(module: str, arguments: list[str], folder: Path, **options) -> Trainer:
    """A run that must end well."""
    trainer = Trainer(module, arguments, folder, **options)
    codes = trainer.wait()
    assert codes == [0] * len(codes), f"exit codes {codes}:\n{trainer.text()[-4000:]}"
    return trainer


def _environment(rank: int, num_processes: int, port: int, fsdp: bool) -> dict[str, str]:
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "LOCAL_WORLD_SIZE": num_processes}
        environment |= {name: str(value) for name, value in numbers.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if fsdp:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    return environment


def _main(module, arguments, rank, environment, log, tamper, fsdp) -> None:
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    code = 0
    try:
        if fsdp:
            _allow_fsdp_on_the_processor()
        if tamper is not None:
            tamper(rank)
        sys.argv = [module, *arguments]
        importlib.import_module(module).main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads can abort while a loaded process winds down


def _allow_fsdp_on_the_processor() -> None:
    """accelerate gives FSDP to GPUs alone; told that the processes had one each, it splits over gloo just as well."""
    from accelerate import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
