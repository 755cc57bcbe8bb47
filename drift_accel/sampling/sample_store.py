"""Pictures made or measured in chunks on disk: any number of processes, resumed after any kill, to the same bits.

FOLDER/settings.json says what the results depend on; FOLDER/chunks/00000012/ holds one committed chunk of 64 pictures: an
array a name (pixels.npy where pictures are kept, whatever is measured of them) and facts.json.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from drift_accel.data.cache_format import settings_difference
from drift_accel.data.latent_export import Workers
from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks
from drift_accel.foundation.collectives import require_agreement, world_group
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.provenance import hash_configuration
from drift_accel.foundation.storage import atomic_write_json, plain_value, remove_partial_folders, require_free_space
from drift_accel.sampling.pictures import PictureBatch, Pictures
from drift_accel.sampling.sampler import CHUNK

SETTINGS_NAME, FACTS_NAME, LOCK_NAME = "settings.json", "facts.json", "lock"
PIXELS = "pixels"


class Measure(Protocol):
    """What is taken from each chunk of pictures."""

    def __call__(self, batch: PictureBatch) -> Mapping[str, np.ndarray]:
        """Arrays by name, each with one row a picture; row i depends on its picture and its place in the batch alone."""

    def identity(self) -> dict[str, Any]:
        """What decides the rows, in plain values."""


class SampleStore:
    """The results of a set of pictures in `folder`; making the object touches nothing.

    `measure` (None: nothing) is applied to each chunk; `keep_pixels` stores the pictures themselves.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        pictures: Pictures,
        measure: Measure | None = None,
        *,
        keep_pixels: bool = False,
    ):
        self.folder, self.pictures, self.measure, self.keep_pixels = Path(folder), pictures, measure, keep_pixels
        self.chunks = ChunkStore(self.folder / "chunks", Chunks(len(pictures), CHUNK))
        measured = None if measure is None else measure.identity()
        self.settings = plain_value({"pictures": pictures.identity(), "measure": measured, "keep_pixels": keep_pixels})

    def compute(
        self, *, workers: Workers | None = None, description: str = "samples", log: Callable[[str], None] = print
    ) -> None:
        """Compute what is missing; every process calls this, and all chunks are there when it returns.

        Raises ValueError for a folder of other settings (showing them), one that another command is writing, and one that a
        process does not see; OSError where the disk is too small.
        """
        workers = workers or Workers()
        require_agreement(hash_configuration(self.settings), "settings of the samples", world_group())
        if workers.is_main:
            self._check()
        workers.wait()  # nobody writes before the folder was looked at
        lock = exclusive_lock(self.folder / LOCK_NAME, f"work in {self.folder}") if workers.is_main else nullcontext()
        with lock:
            if workers.is_main:
                remove_partial_folders(self.folder)
                atomic_write_json(self.folder / SETTINGS_NAME, self.settings)
                self.chunks.prepare()
                there = len(self.chunks.complete())
                if there:
                    log(f"{self.folder}: {there} of {len(self.chunks.chunks)} chunks are there already")
            workers.wait()
            if not self.folder.is_dir():
                raise ValueError(f"process {workers.index} does not see {self.folder}: give a folder that all machines share")
            run_chunks(
                self.chunks,
                self._compute_chunk,
                process_index=workers.index,
                num_processes=workers.count,
                description=description,
            )
            workers.wait()

    def arrays(self, name: str) -> Iterator[np.ndarray]:
        """The arrays of one name, chunk by chunk, in the order of the pictures. Raises ValueError naming one that is damaged."""
        for chunk in range(len(self.chunks.chunks)):
            path = self.chunks.path(chunk) / f"{name}.npy"
            try:
                yield np.load(path, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): remove {path.parent} and run the same command again"
                ) from None

    def rows(self, name: str) -> np.ndarray:
        """All rows of one name in memory, in the order of the pictures."""
        return np.concatenate(list(self.arrays(name)))

    def has(self, name: str) -> bool:
        """Whether the chunks hold an array of this name."""
        return (self.chunks.path(0) / f"{name}.npy").is_file()

    def num_non_finite(self) -> int:
        """How many pictures held a NaN or an infinite value."""
        folders = map(self.chunks.path, range(len(self.chunks.chunks)))
        return sum(json.loads((folder / FACTS_NAME).read_bytes())["non_finite"] for folder in folders)

    def _compute_chunk(self, chunk: int, items: range, folder: Path, advance: Callable[[int], None]) -> None:
        batch = self.pictures.batch(items)
        arrays = {} if self.measure is None else dict(self.measure(batch))
        if self.keep_pixels:
            arrays[PIXELS] = batch.pixels
        for name, array in arrays.items():
            if len(array) != len(items):
                raise ValueError(f"{name} of pictures {items.start} to {items.stop - 1} has {len(array)} rows, not {len(items)}")
            np.save(folder / f"{name}.npy", array, allow_pickle=False)
        atomic_write_json(folder / FACTS_NAME, {"non_finite": batch.non_finite})

    def _check(self) -> None:
        path = self.folder / SETTINGS_NAME
        if path.is_file():
            differences = settings_difference(json.loads(path.read_bytes()), self.settings)
            if differences:
                raise ValueError(
                    f"{self.folder} holds unfinished work with other settings:\n  " + "\n  ".join(differences) + "\n"
                    "Give another output, give the same settings, or remove what is there"
                )
        elif self.folder.exists() and any(not name.startswith(".") and name != LOCK_NAME for name in os.listdir(self.folder)):
            raise ValueError(f"{self.folder} holds other things: give a new or an empty folder")
        if self.keep_pixels:
            first = self.pictures.batch(range(1)).pixels
            if first is None:
                raise ValueError("there are only latents: name their VAE with --vae, so that pictures can be kept")
            require_free_space(self.folder, first.nbytes * len(self.pictures), f"keeping {len(self.pictures):,} pictures")
