"""A set of activations while it is written: any number of processes, resumed after any kill, nothing twice.

FOLDER/activations/SET.in_progress/ holds settings.json and chunks/, each chunk one committed batch file with its pictures.
When all are there, finished.json says what the set is, files move to their names, FOLDER/metadata/SET/dataset_info.json is
written, and SET.in_progress goes; until then `ActivationSet.open` refuses the set.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from drift_accel.analysis.activations.batches import ARROW, DTYPES, RESERVED_NAMES, STORAGES, SUFFIXES, batch_name
from drift_accel.analysis.activations.store import ACTIVATIONS, FORMAT, IMAGES, IN_PROGRESS, INFO_NAME, METADATA
from drift_accel.analysis.activations.writing import BATCH_STEM, BatchWriter, open_writer
from drift_accel.data.cache_format import settings_difference
from drift_accel.data.cache_writing import STATE_NAME, dataset_state
from drift_accel.data.export_chunks import refuse_unreadable
from drift_accel.data.latent_export import Workers
from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks
from drift_accel.foundation.collectives import require_agreement, world_group
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.provenance import collect_provenance, hash_configuration
from drift_accel.foundation.storage import (
    COMPLETE_NAME,
    atomic_write_json,
    plain_value,
    remove_folder,
    remove_partial_folders,
    require_free_space,
)

SETTINGS_NAME, FINISHED_NAME, FACTS_NAME = "settings.json", "finished.json", "facts.json"
DEFAULT_BATCH = {"arrow": 1024, "npz": 64}  # samples a file


def require_set_name(name: str) -> None:
    """Raise ValueError for a name that cannot be a set's folder."""
    if name != Path(name).name or not name or name.startswith(".") or name.endswith(IN_PROGRESS):
        raise ValueError(f"--name is {name!r}: give a name that can be a folder's, without {IN_PROGRESS}")


class StagedSet:
    """The set `name` of `folder` on its way; making the object touches nothing.

    `settings`, in plain values, are all that the content depends on; `shapes` of one sample by layer; batch_size: samples a
    file, of `num_samples`. Raises ValueError for a name that is no folder name, layers that cannot be columns, an unknown
    storage or number type, and a batch size below 1.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        name: str,
        settings: Mapping[str, Any],
        *,
        shapes: Mapping[str, Sequence[int]],
        num_samples: int,
        storage: str = ARROW,
        dtype: str = "float32",
        batch_size: int | None = None,
    ):
        require_set_name(name)
        if storage not in STORAGES or dtype not in DTYPES:
            raise ValueError(f"storage is {storage!r} of {dtype!r}: choose among {', '.join((*STORAGES, *DTYPES))}")
        taken = [layer for layer in shapes if layer in RESERVED_NAMES]
        if taken:
            raise ValueError(f"a layer cannot be called {taken[0]!r}: that is a column of its own; choose another layer")
        batch_size = DEFAULT_BATCH[storage] if batch_size is None else batch_size
        self.folder, self.name, self.storage, self.dtype = Path(folder), name, storage, dtype
        self.shapes = {layer: tuple(shape) for layer, shape in shapes.items()}
        layout = {"format": FORMAT, "name": name, "storage": storage, "dtype": dtype, "batch_size": batch_size}
        described = {layer: {"shape": list(shape)} for layer, shape in self.shapes.items()}
        self.settings = plain_value({**layout, "layers": described, **settings})
        self.place, self.images = self.folder / ACTIVATIONS / name, self.folder / IMAGES / name
        self.info_path = self.folder / METADATA / name / INFO_NAME
        self.work = self.place.with_name(f"{name}{IN_PROGRESS}")
        self.chunks = ChunkStore(self.work / "chunks", Chunks(num_samples, batch_size))

    def write(
        self,
        compute: Callable[[range, BatchWriter, Callable[[int], None]], list[str]],
        *,
        workers: Workers | None = None,
        max_bad: int = 0,
        overwrite: bool = False,
        estimated_bytes: int = 0,
        command: Sequence[str] = (),
        description: str = "activations",
        log: Callable[[str], None] = print,
    ) -> Path:
        """Compute what is missing and finish the set; every process calls this. Returns the file that describes it.

        `compute(places, writer, advance)` adds the samples of `places`, in order, to the writer, their pictures to
        `writer.images`, and returns a line for each sample that could not be read; it may call advance(n) as it goes.
        Raises ValueError for a set of other settings (showing them) unless `overwrite`, one that another command writes, more
        than `max_bad` unreadable samples, and where none is left; OSError where the disk is too small.
        """
        workers = workers or Workers()
        log = log if workers.is_main else lambda message: None
        require_agreement(hash_configuration(self.settings), "settings of the activations", world_group())
        complete = self._is_complete(overwrite)
        workers.wait()  # nobody writes before all have looked
        if complete:
            if workers.is_main:
                remove_partial_folders(self.place.parent)  # a run was killed while it removed its folder
            log(f"the set {self.name!r} of {self.folder} is complete already")
            return self.info_path
        if workers.is_main:
            self._check(overwrite, estimated_bytes)
        lock = exclusive_lock(self.work / "lock", f"work on the set {self.name!r}") if workers.is_main else nullcontext()
        with lock:
            if workers.is_main:
                self._prepare(overwrite, log)
            workers.wait()
            if not self.work.is_dir():
                raise ValueError(f"process {workers.index} does not see {self.work}: give a folder that all machines share")
            if not (self.work / FINISHED_NAME).is_file():
                self._compute(compute, workers, max_bad, description)
                workers.wait()
            if workers.is_main:
                self._finish(max_bad, command)
            workers.wait()
        return self.info_path

    def _is_complete(self, overwrite: bool) -> bool:
        if self.work.is_dir() or not self.info_path.is_file():
            return False
        info = json.loads(self.info_path.read_bytes())
        differences = settings_difference(info.get("settings", {}), self.settings)
        if differences and not overwrite:
            raise ValueError(self._other_settings("a finished set", differences))
        damaged = [] if differences else self._damaged_files(info["files"])
        if damaged and not overwrite:
            raise ValueError(f"{damaged[0]} is missing or cut ({len(damaged)} such files): --overwrite extracts the set again")
        return not differences and not damaged

    def _damaged_files(self, batches: Sequence[Mapping[str, Any]]) -> list[Path]:
        """Batch files of the finished set that are not there in their whole length."""
        paths = {self.place / name: entry["bytes"] for batch in batches for name, entry in batch["files"].items()}
        return [path for path, size in paths.items() if not path.is_file() or path.stat().st_size != size]

    def _check(self, overwrite: bool, estimated_bytes: int) -> None:
        """Refuse, before anything is written, other work in the same place and a disk that is too small."""
        settings = self.work / SETTINGS_NAME
        if settings.is_file():
            differences = settings_difference(json.loads(settings.read_bytes()), self.settings)
            if differences and not overwrite:
                raise ValueError(self._other_settings("unfinished work", differences))
        elif not overwrite:
            for place in (self.place, self.images, self.info_path.parent):
                if place.is_dir() and any(place.iterdir()):
                    raise ValueError(f"{place} holds other things: give another --name, or --overwrite")
        there = sum(path.stat().st_size for path in self.work.rglob("*") if path.is_file())
        needed = max(estimated_bytes - there, 0)
        require_free_space(self.folder, needed, f"{self.chunks.chunks.num_items:,} samples of {len(self.shapes)} layers")

    def _prepare(self, overwrite: bool, log: Callable[[str], None]) -> None:
        """Record the settings, clean up after killed runs, forget samples that could not be read. For one process, alone."""
        for folder in (self.place.parent, self.place, self.info_path.parent, self.work):
            remove_partial_folders(folder)
        settings = self.work / SETTINGS_NAME
        is_ours = settings.is_file() and json.loads(settings.read_bytes()) == self.settings
        if not is_ours:
            if overwrite:
                # What describes the old set goes first: killed here, the rest is a set without a description.
                for place in (self.info_path.parent, self.images, self.place, self.chunks.folder):
                    if place.is_dir():
                        remove_folder(place)
                (self.work / FINISHED_NAME).unlink(missing_ok=True)
            atomic_write_json(settings, self.settings)
        if (self.work / FINISHED_NAME).is_file():
            return
        self.chunks.prepare()
        for chunk in sorted(self.chunks.complete()):
            if self._facts(chunk)["left_out"]:  # the pictures may have been repaired
                self.chunks.discard(chunk)
        there = len(self.chunks.complete())
        if there:
            log(f"{self.work}: {there} of {len(self.chunks.chunks)} files are there already")

    def _compute(self, compute, workers: Workers, max_bad: int, description: str) -> None:
        unreadable: list[str] = []

        def compute_chunk(_chunk: int, places: range, folder: Path, advance: Callable[[int], None]) -> None:
            with open_writer(folder, self.storage, self.dtype, self.shapes) as writer:
                left_out = compute(places, writer, advance)
            unreadable.extend(left_out)
            refuse_unreadable(unreadable, max_bad)
            facts = {"samples": writer.num_samples, "non_finite": writer.num_non_finite, "left_out": left_out}
            atomic_write_json(folder / FACTS_NAME, facts)

        run_chunks(
            self.chunks, compute_chunk, process_index=workers.index, num_processes=workers.count, description=description
        )  # fmt: skip

    def _finish(self, max_bad: int, command: Sequence[str]) -> None:
        """Describe the set and move its files to their names; each step may be done already. For one process, alone."""
        finished = self.work / FINISHED_NAME
        if not finished.is_file():
            atomic_write_json(finished, self._describe(max_bad, command))
        info = json.loads(finished.read_bytes())
        self.place.mkdir(parents=True, exist_ok=True)
        for chunk in sorted(self.chunks.complete()):
            folder = self.chunks.path(chunk)
            for suffix in SUFFIXES[self.storage]:
                _move(folder / f"{BATCH_STEM}{suffix}", self.place / f"{batch_name(chunk)}{suffix}")
            if (folder / IMAGES).is_dir():
                self.images.mkdir(parents=True, exist_ok=True)
                for picture in (folder / IMAGES).iterdir():
                    _move(picture, self.images / picture.name)
        if self.storage == ARROW:
            self._write_dataset_files(info["files"])
        atomic_write_json(self.info_path, info)
        remove_folder(self.work)

    def _write_dataset_files(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """What `datasets.load_from_disk` needs to open the batch files as one table; the columns' types are in the files."""
        sums = {name: entry["sha256"] for batch in batches for name, entry in batch["files"].items()}
        atomic_write_json(self.place / STATE_NAME, dataset_state(sums))
        atomic_write_json(self.place / INFO_NAME, {})

    def _describe(self, max_bad: int, command: Sequence[str]) -> dict[str, Any]:
        files, left_out, non_finite = [], [], 0
        for chunk in range(len(self.chunks.chunks)):
            facts = self._facts(chunk)
            listed = json.loads((self.chunks.path(chunk) / COMPLETE_NAME).read_bytes())["files"]
            sums = {f"{batch_name(chunk)}{suffix}": listed[f"{BATCH_STEM}{suffix}"] for suffix in SUFFIXES[self.storage]}
            files.append({"name": batch_name(chunk), "samples": facts["samples"], "files": sums})
            left_out += facts["left_out"]
            non_finite += facts["non_finite"]
        refuse_unreadable(left_out, max_bad)
        count = sum(entry["samples"] for entry in files)
        if not count:
            raise ValueError(f"no sample of the set {self.name!r} could be read, so there is nothing to keep")
        return {
            **self.settings,
            "num_samples": count,
            "num_non_finite": non_finite,
            "files": files,
            "left_out": left_out,
            "settings": self.settings,
            "provenance": collect_provenance(command=command),
        }

    def _facts(self, chunk: int) -> dict[str, Any]:
        return json.loads((self.chunks.path(chunk) / FACTS_NAME).read_bytes())

    def _other_settings(self, what: str, differences: Sequence[str]) -> str:
        return (
            f"{self.folder} holds {what} {self.name!r} with other settings:\n  " + "\n  ".join(differences) + "\n"
            "Give another --name, give the same settings, or --overwrite"
        )


def _move(source: Path, target: Path) -> None:
    if source.is_file():  # else it was moved before a kill
        os.replace(source, target)
