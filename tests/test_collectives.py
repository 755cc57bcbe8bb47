"""foundation.collectives: one message for many sums, agreements of all processes, nothing sent by a process alone."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import distributed

from drift_accel.foundation import collectives
from drift_accel.foundation.collectives import (
    SharedWork,
    SharedWorkError,
    gather_text,
    packed_all_reduce,
    process_index,
    require_agreement,
    require_num_processes,
    run_on_main,
    world_group,
    world_size,
)

NUM_PROCESSES = 2


def tensors_of(process: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(process)
    shapes = [(), (3,), (2, 0), (2, 3, 4), (5, 2)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    tensors[-1] = tensors[-1].T  # not contiguous
    return tensors


def test_alone_nothing_is_sent():
    tensors = tensors_of(0)
    assert all(given is returned for given, returned in zip(tensors, packed_all_reduce(tensors, None), strict=True))
    assert packed_all_reduce([], None) == []
    assert world_group() is None
    assert world_size(None) == 1
    assert process_index(None) == 0
    require_agreement("abc", "configuration", None)
    assert run_on_main(lambda: 3, None) == 3
    assert gather_text("here", None) == ["here"]


def test_mixed_tensors_are_refused_by_a_process_alone_too():
    with pytest.raises(ValueError, match=r"one dtype and one device.*float32 on cpu.*float64 on cpu"):
        packed_all_reduce([torch.zeros(1), torch.zeros(1, dtype=torch.float64)], None)
    with pytest.raises(ValueError, match=r"float32 on cpu, torch.float32 on meta"):
        packed_all_reduce([torch.zeros(1), torch.zeros(1, device="meta")], None)


def test_number_of_processes():
    require_num_processes(None, 3)
    require_num_processes(2, 2)
    with pytest.raises(
        ValueError,
        match=r"(?s)2 processes were asked for, but this run has 1.*"
        r"--multi_gpu --num_processes 2.*ACCELERATE_USE_CPU=true",
    ):
        require_num_processes(2, 1)


def refusal(call) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refuse():
    raise ValueError("the disk is full")


# Where shared work of two stages fails: {name: (process, stage)}.
FAULTS = {"nowhere": (None, None), "first stage": (1, 0), "second stage": (0, 1), "after the last wait": (1, 2)}


def shared_work(process: int, group, fault: tuple[int | None, int | None]) -> str:
    work = SharedWork(group)

    def stages() -> str:
        for stage in range(2):
            if fault == (process, stage):
                raise OSError(f"disk {process} is full")
            work.wait()
        if fault == (process, 2):
            raise OSError(f"disk {process} is full")
        return "done"

    try:
        return work.run(stages)
    except SharedWorkError as error:
        return f"{error.kind} | {error}"


def process_main(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=NUM_PROCESSES)
    group = world_group()
    messages = []
    send = distributed.all_reduce

    def counted(tensor, *arguments, **keywords):
        messages.append(tensor.numel())
        return send(tensor, *arguments, **keywords)

    distributed.all_reduce = counted
    tensors = tensors_of(process)
    kept = [tensor.clone() for tensor in tensors]
    sums = packed_all_reduce(tensors, group)
    alone = distributed.new_group([0])
    with torch.no_grad():
        without_gradient = packed_all_reduce([torch.ones(1, requires_grad=True)], group)
    report = {
        "messages": messages,
        "largest_error": max(
            float((total - sum(parts)).abs().max()) if total.numel() else 0.0
            for total, *parts in zip(sums, *(tensors_of(other) for other in range(NUM_PROCESSES)), strict=True)
        ),
        "shapes_kept": [total.shape == tensor.shape for total, tensor in zip(sums, tensors, strict=True)],
        "inputs_kept": all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, kept, strict=True)),
        "without_gradient": without_gradient[0].item(),
        "empty": packed_all_reduce([], group),
        "size": world_size(group),
        "index": process_index(group),
        "gradient": refusal(lambda: packed_all_reduce([torch.ones(1, requires_grad=True)], group)),
        "mixed": refusal(lambda: packed_all_reduce([torch.ones(1), torch.ones(1).int()], group)),
        "alone": refusal(lambda: world_size(alone)),
        "agreed": refusal(lambda: require_agreement("abc", "configuration", group)),
        "differed": refusal(lambda: require_agreement(f"abc{process}", "configuration", group)),
    }
    called = []
    report["from_main"] = run_on_main(lambda: called.append(process) or f"made by {process}", group)
    report["called"] = called
    report["failed_on_main"] = refusal(lambda: run_on_main(refuse, group))
    report["texts"] = gather_text(f"text {process}", group)
    report["shared"] = {name: shared_work(process, group, fails_at) for name, fails_at in FAULTS.items()}
    Path(folder, f"report_{process}.json").write_text(json.dumps(report))
    # The report is written: what follows only keeps the other process's connections open until it is done too. gloo's threads
    # can abort while a process that was loaded winds down, so it ends here.
    with contextlib.suppress(RuntimeError):
        distributed.barrier()
    os._exit(0)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process_main, args=(str(folder),), nprocs=NUM_PROCESSES)
    return [json.loads((folder / f"report_{process}.json").read_text()) for process in range(NUM_PROCESSES)]


@pytest.mark.multiprocess
def test_sums_over_processes_travel_in_one_message(reports):
    for process, report in enumerate(reports):
        # One message for the five tensors, one for the single tensor without a gradient.
        assert report["messages"] == [1 + 3 + 0 + 24 + 10, 1]
        assert report["largest_error"] == 0.0
        assert all(report["shapes_kept"]) and len(report["shapes_kept"]) == 5
        assert report["inputs_kept"]
        assert report["without_gradient"] == NUM_PROCESSES
        assert report["empty"] == []
        assert report["size"] == NUM_PROCESSES
        assert report["index"] == process


@pytest.mark.multiprocess
def test_work_of_the_main_process_reaches_all_or_stops_all(reports):
    for process, report in enumerate(reports):
        assert report["from_main"] == "made by 0"
        assert report["called"] == ([0] if process == 0 else [])
        assert report["texts"] == ["text 0", "text 1"]
    assert reports[0]["failed_on_main"] == "ValueError: the disk is full"
    assert reports[1]["failed_on_main"] == "RuntimeError: process 0 stopped with ValueError: the disk is full"


@pytest.mark.multiprocess
def test_a_fault_in_shared_work_ends_it_for_all(reports):
    for report in reports:
        assert report["shared"]["nowhere"] == "done"
        assert report["shared"]["first stage"] == "OSError | process 1, OSError: disk 1 is full"
        assert report["shared"]["second stage"] == "OSError | process 0, OSError: disk 0 is full"
        assert report["shared"]["after the last wait"] == "OSError | process 1, OSError: disk 1 is full"


def test_shared_work_of_one_process():
    assert shared_work(0, None, (None, None)) == "done"
    assert shared_work(0, None, (0, 1)) == "OSError | OSError: disk 0 is full"


@pytest.mark.multiprocess
def test_refusals_of_several_processes(reports):
    for report in reports:
        assert "detach" in report["gradient"]
        assert "one dtype" in report["mixed"]
        assert report["agreed"] == ""
        assert "same configuration: process 0 has 'abc0', process 1 has 'abc1'" in report["differed"]
    assert reports[0]["alone"] == ""
    assert "not a member" in reports[1]["alone"]


def test_world_group_without_torch_distributed(monkeypatch):
    monkeypatch.setattr(collectives.distributed, "is_available", lambda: False)
    assert world_group() is None
