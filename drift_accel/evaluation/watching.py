"""Evaluating each new checkpoint of a run while it trains.

What is done is told by the result files, so that the watcher may be stopped and started at any time; a checkpoint that the
trainer removes before its turn is passed over.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from drift_accel.data.latent_export import Workers
from drift_accel.evaluation.sweeps import Evaluator, SweepPlan, evaluate_once, point_path
from drift_accel.evaluation.work_state import WorkState
from drift_accel.foundation.collectives import run_on_main, world_group
from drift_accel.foundation.run_folder import RunFolder

STATE_NAME = "state.json"


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """How a run is watched. Raises ValueError for values out of range."""

    poll_seconds: float = 60.0
    """Between two looks at the run."""
    every: int = 1
    """Only checkpoints whose step is a multiple of this, and the last one."""
    give_up_seconds: float | None = None
    """End when no checkpoint came for so long, though the run is not finished; None: wait for ever."""

    def __post_init__(self):
        if self.poll_seconds <= 0 or self.every < 1:
            raise ValueError(f"--poll_seconds is {self.poll_seconds} and --every {self.every}: give more than 0, and at least 1")
        if self.give_up_seconds is not None and self.give_up_seconds <= 0:
            raise ValueError(f"--give_up_seconds is {self.give_up_seconds}: give more than 0")


def watch_run(
    run: RunFolder,
    plan: SweepPlan,
    evaluate: Evaluator,
    state: WorkState,
    *,
    config: WatchConfig | None = None,
    workers: Workers | None = None,
    log: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Evaluate every checkpoint of `run` at each point of `plan` (their steps are filled in) until the last one is done.

    Returns whether the run reached its last step; False means that it was given up. A checkpoint that fails is noted in
    `state`, logged and not tried again by this watcher.
    """
    config, workers = config or WatchConfig(), workers or Workers()
    tried: set[int] = set()
    seen_at = clock()

    def look() -> tuple[list[int], bool, bool]:
        due = [step for step in due_steps(run, plan, config.every) if step not in tried]
        return due, is_finished(run), config.give_up_seconds is not None and clock() - seen_at > config.give_up_seconds

    while True:
        # One process looks and all do as it says: folders do not change for all at the same moment.
        due, finished, patience_is_over = run_on_main(look, world_group())
        for step in due:
            tried.add(step)
            seen_at = clock()
            _evaluate_step(run, plan, step, evaluate, state, workers, log)
        if due:
            continue
        if finished or patience_is_over:
            return finished
        state.wait("for a checkpoint")
        sleep(config.poll_seconds)


def due_steps(run: RunFolder, plan: SweepPlan, every: int) -> list[int]:
    """Steps of complete checkpoints, rising, that have no result for some point yet."""
    last = last_step(run)
    return [
        step
        for step in run.checkpoint_steps()
        if (step % every == 0 or step == last)
        and any(not point_path(run, plan, replace(point, step=step), plan.num_samples).exists() for point in plan.points)
    ]


def is_finished(run: RunFolder) -> bool:
    """Whether the run has the checkpoint of its last step."""
    last = last_step(run)
    return last is not None and last in run.checkpoint_steps()


def last_step(run: RunFolder) -> int | None:
    """The step at which the run will end; None where its configuration cannot be read yet."""
    try:
        return int(run.read_configuration()["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _evaluate_step(
    run: RunFolder,
    plan: SweepPlan,
    step: int,
    evaluate: Evaluator,
    state: WorkState,
    workers: Workers,
    log: Callable[[str], None],
) -> None:
    def work() -> None:
        for point in plan.points:
            evaluate_once(run, plan, replace(point, step=step), plan.num_samples, evaluate, workers, log)

    name = f"checkpoint {step}"
    if state.run(name, lambda: workers.together(work)):
        return
    if step not in run.checkpoint_steps():
        log(f"{name} was removed by the trainer before it could be evaluated")
        state.skip(name)
    elif workers.is_main:
        log(f"{name}: {state.stages[name]}")
