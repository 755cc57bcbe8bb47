"""How a run is doing: python tools/run_status.py RUN [--watch SECONDS]

Prints step, pace, time left, last values and the alarms that last, from the run's folder alone. A run that was killed is told,
and its RUN.md completed. --watch prints it again every few seconds until the run ends.
"""

import argparse
import time
from pathlib import Path

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.run_records import duration_text
from drift_accel.training.alarms import AlarmWatch, loss_bound

PACE_RECORDS = 20
EVALUATION = "evaluation/"


def main() -> None:
    """Parse, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="again and again (default: every 10 s)"
    )
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    if not run.config_path.is_file():
        parser.error(f"{arguments.run} is no run: it has no {run.config_path.name}")
    if arguments.watch is not None and arguments.watch <= 0:
        parser.error(f"--watch is {arguments.watch}: give a positive number of seconds")
    while True:
        try:
            text, is_over = status(run)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        print(text, flush=True)
        if arguments.watch is None or is_over:
            return
        time.sleep(arguments.watch)
        print()


def status(run: RunFolder) -> tuple[str, bool]:
    """What to print, and whether the run has ended."""
    killed = run.complete_notes()
    configuration, records = run.read_configuration(), run.read_metrics()
    steps, state, is_over = configuration["steps"], *_state(run, killed)
    lines = [f"{run.path.resolve().name}: {state}"]
    if not records:
        return "\n".join([*lines, f"no record yet; {steps:,} steps are to do"]), is_over
    last = records[-1]
    lines.append(f"step {last['step']:,} of {steps:,} ({last['step'] / steps:.1%})")
    pace = _pace(records)
    if pace:
        left = "" if is_over else f", {duration_text((steps - last['step']) / pace)} left"
        lines.append(f"{pace:.3g} steps a second{left}, {_shown(last, 'samples_per_second')} samples a second")
    norms = sorted(name for name in last if name.startswith("drift_sqnorm_") and "/" not in name)
    names = ("loss", *norms, "scale", "diversity_ratio", "reconstruction", "accuracy", "gradient_norm", "learning_rate")
    names += ("data_wait_share", "model_flop_utilisation", "memory_gb", "skipped_steps")
    width = max(map(len, names))
    lines += [f"  {name:<{width}}  {_shown(last, name)}" for name in names if name in last]
    lines += _last_evaluation(records)
    alarms = _lasting_alarms(configuration, records)
    return "\n".join([*lines, *(alarms or ["no alarms"])]), is_over


def _state(run: RunFolder, killed: bool) -> tuple[str, bool]:
    """The last line of the diary in words, and whether nothing runs."""
    if not run.notes_path.exists():
        return "not started", False
    diary = [line for line in run.notes_path.read_text("utf-8").splitlines() if line.startswith("- ")]
    last = diary[-1].removeprefix("- ") if diary else ""
    if last.startswith("opened"):
        return f"running, {last.partition(': ')[0]}", False
    return (f"{last}; the same command goes on" if killed or last.startswith("ended") else last), True


def _pace(records: list[dict]) -> float | None:
    """Steps a second over the last records."""
    rates = [record["steps_per_second"] for record in records[-PACE_RECORDS:] if record.get("steps_per_second")]
    return len(rates) / sum(1 / rate for rate in rates) if rates else None


def _last_evaluation(records: list[dict]) -> list[str]:
    """The newest numbers of the run's own evaluation in a line; none where it has none."""
    for record in reversed(records):
        names = [name for name in record if name.startswith(EVALUATION) and not name.endswith("_std")]
        if names:
            numbers = ", ".join(f"{name.removeprefix(EVALUATION)} {_shown(record, name)}" for name in names)
            return [f"evaluation after step {record['step']:,}: {numbers}"]
    return []


def _lasting_alarms(configuration: dict, records: list[dict]) -> list[str]:
    drift = configuration.get("drift")
    bound = None
    if drift is not None:
        options = {
            "field": drift["field"],
            "reduction": drift["reduction"],
            "statistics": configuration.get("statistics", "global"),
        }
        bound = loss_bound(len(drift["temperatures"]), **options)
    watch = AlarmWatch(max_key_loss=bound, warmup_steps=configuration["optimizer"]["warmup_steps"])
    for record in records:
        watch.check(record)
    return [str(alarm) for alarm in watch.active.values()]


def _shown(record: dict, name: str) -> str:
    value = record.get(name)
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"


if __name__ == "__main__":
    main()
