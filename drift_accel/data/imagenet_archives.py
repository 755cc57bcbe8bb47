"""ImageNet from its archives: train/<wnid>/*.JPEG, val/<wnid>/*.JPEG and classes.json, with a record of where they come from.

    classes.json       the class table
    train/ val/        a folder a class, nothing else in it but its pictures
    manifest.json      pictures, bytes and SHA-256 of every class; a split is in it when it is finished
    provenance.json    archives, counts, versions, time
    in_progress/       records of splits that are not finished

The archives are read where they are. Everything that can be checked is checked before the first picture is written; killed
at any instant, the same command goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_accel.data.archive_extraction import extract_classes, folder_problems, refuse_problems, remove_unfinished
from drift_accel.data.archive_listing import (
    OFFICIAL,
    OFFICIAL_CLASSES,
    SPLITS,
    ClassJob,
    Devkit,
    SplitListing,
    check_md5,
    find_archive,
    list_train,
    list_val,
    read_devkit,
)
from drift_accel.data.archive_records import (
    CLASSES_NAME,
    ClassRecord,
    SplitSummary,
    has_progress,
    manifest_records,
    progress_path,
    read_json,
    read_manifest,
    read_record,
    remove_progress,
    summarize,
    write_finished,
)
from drift_accel.data.class_table import ClassTable
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.storage import atomic_write_json, remove_partial_folders, require_free_space, sha256_file

_LOCK_NAME = ".prepare_imagenet.lock"
# What folders of files take beyond the bytes of the tar: blocks that are not full, inodes, the folders themselves.
_OVERHEAD = 1.03
_BYTES_A_FILE = 4096


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, from which archives. Raises ValueError for values that cannot be meant."""

    output_dir: Path
    """Folder for train/, val/ and classes.json."""
    archives: Path | None = None
    """Folder with the archives under their official names."""
    train_archive: Path | None = None
    """The train archive, whatever its name; None: the official name in `archives`."""
    val_archive: Path | None = None
    """The validation archive; None as above."""
    devkit_archive: Path | None = None
    """The devkit of tasks 1 and 2, needed for every split; None as above."""
    split: str = "all"
    """"train", "val" or "all"."""
    skip_md5: bool = False
    """Do not compare the archives with the official checksums (reading 145 GB); all other checks remain."""
    expect: str = "imagenet"
    """"imagenet": 1,281,167 and 50,000 pictures of 1,000 classes; "none": any number."""
    num_workers: int = 1
    """Processes that extract, at least 1."""

    def __post_init__(self):
        if self.split not in (*SPLITS, "all"):
            raise ValueError(f"split is {self.split!r}: choose train, val or all")
        if self.expect not in ("imagenet", "none"):
            raise ValueError(f"expect is {self.expect!r}: choose imagenet or none")
        if self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}: give at least 1 process")

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits to prepare."""
        return SPLITS if self.split == "all" else (self.split,)


def prepare_imagenet(
    config: PrepareConfig, *, command: Sequence[str] = (), log: Callable[[str], None] = print
) -> dict[str, SplitSummary]:
    """Make or complete the class folders of the wanted splits; on finished output only counts and sizes are verified.

    `command` is recorded in the provenance, without the folders of paths. Raises FileNotFoundError for a missing archive,
    ValueError for an archive or an output folder that is not what it must be, OSError (a full disk, a killed worker).
    """
    manifest = read_manifest(config.output_dir)
    wanted = [split for split in config.splits if not _is_finished(config, manifest, split)]
    extracted = dict.fromkeys(config.splits, 0)
    if wanted or has_progress(config.output_dir, config.splits):
        devkit, listings = _list_archives(config, wanted, log) if wanted else (None, [])
        with exclusive_lock(config.output_dir / _LOCK_NAME, f"prepare_imagenet into {config.output_dir}"):
            if read_manifest(config.output_dir) != manifest:
                raise ValueError(f"another process has just changed {config.output_dir}; run the same command again")
            if wanted:
                extracted |= _prepare(config, devkit, listings, manifest, command, log)
            for split in config.splits:
                remove_progress(config.output_dir, split)
    manifest = read_manifest(config.output_dir)
    return {split: summarize(manifest_records(manifest[split]), extracted[split]) for split in config.splits}


def _archive_path(config: PrepareConfig, kind: str) -> Path:
    return find_archive(kind, getattr(config, f"{kind}_archive"), config.archives)


def _is_finished(config: PrepareConfig, manifest: Mapping[str, Any], split: str) -> bool:
    """Whether every class folder of a split is there as the manifest says. Raises ValueError for damaged or foreign ones."""
    if split not in manifest or not (config.output_dir / CLASSES_NAME).exists():
        return False
    entry, folder = manifest[split], config.output_dir / split
    try:
        archive = _archive_path(config, split)
    except FileNotFoundError:
        archive = None  # deleted to save space, as one does
    if archive is not None and archive.stat().st_size != entry["archive"]["bytes"]:
        raise ValueError(
            f"{folder} was made from an archive of {entry['archive']['bytes']} bytes, but {archive} has "
            f"{archive.stat().st_size}: choose another --output_dir for another archive"
        )
    refuse_problems(folder_problems(config.output_dir, split, manifest_records(entry)))
    table = ClassTable.read(config.output_dir / CLASSES_NAME)
    return all(wnid in table and (folder / wnid).is_dir() for wnid in entry["classes"])


def _list_archives(config: PrepareConfig, splits: Sequence[str], log: Callable[[str], None]) -> tuple[Devkit, list[SplitListing]]:
    """Read devkit and headers of the archives; refuse what is not the expected ImageNet."""
    paths = {kind: _archive_path(config, kind) for kind in ("devkit", *splits)}
    devkit = read_devkit(paths["devkit"])
    listings = [list_train(paths[name], devkit.table) if name == "train" else list_val(paths[name], devkit) for name in splits]
    found = [("classes in the devkit", len(devkit.table), OFFICIAL_CLASSES)]
    found.append(("lines in its ground truth", len(devkit.validation_wnids), OFFICIAL["val"].images))
    for listing in listings:
        found.append((f"classes in the {listing.split} archive", len(listing.jobs), OFFICIAL_CLASSES))
        if listing.split == "val":
            images = sum(len(job.pictures) for job in listing.jobs)
            found.append(("pictures in the val archive", images, OFFICIAL["val"].images))
        absent = sorted(set(devkit.table.wnids) - {job.wnid for job in listing.jobs})
        if absent and config.expect == "none":
            log(
                f"warning: {len(absent)} of {len(devkit.table)} classes have no pictures in the {listing.split} archive, such as "
                f"{absent[0]}; labels by rank of the class folders are not the indices of {CLASSES_NAME}"
            )
    for what, number, official in found:
        _check_expected(config, what, number, official)
    return devkit, listings


def _check_expected(config: PrepareConfig, what: str, found: int, official: int) -> None:
    if config.expect == "imagenet" and found != official:
        raise ValueError(
            f"{found:,} {what}, but ImageNet (ILSVRC2012) has {official:,}: get the archive again, or say --expect none if "
            "these are other archives in the same layout"
        )


def _prepare(
    config: PrepareConfig,
    devkit: Devkit,
    listings: Sequence[SplitListing],
    manifest: Mapping[str, Any],
    command: Sequence[str],
    log: Callable[[str], None],
) -> dict[str, int]:
    """Extract what is missing, then write down each finished split; returns the number of classes extracted by split."""
    output_dir, start = config.output_dir, time.monotonic()
    _check_table(output_dir, devkit)
    records, missing = {}, {}
    for listing in listings:
        split = listing.split
        remove_partial_folders(output_dir / split)
        _check_same_archive(output_dir, listing, manifest)
        records[split] = _present_records(output_dir, listing, manifest)
        refuse_problems(folder_problems(output_dir, split, records[split]))
        missing[split] = [job for job in listing.jobs if job.wnid not in records[split]]
    jobs = [job for split in missing for job in missing[split]]
    needed = sum(int(job.num_bytes * _OVERHEAD) + _BYTES_A_FILE * len(job.pictures) for job in jobs)
    require_free_space(output_dir, needed, f"extracting {len(jobs)} class folders")
    archives = _verify_archives(config, devkit, listings)
    devkit.table.write(output_dir / CLASSES_NAME)
    for listing in listings:
        (output_dir / listing.split).mkdir(exist_ok=True)
        atomic_write_json(progress_path(output_dir, listing.split), archives[listing.split])
    _extract(jobs, listings, config, records)
    seconds = time.monotonic() - start
    remove_unfinished(output_dir, SPLITS)
    for listing in listings:
        images = sum(record.images for record in records[listing.split].values())
        _check_expected(config, f"pictures in the {listing.split} archive", images, OFFICIAL[listing.split].images)
        settings = {"skip_md5": config.skip_md5, "expect": config.expect, "num_workers": config.num_workers}
        run = {"settings": settings, "seconds_of_last_run": round(seconds, 1), "command": command}
        write_finished(output_dir, listing.split, records[listing.split], archives, run)
    return {split: len(missing[split]) for split in missing}


def _extract(
    jobs: Sequence[ClassJob], listings: Sequence[SplitListing], config: PrepareConfig, records: dict[str, dict[str, ClassRecord]]
) -> None:
    """Extract the jobs, add their records, show megabytes, pictures a second and the time that is left."""
    total = sum(job.num_bytes for listing in listings for job in listing.jobs)
    done = total - sum(job.num_bytes for job in jobs)
    num_classes, images, start = sum(len(listing.jobs) for listing in listings), 0, time.monotonic()
    with Progress(total // 10**6, done // 10**6, "extracting, in MB") as progress:
        for job, record in extract_classes(jobs, config.output_dir, config.num_workers):
            records[job.split][job.wnid] = record
            done, images = done + job.num_bytes, images + record.images
            progress.update(
                done // 10**6 - progress.step,
                classes=f"{sum(map(len, records.values()))}/{num_classes}",
                images_per_second=round(images / max(time.monotonic() - start, 1e-9)),
            )


def _verify_archives(config: PrepareConfig, devkit: Devkit, listings: Sequence[SplitListing]) -> dict[str, dict[str, Any]]:
    """Name, size and hashes of each archive. Raises ValueError for an MD5 that is not the official one.

    An archive whose MD5 an earlier, killed run has verified is not read again while its size and time are the same.
    """
    size = devkit.path.stat().st_size
    archives = {"devkit": {"name": devkit.path.name, "bytes": size, "sha256": sha256_file(devkit.path), "md5": None}}
    for listing in listings:
        status = listing.archive.stat()
        archives[listing.split] = {
            "name": listing.archive.name,
            "bytes": listing.num_bytes,
            "mtime_ns": status.st_mtime_ns,
            "listing_sha256": listing.listing_sha256,
            "md5": None,
        }
    paths = {"devkit": devkit.path, **{listing.split: listing.archive for listing in listings}}
    for kind, path in paths.items():
        before = read_json(progress_path(config.output_dir, kind), {})
        if before.get("md5") and before == {**archives[kind], "name": before.get("name"), "md5": before["md5"]}:
            archives[kind]["md5"] = before["md5"]
        elif not config.skip_md5:
            archives[kind]["md5"] = check_md5(path, kind)
    return archives


def _check_table(output_dir: Path, devkit: Devkit) -> None:
    path = output_dir / CLASSES_NAME
    if path.exists() and ClassTable.read(path) != devkit.table:
        raise ValueError(
            f"{path} has other classes than {devkit.path}: give the devkit it was made with, or another --output_dir"
        )


def _check_same_archive(output_dir: Path, listing: SplitListing, manifest: Mapping[str, Any]) -> None:
    before = manifest[listing.split]["archive"] if listing.split in manifest else {}
    before = before or read_json(progress_path(output_dir, listing.split), {})
    if before and (before["bytes"], before["listing_sha256"]) != (listing.num_bytes, listing.listing_sha256):
        raise ValueError(
            f"{output_dir / listing.split} was begun with another {listing.split} archive ({before['name']}, {before['bytes']} "
            f"bytes) than {listing.archive} ({listing.num_bytes} bytes): give that one, or choose another --output_dir"
        )


def _present_records(output_dir: Path, listing: SplitListing, manifest: Mapping[str, Any]) -> dict[str, ClassRecord]:
    """The records of those class folders that are there. A folder without a record was made by something else."""
    known = manifest_records(manifest[listing.split]) if listing.split in manifest else {}
    records = {}
    for job in listing.jobs:
        if (output_dir / listing.split / job.wnid).is_dir():
            record = known.get(job.wnid) or read_record(output_dir, listing.split, job.wnid)
            if record is not None:
                records[job.wnid] = record
    return records
