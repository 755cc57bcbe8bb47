"""tools/benchmark_step.py and what it measures with: operations, peak memory, peaks of devices."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import TINY_GENERATOR, TINY_MAE, run_tool

from drift_accel.training.measurement import count_operations, peak_allocation, peak_flops
from drift_accel.training.step_parts import PARTS


def recipe(arguments):
    """A trainer's tiny arguments without what the tool has of its own."""
    skipped = {"--device", "--features.maps"}
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return [text for key, value in pairs if key not in skipped for text in (key, value)]


@pytest.mark.parametrize("arguments", [TINY_GENERATOR, TINY_MAE], ids=["generator", "encoder"])
def test_parts_memory_and_utilisation_of_both_trainers(arguments, tmp_path, capsys):
    report = tmp_path / "report.json"
    more = ["--device", "cpu", "--synthetic", "tiny", "--measured", 1, "--warmup", 0, "--peak_tflops", 0.1, "--report", report]
    more += ["--features.maps", '["conv1","layer1_blk2"]', "--encoder.path", "none"] if arguments is TINY_GENERATOR else []
    assert run_tool("benchmark_step", *recipe(arguments), *more) == 0
    printed, results = capsys.readouterr().out, json.loads(report.read_text())
    for name in PARTS:
        assert name in printed and name in results["part_seconds"]
    used = {name for name, seconds in results["part_seconds"].items() if seconds > 0}
    assert {"data", "transfer", "encoder", "backward", "optimiser", "ema"} <= used
    assert ({"generator", "drift"} <= used) == (arguments is TINY_GENERATOR)
    total = sum(results["flops"].values())
    assert results["model_flop_utilisation"] == pytest.approx(total / results["step_seconds"] / 1e11)
    assert results["flops"]["backward"] > 0 and results["flops"]["encoder"] > 0
    assert results["peak_bytes"] > 1e5 and "provenance" in results


def test_the_choices_of_statistics_side_by_side(tmp_path, capsys):
    report = tmp_path / "report.json"
    more = ["--features.maps", '["conv1","layer1_blk2"]', "--encoder.path", "none", "--synthetic", "tiny", "--device", "cpu"]
    more += ["--compare_statistics", 1, "--measured", 1, "--warmup", 1, "--report", report]
    assert run_tool("benchmark_step", *recipe(TINY_GENERATOR), *more) == 0
    rows = json.loads(report.read_text())["statistics"]
    assert [row["choice"].split(", ")[-1] for row in rows] == [
        "global",
        "products kept",
        "a third pass",
        "lagged",
        "slice",
        "rank",
    ]
    whole, kept, third, lagged, by_slice, rank = (row["peak_bytes"] for row in rows)
    assert max(lagged, by_slice, rank, third) < 0.6 * whole and third <= kept < whole
    assert "lagged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--measured", "0"], "--measured is 0"),
        (["--synthetic", "huge"], "--synthetic is 'huge': choose one of tiny"),
        (["--optimizer.lr", "-1"], "optimizer.lr is -1"),
        (["--device", "gpu"], "device is 'gpu'"),
    ],
)
def test_refusals(more, message, capsys):
    outcome = run_tool("benchmark_step", *recipe(TINY_GENERATOR), "--encoder.path", "none", *more)
    assert message in f"{outcome} {capsys.readouterr().err}"
    if more[0] == "--measured":
        run_tool("benchmark_step", *recipe(TINY_MAE), "--compare_statistics", 1)
        assert "an encoder's step has no statistics" in capsys.readouterr().err


def test_peak_allocation_counts_what_lives_at_the_same_time():
    held = torch.zeros(1000)

    def work():
        first = held * 2  # 4,000 bytes
        second = torch.cat([first, first])  # 12,000 bytes live
        del first
        second.view(2, 1000).add_(1)  # in place, a view: nothing new
        return second + 1  # 16,000 bytes live

    assert peak_allocation(work, torch.device("cpu")) == 16_000
    assert peak_allocation(lambda: held.view(10, 100).add_(1), torch.device("cpu")) == 0


def test_operations_are_those_of_all_labels_without_recomputation():
    class Batch:
        def __init__(self, images):
            self.images = self.labels = images

        def labels_from(self, start, stop):
            return Batch(self.images[start:stop])

    class Task:
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 2))

        def compute(self, model, batch, step, *, diagnostics):
            from drift_accel.training.step_parts import step_part

            with step_part("encoder"):
                return model(batch.images).sum(), {}

    flops = count_operations(Task(), Batch(torch.ones(5, 8)))
    forward = 5 * 2 * (8 * 16 + 16 * 2)
    assert flops == {"encoder": forward, "backward": forward + 5 * 2 * 16 * 2}  # weights of both layers, input of the second
    assert all(parameter.grad is None for parameter in Task.model.parameters())


def test_peaks_of_known_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    cuda = torch.device("cuda")
    assert peak_flops(cuda, "bfloat16") == 756e12 and peak_flops(cuda, "float32") == 378e12, "convolutions use TF32"
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    assert peak_flops(cuda, "float32") == 51e12
    for name, peak in (("H100 80GB HBM3", 989e12), ("H200 NVL", 835.5e12), ("GH200 480GB", 989e12), ("GB200", 2500e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: f"NVIDIA {name}")
        assert peak_flops(cuda, "bfloat16") == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard of")
    assert peak_flops(cuda, "bfloat16") is None and peak_flops(torch.device("cpu"), "float32") is None
