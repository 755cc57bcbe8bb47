"""The folder of a run. Nothing else in the package knows its layout:

    config.yaml  provenance.json  RUN.md  metrics.jsonl  tensorboard/  samples/step_00001000.png
    checkpoints/step_00001000/{COMPLETE.json, ...}  exports/NAME/  evaluation/NAME.json  profiles/  .lock

Methods that write are for the main process alone.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import yaml

from drift_accel.foundation import run_records
from drift_accel.foundation.locks import exclusive_lock, is_held
from drift_accel.foundation.storage import (
    COMPLETE_NAME,
    atomic_write_bytes,
    atomic_write_text,
    committed_folder,
    is_partial_name,
    json_text,
    plain_value,
    remove_folder,
    remove_partial_folders,
    verify_folder,
)

_logger = logging.getLogger(__name__)
_STEP_NAME = re.compile(r"step_(\d{8,})")
_FOLDER_NAMES = ("tensorboard", "samples", "checkpoints", "exports", "evaluation")
# What an interrupted first start can leave before config.yaml is there.
_EARLY_FILE_NAMES = ("provenance.json", "RUN.md", ".lock")


class RunFolder:
    """One run's folder at `path`; making the object touches nothing."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._damaged_checkpoints: dict[int, tuple[int, int] | None] = {}
        self._lock = ExitStack()

    @property
    def config_path(self) -> Path:
        """The resolved configuration, YAML."""
        return self.path / "config.yaml"

    @property
    def provenance_path(self) -> Path:
        """What made the run, JSON."""
        return self.path / "provenance.json"

    @property
    def notes_path(self) -> Path:
        """The run's diary, Markdown."""
        return self.path / "RUN.md"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a line, each with its "step"."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard_dir(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def samples_dir(self) -> Path:
        """Sample grids, one picture a step."""
        return self.path / "samples"

    @property
    def checkpoints_dir(self) -> Path:
        """One committed folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def checkpoint_values_path(self) -> Path:
        """The value of a metric by checkpoint, JSON; there where one decides which checkpoints stay."""
        return self.checkpoints_dir / "values.json"

    @property
    def exports_dir(self) -> Path:
        """Models to use elsewhere, one folder each."""
        return self.path / "exports"

    @property
    def evaluation_dir(self) -> Path:
        """Results, one JSON file each."""
        return self.path / "evaluation"

    def sample_path(self, step: int) -> Path:
        """The picture of a step (>= 0). Raises ValueError for a negative step."""
        return self.samples_dir / f"{_step_name(step)}.png"

    def trace_path(self, first: int, last: int) -> Path:
        """The profiler's trace of the steps `first` to `last` (>= 0). Raises ValueError for a negative step."""
        return self.path / "profiles" / f"{_step_name(first)}_to_{_step_name(last)}.json.gz"

    def checkpoint_dir(self, step: int) -> Path:
        """The checkpoint folder of a step (>= 0). Raises ValueError for a negative step."""
        return self.checkpoints_dir / _step_name(step)

    def export_dir(self, name: str) -> Path:
        """The folder of an export. Raises ValueError for a name that is no plain file name."""
        return self.exports_dir / _file_name(name)

    def find_export(self, name: str | None = None) -> Path:
        """The folder of an existing export, by default the first by name.

        Raises FileNotFoundError for a run without exports, ValueError naming those there are for another name.
        """
        exports = sorted(path.parent.name for path in self.exports_dir.glob("*/config.json"))
        if not exports:
            raise FileNotFoundError(f"{self.path} has no export yet: give the --output_dir of a run that has finished")
        if name is not None and name not in exports:
            raise ValueError(f"{self.path} has no export {name!r}: it has {', '.join(exports)}")
        return self.export_dir(name or exports[0])

    def evaluation_path(self, name: str) -> Path:
        """The file of a result, given its name without suffix. Raises ValueError for a name that is no plain one."""
        return self.evaluation_dir / f"{_file_name(name)}.json"

    def create(self) -> None:
        """Make the folder and its subfolders where missing, and clean up what a killed run left half-written.

        Raises ValueError, nothing touched, if the path is a file or a folder with something else in it.
        """
        self._refuse_foreign_folder()
        for name in _FOLDER_NAMES:
            (self.path / name).mkdir(parents=True, exist_ok=True)
        for folder in (self.path, *(self.path / name for name in _FOLDER_NAMES)):
            remove_partial_folders(folder)

    def open_configuration(
        self,
        configuration: Mapping[str, Any],
        may_change: Collection[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> bool:
        """Save the resolved configuration, or compare it with the saved one; True if the run existed already.

        `may_change` are dotted keys ("checkpoint", "optimizer.lr") that an existing run may change, with all below
        them; such changes are saved. `defaults` are the values of keys that the saved configuration is too old to know.
        Raises ValueError showing every other difference, TypeError for a value that YAML cannot hold, and as `create`
        does; nothing is written then.
        """
        self._refuse_foreign_folder()
        asked = plain_value(configuration, "configuration")
        if not self.config_path.exists():
            self._write_configuration(asked)
            return False
        differences = run_records.configuration_differences(self.read_configuration(), asked, defaults)
        refused = {key: text for key, text in differences.items() if not run_records.is_covered(key, may_change)}
        if refused:
            lines = "\n".join(f"  {key}: {text}" for key, text in refused.items())
            allowed = f" (An existing run may change: {', '.join(sorted(may_change))}.)" if may_change else ""
            raise ValueError(
                f"the run in {self.path} was started with another configuration (saved -> asked):\n{lines}\n"
                f"Give another --output_dir, or undo these changes to resume this run.{allowed}"
            )
        if differences:
            self._write_configuration(asked)
        return True

    def read_configuration(self) -> dict[str, Any]:
        """The saved configuration. Raises FileNotFoundError if there is none, ValueError if it is no mapping."""
        try:
            saved = yaml.safe_load(self.config_path.read_text("utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{self.config_path} is no YAML: {error}") from error
        if not isinstance(saved, dict):
            raise ValueError(f"{self.config_path} holds no configuration (a mapping of keys to values)")
        return saved

    def lock(self) -> None:
        """Hold the folder, which is made where missing, against other live runs until `unlock` or the end of the process.

        Raises ValueError where another run holds it, or the folder is a foreign one.
        """
        self._refuse_foreign_folder()
        self._lock.enter_context(exclusive_lock(self.path / ".lock", f"a run in {self.path}"))

    def unlock(self) -> None:
        """Let other runs have the folder; harmless where it is not held."""
        self._lock.close()

    def is_held(self) -> bool:
        """Whether a live process holds the folder."""
        return is_held(self.path / ".lock")

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """`committed_folder` for the checkpoint of a step; a folder of an earlier, damaged one is exchanged."""
        with committed_folder(self.checkpoint_dir(step), replace=True) as folder:
            yield folder

    def checkpoint_steps(self) -> list[int]:
        """The steps of the completed checkpoints in rising order; their contents are not read."""
        return [step for step in self._checkpoint_folder_steps() if self._completion_mark(step) is not None]

    def latest_complete_checkpoint(self, on_damaged: Callable[[str], None] = _logger.warning) -> tuple[int, Path] | None:
        """(step, folder) of the newest checkpoint whose every file has its hash, or None. Reads it all.

        Each newer damaged one is skipped and given to `on_damaged` as a line that names its files.
        """
        for step in reversed(self._checkpoint_folder_steps()):
            folder = self.checkpoint_dir(step)
            problems = verify_folder(folder)
            if not problems:
                self._damaged_checkpoints.pop(step, None)
                return step, folder
            self._damaged_checkpoints[step] = self._completion_mark(step)
            on_damaged(f"checkpoint {folder} is damaged and skipped: {'; '.join(problems)}")
        return None

    def prune_checkpoints(self, keep_last: int | None, kept_steps: Collection[int] = ()) -> list[int]:
        """Remove the checkpoints before the newest `keep_last` completed ones (None: keep all); returns their steps.

        Those of `kept_steps` stay, whatever their age. One that `latest_complete_checkpoint` found damaged does not count, or it
        would push out the good ones. Raises ValueError for keep_last < 1.
        """
        if keep_last is None:
            return []
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, or None to keep all checkpoints, got {keep_last}")
        steps = self.checkpoint_steps()
        good = [step for step in steps if self._damaged_checkpoints.get(step) != self._completion_mark(step)]
        kept = good[-keep_last:]
        removed = [step for step in steps if kept and step < kept[0] and step not in kept_steps]
        for step in removed:
            remove_folder(self.checkpoint_dir(step))
        return removed

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to the metrics, at once in the file. `record` has an integer "step"; NaN becomes null.

        Raises ValueError without a step, TypeError for a value that JSON cannot hold (a tensor).
        """
        record = plain_value(record, "record")
        line = json_text(record)
        if not isinstance(record.get("step"), int) or isinstance(record["step"], bool):
            raise ValueError(f'a record of metrics needs an integer "step", got {record.get("step")!r}')
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.metrics_path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(len(run_records.whole_lines(file.read())))
            file.write(line.encode("utf-8") + b"\n")
            file.flush()

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records, without a half-written last line; an empty list without a file. Raises ValueError naming a
        line that is no record."""
        try:
            content = self.metrics_path.read_bytes()
        except FileNotFoundError:
            return []
        return run_records.parse_metric_lines(content, str(self.metrics_path))

    def truncate_metrics(self, last_step: int) -> int:
        """Drop the records after `last_step`, which a resumed run writes again, and a half-written last line.

        Returns the number of records dropped. Raises ValueError as `read_metrics` does.
        """
        records = self.read_metrics()
        kept = [record for record in records if record["step"] <= last_step]
        content = "".join(json_text(record) + "\n" for record in kept).encode("utf-8")
        if self.metrics_path.exists() and content != self.metrics_path.read_bytes():
            atomic_write_bytes(self.metrics_path, content)
        return len(records) - len(kept)

    def start_notes(self, text: str, summary: str = "") -> None:
        """Add a line "opened" to RUN.md; a run found open is completed with "ended without closing" first.

        `summary`, in Markdown, becomes the head of a new RUN.md.
        """
        notes = self._notes()
        sign = self._last_sign(notes)
        atomic_write_text(
            self.notes_path, run_records.notes_with_opening(notes, self.path.name, text, summary=summary, last_sign=sign)
        )

    def complete_notes(self) -> bool:
        """Complete the notes of a run that was killed, where no other process runs it; True if there was something to do."""
        notes = self._notes()
        if not run_records.is_open(notes):
            return False
        try:
            with exclusive_lock(self.path / ".lock", f"a run in {self.path}"):
                atomic_write_text(self.notes_path, run_records.completed_notes(notes, self._last_sign(notes)))
        except ValueError:
            return False  # it lives
        return True

    def finish_notes(self, outcome: str) -> None:
        """Add a line "closed" to RUN.md. Raises ValueError if no run is open there."""
        atomic_write_text(self.notes_path, run_records.notes_with_closing(self._notes(), outcome))

    def last_outcome(self) -> str | None:
        """How the last start ended, in the words of `finish_notes`; None for one that is open or was killed, and for none."""
        return run_records.last_outcome(self._notes())

    def _last_sign(self, notes: str) -> str:
        """What the run that `notes` leave open recorded last: step, time, how long after its start."""
        opened = run_records.opening_time(notes)
        if opened is None or not self.metrics_path.exists():
            return ""
        written = datetime.fromtimestamp(self.metrics_path.stat().st_mtime, timezone.utc)
        lines = run_records.whole_lines(self.metrics_path.read_bytes()).splitlines()
        if written < opened - timedelta(seconds=1) or not lines:
            return "nothing was recorded after its start"
        try:
            step = json.loads(lines[-1]).get("step")
        except (ValueError, AttributeError):
            return ""
        after = run_records.duration_text((written - opened).total_seconds())
        return f"last record of step {step}, {written:%Y-%m-%d %H:%M:%S} UTC, {after} after its start"

    def _notes(self) -> str:
        return self.notes_path.read_text("utf-8") if self.notes_path.exists() else ""

    def _write_configuration(self, configuration: dict[str, Any]) -> None:
        atomic_write_text(self.config_path, yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True))

    def _refuse_foreign_folder(self) -> None:
        if not self.path.exists() or self.config_path.is_file():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; --output_dir needs a folder")
        foreign = sorted(entry.name for entry in self.path.iterdir() if not _belongs_to_new_run(entry))
        if foreign:
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise ValueError(
                f"{self.path} is not empty and no run folder (it has {shown} but no {self.config_path.name}); "
                "give --output_dir a new or empty folder"
            )

    def _checkpoint_folder_steps(self) -> list[int]:
        if not self.checkpoints_dir.is_dir():
            return []
        matches = ((_STEP_NAME.fullmatch(entry.name), entry) for entry in self.checkpoints_dir.iterdir())
        steps = (int(match[1]) for match, entry in matches if match and entry.is_dir())
        # A step has one name: step_000001000 is somebody else's folder.
        return sorted(step for step in set(steps) if self.checkpoint_dir(step).is_dir())

    def _completion_mark(self, step: int) -> tuple[int, int] | None:
        # Tells a checkpoint from another one that replaced it under the same name.
        try:
            status = (self.checkpoint_dir(step) / COMPLETE_NAME).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def _belongs_to_new_run(entry: Path) -> bool:
    if entry.is_dir():
        return entry.name in _FOLDER_NAMES and all(is_partial_name(inner.name) for inner in entry.iterdir())
    return entry.name in _EARLY_FILE_NAMES or is_partial_name(entry.name)


def _step_name(step: int) -> str:
    if step < 0:
        raise ValueError(f"a step is 0 or more, got {step}")
    return f"step_{step:08d}"


def _file_name(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"a name here is a plain file name without '/' and without a '.' in front, got {name!r}")
    return name
