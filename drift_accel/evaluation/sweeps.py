"""Many evaluations of one run: guidance scales, averages, checkpoints; a cheap pass first, then a full one at the best.

The noise is the same everywhere (sample i depends on the seed and i), so that differences are those of the settings. Every
evaluation is a result file of its own in RUN/evaluation: an interrupted sweep goes on with those that are missing.
"""

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.results import is_better, load_result, main_metric
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_text
from drift_accel.sampling.trained import checkpoint_averages

NAME_PATTERN = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting of a sweep."""

    guidance_scale: float
    step: int | None = None
    """A checkpoint; None: the run's export."""
    ema: str | None = None
    """An average; None: the first."""


def result_name(protocol: str, step: int | None, ema: str | None, guidance_scale: float, count: int, seed: int) -> str:
    """The file name, without suffix, of an evaluation: it holds everything that is likely to vary."""
    parts = [protocol, f"step_{step:08d}" if step is not None else None, ema, f"guidance_{guidance_scale:g}", f"n{count}"]
    parts.append(f"seed_{seed}" if seed else None)
    return NAME_PATTERN.sub("-", "_".join(part for part in parts if part))


def parse_guidance(text: str) -> list[float]:
    """Guidance scales of "1.0,1.5,2.0" or of "1.0/3.0/9" (least, most, number), rising. Raises ValueError for others."""
    try:
        if "/" in text:
            parts = text.split("/")
            if len(parts) != 3:
                raise ValueError(f"{len(parts)} parts between slashes")
            low, high, number = parts
            count = int(number)
            if count < 2:
                raise ValueError("give at least 2 values")
            values = [float(low) + (float(high) - float(low)) * place / (count - 1) for place in range(count)]
        else:
            values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--guidance is {text!r} ({error}): give values such as 1.0,1.5,2.0 or least/most/number") from None
    values = sorted({round(value, 6) for value in values})
    if values[0] < 1 or values[-1] == float("inf") or any(value != value for value in values):
        raise ValueError(f"--guidance is {text!r}: guidance starts at 1 (no guidance)")
    return values


def choose_steps(run: RunFolder, steps: str | None, last: int | None) -> list[int | None]:
    """The checkpoints that "1000,2000", "all" or the last `last` stand for; [None], the export, where neither is given.

    Raises ValueError for checkpoints that are not there.
    """
    there = run.checkpoint_steps()
    if steps is not None and last is not None:
        raise ValueError("--steps and --last both choose checkpoints: give one of them")
    if steps is None and last is None:
        return [None]
    if not there:
        raise ValueError(f"{run.path} has no checkpoints")
    if last is not None:
        if last < 1:
            raise ValueError(f"--last is {last}: give at least 1")
        return list(there[-last:])
    if steps == "all":
        return list(there)
    try:
        asked = [int(part) for part in steps.split(",")]
    except ValueError:
        raise ValueError(f'--steps is {steps!r}: give steps such as 1000,2000, or "all"') from None
    missing = sorted(set(asked) - set(there))
    if missing:
        raise ValueError(f"{run.path} has no checkpoint of step {missing[0]}: it has {', '.join(map(str, there))}")
    return sorted(set(asked))


def choose_averages(run: RunFolder, text: str | None) -> list[str | None]:
    """The averages that "0.999,0.9999", "all" or "none" stand for; [None], the first one, for None. Raises ValueError."""
    if text is None:
        return [None]
    if text != "all":
        return [part.strip() for part in text.split(",") if part.strip()]
    steps = run.checkpoint_steps()
    if not steps:
        raise ValueError(f"{run.path} has no checkpoints whose averages could be listed: name them")
    return list(checkpoint_averages(run.checkpoint_dir(steps[-1])))


class Evaluator(Protocol):
    """What a sweep needs from `RunEvaluator`."""

    def __call__(self, point: Point, num_samples: int, path: Path) -> None:
        """Write the result of a point; all processes call it."""

    def problems(self, result: Mapping[str, Any]) -> list[str]:
        """Why a result that is there is not one that this evaluator would write, one line a reason."""


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep computes. Raises ValueError for no points or counts below 1."""

    points: tuple[Point, ...]
    num_samples: int
    """Samples of each point."""
    final_samples: int | None
    """Samples of the best point at the end; None: no second pass."""
    protocol: str
    seed: int = 0

    def __post_init__(self):
        if not self.points:
            raise ValueError("a sweep needs at least one point")
        for name in ("num_samples", "final_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}: give at least 1")


def run_sweep(
    run: RunFolder, plan: SweepPlan, evaluate: Evaluator, *, workers: Workers | None = None, log: Callable[[str], None] = print
) -> tuple[list[tuple[Point, dict[str, Any]]], dict[str, Any] | None]:
    """Evaluate every point that has no result yet, then the best one with more samples; returns (results, that of the best).

    Results that are there are taken if they were made in the same way. Raises ValueError where they were not.
    """
    workers = workers or Workers()
    results = []
    for number, point in enumerate(plan.points, start=1):
        note = f"{number} of {len(plan.points)}: "
        results.append((point, evaluate_once(run, plan, point, plan.num_samples, evaluate, workers, log, note)))
    if plan.final_samples is None:
        return results, None
    best = best_point(results)
    return results, evaluate_once(run, plan, best, plan.final_samples, evaluate, workers, log, "the best: ")


def evaluate_once(
    run: RunFolder,
    plan: SweepPlan,
    point: Point,
    count: int,
    evaluate: Evaluator,
    workers: Workers,
    log: Callable[[str], None],
    note: str = "",
) -> dict[str, Any]:
    """The result of a point: the one that is there, or a new one. Raises ValueError for one that was made in another way."""
    path = point_path(run, plan, point, count)
    if not path.exists():
        if workers.is_main:
            log(f"{note}{path.stem}")
        evaluate(point, count, path)
        workers.wait()
    result = load_result(path)
    problems = evaluate.problems(result)
    if problems:
        raise ValueError(f"{path} was made in another way:\n  " + "\n  ".join(problems) + "\nRemove it, or undo these changes")
    return result


def point_path(run: RunFolder, plan: SweepPlan, point: Point, count: int) -> Path:
    """The result file of a point."""
    return run.evaluation_path(result_name(plan.protocol, point.step, point.ema, point.guidance_scale, count, plan.seed))


def best_point(results: Sequence[tuple[Point, Mapping[str, Any]]]) -> Point:
    """The point whose main metric is best; the first one of equals."""
    name = main_metric(results[0][1]["metrics"])
    best, value = results[0][0], results[0][1]["metrics"][name]
    for point, result in results[1:]:
        if is_better(name, result["metrics"][name], value):
            best, value = point, result["metrics"][name]
    return best


def sweep_rows(results: Sequence[tuple[Point, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """One flat row a result: step, average, guidance, count and every number."""
    rows = []
    for point, result in results:
        model = result.get("model") or {}
        row = {"step": model.get("step", point.step), "ema": model.get("ema", point.ema), "guidance_scale": point.guidance_scale}
        rows.append({**row, "num_samples": result["num_generated"], **result["metrics"]})
    return rows


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_text(path, text.getvalue())


def require_same_sweep(path: Path, plan: SweepPlan) -> None:
    """Raise ValueError where the table at `path`, if there is one, is of other points than `plan`: it would be lost."""
    if not path.exists():
        return
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        found = {(float(row["guidance_scale"]), int(row["num_samples"])) for row in rows}
        steps = {row["step"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of a sweep ({error!r}): give another --name") from None
    asked = {str(point.step) for point in plan.points if point.step is not None}
    if found != {(point.guidance_scale, plan.num_samples) for point in plan.points} or (asked and steps != asked):
        raise ValueError(f"{path} is the table of another sweep: give another --name, or add --overwrite")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same rows for people."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    shown = [[_shown(row.get(name)) for name in names] for row in rows]
    return "\n".join(["| " + " | ".join(names) + " |", "|---" * len(names) + "|", *("| " + " | ".join(r) + " |" for r in shown)])


def points_of(guidance: Sequence[float], steps: Sequence[int | None], averages: Sequence[str | None]) -> tuple[Point, ...]:
    """Every combination, steps outermost, guidance innermost."""
    base = Point(guidance_scale=1.0)
    return tuple(
        replace(base, guidance_scale=scale, step=step, ema=ema) for step in steps for ema in averages for scale in guidance
    )  # fmt: skip


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
