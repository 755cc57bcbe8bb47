"""What a folder of extracted classes knows about itself: the state of unfinished splits, manifest and provenance.

manifest.json         what is finished, {"splits": {split: archive, images, bytes, sha256, classes: {wnid: ClassRecord}}}
provenance.json       {split: archives, counts, settings, versions, time}
in_progress/val.json                the archive that an unfinished split is made from
in_progress/val/n01440764.json      the record of a class; written before its folder takes its name
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json

PROGRESS_NAME = "in_progress"
CLASSES_NAME = "classes.json"
MANIFEST_NAME = "manifest.json"
PROVENANCE_NAME = "provenance.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ClassRecord:
    """A finished class folder: pictures, bytes of the pictures, SHA-256 over their names, sizes and contents."""

    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """A finished split; `extracted` is the number of classes that this run wrote."""

    images: int
    bytes: int
    classes: int
    extracted: int


def listing_sha256(pictures: Iterable[tuple[str, int, str]]) -> str:
    """SHA-256 over name, size and content's SHA-256 of the pictures of a class, whatever their order."""
    digest = hashlib.sha256()
    for name, size, content in sorted(pictures):
        digest.update(f"{name}\0{size}\0{content}\n".encode())
    return digest.hexdigest()


def summarize(records: Mapping[str, ClassRecord], extracted: int) -> SplitSummary:
    """The sums over the classes of a split."""
    images, size = (sum(getattr(record, name) for record in records.values()) for name in ("images", "bytes"))
    return SplitSummary(images=images, bytes=size, classes=len(records), extracted=extracted)


def record_path(output_dir: Path, split: str, wnid: str) -> Path:
    """Where the record of a class lies until its split is finished."""
    return output_dir / PROGRESS_NAME / split / f"{wnid}.json"


def read_record(output_dir: Path, split: str, wnid: str) -> ClassRecord | None:
    """The record of a class whose split is not finished, or None. Raises ValueError for a damaged record."""
    path = record_path(output_dir, split, wnid)
    try:
        return ClassRecord(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        folder = output_dir / split / wnid
        raise ValueError(f"{path} is damaged ({error}): remove it and {folder}, then run the same command again") from None


def progress_path(output_dir: Path, split: str) -> Path:
    """Where the archive of an unfinished split is described."""
    return output_dir / PROGRESS_NAME / f"{split}.json"


def has_progress(output_dir: Path, splits: Sequence[str]) -> bool:
    """Whether there is state to remove if the splits are finished."""
    folder = output_dir / PROGRESS_NAME
    return folder.is_dir() and (not any(folder.iterdir()) or any(progress_path(output_dir, split).exists() for split in splits))


def remove_progress(output_dir: Path, split: str) -> None:
    """Remove the state of a split that is finished. Raises OSError."""
    folder = output_dir / PROGRESS_NAME
    shutil.rmtree(folder / split, ignore_errors=True)
    progress_path(output_dir, split).unlink(missing_ok=True)  # after the folder: `has_progress` asks for it
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """The finished splits. Raises ValueError for a manifest that this command has not written."""
    path = output_dir / MANIFEST_NAME
    content = read_json(path, {"format": FORMAT, "splits": {}})
    if content.get("format") != FORMAT or not isinstance(content.get("splits"), dict):
        raise ValueError(f"{path} is no manifest of format {FORMAT}: choose another --output_dir")
    return content["splits"]


def manifest_records(entry: Mapping[str, Any]) -> dict[str, ClassRecord]:
    """The records of a split in the manifest, by wnid."""
    return {wnid: ClassRecord(**record) for wnid, record in entry["classes"].items()}


def write_finished(
    output_dir: Path,
    split: str,
    records: Mapping[str, ClassRecord],
    archives: Mapping[str, Mapping[str, Any]],
    run: Mapping[str, Any],
) -> None:
    """Write the provenance of a split and then the manifest, which makes it finished.

    `archives` describes the archives of the split and the devkit; `run` is how this run was called, `command` (argv)
    among it. Raises OSError.
    """
    classes = {wnid: asdict(records[wnid]) for wnid in sorted(records)}
    summary = summarize(records, 0)
    text = "".join(f"{wnid}\0{record['sha256']}\n" for wnid, record in classes.items())
    counts = {"images": summary.images, "bytes": summary.bytes, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    archive = {key: value for key, value in archives[split].items() if key != "mtime_ns"}
    provenance = read_json(output_dir / PROVENANCE_NAME, {})
    provenance[split] = {
        "archives": {split: archive, "devkit": archives["devkit"]},
        **counts,
        "classes": len(classes),
        **run,
        **collect_provenance(command=[_without_folders(argument) for argument in run["command"]]),
    }
    atomic_write_json(output_dir / PROVENANCE_NAME, provenance)
    splits = read_manifest(output_dir) | {split: {"archive": archive, **counts, "classes": classes}}
    atomic_write_json(output_dir / MANIFEST_NAME, {"format": FORMAT, "splits": {name: splits[name] for name in sorted(splits)}})


def read_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    """The object in a JSON file, `default` if there is no file. Raises ValueError for a damaged one."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return default
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same command again") from None
    return content if isinstance(content, dict) else {}


def _without_folders(argument: str) -> str:
    """An argument of the command line without the folders of a path: they say who ran it, not what ran."""
    option, separator, value = argument.rpartition("=")
    return option + separator + (os.path.basename(value.rstrip(os.sep)) if os.sep in value else value)
