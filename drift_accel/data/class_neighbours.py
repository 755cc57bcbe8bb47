"""Which rows of a class lie nearest to, or farthest from, each of its rows: a table made once and memory-mapped.

For a row a (the anchor) of a class with n rows and features f, the rows of the class in the order of |f - f_a|, P of them:
"nearest" begins with the anchor itself, "farthest" with the row farthest away and ends with the anchor. Equal distances come in
the order of the rows. A class with fewer than P rows repeats its order from the start.

The features are needed for one class at a time and are never stored: only the order is, int32 [rows, P] in class order (of
1,281,167 rows with P = 64: 328 MB), so that a step looks its rows up and computes nothing. Classes are cut into chunks that any
number of processes computes and that a killed run keeps.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks
from drift_accel.foundation.collectives import gather_text, run_on_main
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import (
    atomic_write_bytes,
    atomic_write_json,
    committed_folder,
    plain_value,
    remove_folder,
    verify_folder,
)

CHOICES = ("random", "nearest", "farthest")
TABLE_NAME, DESCRIPTION_NAME = "neighbours.npy", "description.json"
FORMAT = 1
MOST_CHUNKS = 1000
BATCH_SIZE = 64  # images that pass through the encoder at once
# Distances that are held at once while a class is sorted.
BLOCK_DISTANCES = 2**24
POSTERIOR_SEED = 0  # a row of stored moments has the same draw in every table

Extract = Callable[[np.ndarray], Tensor]  # images [n,C,H,W] -> features [n,S]


@dataclass(frozen=True, kw_only=True)
class PositivesConfig:
    """Which rows of a label's class are its positives in a step. Raises ValueError for an unknown choice."""

    choice: str = "random"
    """"random": any rows of the class, the published method. "nearest": a row of the class drawn at random, and those nearest to
    it in the feature space of the first encoder. "farthest": those farthest from such a row."""
    map: str | None = None
    """The encoder's map whose mean over locations is the feature space; null: its last one."""
    folder: str | None = None
    """Where the table of neighbours is kept, under a name made of what it depends on; null: class_neighbours in the cache's
    folder, or in the run's folder for the digits."""

    def __post_init__(self):
        if self.choice not in CHOICES:
            raise ValueError(f"positives.choice is {self.choice!r}: choose one of {', '.join(CHOICES)}")
        if self.choice == "random" and self.map is not None:
            raise ValueError(f"positives.map is {self.map!r}, which random positives do not use: leave it out")

    @property
    def needs_table(self) -> bool:
        """Whether rows come from a table of neighbours."""
        return self.choice != "random"


class ClassNeighbours:
    """A complete table: `order(label, place)` are the rows around row number `place` of a class, int64 [P]."""

    def __init__(self, source, table: np.ndarray):
        self._table = table
        counts = np.bincount(source.labels, minlength=source.num_classes)
        self._starts = np.concatenate([[0], np.cumsum(counts)])

    @property
    def count(self) -> int:
        """P."""
        return self._table.shape[1]

    def order(self, label: int, place: int) -> np.ndarray:
        """Rows [P]; `place` counts within the class."""
        return self._table[self._starts[label] + place].astype(np.int64)


def neighbour_order(features: Tensor, choice: str, count: int) -> np.ndarray:
    """The places [n, count] of the members around each of n members with features [n,S], as the module says.

    Raises ValueError naming the first member whose features are not finite.
    """
    finite = torch.isfinite(features).all(dim=1)
    if not finite.all():
        raise ValueError(f"the features of member {int((~finite).nonzero()[0])} of the class are not finite")
    wide = features.double()
    wide = wide - wide.mean(dim=0)  # a common offset would cost digits of the differences
    squares = wide.square().sum(dim=1)
    n = len(wide)
    sign, of_itself = (1.0, -torch.inf) if choice == "nearest" else (-1.0, torch.inf)
    parts = []
    for places in torch.arange(n, device=wide.device).split(max(1, BLOCK_DISTANCES // n)):
        distance = squares[places, None] + squares - 2 * wide[places] @ wide.T  # [block, n], squared
        distance = sign * distance
        distance[torch.arange(len(places), device=wide.device), places] = of_itself
        parts.append(distance.argsort(dim=1, stable=True)[:, :count].cpu())
    order = torch.cat(parts).numpy()  # [n, min(n, count)]
    return order[:, np.arange(count) % n]


def table_key(description: Mapping) -> str:
    """The name of the table that belongs to a description of everything it depends on."""
    return hashlib.sha256(json.dumps(plain_value(description), sort_keys=True).encode()).hexdigest()[:16]


def open_class_neighbours(
    root: str | os.PathLike,
    source,
    extract: Extract,
    *,
    choice: str,
    count: int,
    description: Mapping,
    process_index: int = 0,
    num_processes: int = 1,
    group=None,
    log: Callable[[str], None] = print,
) -> ClassNeighbours:
    """The table of `source` (a cache, images in memory, a part of one) in root/KEY, made first where it is not there.

    `description` says what the rows and features are, beside choice, count and format; it is kept with the table. Every process
    of `group` must call this on a folder that all of them see. Raises ValueError for a folder that cannot be written, a table
    that another command is making, and features that are not finite.
    """
    description = {**description, "choice": choice, "count": count, "format": FORMAT, "rows": len(source)}
    folder = Path(root) / table_key(description)
    if not run_on_main(lambda: not verify_folder(folder, full=False), group):
        log(f"making the table of {choice} rows in {folder}: all {len(source):,} rows pass through the encoder once")
        store = ChunkStore(
            folder.with_name(f"{folder.name}.in_progress"), Chunks(source.num_classes, -(-source.num_classes // MOST_CHUNKS))
        )
        with _held_by_main(folder.with_name(f".{folder.name}.lock"), group):
            run_on_main(store.prepare, group)
            run_chunks(
                store,
                lambda chunk, labels, place, advance: _write_classes(source, extract, choice, count, labels, place, advance),
                process_index=process_index,
                num_processes=num_processes,
                description="classes",
            )
            gather_text("done", group)  # nothing is put together before all parts are there
            run_on_main(lambda: _assemble(store, folder, source, count, description), group)
    if not (folder / TABLE_NAME).is_file():
        raise ValueError(f"process {process_index} does not see {folder}: set positives.folder to one that all machines share")
    return ClassNeighbours(source, np.load(folder / TABLE_NAME, mmap_mode="r", allow_pickle=False))


@contextmanager
def _held_by_main(path: Path, group) -> Iterator[None]:
    """The lock on the table's making, held by process 0 for all; where it is refused, all of them stop."""
    with ExitStack() as stack:

        def take() -> None:
            try:
                stack.enter_context(exclusive_lock(path, "a command that makes the same table of neighbours"))
            except OSError as error:
                raise ValueError(
                    f"the table of neighbours cannot be written ({error}): set positives.folder to a folder that can"
                ) from error

        run_on_main(take, group)
        yield
        run_on_main(lambda: path.unlink(missing_ok=True), group)


def _write_classes(source, extract: Extract, choice: str, count: int, labels: range, folder: Path, advance) -> None:
    """The order of every row of some classes, rows [rows of the classes, count] int32, into the chunk's folder."""
    sizes = np.bincount(source.labels, minlength=source.num_classes)
    parts = [np.empty((0, count), dtype=np.int32)]
    for label in labels:
        if sizes[label]:
            rows = source.class_rows(label)
            features = torch.cat(
                [extract(_read(source, rows[first : first + BATCH_SIZE])) for first in range(0, len(rows), BATCH_SIZE)]
            )
            try:
                parts.append(rows[neighbour_order(features, choice, count)].astype(np.int32))
            except ValueError as error:
                raise ValueError(f"class {label} ({source.class_names[label]}): {error}") from error
        advance(1)
    content = io.BytesIO()
    np.save(content, np.concatenate(parts))
    atomic_write_bytes(folder / TABLE_NAME, content.getvalue())


def _read(source, rows: np.ndarray) -> np.ndarray:
    """The images of rows [n] as they are, not mirrored."""
    if not source.is_sampled_at_read:
        return source.rows(rows)
    return source.rows(rows, None, [random_stream(POSTERIOR_SEED, "neighbours/posterior", int(row)) for row in rows])


def _assemble(store: ChunkStore, folder: Path, source, count: int, description: Mapping) -> None:
    """Put the chunks of all classes into one file and commit it with its description."""
    if not verify_folder(folder, full=False):
        return  # another command, which held the lock before, made it
    damaged = [chunk for chunk in range(len(store.chunks)) if store.problems(chunk)]
    for chunk in damaged:
        store.discard(chunk)
    if damaged:
        raise ValueError(f"{len(damaged)} damaged part(s) of {folder} were removed: run the same command again")
    if folder.exists():
        remove_folder(folder)
    with committed_folder(folder) as place:
        table = np.lib.format.open_memmap(place / TABLE_NAME, "w+", dtype=np.int32, shape=(len(source), count))
        start = 0
        for chunk in range(len(store.chunks)):
            part = np.load(store.path(chunk) / TABLE_NAME, allow_pickle=False)
            table[start : start + len(part)] = part
            start += len(part)
        table.flush()
        atomic_write_json(place / DESCRIPTION_NAME, description)
    remove_folder(store.folder)
