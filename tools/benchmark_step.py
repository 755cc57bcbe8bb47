"""Where a training step's time and memory go: python tools/benchmark_step.py --config train_configs/X.yaml [--key value ...]

Runs the trainer's own step on this machine's device and prints seconds by part (data, transfer, vae, generator, encoder, drift,
backward, optimiser, ema), peak memory and model FLOP utilisation. Keys of the recipe may follow, as for the trainer; recipes
whose name begins with mae_ are those of train_mae. Parts are timed with a wait for the device between them, the step without.
--compare_statistics N times label slices of N labels with every choice of `statistics` against the step in one slice, taking
turns in one process. --synthetic needs neither data nor encoder weights: random images, a random encoder of the given preset.
Nothing is saved but the --report.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from drift_accel import train, train_mae
from drift_accel.data import LabelledImages, make_sampler, open_source
from drift_accel.data.online_images import open_encoder_data
from drift_accel.drift.encoders import as_specs
from drift_accel.foundation.command_line import parse_command, plain_errors
from drift_accel.foundation.devices import DEVICE_HELP
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import atomic_write_json
from drift_accel.models.configuration import DecoderConfig
from drift_accel.training.launch import start_accelerator
from drift_accel.training.loop import start_state, train_step
from drift_accel.training.measurement import count_operations, operations_of, peak_allocation, peak_flops
from drift_accel.training.networks import compile_blocks
from drift_accel.training.prefetch import Prefetch
from drift_accel.training.slices import StepStatistics
from drift_accel.training.step_parts import PARTS, PartMeter, device_clock, metered_parts, step_part

SYNTHETIC_CLASSES = 2
UNLIMITED_GB = 1e9


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, help="recipe to measure")
    parser.add_argument("--device", default="auto", help=f"{DEVICE_HELP} (default: auto)")
    parser.add_argument("--measured", type=int, default=10, help="steps that are timed (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--compare_statistics", type=int, metavar="N", help="compare `statistics` with N labels a slice")
    parser.add_argument("--synthetic", metavar="PRESET", help="random data and encoder, for example latent-640")
    parser.add_argument("--peak_tflops", type=float, help="what the device reaches at best (default: known for common GPUs)")
    parser.add_argument("--report", type=Path, help="write the numbers there as JSON")
    arguments, keys = parser.parse_known_args()
    if arguments.measured < 1 or arguments.warmup < 0:
        parser.error(f"--measured is {arguments.measured} and --warmup {arguments.warmup}: give at least 1 and 0")
    command = train_mae if "mae" in arguments.config.name else train
    if arguments.compare_statistics is not None and command is train_mae:
        parser.error("--compare_statistics: an encoder's step has no statistics to compare; give a generator's recipe")
    config_type = train_mae.MaeTrainingConfig if command is train_mae else train.GeneratorTrainingConfig
    given = ["--config", str(arguments.config), "--device", arguments.device, *keys, "--dry_run"]
    config = parse_command(config_type, __doc__, given, debug_values=command.DEBUG_VALUES).config
    with plain_errors():
        accelerator = start_accelerator(config)
        # Operations are counted through the networks' own code, so blocks are compiled after that.
        task = make_task(command, replace(config, compile="none"), accelerator, arguments.synthetic)
    state = start_state(task, config, accelerator)
    results = {"device": describe_device(accelerator.device), "processes": accelerator.num_processes}
    drawn = task.draw(0)
    batch, flops = operations_of(lambda: task.transfer(drawn))  # a VAE's
    flops |= count_operations(task, batch)
    for network in (task.model, getattr(task, "encoder", None)):
        if network is not None:
            compile_blocks(network, config.compile)
    if arguments.compare_statistics is None:
        results |= measure_step(state, config, arguments.measured, arguments.warmup)
        peak = peak_flops(accelerator.device, config.precision) if arguments.peak_tflops is None else 1e12 * arguments.peak_tflops
        results |= utilisation(flops, results["step_seconds"], peak)
        if accelerator.is_main_process:
            print_step(results)
    else:
        results["statistics"] = compare_statistics(state, config, arguments)
        if accelerator.is_main_process:
            print_comparison(results["statistics"])
    if arguments.report and accelerator.is_main_process:
        atomic_write_json(arguments.report, {**results, "provenance": collect_provenance(command=sys.argv)})
    accelerator.end_training()


def make_task(command, config, accelerator, synthetic: str | None):
    """The trainer's task on the recipe's data and encoder, or on random ones. Raises ValueError, OSError as the trainer."""
    if command is train_mae:
        if synthetic is None:
            source = open_encoder_data(config.data)
        else:
            mae = config.mae.resolved()
            source = synthetic_source((mae["in_channels"], mae["input_size"], mae["input_size"]), 256)
        train_mae.check_fit(config, source)
        return train_mae.make_task(config, accelerator, source)
    if synthetic is None:
        source = open_source(config.data)
        specs = train.load_encoders(config, source)
    else:
        generator = config.generator.resolved()
        shape = (generator["in_channels"], generator["input_size"], generator["input_size"])
        source = synthetic_source(shape, config.batch.positives)
        specs = as_specs(synthetic_encoder(synthetic), config.features)
        left_out = [entry.name for entry in config.more_encoders] + ["decoder"] * (config.decoder.vae is not None)
        if left_out:
            print(f"--synthetic measures one encoder of what the generator makes; left out: {', '.join(left_out)}")
        config = replace(config, more_encoders=(), decoder=DecoderConfig())
    if config.positives.needs_table:
        raise ValueError("positives.choice needs a table that training makes, and reading it costs nothing: leave it out here")
    train.check_fit(config, specs, source)
    real_images = train.open_real_images(config, specs, source)
    counts = {"positives": config.batch.positives, "negatives": config.batch.negatives}
    sampler = make_sampler(config.data, source, config.seed, **counts)
    sampler.warm_up()
    return train.make_task(config, accelerator, specs, sampler, real_images=real_images)


def synthetic_source(shape: tuple[int, int, int], rows_per_class: int) -> LabelledImages:
    """Random images [rows, C, H, W] of a few classes."""
    rows = SYNTHETIC_CLASSES * rows_per_class
    images = random_stream(0, "benchmark/images", 0).standard_normal((rows, *shape), dtype=np.float32)
    return LabelledImages(images, np.arange(rows) % SYNTHETIC_CLASSES, [str(label) for label in range(SYNTHETIC_CLASSES)])


def synthetic_encoder(preset: str):
    """An untrained encoder of a preset. Raises ValueError naming the presets."""
    from drift_accel.models.masked_autoencoder import MAE_PRESETS, MaskedAutoencoder

    if preset not in MAE_PRESETS:
        raise ValueError(f"--synthetic is {preset!r}: choose one of {', '.join(MAE_PRESETS)}")
    return MaskedAutoencoder(**MAE_PRESETS[preset]).eval().requires_grad_(False)


def measure_step(state, config, measured: int, warmup: int) -> dict:
    """Medians of the parts, the pace of undisturbed steps with prefetch, and peak memory."""
    clock, device = device_clock(state.accelerator.device), state.accelerator.device
    steps, by_part = iter(range(10**9)), {name: [] for name in (*PARTS, "other")}
    with metered_parts(PartMeter(clock)) as meter:
        for count in range(warmup + measured):
            started = clock()
            with step_part("data"):
                batch = state.task.draw(next(steps))
            train_step(state, config, batch, diagnostics=False)
            seconds = meter.read()
            seconds["other"] = clock() - started - sum(seconds.values())
            if count >= warmup:
                for name, values in by_part.items():
                    values.append(seconds.get(name, 0.0))
    first = next(steps)
    prefetch = Prefetch(state.task.draw, first, first + measured)
    try:
        started = clock()
        for _ in range(measured):
            train_step(state, config, prefetch.take(), diagnostics=False)
        pace = (clock() - started) / measured
    finally:
        prefetch.close()
    batch = state.task.draw(first + measured)
    memory = peak_allocation(lambda: train_step(state, config, batch, diagnostics=False), device)
    return {
        "step_seconds": pace,
        "part_seconds": {name: median(values) for name, values in by_part.items()},
        "peak_bytes": memory,
        "samples_per_second": state.task.num_samples / pace,
    }


def utilisation(flops: dict[str, float], step_seconds: float, peak: float | None) -> dict:
    """Operations a step and process, and their share of what the device could have done in that time."""
    total = sum(flops.values())
    return {
        "flops": flops,
        "tflops_per_second": total / step_seconds / 1e12,
        "peak_tflops": None if peak is None else peak / 1e12,
        "model_flop_utilisation": None if peak is None else total / step_seconds / peak,
    }


def compare_statistics(state, config, arguments: argparse.Namespace) -> list[dict]:
    """Every choice of `statistics` on slices against the step in one slice: median of ratios of turns, and peak memory."""
    task, device = state.task, state.accelerator.device
    whole = replace(config.batch, labels_per_slice=None)
    sliced = replace(config.batch, labels_per_slice=arguments.compare_statistics)
    choices = [
        ("one slice, global", whole, "global", UNLIMITED_GB),
        ("slices, global, products kept", sliced, "global", UNLIMITED_GB),
        ("slices, global, a third pass", sliced, "global", 0.0),
        *((f"slices, {mode}", sliced, mode, 0.0) for mode in ("lagged", "slice", "rank")),
    ]
    settings = {"group": task.statistics.group, "log": lambda line: None}
    statistics = [StepStatistics(mode, config.drift, memory_gb=memory, **settings) for _, _, mode, memory in choices]
    clock = device_clock(device)
    seconds, memory = [[] for _ in choices], [0] * len(choices)

    def choose(index: int) -> None:
        task.batch, task.statistics = choices[index][1], statistics[index]

    for turn in range(arguments.warmup + arguments.measured):
        batch = task.draw(turn)
        for index in range(len(choices)):
            choose(index)
            started = clock()
            train_step(state, config, batch, diagnostics=False)
            if turn >= arguments.warmup:
                seconds[index].append(clock() - started)
    for index in range(len(choices)):
        choose(index)
        memory[index] = peak_allocation(lambda: train_step(state, config, batch, diagnostics=False), device)
    return [
        {
            "choice": name,
            "seconds": median(times),
            "time_ratio": median(a / b for a, b in zip(times, seconds[0], strict=True)),
            "peak_bytes": bytes_,
            "memory_ratio": bytes_ / memory[0],
        }
        for (name, *_), times, bytes_ in zip(choices, seconds, memory, strict=True)
    ]


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"processor, {torch.get_num_threads()} thread(s)"


def print_step(results: dict) -> None:
    """The table of a step."""
    print(f"{results['device']}, {results['processes']} process(es)")
    print(f"{'part':<12}{'ms':>10}{'share':>8}{'GFLOP':>10}")
    total = sum(results["part_seconds"].values())
    for name, seconds in results["part_seconds"].items():
        flops = results["flops"].get(name, 0.0) / 1e9
        print(f"{name:<12}{1e3 * seconds:10.2f}{seconds / total:8.1%}{flops:10.2f}")
    print(f"a step with prefetch and no waiting between parts: {1e3 * results['step_seconds']:.2f} ms, ", end="")
    print(f"{results['samples_per_second']:.1f} samples a second")
    print(f"peak memory of a step: {results['peak_bytes'] / 1e6:,.1f} MB above weights, moments and averages")
    used = results["model_flop_utilisation"]
    known = "unknown for this device: give --peak_tflops" if used is None else f"{used:.1%} of {results['peak_tflops']:g} TFLOP/s"
    print(f"{results['tflops_per_second']:.4g} TFLOP/s; model FLOP utilisation {known}")


def print_comparison(rows: list[dict]) -> None:
    """The table of the statistics."""
    print(f"{'statistics':<32}{'ms':>10}{'time':>8}{'peak MB':>10}{'memory':>8}")
    for row in rows:
        megabytes, milliseconds = row["peak_bytes"] / 1e6, 1e3 * row["seconds"]
        print(f"{row['choice']:<32}{milliseconds:10.1f}{row['time_ratio']:8.2f}{megabytes:10.1f}{row['memory_ratio']:8.2f}")


if __name__ == "__main__":
    main()
