"""The contents of a run's text records: comparing configurations, lines of metrics, lines of notes.

Pure functions of text and dicts; `run_folder.py` knows where the records lie.
"""

import json
import re
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from typing import Any

_ABSENT = object()
_OPENED = "- opened "
_CLOSED = "- closed "
_NOT_CLOSED = "- ended without closing"


def flatten_configuration(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys; lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for key, value in configuration.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten_configuration(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def configuration_differences(
    saved: Mapping[str, Any], asked: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """{dotted key: "saved -> asked"} for each value that two plain configurations do not share.

    A key that `saved` does not know has its value of `defaults`: what was saved before the key existed ran as the default does.
    """
    flat_saved, flat_asked = flatten_configuration(saved), flatten_configuration(asked)
    for key, value in flatten_configuration(defaults or {}).items():
        if not any(is_covered(key, (known,)) or is_covered(known, (key,)) for known in flat_saved):
            flat_saved[key] = value
    differences = {}
    for key in sorted(flat_saved.keys() | flat_asked.keys()):
        before, after = flat_saved.get(key, _ABSENT), flat_asked.get(key, _ABSENT)
        if not _same(before, after):
            differences[key] = f"{_shown(before)} -> {_shown(after)}"
    return differences


def is_covered(key: str, prefixes: Collection[str]) -> bool:
    """Whether a dotted key is one of `prefixes` or lies below one of them."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def parse_metric_lines(content: bytes, source: str) -> list[dict[str, Any]]:
    """The records of a metrics file, one JSON object a line, without a half-written last line.

    Raises ValueError naming `source` and the line for any other line that is no record with an integer "step".
    """
    records = []
    for number, line in enumerate(whole_lines(content).splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f'{source}, line {number}: is no JSON object with an integer "step"; remove that line')
        records.append(record)
    return records


def whole_lines(content: bytes) -> bytes:
    """The content up to its last line end: what follows was being written when the writer was killed."""
    return content[: content.rfind(b"\n") + 1]


def notes_with_opening(notes: str, title: str, text: str, *, summary: str = "", last_sign: str = "") -> str:
    """The notes with a line "opened"; a run that was still open is completed first (`completed_notes`).

    `summary`, in Markdown, stands at the head of new notes.
    """
    notes = notes or f"# {title}\n\n" + (f"{summary.strip()}\n\n## Diary\n\n" if summary else "")
    return f"{_line_ended(completed_notes(notes, last_sign))}{_OPENED}{_now()}: {_one_line(text)}\n"


def completed_notes(notes: str, last_sign: str = "") -> str:
    """The notes of a run that nobody runs any more: one that is still open there gets its line "ended without closing".

    `last_sign` says what it was seen doing last.
    """
    if not is_open(notes):
        return notes
    return f"{_line_ended(notes)}{_NOT_CLOSED}{f': {_one_line(last_sign)}' if last_sign else ''}\n"


def opening_time(notes: str) -> datetime | None:
    """When the last run in the notes was opened."""
    found = re.findall(rf"^{re.escape(_OPENED)}(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", notes, re.M)
    return datetime.strptime(found[-1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc) if found else None


def duration_text(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(max(int(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def notes_with_closing(notes: str, outcome: str) -> str:
    """The notes with a line "closed". Raises ValueError if no run is open in them."""
    if not is_open(notes):
        raise ValueError("the notes have no open run to close; start_notes comes first")
    opened = opening_time(notes)
    after = "" if opened is None else f" after {duration_text((datetime.now(timezone.utc) - opened).total_seconds())}"
    return f"{_line_ended(notes)}{_CLOSED}{_now()}{after}: {_one_line(outcome)}\n"


def last_outcome(notes: str) -> str | None:
    """What the last line "opened", "closed" or "ended" says of the ending, if it is a "closed"; else None."""
    marks = [line for line in notes.splitlines() if line.startswith((_OPENED, _CLOSED, _NOT_CLOSED))]
    return marks[-1].partition(": ")[2] if marks and marks[-1].startswith(_CLOSED) else None


def _same(first: Any, second: Any) -> bool:
    # Equality of what is meant: 1 is 1.0, but True is not 1, and a NaN is the same as a NaN.
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int | float) and isinstance(second, int | float):
        return first == second or (first != first and second != second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return type(first) is type(second) and first == second


def is_open(notes: str) -> bool:
    """Whether the last run in the notes has not ended, or was killed."""
    # Lines that people add in between do not matter.
    marks = [line for line in notes.splitlines() if line.startswith((_OPENED, _CLOSED, _NOT_CLOSED))]
    return bool(marks) and marks[-1].startswith(_OPENED)


def _line_ended(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def _shown(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
