"""Is this machine ready for a run? accelerate launch ... tools/preflight.py --config train_configs/X.yaml --output_dir RUN

Launched as the run will be, with the same options (--key value ...). Looks at versions, devices, the compiled drift op, messages
between all processes (with a time limit and a map of who is where), disk space, and whether cache and encoder fit the
configuration. Each problem is one line that says what to do. Exit code 0 where nothing is wrong, 1 otherwise, on every process:
the first one looks at most of it, and the others wait for what it finds.
"""

import argparse
import os
import sys
from pathlib import Path

from drift_accel import doctor, train, train_mae
from drift_accel.data import open_source
from drift_accel.data.online_images import open_encoder_data
from drift_accel.drift.configuration import BackendError
from drift_accel.drift.encoders import load_specs
from drift_accel.drift.loss import require_backend
from drift_accel.drift.ops import load_extension, wanted_backend
from drift_accel.foundation.command_line import parse_command
from drift_accel.foundation.devices import find_device
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import require_free_space
from drift_accel.training.rendezvous import Meeting, meet
from drift_accel.training.retention import checkpoint_bytes, run_bytes

RECORD_BYTES = 2e9  # metrics, events and pictures of a long run
LONGEST_LOOK = 1800  # seconds that the first process may take for data and encoders


def main() -> int:
    """Parse, look, print; on processes other than the first only their own problems are printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )  # fmt: skip
    parser.add_argument("--config", type=Path, required=True, help="the recipe")
    parser.add_argument("--output_dir", type=Path, required=True, help="the run's folder; nothing is written")
    parser.add_argument(
        "--timeout", type=float, default=120, help="seconds that a process may take to join or answer (default: 120)"
    )
    parser.add_argument("--encoder_width", type=int, help="width that the encoder must have (default: any)")
    arguments, keys = parser.parse_known_args()
    if arguments.timeout <= 0:
        parser.error(f"--timeout is {arguments.timeout}: give a positive number of seconds")
    command = train_mae if "mae" in arguments.config.name else train
    config_type = train_mae.MaeTrainingConfig if command is train_mae else train.GeneratorTrainingConfig
    given = ["--config", str(arguments.config), *keys, "--dry_run"]
    config = parse_command(config_type, __doc__, given, debug_values=command.DEBUG_VALUES).config
    is_main = int(os.environ.get("RANK", "0")) == 0
    meeting = meet(arguments.timeout)
    problems = check_processes(config, meeting, is_main=is_main)
    if is_main:
        problems += check_machine(config)
        problems += check_disk(config, command, arguments.output_dir)
        problems += check_inputs(config, command, arguments.encoder_width, RunFolder(arguments.output_dir))
    for problem in problems:
        print(f"problem: {problem}", flush=True)
    failed = meeting.conclude(bool(problems), LONGEST_LOOK)
    if is_main:
        found = f"{len(problems)} problem(s)" if problems else "another process found a problem"
        print(f"{found}: not ready" if failed else "ready", flush=True)
    return int(failed)


def check_processes(config, meeting: Meeting, *, is_main: bool) -> list[str]:
    """Every process: does it have its device, do all meet?"""
    if is_main:
        for rank, where in sorted(meeting.ranks.items()):
            print(f"rank {rank:<11}{where}")
        for backend, line in meeting.messages.items():
            print(f"{backend:<16}{line}")
    problems = list(meeting.problems) if is_main or not meeting.ranks else []
    try:
        config.check_launch(int(os.environ.get("WORLD_SIZE", "1")))
        find_device(config.device)
    except (ValueError, BackendError) as error:
        problems.append(str(error))
    return problems


def check_machine(config) -> list[str]:
    """Versions, devices, the compiled op."""
    report = doctor.examine()
    print("\n".join(report.lines))
    problems = [problem for problem in report.problems if "fused op" not in problem]
    drift = getattr(config, "drift", None)
    if drift is not None and wanted_backend(drift.backend) != "reference":
        trouble = load_extension().problem
        device = find_device(config.device).type if config.device != "auto" else None
        if trouble is None:
            try:
                require_backend("fused", len(drift.temperatures), device_type=device or find_device().type)
            except BackendError as error:
                trouble = str(error)
        if trouble is not None:
            problems.append(f"the fused drift op is not there: {trouble} (or accept the slow path: --drift.backend reference)")
    return problems


def check_disk(config, command, output_dir: Path) -> list[str]:
    """Room for the checkpoints that are kept at once, and the records."""
    import torch

    from drift_accel.models import Generator, MaskedAutoencoder

    network, group = (MaskedAutoencoder, config.mae) if command is train_mae else (Generator, config.generator)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in network(**group.arguments()).parameters())
    there = len(RunFolder(output_dir).checkpoint_steps())
    averages = len(config.ema.decays)
    missing, needed = run_bytes(config.checkpoint, parameters, averages, config.steps, there=there)
    needed += int(RECORD_BYTES) * (parameters > 10_000_000)
    each = checkpoint_bytes(parameters, averages)
    print(f"{'disk':<16}{needed / 1e9:.1f} GB for {missing} more checkpoints of {each / 1e9:.2f} GB and records")
    try:
        require_free_space(output_dir, needed, "the run")
    except OSError as error:
        return [f"{error.strerror or error}; or keep fewer checkpoints: checkpoint.keep_last, checkpoint.keep_every"]
    return []


def check_inputs(config, command, encoder_width: int | None, run: RunFolder) -> list[str]:
    """The data, the encoder and what an evaluation needs are there, whole, and those of the configuration."""
    problems = []
    source = None
    try:
        source = open_encoder_data(config.data) if command is train_mae else open_source(config.data)
        print(f"{'data':<16}{len(source):,} images {list(source.image_shape)} of {source.num_classes} classes")
    except (OSError, ValueError, ModuleNotFoundError) as error:
        problems.append(f"data: {error}")
    if command is train_mae:
        if source is not None:
            problems += _refusals(lambda: train_mae.check_fit(config, source))
            problems += _refusals(lambda: train_mae.open_held_out(config, source))
        return problems
    try:  # without data nothing is known of a decoder before the encoders
        specs = load_specs(config.encoder, config.features) if source is None else train.load_encoders(config, source)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return [
            *problems,
            f"encoder: {lines[0]} (encoder.path is {config.encoder.path}: give the folder that belongs to this recipe)",
        ]
    for spec in specs:
        width = getattr(getattr(spec.encoder, "config", None), "width", None)
        print(f"{spec.name:<16}{type(spec.encoder).__name__}, width {width}, of {spec.encoder.input_space}s")
        if spec is specs[0] and encoder_width is not None and width != encoder_width:
            problems.append(
                f"encoder.path {config.encoder.path} has width {width}, the recipe's encoder has {encoder_width}: give the "
                "right folder"
            )
    if source is not None:
        misfits = _refusals(lambda: train.check_fit(config, specs, source))
        if not misfits:
            misfits += _refusals(lambda: train.open_evaluation(config, run, specs, source, "cpu"))
            misfits += _refusals(lambda: train.open_real_images(config, specs, source))
        problems += misfits
    return problems


def _refusals(check) -> list[str]:
    try:
        check()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return [str(error)]
    return []


if __name__ == "__main__":
    sys.exit(main())
