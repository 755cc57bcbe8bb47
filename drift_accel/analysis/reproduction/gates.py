"""gates.json: which stages of a reproduction have passed their checks, with what was found, and whether that is still so.

{"format", "stages": {stage: {"status": "passed" | "failed", "time", "checks", "identity", "inputs", "next"}}}. A stage that has
passed is looked at again before it is skipped: its output must be the one that passed, made from the inputs that are there now.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from drift_accel.analysis.reproduction.findings import Findings
from drift_accel.analysis.reproduction.stages import INPUTS, STAGES, Reproduction
from drift_accel.foundation.storage import atomic_write_json

FORMAT = 1
PASSED, FAILED = "passed", "failed"
CHEAP = ("verify_images", "verify_cache", "evaluate", "report")  # done again where what they were made from has changed
STOPPED = 75  # training.stops.EXIT_STOPPED, whose module brings torch
_ADVICE = "remove it; stages that are done are then checked again"


class State(Enum):
    """What is to be done with a stage."""

    FINISHED = "finished"
    UNFINISHED = "unfinished"
    BROKEN = "broken"
    BLOCKED = "blocked"


class Gates:
    """The gates of one reproduction. `command` begins what is typed to run a stage again; making the object writes nothing.

    Raises ValueError for a gates.json that is something else.
    """

    def __init__(self, paths: Reproduction, command: str = "bash launch_scripts/imagenet256.sh"):
        self.paths, self.command = paths, command
        self.stages: dict[str, dict[str, Any]] = _read(paths.gates)

    def look(self, stage: str) -> tuple[State, list[str]]:
        """What is to be done with a stage, and what is wrong: with one that had passed, which is then recorded as failed, or with
        the stages that it needs."""
        missing = [name for name in INPUTS[stage] if self.stages.get(name, {}).get("status") != PASSED]
        if missing:
            return State.BLOCKED, [f"needs stage {name}, which has not passed; type {self.command} {name}" for name in missing]
        entry = self.stages.get(stage, {})
        if entry.get("status") != PASSED:
            return State.UNFINISHED, []
        stale = [name for name, identity in entry["inputs"].items() if self.stages[name]["identity"] != identity]
        if stale and stage in CHEAP:
            return State.UNFINISHED, []
        findings = self._findings(stage, full=False)
        problems = findings.problems
        before, now = entry["identity"], findings.identity
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if changed and not problems:
            problems = [f"{self.output(stage)}: {', '.join(changed)} is not what passed the gate on {entry['time']}"]
        problems += [f"{self.output(stage)}: was made from another output of stage {name} than there is now" for name in stale]
        if problems:
            self._record(stage, FAILED, findings, problems)
            return State.BROKEN, problems
        return State.FINISHED, []

    def check(self, stage: str) -> list[str]:
        """Look at all of a stage's output and record the gate; returns the problems."""
        findings = self._findings(stage, full=True)
        problems = findings.problems
        self._record(stage, FAILED if problems else PASSED, findings, problems)
        return problems

    def fail(self, stage: str, code: int) -> list[str]:
        """Record that a stage's command ended with an exit code; returns that as a problem."""
        problems = [f"its command ended with code {code}; its own messages, above, say why"]
        if code == STOPPED:
            problems = ["its command was asked to stop and did so with a checkpoint"]
        self._record(stage, FAILED, Findings(), problems)
        return problems

    def next_command(self, stage: str, problems: list[str]) -> str:
        """What to type where a stage has failed."""
        again = f"{self.command} {stage}"
        if any(problem.startswith("its command was asked") for problem in problems):
            return again
        if any(problem.startswith("its command") for problem in problems):
            return f"mend that, then: {again}"
        return f"remove or repair {self.output(stage)}, then: {again}"

    def output(self, stage: str) -> Path:
        """What a stage writes."""
        paths = self.paths
        outputs = (
            paths.images, paths.images_report, paths.reference, paths.cache, paths.cache_report,
            paths.mae if paths.trains_encoder else paths.encoder, paths.generator, paths.samples, paths.result, paths.report,
        )  # fmt: skip
        return dict(zip(STAGES, outputs, strict=True))[stage]

    def _findings(self, stage: str, *, full: bool) -> Findings:
        # Not at the top: this brings all rooms and torch, and most calls need only the record.
        from drift_accel.analysis.reproduction.checks import check_stage

        return check_stage(stage, self.paths, self._identities(stage), full=full)

    def _identities(self, stage: str) -> dict[str, Mapping[str, str]]:
        passed = {name: self.stages.get(name, {}) for name in INPUTS[stage]}
        return {name: entry["identity"] for name, entry in passed.items() if entry.get("status") == PASSED}

    def _record(self, stage: str, status: str, findings: Findings, problems: list[str]) -> None:
        self.stages[stage] = {
            "status": status,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checks": findings.checks,
            "identity": findings.identity,
            "inputs": self._identities(stage),
            "problems": problems,
            "next": self.next_command(stage, problems) if problems else None,
        }
        ordered = {name: self.stages[name] for name in STAGES if name in self.stages}
        atomic_write_json(self.paths.gates, {"format": FORMAT, "stages": ordered})


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
        stages = content["stages"]
        known = content["format"] == FORMAT and isinstance(stages, dict)
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of gates ({error!r}): {_ADVICE}") from None
    if not known or any(not isinstance(entry, dict) or "status" not in entry for entry in stages.values()):
        raise ValueError(f"{path} is no record of gates of format {FORMAT}: {_ADVICE}")
    return stages
