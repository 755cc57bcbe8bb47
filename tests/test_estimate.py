"""tools/estimate.py against what torch counts and what its allocator gives out, on steps that a processor can do."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from golden_files import GOLDENS
from small_caches import write_pictures, write_tiny_vae
from tiny_runs import load_tool, run_tool
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import profile

from drift_accel import train
from drift_accel.drift import multi_scale_features
from drift_accel.drift.cost import drift_cost, key_sizes
from drift_accel.drift.encoders import as_specs
from drift_accel.foundation.command_line import parse_command
from drift_accel.models import MaskedAutoencoder
from drift_accel.models.configuration import DecoderConfig, EncoderConfig
from drift_accel.train import GeneratorTrainingConfig, make_task
from drift_accel.training.estimation import GPUS, USABLE_SHARE, estimate_step
from drift_accel.training.hollow_networks import load_hollow_decoder, load_hollow_encoder, load_hollow_encoders
from drift_accel.training.launch import start_accelerator
from drift_accel.training.loop import start_state, train_step
from drift_accel.training.measurement import count_operations, peak_allocation
from drift_accel.training.utilisation import generator_step_flops

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


@pytest.fixture(autouse=True)
def no_precision_is_left_behind():
    """One process has one accelerator's state: another test's precision is another one."""
    yield
    AcceleratorState._reset_state(True)


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


BEHIND_A_DECODER = """
steps: 10
device: cpu
generator: {input_size: 8, in_channels: 4, patch_size: 2, hidden_size: 32, depth: 1, num_heads: 2, num_classes: 10,
num_style_tokens: 4}
encoder: {kind: convnextv2, path: CONVNEXT, image_size: 32}
batch: {labels: 3, generated: 4, positives: 5, negatives: 3}
decoder: {vae: VAE, batch: 3}
"""


@pytest.fixture(scope="module")
def pixel_recipe(tmp_path_factory):
    """A generator of latents, its pixels judged through a tiny VAE, with the caches of its real samples."""
    place = tmp_path_factory.mktemp("decoder")
    vae, pictures = write_tiny_vae(place / "vae"), write_pictures(place / "pictures", classes=4, each=7)
    for name, how in (("latents", ("--vae", vae)), ("pixels", ("--encoding", "png"))):
        arguments = ("--source", pictures, "--output_dir", place / name, *how, "--image_size", 16, "--device", "cpu")
        assert run_tool("export_latents", *arguments) == 0
    text = BEHIND_A_DECODER.replace("CONVNEXT", str(GOLDENS / "convnextv2")).replace("VAE", str(vae))
    (place / "recipe.yaml").write_text(text + f"data: {{source: cache, path: {place / 'latents'}}}\n")
    return place / "recipe.yaml"


@pytest.mark.parametrize("real_images", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["decoded", "read"])
def test_the_decoder_is_counted_and_its_memory_too(real_images, pixel_recipe, capsys, tmp_path):
    """Against the step itself: operations by part, and the allocator's peak with slices that are decoded again."""
    pixels = pixel_recipe.parent / "pixels"
    changes = ("--decoder.real_images", str(pixels)) if real_images else ()
    config = parse_command(GeneratorTrainingConfig, "", ["--config", str(pixel_recipe), "--dry_run", *changes]).config
    estimate = estimate_step(config, 1, encoder=lambda: load_hollow_encoders(config))
    AcceleratorState._reset_state(True)
    accelerator = start_accelerator(config)
    task = load_tool("benchmark_step").make_task(train, config, accelerator, None)
    state = start_state(task, config, accelerator)
    counted = count_operations(task, task.transfer(task.draw(0)))
    assert estimate.flops["encoder forward"] == pytest.approx(counted["encoder"], rel=0.02)
    assert estimate.flops["vae forward"] == pytest.approx(counted["vae"], rel=0.02)
    decoded = 4 if real_images else 12
    # Each slice of generated latents once more, then the gradient to its inputs.
    assert estimate.flops["vae backward"] == pytest.approx(estimate.flops["vae forward"] * 4 / decoded * 2, rel=0.1)
    backward = sum(estimate.flops[f"{name} backward"] for name in ("generator", "encoder", "vae"))
    # torch leaves out the last operation of what it computes again.
    assert backward - estimate.flops["vae forward"] * 4 / decoded == pytest.approx(counted["backward"], rel=0.05)
    least = generator_step_flops(config, task.specs)  # decodes nothing twice
    assert least == pytest.approx(sum(counted[name] for name in ("generator", "encoder", "vae", "backward")), rel=0.01)
    assert task.specs[0].decoder.checkpointing
    assert estimate.parameters["vae"] == sum(weight.numel() for weight in task.specs[0].decoder.parameters())
    assert estimate.step_seconds(GPUS["h100"], 1, 0.5) > replace(estimate, float32_parts=()).step_seconds(GPUS["h100"], 1, 0.5)
    peak = peak_allocation(lambda: train_step(state, config, task.draw(0), diagnostics=False), accelerator.device)
    steady = ("weights", "optimiser", "averages", "encoder", "vae")
    assert estimate.total_memory - sum(estimate.memory[name] for name in steady) == pytest.approx(peak, rel=0.2)

    report = tmp_path / "report.json"
    assert run_tool("estimate", "--config", pixel_recipe, "--num_gpus", 3, "--report", report, *changes) == 0
    assert json.loads(report.read_text())["flops"]["vae backward"] == estimate.flops["vae backward"]
    assert "vae backward" in capsys.readouterr().out
    measured = ("--config", pixel_recipe, "--measured", 1, "--warmup", 0, "--device", "cpu", "--report", report, *changes)
    assert run_tool("benchmark_step", *measured) == 0
    assert json.loads(report.read_text())["part_seconds"]["vae"] > 0


def test_a_vae_that_is_not_there_is_taken_for_stable_diffusions():
    config = DecoderConfig(vae="stabilityai/sd-vae-ft-mse")
    with FakeTensorMode(), pytest.warns(UserWarning, match="estimated as Stable Diffusion's VAE"):
        decoder = load_hollow_decoder(config)
        assert sum(weight.numel() for weight in decoder.parameters()) == 83_653_863
        assert decoder(torch.zeros(2, 4, 32, 32)).shape == (2, 3, 256, 256) and decoder.image_shape(32) == (3, 256, 256)


@pytest.mark.parametrize("kind", ["convnextv2", "base", "dinov2"])
def test_encoders_of_transformers_are_estimated(kind, tmp_path):
    """Their constructors read numbers, which tensors without contents do not have."""
    path = GOLDENS / "convnextv2"
    if kind == "dinov2":
        settings = {"model_type": "dinov2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
        path = tmp_path
        (path / "config.json").write_text(json.dumps(settings))
    config = EncoderConfig(kind=kind if kind == "dinov2" else "convnextv2", path="nowhere" if kind == "base" else str(path))
    with FakeTensorMode():
        encoder = load_hollow_encoder(config)
        assert all(isinstance(weight, FakeTensor) for weight in encoder.parameters())
        features = multi_scale_features(encoder, torch.zeros(2, 3, 64, 64))
    assert kind != "base" or (features["global_mean"].shape == (2, 1, 1024))
    assert kind != "base" or sum(weight.numel() for weight in encoder.parameters()) == 87_692_800


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
