"""The runs of a study: checked all together, trained one after the other, judged; what is done is told by the files.

DIR/runs/VARIANT/seed_N/   ordinary runs of drift_accel.train; studies that share DIR share runs of equal name and configuration
DIR/logs/                  what the trainings printed        DIR/STUDY.state.json   what the work is at
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from drift_accel.analysis.studies.study import Study, Variant
from drift_accel.evaluation.work_state import WorkState
from drift_accel.foundation.command_line import configuration_dict, default_values
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.run_records import configuration_differences, duration_text, is_covered
from drift_accel.training.averages import export_names
from drift_accel.training.configuration import TrainingConfig
from drift_accel.training.exports import is_whole_export

DONE, DIVERGED, FAILED, UNFINISHED = "done", "diverged", "failed", "not run"
POLL_SECONDS = 5.0
_NOT_FINITE = "stopped by NonFiniteError: "

CheckConfiguration = Callable[[Sequence[str]], TrainingConfig]
"""The trainer's reading of its arguments, a dry run: ends the process with a message for what it refuses."""


class Judge(Protocol):
    """Turns a trained run into numbers, kept in the run's evaluation folder."""

    def result(self, run: RunFolder) -> dict[str, float] | None:
        """The numbers that are there and still true of the run's export; None where there are none."""

    def judge(self, run: RunFolder) -> None:
        """Make them. Raises ValueError and OSError."""

    def of_real(self, run: RunFolder) -> dict[str, float]:
        """The same numbers of real images in the place of the samples, where a judged run has them."""


class TrainingFailedError(RuntimeError):
    """A training ended otherwise than with a whole export."""


@dataclass(frozen=True)
class StudyRun:
    """One training: a variant with a seed."""

    variant: Variant
    seed: int
    arguments: list[str]
    config: TrainingConfig
    run: RunFolder

    @property
    def name(self) -> str:
        """VARIANT-seed_N."""
        return f"{self.variant.name}-seed_{self.seed}"

    def is_trained(self) -> bool:
        """Whether its last step is done and its exports are whole."""
        exports = [self.run.export_dir(name) for name in export_names(self.config.ema.decays).values()]
        return all(is_whole_export(folder, self.config.steps) for folder in exports)

    def divergence(self) -> str | None:
        """Where and why it stopped, if a loss or gradient that was not finite ended it."""
        outcome = self.run.last_outcome()
        return outcome.removeprefix(_NOT_FINITE) if outcome and outcome.startswith(_NOT_FINITE) else None


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its state, what there is to say about it, and its numbers if it is done."""

    state: str
    detail: str = ""
    metrics: Mapping[str, float] | None = None


def plan_runs(study: Study, output_dir: Path, check: CheckConfiguration) -> list[StudyRun]:
    """Every run of a study, seed by seed, so that a study that is stopped early has compared all variants.

    Everything that can be refused is refused here: raises ValueError naming the variant for a configuration that the trainer
    refuses, for two variants of one configuration, and for a run that is there already with another configuration.
    """
    configs: dict[str, TrainingConfig] = {}
    for variant in study.variants:
        config = _checked(study, variant, check)
        same = [name for name, other in configs.items() if other == config]
        if same:
            names = f"{same[0]} and {variant.name}"
            raise ValueError(f"variants {names} have one and the same configuration: change one, or take it out")
        configs[variant.name] = config
    return [
        _plan_run(study, variant, seed, replace(configs[variant.name], seed=seed), output_dir)
        for seed in study.seeds
        for variant in study.variants
    ]


def choose_runs(runs: Sequence[StudyRun], only: Sequence[str]) -> list[StudyRun]:
    """The runs of the variants that are named in `only`; all of them for none. Raises ValueError for an unknown name."""
    names = list(dict.fromkeys(item.variant.name for item in runs))
    for name in only:
        if name not in names:
            raise ValueError(f"--only {name}: the study has no such variant; it has {', '.join(names)}")
    return [item for item in runs if not only or item.variant.name in only]


def _checked(study: Study, variant: Variant, check: CheckConfiguration) -> TrainingConfig:
    """A variant's configuration; its seeds change nothing else."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return check(study.arguments(variant, study.seeds[0]))
    except SystemExit:
        message = " ".join(said.getvalue().partition("error:")[2].split()) or said.getvalue().strip()
        raise ValueError(f"variant {variant.name}: the trainer refuses its configuration: {message}") from None


def _plan_run(study: Study, variant: Variant, seed: int, config: TrainingConfig, output_dir: Path) -> StudyRun:
    run = RunFolder(output_dir / "runs" / variant.name / f"seed_{seed}")
    if run.config_path.exists():
        asked, defaults = configuration_dict(config), default_values(type(config))
        differences = configuration_differences(run.read_configuration(), asked, defaults)
        refused = [f"{key}: {text}" for key, text in differences.items() if not is_covered(key, config.may_change)]
        if refused:
            raise ValueError(
                f"variant {variant.name}: the run in {run.path} has another configuration (saved -> asked): {'; '.join(refused)}."
                " Give another --output_dir or name"
            )
        done = max(run.checkpoint_steps(), default=0)
        if done > config.steps:
            raise ValueError(
                f"variant {variant.name}: the run in {run.path} has {done} steps already, {config.steps} are asked for: "
                "raise steps, or give another --output_dir"
            )
    return StudyRun(variant, seed, study.arguments(variant, seed), config, run)


def outcome_of(item: StudyRun, judge: Judge) -> Outcome:
    """What the files of a run say."""
    if item.is_trained():
        metrics = judge.result(item.run)
        return Outcome(UNFINISHED, "trained, not judged") if metrics is None else Outcome(DONE, metrics=metrics)
    divergence = item.divergence()
    if divergence is not None:
        return Outcome(DIVERGED, divergence)
    return Outcome(UNFINISHED, f"at step {max(item.run.checkpoint_steps(), default=0)} of {item.config.steps}")


def run_study(
    runs: Sequence[StudyRun],
    judge: Judge,
    train: Callable[[StudyRun], None],
    state_path: Path,
    *,
    again: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Outcome]:
    """Train and judge what is not done yet; the outcome of every run by its name.

    `train` runs one training to its end and raises TrainingFailedError where it ends otherwise. A run that diverged or failed is
    noted and the next one starts; `again` also repeats those that diverged before.
    """
    spent, state = [], WorkState(state_path, tuple(item.name for item in runs))
    outcomes = {item.name: outcome_of(item, judge) for item in runs}
    open_states = (UNFINISHED, DIVERGED) if again else (UNFINISHED,)
    num_left = sum(outcome.state in open_states for outcome in outcomes.values())
    for number, item in enumerate(runs, start=1):
        place, before = f"[{number}/{len(runs)}] {item.name}", outcomes[item.name]
        if before.state not in open_states:
            if before.state == DONE:
                state.skip(item.name)
            log(f"{place}: {describe(before)}, kept")
            continue
        log(f"{place}: {before.detail}, starts{_time_left(spent, num_left)}")
        start = time.monotonic()
        state.run(item.name, lambda item=item: _work(item, judge, train, log))
        spent.append(time.monotonic() - start)
        num_left -= 1
        outcomes[item.name] = _outcome_after(item, judge, state.stages[item.name])
        log(f"{place}: {describe(outcomes[item.name])}, {duration_text(spent[-1])}")
    state.finish()
    return outcomes


def describe(outcome: Outcome) -> str:
    """An outcome in a line."""
    if outcome.metrics is not None:
        return ", ".join(f"{name} {value:.4g}" for name, value in outcome.metrics.items())
    return f"{outcome.state}: {outcome.detail}" if outcome.detail else outcome.state


def _work(item: StudyRun, judge: Judge, train: Callable[[StudyRun], None], log: Callable[[str], None]) -> None:
    if not item.is_trained():
        _wait_until_free(item.run, log)
    if not item.is_trained():
        train(item)
    judge.judge(item.run)


def _wait_until_free(run: RunFolder, log: Callable[[str], None]) -> None:
    """A start of the study that was killed may have left its training behind, which goes on by itself."""
    if run.is_held():
        log(f"{run.path} is being trained by a process that is still there: waiting for it")
    while run.is_held():
        time.sleep(POLL_SECONDS)


def _outcome_after(item: StudyRun, judge: Judge, stage: str) -> Outcome:
    outcome = outcome_of(item, judge)
    if outcome.state == UNFINISHED:
        return Outcome(FAILED, stage.removeprefix("failed: "))
    return outcome


def _time_left(spent: Sequence[float], num_left: int) -> str:
    """Nothing is known of the first one."""
    return f"; {num_left} left, about {duration_text(sum(spent) / len(spent) * num_left)}" if spent else ""
