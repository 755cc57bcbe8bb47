"""What of a run's folder nobody needs any more, and what something still points at."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import is_partial_name

# Where configurations, provenance, exports' descriptions, results and reports are written.
_TEXT_SUFFIXES = {".yaml", ".yml", ".json", ".md", ".html", ".csv", ".txt"}
_LARGEST_TEXT = 200_000_000
_CHECKPOINT = re.compile(r"checkpoints[/\\]+step_0*(\d+)")
_STEP_FOLDER = re.compile(r"step_0*(\d{1,})")


@dataclass(frozen=True)
class Leftover:
    """A file or folder that can go: why, and its bytes."""

    path: Path
    reason: str
    num_bytes: int


def find_leftovers(run: RunFolder, *, keep_last: int = 1, others: Iterable[Path] = ()) -> tuple[list[Leftover], dict[Path, str]]:
    """(what can go, {checkpoint that stays though it is old: who needs it}) of a run that nobody runs.

    Checkpoints before the newest `keep_last` complete ones go, and damaged ones, unless the run's own configuration keeps them
    (checkpoint.keep_every, keep_best) or a text in the run or below the folders `others` names them. What killed writers left and
    profiler traces go too. The newest complete checkpoint always stays; every file of it is read. Raises ValueError for
    keep_last < 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: at least the newest checkpoint stays")
    latest = run.latest_complete_checkpoint(on_damaged=lambda line: None)
    complete = run.checkpoint_steps()
    kept = set(complete[-keep_last:]) | ({latest[0]} if latest else set())
    needed = needed_steps(run, others)
    leftovers, protected = [], {}
    for step in complete:
        folder = run.checkpoint_dir(step)
        if step in kept:
            continue
        if step in needed:
            protected[folder] = needed[step]
        else:
            leftovers.append(_leftover(folder, "older checkpoint"))
    for parent in (run.path, run.checkpoints_dir, run.exports_dir, run.samples_dir, run.evaluation_dir):
        entries = sorted(parent.iterdir()) if parent.is_dir() else []
        leftovers += [_leftover(entry, "half-written") for entry in entries if is_partial_name(entry.name)]
    profiles = run.trace_path(0, 0).parent
    if profiles.is_dir():
        leftovers += [_leftover(entry, "profiler trace") for entry in sorted(profiles.iterdir()) if entry.is_file()]
    return leftovers, protected


def needed_steps(run: RunFolder, others: Iterable[Path] = ()) -> dict[int, str]:
    """{step: who needs its checkpoint}: the run's configuration, its exports and results, reports, other runs."""
    needed: dict[int, str] = {}
    if run.config_path.is_file():
        configured = run.read_configuration().get("checkpoint") or {}
        every = configured.get("keep_every")
        for step in run.checkpoint_steps():
            if every and step % every == 0:
                needed[step] = f"{run.config_path}: checkpoint.keep_every {every}"
        if configured.get("keep_best"):
            for step, value in _best_steps(run, configured.get("best_is", "min")).items():
                needed.setdefault(step, f"{run.config_path}: best {configured['keep_best']} ({value:g})")
    own = run.path.resolve()
    for file in _texts([run.path, *others]):
        is_own = own in file.resolve().parents
        text = file.read_text("utf-8", errors="replace")
        steps = set(_json_steps(text)) if is_own and file.suffix == ".json" else set()
        if is_own or run.path.name in text:
            steps |= {int(number) for number in _CHECKPOINT.findall(text)}
        if is_own and file.parent != run.path:  # exports and results name their step also without its folder
            steps |= {int(number) for number in _STEP_FOLDER.findall(f"{file.relative_to(run.path)} {text}")}
        for step in steps:
            needed.setdefault(step, str(file))
    return needed


def remove(leftovers: Sequence[Leftover], run: RunFolder) -> None:
    """Delete them; checkpoints lose their name first, so that a half-deleted one is never taken for complete. Raises OSError."""
    from drift_accel.foundation.storage import remove_folder

    for leftover in leftovers:
        if run.path.resolve() not in leftover.path.resolve().parents:
            raise ValueError(f"{leftover.path} is not in {run.path}")
        if leftover.path.is_dir() and not leftover.path.is_symlink():
            remove_folder(leftover.path)
        else:
            leftover.path.unlink()


def _best_steps(run: RunFolder, best_is: str) -> dict[int, float]:
    try:
        saved = json.loads(run.checkpoint_values_path.read_text("utf-8"))["values"]
        numbers = {int(step): float(value) for step, value in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    if not numbers:
        return {}
    best = (min if best_is == "min" else max)(numbers.values())
    return {step: value for step, value in numbers.items() if value == best}


def _texts(folders: Iterable[Path]) -> Iterable[Path]:
    """Every text below the folders, each once; checkpoints and event files describe themselves and are left out."""
    seen = set()
    for folder in folders:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
            inside = file.relative_to(folder).parts[:-1] if folder.is_dir() else ()
            if "checkpoints" in inside or "tensorboard" in inside or file.suffix.lower() not in _TEXT_SUFFIXES:
                continue
            if file.is_file() and file.resolve() not in seen and file.stat().st_size <= _LARGEST_TEXT:
                seen.add(file.resolve())
                yield file


def _json_steps(text: str) -> Iterable[int]:
    """Whole numbers under keys that speak of a step, at any depth: {"checkpoint": {"step": 1000}}."""
    try:
        stack = [json.loads(text)]
    except ValueError:
        return
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            for key, item in value.items():
                if "step" in key and isinstance(item, int) and not isinstance(item, bool):
                    yield item
            stack.extend(value.values())
        elif isinstance(value, list):
            stack.extend(value)


def _leftover(path: Path, reason: str) -> Leftover:
    files = [path] if path.is_file() or path.is_symlink() else [entry for entry in path.rglob("*") if entry.is_file()]
    return Leftover(path, reason, sum(file.lstat().st_size for file in files))
