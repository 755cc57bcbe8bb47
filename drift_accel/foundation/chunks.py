"""Work in fixed chunks whose result does not depend on how it was run.

range(num_items) is cut by index into chunks of a fixed size. Chunk i belongs to process i % num_processes and is computed
alone, so any number of processes gives the same chunks, and a killed run goes on, with any number of processes, where chunks
are missing. Each chunk is a committed folder: whole or absent, with the SHA-256 of its files in COMPLETE.json.
"""

import os
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from drift_accel.foundation.progress import Progress
from drift_accel.foundation.storage import committed_folder, remove_folder, remove_partial_folders, verify_folder

_NAME_DIGITS = 8


@dataclass(frozen=True)
class Chunks:
    """The cut of range(num_items) into chunks of `chunk_size` items, the last one shorter.

    Raises ValueError for a negative number of items or a chunk size below 1.
    """

    num_items: int
    chunk_size: int

    def __post_init__(self):
        if self.num_items < 0 or self.chunk_size < 1:
            raise ValueError(f"{self.num_items} items in chunks of {self.chunk_size}: give at least 0 items in chunks of 1")

    def __len__(self) -> int:
        return -(-self.num_items // self.chunk_size)

    def span(self, chunk: int) -> range:
        """The items of one chunk. Raises IndexError for a chunk that does not exist."""
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk {chunk} does not exist: there are {len(self)}, from 0")
        start = chunk * self.chunk_size
        return range(start, min(start + self.chunk_size, self.num_items))


class ChunkStore:
    """The results of chunks on disk: folder/00000012/ holds chunk 12, committed.

    One process prepares the store (`prepare`) while no other one writes; then any number may write different chunks.
    """

    def __init__(self, folder: str | os.PathLike, chunks: Chunks):
        self.folder, self.chunks = Path(folder), chunks

    def path(self, chunk: int) -> Path:
        """The folder of one chunk, there or not."""
        return self.folder / f"{chunk:0{_NAME_DIGITS}d}"

    def prepare(self) -> None:
        """Make the folder and remove what killed writers left in it and chunks with missing or cut files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partial_folders(self.folder)
        for chunk in sorted(self.complete()):
            if verify_folder(self.path(chunk), full=False):
                self.discard(chunk)

    def is_complete(self, chunk: int) -> bool:
        """Whether the chunk's folder is there; it is never there in part."""
        return self.path(chunk).is_dir()

    def complete(self) -> set[int]:
        """The chunks that are there."""
        if not self.folder.is_dir():
            return set()
        names = (name for name in os.listdir(self.folder) if len(name) == _NAME_DIGITS and name.isdecimal())
        return {chunk for chunk in map(int, names) if chunk < len(self.chunks)}

    def write(self, chunk: int) -> AbstractContextManager[Path]:
        """A context that yields the folder to write chunk's files into and commits it at its end (`committed_folder`)."""
        return committed_folder(self.path(chunk))

    def problems(self, chunk: int) -> list[str]:
        """What is wrong with a chunk, one line a file, after reading all of it; empty if nothing is."""
        return verify_folder(self.path(chunk), full=True)

    def discard(self, chunk: int) -> None:
        """Remove a chunk, so that the next run computes it again. Raises FileNotFoundError if it is not there."""
        remove_folder(self.path(chunk))


def run_chunks(
    store: ChunkStore,
    compute: Callable[[int, range, Path, Callable[[int], None]], None],
    *,
    process_index: int = 0,
    num_processes: int = 1,
    finished: Collection[int] = (),
    committed: Callable[[int], None] | None = None,
    description: str = "",
    enabled: bool | None = None,
    seconds_between_lines: float = 60.0,
) -> int:
    """Compute those chunks of this process that are missing, in ascending order; returns how many these were.

    `compute(chunk, items, folder, advance)` writes the files of one chunk into `folder` and may call `advance(n)` when `n`
    more items are done; `committed(chunk)` is called once its folder is there. Chunks in `finished` count as there: their
    results live elsewhere by now. Progress counts the items of all processes, by the chunks on disk; it is shown by process 0,
    or as `enabled` says. This returns when this process is done: the caller waits for the others.
    Raises ValueError unless 0 <= process_index < num_processes, and whatever `compute` raises; that chunk is then absent.
    """
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process {process_index} of {num_processes}: wanted 0 <= process < number of processes")
    finished = frozenset(finished)
    complete = store.complete() | finished
    mine = [chunk for chunk in range(process_index, len(store.chunks), num_processes) if chunk not in complete]
    tracker = _Tracker(
        store,
        finished,
        Progress(
            store.chunks.num_items,
            sum(len(store.chunks.span(chunk)) for chunk in complete),
            description,
            process_index == 0 if enabled is None else enabled,
            seconds_between_lines=seconds_between_lines,
        ),
    )
    with tracker.progress:
        for chunk in mine:
            with store.write(chunk) as folder:
                compute(chunk, store.chunks.span(chunk), folder, tracker.advance)
            if committed is not None:
                committed(chunk)
            tracker.count()
    return len(mine)


class _Tracker:
    """Items done by all processes: the chunks on disk and this process's part of the one it is at."""

    def __init__(self, store: ChunkStore, finished: frozenset[int], progress: Progress):
        self.store, self.finished, self.progress = store, finished, progress
        self._start_time, self._start_step = time.monotonic(), progress.step

    def advance(self, num_items: int) -> None:
        self._show(self.progress.step + num_items)

    def count(self) -> None:
        if self.progress.enabled:  # listing the folder is for the one that shows it
            self._show(sum(len(self.store.chunks.span(chunk)) for chunk in self.store.complete() | self.finished))

    def _show(self, step: int) -> None:
        step = min(step, self.progress.total)
        if step > self.progress.step:
            rate = (step - self._start_step) / max(time.monotonic() - self._start_time, 1e-9)
            self.progress.update(step - self.progress.step, items_per_second=round(rate, 1))
