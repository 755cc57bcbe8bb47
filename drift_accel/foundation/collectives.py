"""Sums and agreements over the processes of a torch.distributed group.

Everywhere in the package a group of None means "this process alone": nothing is communicated, even where
torch.distributed is initialised. The group of all processes is `world_group()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

Result = TypeVar("Result")


def world_group() -> distributed.ProcessGroup | None:
    """The group of all processes, or None where there is one process or torch.distributed is not initialised."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.group.WORLD


def world_size(group: distributed.ProcessGroup | None) -> int:
    """The number of processes in `group`, 1 for None. Raises ValueError if this process is not in the group."""
    if group is None:
        return 1
    size = distributed.get_world_size(group)
    if size < 1:
        raise ValueError("this process is not a member of the group it was given")
    return size


def process_index(group: distributed.ProcessGroup | None) -> int:
    """The place of this process in `group`, 0 for None. Raises ValueError if this process is not in the group."""
    return distributed.get_rank(group) if world_size(group) > 1 else 0


def packed_all_reduce(tensors: Sequence[Tensor], group: distributed.ProcessGroup | None) -> list[Tensor]:
    """Sum each tensor over the processes of `group`, all of them in one message.

    `tensors` have any shapes, the same ones in the same order on every process; the sums are new tensors of the same
    shapes. With None the tensors are returned as they are. Raises ValueError, before anything is sent, for tensors of
    several dtypes or devices and for tensors that carry a gradient, which the sum would cut silently.
    """
    tensors = list(tensors)
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    if len(kinds) > 1:
        names = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
        raise ValueError(f"tensors that are summed in one message need one dtype and one device, got {names}")
    if group is None or not tensors:
        return tensors
    world_size(group)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError("the sum over processes is not differentiated; detach the tensors or use torch.no_grad()")
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])  # [sum of the sizes]
    distributed.all_reduce(flat, op=distributed.ReduceOp.SUM, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def require_num_processes(asked: int | None, actual: int) -> None:
    """Raise ValueError unless `actual` processes are the number that was `asked` for (None: any number will do)."""
    if asked is None or asked == actual:
        return
    raise ValueError(
        f"{asked} processes were asked for, but this run has {actual}. accelerate starts one process, or several that "
        "know nothing of each other, without an error for `--cpu --num_processes N`, for `distributed_type: MULTI_CPU` "
        "and for `distributed_type: MULTI_GPU` with `use_cpu: true`. On the GPUs of one machine type\n"
        f"  accelerate launch --multi_gpu --num_processes {asked} --num_machines 1 --mixed_precision no "
        "--dynamo_backend no -m drift_accel.train ...\n"
        "and on its CPU the same with ACCELERATE_USE_CPU=true in front."
    )


def require_agreement(value: str, name: str, group: distributed.ProcessGroup | None) -> None:
    """Raise ValueError on every process of `group` unless all of them hold the same `value` of `name`.

    For hashes of configurations and data: processes that differ would train on, each on something else. The message
    gives the processes that differ from process 0 and their values. Every process of the group must call this.
    """
    num_processes = world_size(group)
    if num_processes == 1:
        return
    values: list[str | None] = [None] * num_processes
    distributed.all_gather_object(values, value, group=group)
    different = [f"process {index} has {other!r}" for index, other in enumerate(values) if other != values[0]]
    if different:
        raise ValueError(
            f"the processes do not have the same {name}: process 0 has {values[0]!r}, {', '.join(different)}; "
            "start all of them with the same command, files and package version"
        )


def run_on_main(work: Callable[[], Result], group: distributed.ProcessGroup | None) -> Result:
    """Call `work` on process 0 of `group` alone and give its result, which must pickle, to all.

    Every process of the group must call this. Where `work` raises, process 0 raises that error and the others a RuntimeError
    with its text, instead of waiting for a process that is gone.
    """
    if world_size(group) == 1:
        return work()
    outcome: list = [None, None]  # result, text of the error
    failure = None
    if process_index(group) == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            failure = error
            outcome[1] = f"{type(error).__name__}: {error}"
    distributed.broadcast_object_list(outcome, group=group, group_src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise RuntimeError(f"process 0 stopped with {outcome[1]}")
    return outcome[0]


def gather_text(text: str, group: distributed.ProcessGroup | None) -> list[str]:
    """The `text` of every process of `group`, by process index. Every process of the group must call this."""
    if world_size(group) == 1:
        return [text]
    texts: list[str] = [""] * world_size(group)
    distributed.all_gather_object(texts, text, group=group)
    return texts


class SharedWorkError(RuntimeError):
    """Work that all processes shared was ended by an error of one of them; kind: the name of that error's class."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class SharedWork:
    """Work that all processes of `group` do together: an error of one ends it for all, instead of leaving the others waiting.

    The work waits for the others with `wait`, as often on every process. Errors travel where the others wait next.
    """

    def __init__(self, group: distributed.ProcessGroup | None):
        self.group = group

    def wait(self) -> None:
        """Return when all processes are here. Raises SharedWorkError where one of them came with an error."""
        failure = self._first_failure("")
        if failure is not None:
            raise failure

    def run(self, work: Callable[[], Result]) -> Result:
        """Call `work` on every process and wait for its end. Raises SharedWorkError on all where it raised on one."""
        try:
            result = work()
            self.wait()
        except SharedWorkError:
            raise
        except Exception as error:  # where messages themselves fail, so does this one, and its error goes on as it is
            raise self._first_failure(f"{type(error).__name__}\n{error}") from error
        return result

    def _first_failure(self, own: str) -> SharedWorkError | None:
        """Tell the others of this process's error, "" for none; the first error that there is."""
        texts = gather_text(own, self.group)
        for index, text in enumerate(texts):
            if text:
                kind, _, message = text.partition("\n")
                where = f"process {index}, " if len(texts) > 1 else ""
                return SharedWorkError(kind, f"{where}{kind}: {message}")
        return None
