"""The gates of launch_scripts/imagenet256.sh: python tools/check_stage.py all|STAGE [--look | --failed CODE] --work WORK ...

STAGE: looks at everything that the stage has left (counts, hashes, finite numbers, a loss or statistic that moved), writes what
it found to WORK/gates.json and ends with 0, or with 1 and the next command to type. --look: 0 where the stage has passed before
and its output is still the same, 3 where it is to be run, 1 where its output is broken or a stage that it needs has not passed.
all: what the stages that are left need on the disk, and what they start from; 1 where something is missing. --list prints the
gates. The script gives all other options; they say where things lie.
"""

import argparse
import json
import sys
from pathlib import Path

from drift_accel.analysis.reproduction.gates import Gates, State
from drift_accel.analysis.reproduction.stages import STAGES, Reproduction

TO_RUN = 3


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=("all", *STAGES), help="what to look at")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--look", action="store_true", help="only whether it is to be run")
    mode.add_argument("--failed", type=int, metavar="CODE", help="record that its command has ended with this code")
    mode.add_argument("--list", action="store_true", help="print the state of every gate")
    for name, what in (
        ("work", "folder of gates.json"), ("archives", "folder of the three archives"), ("images", "folder of the pictures"),
        ("cache", "the latents"), ("reference", "statistics of real pictures"), ("mae", "the encoder's run"),
        ("encoder", "its export, or an encoder from elsewhere"), ("generator", "the generator's run"),
        ("samples", "the .npz of samples"), ("result", "their evaluation"), ("mae_recipe", "YAML of the encoder"),
        ("recipe", "YAML of the generator"),
    ):  # fmt: skip
        add(f"--{name}", type=Path, required=True, help=what)
    add("--protocol", required=True, help="of reference and evaluation")
    add("--network", type=Path, help="the protocol's network")
    add("--num_samples", type=int, default=50_000, help="(default: 50000)")
    add("--image_size", type=int, default=256, help="(default: 256)")
    add("--other_archives", action="store_true", help="the archives are others than ImageNet's: any number of pictures will do")
    add("--options", default="", help="keys of the generator's training beside its recipe, in one text")
    add("--mae_options", default="", help="keys of the encoder's training beside its recipe, in one text")
    add("--command", default="bash launch_scripts/imagenet256.sh", help="how the script is called, for what to type next")
    return parser, parser.parse_args()


def main() -> int:
    """Parse, look, print."""
    parser, arguments = parse_arguments()
    names = Reproduction.__dataclass_fields__.keys() - {"is_imagenet"}
    try:
        paths = Reproduction(is_imagenet=not arguments.other_archives, **{name: getattr(arguments, name) for name in names})
        gates = Gates(paths, arguments.command)
        if arguments.list:
            return print_gates(gates)
        if arguments.stage == "all":
            return plan(gates, arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    stage = arguments.stage
    if arguments.look:
        state, problems = gates.look(stage)
        if state is State.UNFINISHED:
            return TO_RUN
        if state is State.FINISHED:
            print(f"{stage}: passed on {gates.stages[stage]['time']}, skipped")
            return 0
    else:
        problems = gates.check(stage) if arguments.failed is None else gates.fail(stage, arguments.failed)
    for check in gates.stages[stage]["checks"] if not arguments.look else ():
        print(f"{'ok ' if check['passed'] else 'NOT'} {stage}: {check['check']}: {shown(check['found'])}")
    for problem in problems:
        print(f"{stage}: {problem}", file=sys.stderr)
    if problems and not all(problem.startswith("needs stage") for problem in problems):
        print(f"next: {gates.next_command(stage, problems)}", file=sys.stderr)
    return 1 if problems else 0


def plan(gates: Gates, arguments: argparse.Namespace) -> int:
    """Space on the disk and inputs of the stages that are left; 1 where something is missing."""
    from drift_accel import train, train_mae
    from drift_accel.analysis.reproduction.budget import disk_problems, plan_space
    from drift_accel.evaluation.networks import find_network
    from drift_accel.evaluation.protocols import get_protocol
    from drift_accel.foundation.command_line import parse_command

    finished = [stage for stage in STAGES if gates.stages.get(stage, {}).get("status") == "passed"]
    given = ["--config", str(arguments.recipe), *arguments.options.split(), "--dry_run"]
    generator = parse_command(train.GeneratorTrainingConfig, "", given).config
    folders = ["--data.path", str(arguments.images / "train"), "--validation.path", str(arguments.images / "val")]
    given = ["--config", str(arguments.mae_recipe), *folders, *arguments.mae_options.split(), "--dry_run"]
    mae = parse_command(train_mae.MaeTrainingConfig, "", given).config
    spaces = plan_space(gates.paths, generator, mae, finished)
    for space in spaces:
        passing = f", and {space.passing / 1e9:.2f} GB while it runs" if space.passing else ""
        print(f"{space.stage:<10}{space.kept / 1e9:10.2f} GB in {space.folder}{passing}")
    problems = disk_problems(spaces)
    if not {"reference", "evaluate"} <= set(finished):
        try:
            find_network(get_protocol(arguments.protocol), arguments.network)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if not gates.paths.trains_encoder and not arguments.encoder.is_dir():
        problems.append(f"ENCODER {arguments.encoder} is no folder: give an encoder's, or leave it out to train one")
    if not gates.paths.makes_reference and not arguments.reference.is_file():
        problems.append(f"REFERENCE {arguments.reference} is no file: give one of statistics, or leave it out to make it")
    total = sum(space.kept for space in spaces) / 1e9
    print(f"{'together':<10}{total:10.2f} GB for {len(STAGES) - len(finished)} of {len(STAGES)} stages")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if problems:
        print(f"next: mend that, then: {gates.command} all", file=sys.stderr)
    return 1 if problems else 0


def print_gates(gates: Gates) -> int:
    """One line a stage; 1 unless all have passed."""
    for stage in STAGES:
        entry = gates.stages.get(stage)
        line = "not run yet" if entry is None else f"{entry['status']} {entry['time']}"
        print(f"{stage:<14}{line}{'' if not entry or not entry['next'] else ', next: ' + entry['next']}")
    return 0 if all(gates.stages.get(stage, {}).get("status") == "passed" for stage in STAGES) else 1


def shown(value) -> str:
    """A finding in a line."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 100 else f"{text[:97]}..."


if __name__ == "__main__":
    sys.exit(main())
