"""How a study judges its runs: the digits protocol, or one of the protocols of tools/evaluate.py."""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from drift_accel.analysis.studies.study import DIGITS, StudyEvaluation
from drift_accel.data.latent_export import Workers
from drift_accel.evaluation import digits
from drift_accel.evaluation.network_options import add_metric_options, add_network_options, asked_metrics
from drift_accel.evaluation.protocols import PROTOCOLS
from drift_accel.evaluation.results import load_result
from drift_accel.evaluation.run_options import add_run_options, described_evaluator
from drift_accel.evaluation.sweeps import Point, result_name
from drift_accel.foundation.devices import find_device
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json
from drift_accel.sampling import load_trained
from drift_accel.training.configuration import TrainingConfig


class DigitsJudge:
    """The digits protocol of tools/evaluate_digits.py."""

    def __init__(self, evaluation: StudyEvaluation):
        self.evaluation = evaluation

    def result(self, run: RunFolder) -> dict[str, float] | None:
        """The numbers that are there, if they are of the export that is there."""
        try:
            record = json.loads(self._path(run).read_text(encoding="utf-8"))
            made_of = digits.identity(run, None, self.evaluation.guidance_scale, self.evaluation.seed)
            current = all(record[name] == value for name, value in made_of.items())
            return {name: _number(record[name]) for name in digits.METRICS} if current else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def judge(self, run: RunFolder) -> None:
        """Draw 1,000 digits and write what they are worth."""
        _, _, record = digits.judge_digits_run(
            run, guidance_scale=self.evaluation.guidance_scale, seed=self.evaluation.seed
        )  # fmt: skip
        atomic_write_json(self._path(run), {**record, "provenance": collect_provenance(command=sys.argv)})

    def of_real(self, run: RunFolder) -> dict[str, float]:
        """The same numbers of real digits, as a judged run recorded them."""
        return digits.real_values(json.loads(self._path(run).read_text(encoding="utf-8")))

    def _path(self, run: RunFolder) -> Path:
        asked = self.evaluation
        return run.evaluation_path(
            result_name("digits", None, None, asked.guidance_scale, digits.NUM_GENERATED, asked.seed)
        )  # fmt: skip


class ProtocolJudge:
    """A protocol of tools/evaluate.py. Raises ValueError and OSError for options, network and reference that do not fit."""

    def __init__(self, evaluation: StudyEvaluation, work_dir: Path):
        self.evaluation = evaluation
        options = _parse_options(evaluation)
        self._evaluator = described_evaluator(
            options, RunFolder(work_dir), work_dir, find_device(options.device), Workers()
        )  # fmt: skip

    def result(self, run: RunFolder) -> dict[str, float] | None:
        """The numbers that are there, if they were made in this way and of the export that is there."""
        try:
            result = load_result(self._path(run))
            if self._evaluator.problems(result):
                return None
            if result["model"]["weights_sha256"] != load_trained(run.path).origin["weights_sha256"]:
                return None
        except (OSError, ValueError, KeyError):
            return None
        return {name: _number(value) for name, value in result["metrics"].items() if not name.endswith("_std")}

    def judge(self, run: RunFolder) -> None:
        """Draw the samples and write the result."""
        evaluator = replace(self._evaluator, run=run, _loaded=None)
        point = Point(guidance_scale=self.evaluation.guidance_scale)
        evaluator(point, self.evaluation.num_samples, self._path(run))

    def of_real(self, run: RunFolder) -> dict[str, float]:
        """Nothing: these protocols measure against the real images alone."""
        return {}

    def _path(self, run: RunFolder) -> Path:
        asked = self.evaluation
        return run.evaluation_path(
            result_name(asked.protocol, None, None, asked.guidance_scale, asked.num_samples, asked.seed)
        )  # fmt: skip


def _number(value: float | None) -> float:
    """Files have null for what is not finite."""
    return math.nan if value is None else value


def check_evaluation(evaluation: StudyEvaluation, configs: Iterable[TrainingConfig]) -> None:
    """Raise ValueError for a protocol or option that there is not, and for runs that the digits protocol cannot judge."""
    if evaluation.protocol != DIGITS:
        if evaluation.protocol not in PROTOCOLS:
            known = ", ".join((DIGITS, *PROTOCOLS))
            raise ValueError(f"evaluation.protocol is {evaluation.protocol!r}: choose one of {known}")
        asked_metrics(_parse_options(evaluation))
        return
    for config in configs:
        generator = config.generator.resolved()
        channels, side = generator["in_channels"], generator["input_size"]
        if (channels, side) != (1, 8):
            raise ValueError(
                f"evaluation.protocol 'digits' judges 1x8x8 images, a generator here makes {channels}x{side}x{side}: "
                f"choose one of {', '.join(PROTOCOLS)}"
            )


def make_judge(evaluation: StudyEvaluation, work_dir: Path) -> DigitsJudge | ProtocolJudge:
    """The judge that a study names. Raises what opening its network and reference does, ModuleNotFoundError for a library."""
    if evaluation.protocol == DIGITS:
        import sklearn.neighbors  # noqa: F401  an extra: missing before the first training, not after it

        return DigitsJudge(evaluation)
    return ProtocolJudge(evaluation, work_dir)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError instead of ending the process."""

    def error(self, message: str):
        raise ValueError(f"evaluation.options: {message}")


def _parse_options(evaluation: StudyEvaluation) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    add_run_options(parser)
    add_network_options(parser)
    add_metric_options(parser)
    given = {"protocol": evaluation.protocol, **evaluation.options, "seed": evaluation.seed}
    return parser.parse_args(["study", *_as_arguments(given)])


def _as_arguments(options: Mapping[str, Any]) -> Sequence[str]:
    arguments = []
    for name, value in options.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None and value is not False:
            arguments += [f"--{name}", str(value)]
    return arguments
