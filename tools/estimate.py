"""What a recipe needs before it runs: python tools/estimate.py --config train_configs/X.yaml --gpu h100 --num_gpus 8

Prints parameters, operations of a step by part, memory of a GPU by part, the pace at a given utilisation, days of the whole run,
and
whether it fits, else what to change. Keys of the recipe may follow, as for the trainer. Nothing is computed or allocated. Exit
code 1 where it does not fit.
"""

import argparse
import sys
from pathlib import Path

from drift_accel import train
from drift_accel.foundation.command_line import parse_command, plain_errors
from drift_accel.foundation.storage import atomic_write_json
from drift_accel.training.estimation import FIXED_BYTES, GPUS, USABLE_SHARE, Estimate, advice, estimate_step
from drift_accel.training.hollow_networks import load_hollow_encoders


def main() -> int:
    """Parse, estimate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, help="a generator's recipe")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="device (default: h100)")
    parser.add_argument("--num_gpus", type=int, default=8, help="how many of them (default: 8)")
    parser.add_argument(
        "--utilisation", type=float, default=0.4, help="share of the device's products that is reached (default: 0.4)"
    )
    parser.add_argument(
        "--encoder", metavar="PRESET", help="encoder's architecture where encoder.path is not there: latent-640, ..."
    )
    parser.add_argument("--sharded", action="store_true", help="FSDP2 instead of data parallelism")
    parser.add_argument("--report", type=Path, help="write the numbers there as JSON")
    arguments, keys = parser.parse_known_args()
    if arguments.num_gpus < 1 or not 0 < arguments.utilisation <= 1:
        parser.error(
            f"--num_gpus {arguments.num_gpus} and --utilisation {arguments.utilisation}: give at least 1, and a share in (0, 1]"
        )
    if "mae" in arguments.config.name:
        parser.error(
            f"--config {arguments.config} trains an encoder: give a generator's recipe (tools/benchmark_step.py measures both)"
        )
    given = ["--config", str(arguments.config), *keys, "--dry_run"]
    config = parse_command(train.GeneratorTrainingConfig, __doc__, given, debug_values=train.DEBUG_VALUES).config
    gpu = GPUS[arguments.gpu]

    def encoder():
        return load_hollow_encoders(config, arguments.encoder)

    with plain_errors():
        estimate = estimate_step(config, arguments.num_gpus, encoder=encoder, sharded=arguments.sharded)
        seconds = estimate.step_seconds(gpu, arguments.num_gpus, arguments.utilisation)
        print_estimate(config, estimate, gpu, arguments, seconds)
        fits = estimate.fits(gpu)
        if not fits:
            changes = advice(config, estimate, gpu, arguments.num_gpus, encoder=encoder, sharded=arguments.sharded)
            print("to make it fit: " + (", or ".join(changes) or "a GPU with more memory, or a smaller model"))
    if arguments.report:
        numbers = {
            name: getattr(estimate, name) for name in ("parameters", "flops", "memory", "passes", "num_slices", "num_samples")
        }
        atomic_write_json(arguments.report, {**numbers, "step_seconds": seconds, "fits": fits})
    return 0 if fits else 1


def print_estimate(config, estimate: Estimate, gpu, arguments, seconds: float) -> None:
    """The tables."""
    for name, count in estimate.parameters.items():
        print(f"parameters of the {name:<12}{count:>18,}")
    print(f"\n{'a step over all GPUs':<28}{'TFLOP':>12}{'share':>8}")
    for name, flops in estimate.flops.items():
        print(f"{name:<28}{flops / 1e12:12,.4g}{flops / estimate.total_flops:8.1%}")
    print(
        f"{'together':<28}{estimate.total_flops / 1e12:12,.4g}   networks forward {estimate.passes}x, {estimate.num_slices} "
        "slice(s) a GPU"
    )
    print(f"\n{'memory of a GPU':<28}{'GB':>12}")
    for name, size in (*estimate.memory.items(), ("together", estimate.total_memory)):
        print(f"{name:<28}{size / 1e9:12,.2f}")
    room = USABLE_SHARE * gpu.memory - FIXED_BYTES
    verdict = "fits" if estimate.fits(gpu) else "DOES NOT FIT"
    print(f"{verdict} a {gpu.name}: {room / 1e9:.1f} GB are left there by CUDA, its libraries and gaps between blocks")
    days = seconds * config.steps / 86400
    print(
        f"\nat {arguments.utilisation:.0%} of {gpu.flops / 1e12:g} TFLOP/s on {arguments.num_gpus} GPU(s): {seconds:.3g} s a "
        "step, "
        f"{estimate.num_samples / seconds:,.4g} samples a second, {days:.3g} days for {config.steps:,} steps"
    )


if __name__ == "__main__":
    sys.exit(main())
