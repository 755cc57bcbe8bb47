"""The reference that a run makes of real pictures for its own evaluation, once."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from drift_accel.evaluation.evaluate import discard, make_reference
from drift_accel.evaluation.run_evaluator import RunEvaluator
from drift_accel.evaluation.statistics import ReferenceStatistics, load_reference, save_reference
from drift_accel.foundation.collectives import run_on_main, world_group
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import plain_value
from drift_accel.sampling.pictures import Pictures

FILE_NAME = "training_reference.npz"  # in RUN/evaluation


class RealPictures:
    """`pictures` called `name`, all of whose features are kept; `statistics` (None: theirs) stay those of the reference."""

    def __init__(self, run: RunFolder, pictures: Pictures, name: str, statistics: ReferenceStatistics | None = None):
        self.path, self.pictures = run.evaluation_dir / FILE_NAME, pictures
        self._name, self._statistics = name, statistics

    def reference(self, evaluator: RunEvaluator) -> ReferenceStatistics:
        """The reference for the evaluator's network, on every process: the saved one, or a new one that is saved."""
        if not run_on_main(lambda: self._is_there(evaluator), world_group()):
            self._make(evaluator)
        made = load_reference(self.path)
        source = {"path": self._name, **self.pictures.identity()}
        if self._statistics is not None:
            return replace(
                self._statistics, features=made.features, record={**self._statistics.record, "features_from": source}
            )  # fmt: skip
        return replace(made, record={**made.record, "features_from": source}, file=self._name)

    def _is_there(self, evaluator: RunEvaluator) -> bool:
        try:
            saved = load_reference(self.path)
            saved.require_protocol(evaluator.network.identity())
        except (OSError, ValueError):
            return False
        return saved.record.get("pictures") == plain_value(self.pictures.identity())

    def _make(self, evaluator: RunEvaluator) -> None:
        work, workers = self.path.with_name(f"{Path(FILE_NAME).stem}.in_progress"), evaluator.workers
        settings: dict[str, Any] = {"num_features": len(self.pictures), "workers": workers, "log": evaluator.log}
        run_on_main(lambda: shutil.rmtree(work, ignore_errors=True), world_group())  # a killed run's, perhaps of other pictures
        made = make_reference(self.pictures, evaluator.network, work, command=evaluator.command, **settings)
        workers.wait()  # all have read the chunks
        if workers.is_main:
            save_reference(self.path, made)
            discard(work)
        workers.wait()
