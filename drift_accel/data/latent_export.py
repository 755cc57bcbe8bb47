"""The export of pictures into a cache: resumable at any instant, with any number of processes, to the same rows.

Rows are numbered in a seeded shuffled order. Chunks of them are computed alone and committed; when all are there, they are put
together into shards, which are committed too; at the end the shards move to their names and the manifest makes them a cache.
Until then everything lies in OUT/in_progress.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drift_accel.data.cache_format import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    CacheClass,
    CacheHeader,
    read_description,
    settings_difference,
)
from drift_accel.data.cache_writing import dataset_schema
from drift_accel.data.crops import ImageCrop
from drift_accel.data.export_chunks import ChunkWriter
from drift_accel.data.image_sources import ImageSource
from drift_accel.data.row_encoders import RowEncoder
from drift_accel.data.shard_assembly import ShardAssembly
from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks
from drift_accel.foundation.collectives import require_agreement, world_group
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.provenance import hash_configuration, package_versions
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import atomic_write_json, plain_value, remove_partial_folders, require_free_space

ORDER_STREAM = "export/order"  # part of the meaning of a seed: renaming it changes the order of the rows
SETTINGS_NAME = "settings.json"
# Versions that rows depend on to the last bit; a resumed export must have the same ones.
RECORDED_PACKAGES = ("torch", "diffusers", "numpy", "pillow", "pyarrow")
TEXT_BYTES = 100  # about, a row: label, name, indices
ESTIMATED_PICTURES = 16


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How pictures become rows. Raises ValueError for counts out of range."""

    crop: ImageCrop = field(default_factory=ImageCrop)
    """From a picture to square pixels."""
    views: int = 1
    """Rows a picture, each with its own random crop; more than 1 needs a random crop."""
    seed: int = 0
    """Seed of the row order."""
    max_rows: int | None = None
    """Only so many rows, the first ones of the shuffled order; None: all."""
    chunk_size: int = 1024
    """Rows that are computed, committed and resumed together."""
    batch_size: int = 32
    """Rows that the encoder gets at once, padded to this number."""
    shard_bytes: int = 256_000_000
    """Largest size of a shard; one chunk is never cut."""
    max_bad: int = 0
    """Pictures that may be unreadable: so many are left out and recorded, one more stops the export."""
    num_threads: int = 8
    """Threads of a process that read and crop pictures."""

    def __post_init__(self):
        for name in ("views", "chunk_size", "batch_size", "shard_bytes", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.max_bad < 0:
            raise ValueError(f"max_bad is {self.max_bad}: give at least 0")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}: give at least 1, or leave it out for all")
        if self.views > 1 and not self.crop.is_random:
            raise ValueError(f"views is {self.views}, but the crop {self.crop.kind!r} gives every view the same pixels: use 1")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The processes that share an export: which one this is, of how many, and how it waits for all others.

    `together` calls work on every process and raises the error of one on all, instead of leaving the others waiting.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None
    together: Callable[[Callable[[], Any]], Any] = lambda work: work()

    @property
    def is_main(self) -> bool:
        """Whether this process does what only one may do."""
        return self.index == 0


def export_cache(
    source: ImageSource,
    encoder: RowEncoder,
    output_dir: str | os.PathLike,
    config: ExportConfig,
    *,
    workers: Workers | None = None,
    command: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> Path:
    """Write the rows of `source` through `encoder` into the cache at `output_dir`, or go on with one; returns its folder.

    Every process calls this with the same arguments on a folder that all of them see. A complete cache made with the same
    settings is left as it is. Raises ValueError for a folder that holds something else, an export with other settings (showing
    them), one that another command is writing, more than `max_bad` unreadable pictures (naming them) and rows that are not
    finite; OSError where the disk is too small.
    """
    if not len(source):
        raise ValueError("there are no pictures to export")
    workers = workers or Workers()
    export = _Export(source, encoder, Path(output_dir), config, log if workers.is_main else lambda message: None)
    require_agreement(hash_configuration(export.settings), "settings and pictures of the export", world_group())
    if export.is_complete():
        if workers.is_main:
            remove_partial_folders(export.output_dir)  # a run was killed while it removed its in_progress
        export.log(f"{output_dir} is complete already")
        return export.output_dir
    workers.wait()  # nobody writes before all have looked
    if workers.is_main:
        export.check(workers.count)
    lock = exclusive_lock(export.folder / "lock", f"an export into {output_dir}") if workers.is_main else nullcontext()
    with lock:
        if workers.is_main:
            export.prepare()
        workers.wait()
        if not export.folder.is_dir():
            raise ValueError(f"process {workers.index} does not see {export.folder}: give a folder that all machines share")
        if not export.shards.is_done:
            export.compute_chunks(workers)
            workers.wait()
            if workers.is_main:
                export.shards.plan(config.shard_bytes, config.max_bad)
            workers.wait()
            export.shards.assemble(export.schema, workers.index, workers.count)
            workers.wait()
        if workers.is_main:
            export.shards.finish(export.output_dir, export.header, command)
        workers.wait()
    return export.output_dir


class _Export:
    """The parts of one export."""

    def __init__(self, source: ImageSource, encoder: RowEncoder, output_dir: Path, config: ExportConfig, log):
        self.source, self.encoder, self.config, self.log = source, encoder, config, log
        self.output_dir, self.folder = output_dir, output_dir / PROGRESS_NAME
        order = random_stream(config.seed, ORDER_STREAM, 0).permutation(len(source) * config.views)
        self.order = order[: config.max_rows]  # [rows]: picture * views + view
        self.header = self._header()
        self.settings = plain_value({**dataclasses.asdict(self.header), "shard_bytes": config.shard_bytes})
        self.schema = dataset_schema(self.header)
        self.chunks = ChunkStore(self.folder / "chunks", Chunks(len(self.order), config.chunk_size))
        self.shards = ShardAssembly(self.folder, self.chunks)
        self.writer = ChunkWriter(
            source,
            encoder,
            config.crop,
            self.schema,
            views=config.views,
            batch_size=config.batch_size,
            max_bad=config.max_bad,
        )

    def is_complete(self) -> bool:
        """Whether the output is a finished cache of these settings. Raises ValueError for one of others."""
        if not (self.output_dir / MANIFEST_NAME).is_file():
            return False
        header, _ = read_description(self.output_dir)
        classes = tuple(dataclasses.replace(entry, rows=0) for entry in header.classes)
        bare = dataclasses.replace(header, classes=classes, left_out=())
        self._refuse_differences(dataclasses.asdict(bare), dataclasses.asdict(self.header), "a finished cache")
        return not self.folder.exists()  # else it only was not tidied up

    def check(self, num_processes: int) -> None:
        """Refuse, before anything is written, a folder with other things or settings and a disk that is too small."""
        settings_path = self.folder / SETTINGS_NAME
        if settings_path.is_file():
            self._refuse_differences(json.loads(settings_path.read_bytes()), self.settings, "an unfinished export")
        elif self.output_dir.is_dir():
            strangers = [name for name in os.listdir(self.output_dir) if name != PROGRESS_NAME and not name.startswith(".")]
            if strangers:
                raise ValueError(f"{self.output_dir} holds other things ({strangers[0]}): give a new or an empty folder")
        elif self.output_dir.exists():
            raise ValueError(f"{self.output_dir} is no folder: give a new or an empty one")
        self._require_space(num_processes)

    def prepare(self) -> None:
        """Record the settings and clean up after killed runs. For the main process, alone."""
        remove_partial_folders(self.output_dir)
        remove_partial_folders(self.folder)
        if not (self.folder / SETTINGS_NAME).is_file():
            atomic_write_json(self.folder / SETTINGS_NAME, self.settings)
        if not self.shards.is_done:
            self.shards.prepare()

    def compute_chunks(self, workers: Workers) -> None:
        """Compute this process's missing chunks."""
        with ThreadPoolExecutor(self.config.num_threads) as pool:
            run_chunks(
                self.chunks,
                lambda chunk, rows, folder, advance: self.writer.write(self.order[rows.start : rows.stop], folder, advance, pool),
                process_index=workers.index,
                num_processes=workers.count,
                finished=self.shards.chunks_in_shards(),
                description="export",
            )

    def _header(self) -> CacheHeader:
        source, config = self.source, self.config
        names = enumerate(zip(source.class_ids, source.class_names, strict=True))
        return CacheHeader(
            **self.encoder.header_values(),
            pixel_operations=(*config.crop.operations(), "x / 127.5 - 1"),
            crop=dataclasses.asdict(config.crop),
            views=config.views,
            seed=config.seed,
            chunk_size=config.chunk_size,
            batch_size=config.batch_size,
            source={"num_pictures": len(source), "num_rows": len(self.order), "fingerprint": source.fingerprint()},
            classes=tuple(CacheClass(index=index, id=key, name=name, rows=0) for index, (key, name) in names),
            versions=package_versions(RECORDED_PACKAGES),
        )

    def _refuse_differences(self, old: dict[str, Any], new: dict[str, Any], what: str) -> None:
        differences = settings_difference(old, new)
        if differences:
            raise ValueError(
                f"{self.output_dir} holds {what} with other settings:\n  " + "\n  ".join(differences) + "\n"
                "Give another folder, give the same settings, or remove what is there"
            )

    def _require_space(self, num_processes: int) -> None:
        row_bytes = self._estimate_row_bytes()
        total = len(self.order) * row_bytes
        kind = "uncompressed pixels" if self.header.encoding == "uint8" else self.header.encoding
        self.log(f"{len(self.order):,} rows ({kind}) will take about {total / 1e9:.3f} GB in {self.output_dir}")
        there = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        # A chunk is removed as soon as its shard is there, so only the shards that are being made exist twice.
        shard = min(max(self.config.shard_bytes, self.config.chunk_size * row_bytes), total)
        needed = max(total - there, 0) + min(shard * num_processes, total)
        require_free_space(self.output_dir, needed, f"the export of {len(self.order):,} rows ({kind})")

    def _estimate_row_bytes(self) -> int:
        if self.header.row_bytes is not None:
            return self.header.row_bytes * len(self.header.columns) + TEXT_BYTES
        pictures = map(self.writer.load, self.order[:ESTIMATED_PICTURES].tolist())
        good = [self.encoder.encode(pixels[None], [0], [0])["image"][0] for pixels in pictures if isinstance(pixels, np.ndarray)]
        return int(1.2 * sum(map(len, good)) / max(len(good), 1)) + TEXT_BYTES
