"""Train and judge the variants of a study: python tools/ablate.py STUDY.yaml --output_dir DIR

A study names a base recipe, common changes, seeds, how runs are judged, and variants (train_configs/studies/README.md). All
configurations are checked before the first training. Every variant and seed is an ordinary run in DIR/runs; what is done is
skipped, a killed study goes on by the same command, a run that diverges or fails is a row that says so. The end is a table with
means and spreads over seeds: DIR/STUDY.md, .csv, .json and .png. Several studies may share DIR and the runs they have in common.
"""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from drift_accel.analysis.studies.judges import check_evaluation, make_judge
from drift_accel.analysis.studies.launch import Launcher, stopping_with_sigterm
from drift_accel.analysis.studies.plot import plot_study
from drift_accel.analysis.studies.runs import DONE, Judge, Outcome, StudyRun, choose_runs, outcome_of, plan_runs, run_study
from drift_accel.analysis.studies.study import Study, read_study
from drift_accel.analysis.studies.table import chosen_metric, markdown_table, study_rows, write_tables
from drift_accel.foundation.command_line import parse_command
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.train import GeneratorTrainingConfig


def parse_arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=Path, help="study file, YAML")
    add("--output_dir", type=Path, required=True, help="folder of runs and tables")
    add("--seeds", help="comma-separated, in place of the study's")
    add("--only", action="append", default=[], metavar="VARIANT", help="train these variants alone (may be repeated)")
    add("--dry_run", action="store_true", help="check everything, print each run's command and what is done; train nothing")
    add("--table", action="store_true", help="train nothing, make the tables of what is done")
    add("--again", action="store_true", help="also train what diverged before")
    add("--num_processes", type=int, default=1, help="processes of each training, on this machine (default: 1)")
    add("--launch", help="the command in front of -m drift_accel.train (default: accelerate launch with --num_processes)")
    arguments = parser.parse_args()
    if arguments.num_processes < 1:
        parser.error(f"--num_processes is {arguments.num_processes}: give at least 1")
    return parser, arguments


def main() -> int:
    """Check, train, judge, print; 1 where a run is missing or did not end well, 75 where the study was asked to stop."""
    parser, arguments = parse_arguments()
    try:
        study = read_study(arguments.study, seeds=asked_seeds(arguments.seeds))
        runs = plan_runs(study, arguments.output_dir, checked_configuration)
        check_evaluation(study.evaluation, (item.config for item in runs))
        chosen = choose_runs(runs, arguments.only)
        launch = None if arguments.launch is None else shlex.split(arguments.launch)
        launcher = Launcher(logs=arguments.output_dir / "logs", num_processes=arguments.num_processes, launch=launch)
        if arguments.dry_run:
            print_plan(chosen, launcher)
            return 0
        with exclusive_lock(arguments.output_dir / ".lock", f"a study in {arguments.output_dir}"), stopping_with_sigterm():
            judge = make_judge(study.evaluation, arguments.output_dir)
            state = arguments.output_dir / f"{study.name}.state.json"
            done = {} if arguments.table else run_study(chosen, judge, launcher, state, again=arguments.again, log=say)
            outcomes = {item.name: done.get(item.name) or outcome_of(item, judge) for item in runs}
            report(study, runs, outcomes, judge, arguments.output_dir)
            return 0 if all(outcomes[item.name].state == DONE for item in chosen) else 1
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))


def asked_seeds(text: str | None) -> list[int] | None:
    """The numbers of "0,1,2". Raises ValueError."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds is {text!r}: give numbers such as 0,1,2") from None


def checked_configuration(arguments: Sequence[str]) -> GeneratorTrainingConfig:
    """What the trainer makes of its arguments, as a dry run."""
    return parse_command(GeneratorTrainingConfig, "", [*arguments, "--dry_run"]).config


def say(line: str) -> None:
    """Print at once, also into a file."""
    print(line, flush=True)


def print_plan(runs: Sequence[StudyRun], launcher: Launcher) -> None:
    """The command of every run, and what is there of it."""
    for item in runs:
        state = "trained" if item.is_trained() else f"at step {max(item.run.checkpoint_steps(), default=0)}"
        print(f"{item.name} ({state} of {item.config.steps}):\n  {shlex.join(launcher.command(item))}")
    print(f"{len(runs)} runs; every configuration is accepted")


def report(study: Study, runs: Sequence[StudyRun], outcomes: Mapping[str, Outcome], judge: Judge, folder: Path) -> None:
    """Write and print the tables and the picture."""
    rows = study_rows(study, runs, outcomes)
    written, metric = write_tables(study, runs, rows, folder), chosen_metric(study, rows)
    if metric is not None:
        finished = next(item.run for item in runs if outcomes[item.name].state == DONE)
        written.append(folder / f"{study.name}.png")
        plot_study(rows, written[-1], title=study.title, metric=metric, reference=judge.of_real(finished))
    print(f"\n{study.title}\n\n{markdown_table(study, rows)}\n")
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    raise SystemExit(main())
