"""Class folders out of an archive: each one appears whole or not at all, in any number of processes.

output/val/n01440764/             the pictures of a class, nothing else
output/val/.n01440764.partial-*   a class being written; what a killed process left is removed by the next run
output/in_progress/val/n01440764.json   how many pictures and bytes a class has; written before its folder takes its name
"""

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from drift_accel.data.archive_listing import ClassJob, Member, list_members, require_pictures
from drift_accel.data.archive_records import (
    CLASSES_NAME,
    MANIFEST_NAME,
    PROGRESS_NAME,
    PROVENANCE_NAME,
    ClassRecord,
    listing_sha256,
    record_path,
)
from drift_accel.foundation.storage import atomic_write_json, is_partial_name

_BLOCK_BYTES = 1 << 20
# Flushing one file costs a commit of the file system's journal; flushes of several threads share it (8x faster on ext4).
_FLUSHING_THREADS = 8
_CHECKING_THREADS = 8
_NUM_NAMED = 5


def extract_class(job: ClassJob, output_dir: Path) -> ClassRecord:
    """Write one class folder, compare it with the headers of the tar, and give it its name.

    Raises ValueError for an archive that is damaged or holds what it must not, OSError; the folder is then absent.
    """
    final_path = output_dir / job.split / job.wnid
    # The form that `remove_partial_folders` knows as left by a process that is gone.
    partial = final_path.parent / f".{job.wnid}.partial-{os.getpid()}-{socket.gethostname()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with _open_pictures(job) as (archive, pictures):
            hashes = {picture.name: _copy_picture(archive, picture, partial, job) for picture in pictures}
        _check_written(partial, pictures)
        _flush(partial, pictures)
        total = sum(picture.size for picture in pictures)
        listing = [(picture.name, picture.size, hashes[picture.name]) for picture in pictures]
        record = ClassRecord(images=len(pictures), bytes=total, sha256=listing_sha256(listing))
        atomic_write_json(record_path(output_dir, job.split, job.wnid), asdict(record))
        _take_name(partial, final_path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        hint = "free some space, then run" if error.errno == errno.ENOSPC else "run"
        message = f"{job.split}/{job.wnid} could not be extracted ({error}); {hint} the same command again to go on"
        raise OSError(error.errno, message) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


def extract_classes(jobs: Sequence[ClassJob], output_dir: Path, num_workers: int) -> Iterator[tuple[ClassJob, ClassRecord]]:
    """Extract all jobs, in this process or in `num_workers` others; yields each when it is done, in any order.

    Closing the iterator or an error stops after the classes in work. Raises as `extract_class`, and OSError for a worker
    that was killed.
    """
    if num_workers == 1 or len(jobs) <= 1:
        for job in jobs:
            yield job, extract_class(job, output_dir)
        return
    # A fresh interpreter would load this package again for every worker; forking is safe on Linux alone.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(num_workers, len(jobs)), mp_context=context, initializer=_start_worker)
    try:
        futures = {pool.submit(extract_class, job, output_dir): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenExecutor:
        raise OSError(
            errno.ECHILD,
            "a worker process was killed (often: too little memory); run the same command again, or with fewer --num_workers",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def remove_unfinished(output_dir: Path, splits: Sequence[str]) -> None:
    """Remove what is half-written: for the one that holds the lock, when its workers are gone.

    `remove_partial_folders` alone leaves those whose writer's number belongs to a living process; in containers that is
    often another process by chance. In the output folder itself only files of this command are touched.
    """
    progress = output_dir / PROGRESS_NAME
    folders = [progress, *(parent / split for parent in (output_dir, progress) for split in splits)]
    left = [entry for folder in folders if folder.is_dir() for entry in folder.iterdir() if is_partial_name(entry.name)]
    for name in (CLASSES_NAME, MANIFEST_NAME, PROVENANCE_NAME):
        left += [entry for entry in output_dir.glob(f".{name}.*") if is_partial_name(entry.name)]
    for entry in left:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def folder_problems(output_dir: Path, split: str, records: Mapping[str, ClassRecord]) -> list[str]:
    """What is wrong with the class folders of a split, one line a folder; empty if nothing is. Absent ones are not wrong.

    Compares the number of files and their sizes with the records; contents are not read. Names what else lies there: a
    folder more would shift the labels of whoever lists them.
    """
    folder = output_dir / split
    present = sorted(entry.name for entry in folder.iterdir() if not is_partial_name(entry.name)) if folder.is_dir() else []
    known = [name for name in present if name in records]
    with ThreadPoolExecutor(_CHECKING_THREADS) as pool:
        found = pool.map(lambda name: _folder_problem(folder / name, records[name]), known)
        problems = [problem for problem in found if problem is not None]
    return problems + [f"{folder / name}: was not made by this command" for name in present if name not in records]


def refuse_problems(problems: Sequence[str]) -> None:
    """Raise ValueError with the first few of the problems and what to do, if there are any."""
    if problems:
        more = f"\n  and {len(problems) - _NUM_NAMED} more" if len(problems) > _NUM_NAMED else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:_NUM_NAMED])
        raise ValueError(
            f"remove these, or choose another --output_dir; the same command then makes the missing classes:{lines}{more}"
        )


@contextmanager
def _open_pictures(job: ClassJob) -> Iterator[tuple[tarfile.TarFile, Sequence[Member]]]:
    """The tar to read the pictures of a class from, and where they lie in it. A tar in the archive is read in place."""
    label = f"{job.split} archive {job.archive}"
    try:
        with tarfile.open(job.archive, "r:") as archive:
            if job.nested is None:
                require_pictures(job.pictures, label)
                yield archive, job.pictures
                return
            with tarfile.open(fileobj=archive.extractfile(_tar_info(job.nested)), mode="r:") as nested:
                pictures = list_members(nested, f"{job.nested.name} in {label}")
                require_pictures(pictures, f"{job.nested.name} in {label}")
                yield nested, pictures
    except tarfile.TarError as error:
        raise ValueError(f"{job.wnid} in {label} is damaged or cut short ({error}): get the archive again") from None


def _copy_picture(archive: tarfile.TarFile, picture: Member, folder: Path, job: ClassJob) -> str:
    """Copy the bytes of one picture; returns their SHA-256."""
    digest, copied = hashlib.sha256(), 0
    source = archive.extractfile(_tar_info(picture))
    with open(folder / picture.name, "xb") as file:
        while block := source.read(_BLOCK_BYTES):
            file.write(block)
            digest.update(block)
            copied += len(block)
    if copied != picture.size:
        raise ValueError(
            f"{picture.name} of {job.wnid}: {job.archive} ends after {copied} of its {picture.size} bytes; get the archive again"
        )
    return digest.hexdigest()


def _tar_info(member: Member) -> tarfile.TarInfo:
    info = tarfile.TarInfo(member.name)
    info.size, info.offset_data = member.size, member.offset
    return info


def _check_written(folder: Path, pictures: Sequence[Member]) -> None:
    with os.scandir(folder) as entries:
        written = {entry.name: entry.stat().st_size for entry in entries}
    wanted = {picture.name: picture.size for picture in pictures}
    if written != wanted:
        name = sorted(set(written.items()) ^ set(wanted.items()))[0][0]
        raise ValueError(
            f"{folder}: {name!r} has {written.get(name)} bytes on the disk and {wanted.get(name)} in the archive; does this file "
            "system tell upper from lower case and keep all letters of names?"
        )


def _flush(folder: Path, pictures: Sequence[Member]) -> None:
    with ThreadPoolExecutor(_FLUSHING_THREADS) as pool:
        list(pool.map(_flush_path, (folder / picture.name for picture in pictures)))
    _flush_path(folder)


def _flush_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _take_name(partial: Path, final_path: Path) -> None:
    try:
        os.rename(partial, final_path)
    except OSError:
        # A worker of a killed run, not yet dead, may have finished the same class from the same archive.
        if not final_path.is_dir():
            raise
        shutil.rmtree(partial)
    _flush_path(final_path.parent)


def _folder_problem(folder: Path, record: ClassRecord) -> str | None:
    try:
        with os.scandir(folder) as entries:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
    except OSError as error:
        return f"{folder}: cannot be read ({error.strerror})"
    if (len(sizes), sum(sizes)) != (record.images, record.bytes):
        return f"{folder}: {len(sizes)} files of {sum(sizes)} bytes instead of {record.images} of {record.bytes}"
    return None


def _start_worker() -> None:
    # Ctrl-C reaches the whole group: the parent alone decides, and lets the classes in work finish.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Without it the workers of a parent that is killed would wait for their next class for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
