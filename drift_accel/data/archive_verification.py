"""Are the extracted pictures still those of the archives? Every file is read and compared with the manifest."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from drift_accel.data.archive_extraction import folder_problems
from drift_accel.data.archive_records import ClassRecord, listing_sha256, manifest_records, read_manifest
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.storage import sha256_file

READING_THREADS = 8


def verify_images(output_dir: Path) -> dict[str, Any]:
    """{"is_good", "splits": {split: {"images", "classes", "sha256"}}, "problems": [a line each]} of prepared class folders.

    Counts, sizes and the SHA-256 of every picture of every finished split; the archives are not needed. Raises ValueError for a
    folder without a finished split.
    """
    manifest = read_manifest(output_dir)
    if not manifest:
        raise ValueError(f"{output_dir} has no finished split: make it with tools/prepare_imagenet.py")
    problems, splits = [], {}
    for split, entry in manifest.items():
        problems += _split_problems(output_dir, split, manifest_records(entry))
        splits[split] = {"images": entry["images"], "classes": len(entry["classes"]), "sha256": entry["sha256"]}
    return {"is_good": not problems, "splits": splits, "problems": problems}


def _split_problems(output_dir: Path, split: str, records: Mapping[str, ClassRecord]) -> list[str]:
    folder = output_dir / split
    problems = [f"{folder / name}: is missing" for name in records if not (folder / name).is_dir()]
    problems += folder_problems(output_dir, split, records)
    known = [name for name in records if not any(line.startswith(f"{folder / name}:") for line in problems)]
    total = sum(records[name].images for name in known)
    with ThreadPoolExecutor(READING_THREADS) as pool, Progress(total, 0, f"reading {split}, pictures") as progress:
        for name, digest in zip(known, pool.map(lambda name: _content_sha256(folder / name), known), strict=True):
            if digest != records[name].sha256:
                problems.append(f"{folder / name}: a picture's content is not that of the archive")
            progress.update(records[name].images)
    return problems


def _content_sha256(folder: Path) -> str:
    """As the manifest has it; empty where a file cannot be read."""
    try:
        return listing_sha256((file.name, file.stat().st_size, sha256_file(file)) for file in folder.iterdir())
    except OSError:
        return ""
