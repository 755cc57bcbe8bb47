"""tools/estimate.py against what torch counts and what its allocator gives out, on steps that a processor can do."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_runs import load_tool, run_tool
from torch.profiler import profile

from drift_accel.drift.cost import drift_cost, key_sizes
from drift_accel.drift.encoders import as_specs
from drift_accel.foundation.command_line import parse_command
from drift_accel.models import MaskedAutoencoder
from drift_accel.train import GeneratorTrainingConfig, make_task
from drift_accel.training.estimation import GPUS, USABLE_SHARE, estimate_step
from drift_accel.training.launch import start_accelerator
from drift_accel.training.loop import start_state, train_step
from drift_accel.training.measurement import count_operations

SMALL = """
steps: 10
device: cpu
generator: {input_size: 16, in_channels: 4, patch_size: 2, hidden_size: 96, depth: 3, num_heads: 4, num_classes: 10,
num_style_tokens: 4}
encoder: {path: nowhere}
features: {maps: [conv1, layer1, layer3_blk1, layer4]}
batch: {labels: 4, generated: 6, positives: 8, negatives: 4}
"""


def small_encoder() -> MaskedAutoencoder:
    return MaskedAutoencoder(in_channels=4, input_size=16, width=24, blocks=(1, 1, 1, 1)).eval().requires_grad_(False)


@pytest.fixture
def configured(tmp_path):
    """Reads SMALL with changes."""
    (tmp_path / "small.yaml").write_text(SMALL)

    def read(*changes: str) -> GeneratorTrainingConfig:
        return parse_command(
            GeneratorTrainingConfig, "", ["--config", str(tmp_path / "small.yaml"), "--dry_run", *changes]
        ).config

    return read


def make_state(config):
    AcceleratorState._reset_state(True)  # one process has one, and each case has its own precision
    benchmark = load_tool("benchmark_step")
    accelerator = start_accelerator(config)
    source = benchmark.synthetic_source((4, 16, 16), 16)
    from drift_accel.data import make_sampler

    sampler = make_sampler(config.data, source, 0, positives=config.batch.positives, negatives=config.batch.negatives)
    return start_state(make_task(config, accelerator, as_specs(small_encoder(), config.features), sampler), config, accelerator)


def allocated_peak(work) -> int:
    """The largest sum of what torch's own allocator gave out during `work` and had not got back."""
    with profile(profile_memory=True) as recorded:
        work()
    live = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_operations_agree_with_torchs_counter(configured, precision):
    config = configured("--precision", precision)
    estimate = estimate_step(config, 1, encoder=small_encoder)
    state = make_state(config)
    counted = count_operations(state.task, state.task.transfer(state.task.draw(0)))
    names = ("generator forward", "generator backward", "encoder forward", "encoder backward")
    networks = sum(estimate.flops[name] for name in names)
    assert networks == pytest.approx(counted["generator"] + counted["encoder"] + counted["backward"], rel=0.02)
    assert estimate.flops["generator forward"] == pytest.approx(counted["generator"], rel=0.02)
    assert estimate.flops["encoder forward"] == pytest.approx(counted["encoder"], rel=0.02)
    # Backward is twice forward for weights and inputs, once for the encoder's inputs of the generated samples.
    assert estimate.flops["generator backward"] == pytest.approx(2 * estimate.flops["generator forward"], rel=0.1)
    assert estimate.flops["encoder backward"] == pytest.approx(estimate.flops["encoder forward"] * 6 / 18, rel=0.1)


def test_the_drift_is_the_least_work_of_its_keys(configured):
    estimate = estimate_step(configured(), 1, encoder=small_encoder)
    sizes = key_sizes(small_encoder().to("meta"), (4, 16, 16), configured().features)
    cost = drift_cost(sizes, labels=4, generated=6, positives=8, negatives=4, element_size=4)
    assert estimate.drift == cost and estimate.flops["drift"] == cost.flops


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("--batch.labels_per_slice", "1"),
        pytest.param(("--gradient_checkpointing", "true"), marks=pytest.mark.slow),
        ("--drift.backend", "reference", "--batch.labels_per_slice", "2", "--ema.decays", "[0.9,0.99]"),
        pytest.param(("--precision", "bfloat16"), marks=pytest.mark.slow),
    ],
)
def test_memory_agrees_with_the_allocators_peak(configured, changes):
    config = configured(*changes)
    estimate = estimate_step(config, 1, encoder=small_encoder)

    def work():
        state = make_state(config)
        for step in range(2):
            train_step(state, config, state.task.draw(step), diagnostics=False)

    assert estimate.total_memory == pytest.approx(allocated_peak(work), rel=0.15)


def test_slices_and_processes_share_the_same_operations(configured):
    whole = estimate_step(configured(), 1, encoder=small_encoder)
    sliced = estimate_step(configured("--batch.labels_per_slice", "1"), 1, encoder=small_encoder)
    shared = estimate_step(configured(), 4, encoder=small_encoder)
    assert (whole.passes, whole.num_slices, sliced.passes, sliced.num_slices) == (1, 1, 2, 4)
    assert sliced.flops["statistics pass"] == whole.flops["generator forward"] + whole.flops["encoder forward"]
    assert shared.flops == whole.flops
    assert sliced.memory["activations"] < 0.5 * whole.memory["activations"]
    third = estimate_step(configured("--batch.labels_per_slice", "1", "--statistics_memory_gb", "0"), 1, encoder=small_encoder)
    lagged = estimate_step(configured("--batch.labels_per_slice", "1", "--statistics", "lagged"), 1, encoder=small_encoder)
    assert (third.passes, lagged.passes) == (3, 1)
    sharded = estimate_step(configured(), 4, encoder=small_encoder, sharded=True)
    assert sharded.memory["optimiser"] == shared.memory["optimiser"] / 4


def test_the_pace_follows_from_operations_and_bandwidth(configured):
    estimate = estimate_step(configured(), 1, encoder=small_encoder)
    gpu = GPUS["h100"]
    half, full = estimate.step_seconds(gpu, 1, 0.5), estimate.step_seconds(gpu, 1, 1.0)
    assert full < half < 2 * full + 1e-12
    assert estimate.step_seconds(gpu, 4, 0.5) == pytest.approx(half / 4)


def test_the_command_prints_and_says_what_to_change(tmp_path, capsys, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL.replace("input_size: 16", "input_size: 32"))
    arguments = ("--config", tmp_path / "small.yaml", "--num_gpus", "2", "--report", tmp_path / "report.json")
    status = run_tool("estimate", *arguments)
    assert "nowhere has no config.json" in str(status) and "--encoder" in str(status)
    from drift_accel.models import masked_autoencoder
    from drift_accel.training import estimation

    monkeypatch.setitem(
        masked_autoencoder.MAE_PRESETS, "small", {"in_channels": 4, "input_size": 32, "width": 8, "blocks": (1, 1, 1, 1)}
    )
    assert run_tool("estimate", *arguments, "--encoder", "small") == 0
    printed = capsys.readouterr().out
    assert "fits a H100" in printed and "days for 10 steps" in printed and "DOES NOT" not in printed
    report = json.loads((tmp_path / "report.json").read_text())
    total = sum(report["memory"].values())
    small = estimation.Gpu("small one", (0.8 * total + estimation.FIXED_BYTES) / USABLE_SHARE, 1e12, 1e12)
    monkeypatch.setitem(estimation.GPUS, "h100", small)
    assert run_tool("estimate", *arguments, "--encoder", "small") == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT a small one" in printed and "to make it fit: " in printed and "labels_per_slice 1" in printed
    assert "choose one of" in str(run_tool("estimate", *arguments, "--encoder", "large"))


def test_nothing_is_allocated_for_it(configured):
    config = configured("--generator.hidden_size", "1024", "--generator.depth", "8")
    assert allocated_peak(lambda: estimate_step(config, 1, encoder=small_encoder)) < 4 * 100e6
    assert torch.zeros(1).item() == 0  # outside, tensors have contents again
