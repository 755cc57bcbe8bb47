"""Train the published encoders one after the other: python tools/export_mae_widths.py --output_dir RUNS [-- --key value ...]

The latent masked autoencoders of width 256 and 640 (--recipes: others), each into RUNS/NAME with its export in exports/; what is
complete is skipped, what was interrupted goes on. --classifier_steps adds to recipes without a classifier phase one of its own,
into RUNS/NAME_cls with its encoder in exports/encoder_cls. --after FILE waits until another command's state file says "done"
(tools/watch.py and this tool write one). Options behind `--` go to every training. The state is in RUNS/export_mae_widths.json;
the end is a table of what is there.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from drift_accel.evaluation.work_state import DONE, WorkState
from drift_accel.foundation.command_line import parse_command
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import sha256_file, verify_folder
from drift_accel.models.exports import load_export
from drift_accel.models.masked_autoencoder import MaskedAutoencoder
from drift_accel.train_mae import MaeTrainingConfig
from drift_accel.training.averages import average_name
from drift_accel.training.stops import EXIT_STOPPED

ROOT = Path(__file__).resolve().parents[1]
STATE_NAME = "export_mae_widths.json"
RECIPES = ("train_configs/mae_latent_256.yaml", "train_configs/mae_latent_640.yaml")
LAUNCH = "accelerate launch --num_machines 1 --mixed_precision no --dynamo_backend no"
POLL_SECONDS = 30.0


@dataclass(frozen=True)
class Stage:
    """One training: its name, arguments of drift_accel.train_mae, and the configuration that they make."""

    name: str
    arguments: list[str]
    config: MaeTrainingConfig
    run: RunFolder

    @property
    def exports(self) -> list[Path]:
        """The folders that it leaves behind."""
        return [self.run.export_dir(name) for name in self.config.export_names.values()]

    def is_complete(self) -> bool:
        """Whether its last step is done and every export whole."""
        steps = self.run.checkpoint_steps()
        return bool(steps) and steps[-1] == self.config.steps and all(not verify_folder(path) for path in self.exports)


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line; what follows `--` is kept for the trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own, _, more = _split(sys.argv[1:])
    add = parser.add_argument
    add("--output_dir", type=Path, required=True, help="folder of the runs")
    recipes = [ROOT / name for name in RECIPES]
    add("--recipes", type=Path, nargs="+", default=recipes, help="default: the latent encoders of width 256 and 640")
    add("--after", type=Path, metavar="FILE", help="wait until this state file says that its command is done")
    add("--poll_seconds", type=float, default=POLL_SECONDS, help=f"between two looks at it (default: {POLL_SECONDS:g})")
    add("--classifier_steps", type=int, default=0, help="of a classifier phase for recipes that have none (default: 0, none)")
    add("--classifier_lr", type=float, default=1e-3, help="its learning rate (default: 0.001)")
    add("--launch", default=LAUNCH, help=f"how trainings are started (default: {LAUNCH})")
    add("--audit", action="store_true", help="train nothing, print the table")
    arguments = parser.parse_args(own)
    arguments.more = more
    if arguments.classifier_steps < 0:
        parser.error(f"--classifier_steps is {arguments.classifier_steps}: give at least 0")
    if not arguments.poll_seconds > 0:
        parser.error(f"--poll_seconds is {arguments.poll_seconds}: give a positive number")
    return parser, arguments


def _split(given: list[str]) -> tuple[list[str], str, list[str]]:
    place = given.index("--") if "--" in given else len(given)
    return given[:place], "--", given[place + 1 :]


def main() -> int:
    """Wait, train, audit; 1 where something is missing in the end, 75 where a training was asked to stop."""
    parser, arguments = parse_arguments()
    try:
        stages = plan(arguments)
        if arguments.audit:
            return 0 if print_audit(stages) else 1
        state = WorkState(arguments.output_dir / STATE_NAME, tuple(stage.name for stage in stages))
        if arguments.after is not None:
            wait_for(arguments.after, state, arguments.poll_seconds)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for stage in stages:
        if stage.is_complete():
            print(f"{stage.name}: complete, skipped")
            state.skip(stage.name)
            continue
        stopped = []
        if not state.run(stage.name, lambda stage=stage, stopped=stopped: train(stage, arguments.launch, stopped)):
            print(f"{stage.name}: {state.stages[stage.name]}", file=sys.stderr)
            if stopped:
                return EXIT_STOPPED
            break  # a classifier phase needs its encoder, and a machine that fails one training fails the next
    whole = print_audit(stages)
    return 0 if state.finish() and whole else 1


def plan(arguments: argparse.Namespace) -> list[Stage]:
    """All trainings in their order. Raises ValueError for a recipe that is not there and two of one name."""
    stages = []
    for recipe in arguments.recipes:
        if not recipe.is_file():
            raise ValueError(f"--recipes: there is no {recipe}")
        stage = make_stage(recipe.stem, recipe, arguments, [])
        stages.append(stage)
        steps = arguments.classifier_steps
        if steps and not stage.config.classifier.steps:
            phase = {
                "--init_from": stage.exports[0], "--steps": steps, "--classifier.steps": steps,
                "--optimizer.lr": arguments.classifier_lr, "--optimizer.warmup_steps": steps // 10,
            }  # fmt: skip
            changes = [str(part) for pair in phase.items() for part in pair]
            stages.append(make_stage(f"{recipe.stem}_cls", recipe, arguments, changes))
    names = [stage.name for stage in stages]
    if len(set(names)) < len(names):
        raise ValueError(f"--recipes: two have the same name: {', '.join(names)}")
    return stages


def make_stage(name: str, recipe: Path, arguments: argparse.Namespace, changes: list[str]) -> Stage:
    """One training; its configuration is read as the trainer will."""
    run = RunFolder(arguments.output_dir / name)
    given = ["--config", str(recipe), *arguments.more, *changes]
    config = parse_command(MaeTrainingConfig, "", [*given, "--dry_run"]).config
    return Stage(name, [*given, "--output_dir", str(run.path)], config, run)


def wait_for(path: Path, state: WorkState, seconds: float) -> None:
    """Return when the state file says that its command is done. Raises ValueError where it failed or is no state file."""
    said = ""
    while True:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            now = str(found["now"])
        except FileNotFoundError:
            now = "not started"  # its command may be about to begin
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"--after {path} is no state file ({error!r}): give one that tools/watch.py or this tool wrote"
            ) from None
        if now == DONE:
            return
        if now.startswith("failed"):
            raise ValueError(f"--after {path}: that command has {now}; start it again, or leave --after out")
        state.wait(f"for {path} ({now})")
        if state.now != said:
            said = state.now
            print(said, flush=True)
        time.sleep(seconds)


def train(stage: Stage, launch: str, stopped: list[int]) -> None:
    """Run one training to its end. Raises RuntimeError where it ends otherwise; `stopped` gets the code of a wished stop."""
    command = [*shlex.split(launch), "-m", "drift_accel.train_mae", *stage.arguments]
    print(f"{stage.name}: {shlex.join(command)}", flush=True)
    code = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode
    if code == EXIT_STOPPED:
        stopped.append(code)
        raise RuntimeError("stopped on request; the same command goes on")
    if code:
        raise RuntimeError(f"the training ended with code {code}; its messages say why, the same command goes on")
    if not stage.is_complete():
        raise RuntimeError(f"the training ended without a whole export in {stage.run.exports_dir}")


def print_audit(stages: list[Stage]) -> bool:
    """The table of what is there; whether all of it is whole and what the recipes say."""
    header = ("run", "width", "steps", "weights", "val reconstruction", "val accuracy", "sha256", "verdict")
    rows = [header, *(audit(stage) for stage in stages)]
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    return all(row[-1] == "complete" for row in rows[1:])


def audit(stage: Stage) -> tuple[str, ...]:
    """One row: read from the files, and the export loaded and compared with its recipe."""
    steps = stage.run.checkpoint_steps()
    done = f"{steps[-1] if steps else 0}/{stage.config.steps}"
    start = (stage.name, str(stage.config.mae.resolved()["width"]), done)
    export = stage.exports[0]
    if not stage.is_complete():
        problems = verify_folder(export) if export.exists() else []
        return (*start, "-", "-", "-", "-", f"damaged: {problems[0]}" if problems else "missing" if not steps else "unfinished")
    try:
        model = load_export(export, MaskedAutoencoder)
        wanted = {name: value for name, value in stage.config.mae.resolved().items() if name != "input_space"}
        other = [name for name, value in wanted.items() if _plain(model.config[name]) != _plain(value)]
    except (ValueError, OSError) as error:
        return (*start, "-", "-", "-", "-", f"damaged: {' '.join(str(error).split())}")
    record = (stage.run.read_metrics() or [{}])[-1]
    name = average_name(stage.config.ema.decays[0])
    shown = [f"{record[tag]:.4f}" if (tag := f"val/{key}_{name}") in record else "-" for key in ("reconstruction", "accuracy")]
    count = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M"
    digest = sha256_file(next(export.glob("*.safetensors")))[:12]
    return (*start, count, *shown, digest, f"other {', '.join(other)}" if other else "complete")


def _plain(value):
    return list(value) if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    raise SystemExit(main())
