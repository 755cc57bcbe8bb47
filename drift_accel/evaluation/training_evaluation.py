"""The hook that evaluates a run's generator while it trains.

All processes of the run share the samples, in chunks that no number of processes changes. Nothing here draws from a random
stream of the training, and the generator has its own weights and mode back afterwards.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from drift_accel.data.latent_export import Workers
from drift_accel.data.row_encoders import weights_hash
from drift_accel.evaluation.in_training import PreparedEvaluation
from drift_accel.evaluation.results import load_result, numbers_text
from drift_accel.evaluation.run_evaluator import RunEvaluator
from drift_accel.evaluation.sweeps import Point, result_name
from drift_accel.foundation.collectives import SharedWork, SharedWorkError, process_index, run_on_main, world_group, world_size
from drift_accel.sampling.class_choice import table_of_classes
from drift_accel.sampling.trained import TrainedGenerator
from drift_accel.training.averages import average_name
from drift_accel.training.state import TrainingState
from drift_accel.training.stops import REASONS, StopRequested

NAME_PREFIX = "training_"  # tells results of the run itself from those of the tools, whose references may be others
TAG_PREFIX = "evaluation/"
LONGEST_WAIT = timedelta(days=1)  # of the others, while the first process computes the numbers alone


class TrainingEvaluation:
    """Evaluates the generator of a run in progress; every process must make and call it at the same points.

    The results go into RUN/evaluation/training_*.json, where a run that goes on finds those of the same weights. `ema` is the
    decay that is evaluated where the configuration names none, `last_step` the run's.
    """

    def __init__(
        self,
        prepared: PreparedEvaluation,
        *,
        ema: float,
        last_step: int,
        log: Callable[[str], None] = print,
    ):
        self._config, self._prepared = prepared.config, prepared
        self._ema = ema if prepared.config.ema is None else prepared.config.ema
        self._last_step, self._log = last_step, log
        self._shared = SharedWork(_waiting_group())
        group = self._shared.group
        workers = Workers(
            index=process_index(group), count=world_size(group), wait=self._shared.wait, together=self._shared.run
        )  # fmt: skip
        self._evaluator = replace(prepared.evaluator, workers=workers, command=sys.argv, log=log)

    def __call__(self, step: int, state: TrainingState) -> dict[str, float]:
        """The numbers after `step`, {"evaluation/NAME": value} on the main process; empty where none are due.

        An evaluation that fails is told, and training goes on. Raises SharedWorkError for the one of the very first step.
        """
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be compiled anew for the evaluation's batches
            if step == 1 and self._config.sanity_samples:
                self._check(state)
            is_due = step == self._last_step or step % self._config.every == 0
            return self._tried(step, state) if is_due else {}

    def _tried(self, step: int, state: TrainingState) -> dict[str, float]:
        try:
            return self._shared.run(lambda: self._evaluate(step, state))
        except SharedWorkError as error:
            self._say(f"warning: the evaluation after step {step} gave no numbers: {error}")
            return {}

    def _evaluate(self, step: int, state: TrainingState) -> dict[str, float]:
        started = time.monotonic()
        point = Point(guidance_scale=self._config.guidance_scale, step=step, ema=average_name(self._ema))
        evaluator = self._ready(state)
        name = result_name(
            self._config.protocol, step, point.ema, point.guidance_scale, self._config.num_samples, self._config.seed
        )
        path = evaluator.run.evaluation_path(NAME_PREFIX + name)
        with self._model(point, state) as trained:
            if not run_on_main(lambda: self._is_there(path, trained), self._shared.group):
                self._compute(evaluator, point, self._config.num_samples, path)
        if not self._is_main:
            return {}
        metrics = load_result(path)["metrics"]
        self._log(f"evaluation after step {step}: {numbers_text(metrics)} ({time.monotonic() - started:.1f} s)")
        return {TAG_PREFIX + name: value for name, value in metrics.items()}

    def _check(self, state: TrainingState) -> None:
        """A few samples all the way to a result, which is thrown away."""
        point = Point(guidance_scale=self._config.guidance_scale, step=1, ema=average_name(self._ema))
        count = self._config.sanity_samples * world_size(self._shared.group)  # so that each process has some

        def work() -> None:
            evaluator = self._ready(state)
            path = evaluator.run.evaluation_path(f"{NAME_PREFIX}sanity")
            with self._model(point, state):
                self._compute(evaluator, point, count, path)
            if self._is_main:
                numbers = numbers_text(load_result(path)["metrics"])
                self._log(f"the evaluation works: {numbers}, of {count} samples after step 1, too few to mean much")
                path.unlink()

        try:
            self._shared.run(work)
        except SharedWorkError as error:
            if error.kind == StopRequested.__name__:
                return
            text = f"the evaluation does not work, as the try after step 1 shows: {error}. Mend evaluation.*, or leave it out"
            raise SharedWorkError(error.kind, f"{text} (evaluation.every null)") from error

    def _compute(self, evaluator: RunEvaluator, point: Point, count: int, path: Path) -> None:
        run_on_main(self._discard_unfinished, self._shared.group)
        evaluator(point, count, path)

    def _discard_unfinished(self) -> None:
        """What killed, stopped and failed evaluations left may be of other weights, and nobody comes back to it."""
        for folder in self._evaluator.run.evaluation_dir.glob(f"{NAME_PREFIX}*.in_progress"):
            shutil.rmtree(folder, ignore_errors=True)

    def _ready(self, state: TrainingState) -> RunEvaluator:
        """The evaluator with its reference, and with an eye on wishes to stop."""

        def stop_if_asked() -> None:
            if state.stops.code:
                raise StopRequested(f"the run was asked to stop ({REASONS[state.stops.code]})")

        self._evaluator.network.before_chunk = stop_if_asked
        if self._evaluator.reference is None:
            self._evaluator.reference = self._prepared.real.reference(self._evaluator)
        self._shared.wait()  # a split model is put together by all processes, or by none
        return self._evaluator

    @contextmanager
    def _model(self, point: Point, state: TrainingState) -> Iterator[TrainedGenerator]:
        """The average's weights as the evaluator's model."""
        with state.averages.applied_to(state.task.model, self._ema) as model:
            origin = {"kind": "training", "path": str(self._evaluator.run.path), "run": str(self._evaluator.run.path)}
            origin |= {"step": point.step, "ema": point.ema, "weights_sha256": weights_hash(model)}
            table = table_of_classes(self._prepared.data.get("classes"), model.config.num_classes)
            trained = TrainedGenerator(generator=model, table=table, data=self._prepared.data, origin=origin, provenance={})
            self._shared.wait()  # the memory of one process alone may have been too small
            with self._evaluator.holding(point, trained, self._prepared.decoder):
                yield trained

    def _is_there(self, path: Path, trained: TrainedGenerator) -> bool:
        """Whether the file is the result of these weights under these settings; another one is replaced."""
        if not path.exists():
            return False
        try:
            result = load_result(path)
        except (OSError, ValueError) as error:
            self._log(f"{path} is made anew: {error}")
            return False
        same = (result.get("model") or {}).get("weights_sha256") == trained.origin["weights_sha256"]
        return same and not self._evaluator.problems(result)

    @property
    def _is_main(self) -> bool:
        return process_index(self._shared.group) == 0

    def _say(self, line: str) -> None:
        if self._is_main:
            self._log(line)


def _waiting_group() -> distributed.ProcessGroup | None:
    """A group of all processes in which a GPU does not wait, and whose time is not that of a step's messages."""
    if world_group() is None:
        return None
    return distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)
