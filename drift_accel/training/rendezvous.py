"""Do all launched processes meet, and do their messages arrive? With a time limit, and who was missed."""

import os
import socket
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import distributed

JOINED = "preflight/joined/"
VERDICT = "preflight/verdict/"
DONE = "preflight/done/"
WAIT_BETWEEN = 0.05


@dataclass
class Meeting:
    """How it went: ranks {rank: "host, process, device"}, messages {backend: what was measured}, problems in words."""

    ranks: dict[int, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    store: distributed.Store | None = None  # while others can still be told something

    def conclude(self, failed: bool, seconds: float) -> bool:
        """Whether this process or another one `failed` what it looked at; to be called once, at the end, by every process.

        Waits up to `seconds` for the others: some look at more. One that is gone, or never came, counts as failed.
        """
        if self.store is None:
            return failed or bool(self.problems)
        rank, world = _place()
        try:
            self.store.set(f"{VERDICT}{rank}", "failed" if failed else "well")
            all_well = not self.problems and self._are_all_well(world, seconds)
        except RuntimeError:  # the process that serves the store is gone
            all_well = False
        _leave(self.store, rank, world, seconds)
        self.store = None
        return not all_well

    def _are_all_well(self, world: int, seconds: float) -> bool:
        # Of all, also after a failure: a launcher kills the others, and what they have still to say, when one process ends.
        all_well, missing, deadline = True, set(range(world)), time.monotonic() + seconds
        while missing and time.monotonic() < deadline:
            for rank in sorted(missing):
                if self.store.check([f"{VERDICT}{rank}"]):
                    all_well &= self.store.get(f"{VERDICT}{rank}") == b"well"
                    missing.discard(rank)
            if missing:
                time.sleep(WAIT_BETWEEN)
        return all_well and not missing


def _place() -> tuple[int, int]:
    """This process's rank and how many there are, as the launcher says."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def meet(seconds: float) -> Meeting:
    """Wait for the launcher's processes and sum a number over all of them with every backend that this machine has.

    Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torch's launcher sets them; a process of its own meets nobody. Gives up
    after `seconds` a stage; never raises for what it finds. `Meeting.conclude` ends what this begins.
    """
    rank, world = _place()
    if world == 1:
        return Meeting(ranks={0: _describe()})
    meeting = Meeting()
    store = _open_store(rank, seconds, meeting)
    if store is None:
        return meeting
    _exchange_names(store, rank, world, seconds, meeting)
    if not meeting.problems:
        backends = ["gloo"] + ["nccl"] * (torch.cuda.is_available() and distributed.is_nccl_available())
        for backend in backends:
            _sum_over_all(store, backend, rank, world, seconds, meeting)
    meeting.store = store
    return meeting


def _describe() -> str:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = "processor"
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        name = torch.cuda.get_device_name(local) if local < count else f"NO GPU of its own: {count} for local rank {local}"
        device = f"cuda:{local} ({name})"
    return f"{socket.gethostname()}, process {os.getpid()}, {device}"


def _open_store(rank: int, seconds: float, meeting: Meeting) -> distributed.Store | None:
    """The launcher's key-value store; under `accelerate launch` and torchrun their agent serves it."""
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        tcp = distributed.TCPStore(
            address, port, is_master=rank == 0 and not served, timeout=timedelta(seconds=seconds), wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        meeting.problems.append(
            f"process {rank} cannot reach {address}:{port} ({str(error).splitlines()[0]}): check that machine 0 runs, that its "
            "address "
            "is the one all others reach, and that no firewall closes the port"
        )
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"drift_accel/{attempt}", tcp)


def _exchange_names(store: distributed.Store, rank: int, world: int, seconds: float, meeting: Meeting) -> None:
    store.set(f"{JOINED}{rank}", _describe())
    deadline = time.monotonic() + seconds
    missing = set(range(world))
    while missing and time.monotonic() < deadline:
        for other in sorted(missing):
            if store.check([f"{JOINED}{other}"]):
                meeting.ranks[other] = store.get(f"{JOINED}{other}").decode()
                missing.discard(other)
        if missing:
            time.sleep(WAIT_BETWEEN)
    if missing:
        meeting.problems.append(
            f"{len(missing)} of {world} processes did not join within {seconds:g} s: rank "
            f"{', '.join(map(str, sorted(missing)))}. Start "
            "them (every machine needs its own --machine_rank), look at their output, or wait longer with --timeout"
        )


def _sum_over_all(store, backend: str, rank: int, world: int, seconds: float, meeting: Meeting) -> None:
    """A small sum, whose value is known, and a large one, whose pace is told."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            backend,
            store=distributed.PrefixStore(backend, store),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        number = torch.full((1,), float(rank + 1), device=device)
        _wait_for(distributed.all_reduce(number, async_op=True), seconds)
        if number.item() != world * (world + 1) / 2:
            raise RuntimeError(f"the sum over ranks is {number.item():g} instead of {world * (world + 1) // 2}")
        numbers = torch.ones(4_000_000, device=device)  # 16 MB
        started = time.monotonic()
        _wait_for(distributed.all_reduce(numbers, async_op=True), seconds)
        numbers[-1].item()
        meeting.messages[backend] = f"16 MB summed over {world} processes in {1e3 * (time.monotonic() - started):.1f} ms"
    except (RuntimeError, ValueError, TimeoutError) as error:
        advice = "name the network with GLOO_SOCKET_IFNAME" if backend == "gloo" else "set NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME"
        meeting.problems.append(
            f"{backend}: processes joined but a sum over them failed ({str(error).splitlines()[0]}): {advice}, and check that "
            "machines "
            "reach each other on all ports"
        )
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _wait_for(work: distributed.Work, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer within {seconds:g} s")
        time.sleep(0.001)
    work.wait()


def _leave(store, rank: int, world: int, seconds: float) -> None:
    """Whoever serves the store must go last."""
    try:
        store.set(f"{DONE}{rank}", "1")
        deadline = time.monotonic() + min(seconds, 10)
        while rank == 0 and time.monotonic() < deadline:
            if all(store.check([f"{DONE}{other}"]) for other in range(world)):
                return
            time.sleep(WAIT_BETWEEN)
    except RuntimeError:
        return  # the server has gone already
