"""From the chunks of an export to the shards of a cache, resumable at any instant.

`plan.json` says once which chunks make which shard. A shard is a committed folder; its chunks are removed once it is there.
`manifest.json` in the folder of the unfinished export says that all is done but moving the shards to their names.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from drift_accel.data.cache_format import MANIFEST_NAME, CacheHeader, ShardEntry, parse_manifest, write_manifest
from drift_accel.data.cache_writing import describe_cache, shard_name, write_shard
from drift_accel.data.export_chunks import FACTS_NAME, ROWS_NAME, refuse_unreadable
from drift_accel.foundation.chunks import Chunks, ChunkStore, run_chunks
from drift_accel.foundation.storage import COMPLETE_NAME, atomic_write_json, remove_folder


class ShardAssembly:
    """The shards of one export: `folder` holds its unfinished parts, `chunks` its chunks."""

    def __init__(self, folder: Path, chunks: ChunkStore):
        self.folder, self.chunks = folder, chunks

    @property
    def is_done(self) -> bool:
        """Whether all shards are made and described, and only `finish` is left."""
        return (self.folder / MANIFEST_NAME).is_file()

    def prepare(self) -> None:
        """Clean up after killed runs: parts of shards, and chunks that are in shards or left out pictures.

        The latter are computed again, because their pictures may have been repaired. For the main process, alone.
        """
        self.chunks.prepare()
        if self._plan() is not None:
            self._store().prepare()
        for chunk in self.chunks.complete() & self.chunks_in_shards():
            self.chunks.discard(chunk)
        for chunk in self.chunks.complete():
            if self._facts(self.chunks, chunk)["left_out"]:
                self.chunks.discard(chunk)

    def chunks_in_shards(self) -> set[int]:
        """The chunks whose rows lie in shards that are made."""
        plan = self._plan()
        return set() if plan is None else {chunk for shard in self._store().complete() for chunk in plan[shard]}

    def plan(self, shard_bytes: int, max_bad: int) -> None:
        """Decide which chunks make which shard, unless it was decided already. For the main process, when all chunks are there.

        Raises ValueError if they left out more than `max_bad` pictures, or all of them.
        """
        in_shards = self.chunks_in_shards()
        left_out = [self._facts(self._store(), shard)["left_out"] for shard in sorted(self._store().complete())]
        there = [chunk for chunk in range(len(self.chunks.chunks)) if chunk not in in_shards]
        left_out += [self._facts(self.chunks, chunk)["left_out"] for chunk in there]
        refuse_unreadable([name for names in left_out for name in names], max_bad)
        if self._plan() is not None:
            return
        if not any(self._facts(self.chunks, chunk)["rows"] for chunk in there):
            raise ValueError("no picture could be read, so there is nothing to make a cache of: see max_bad")
        shards, size = [[]], 0
        for chunk in there:
            chunk_bytes = (self.chunks.path(chunk) / ROWS_NAME).stat().st_size
            if shards[-1] and size + chunk_bytes > shard_bytes:
                shards.append([])
                size = 0
            shards[-1].append(chunk)
            size += chunk_bytes
        atomic_write_json(self.folder / "plan.json", {"shards": shards})

    def assemble(self, schema: pa.Schema, process_index: int, num_processes: int) -> None:
        """Make this process's shards. Raises ValueError for a damaged chunk, after removing it."""
        plan, store = self._plan(), self._store()

        def compute(shard: int, _items: range, folder: Path, _advance) -> None:
            # One table a shard: the fewer there are, the less a reader has to search.
            table = pa.Table.from_batches(self._batches(plan[shard]), schema=schema).combine_chunks()
            rows = write_shard(folder / ROWS_NAME, schema, table.to_batches())
            left_out = [name for chunk in plan[shard] for name in self._facts(self.chunks, chunk)["left_out"]]
            atomic_write_json(folder / FACTS_NAME, {"rows": rows, "left_out": left_out})

        def remove_chunks(shard: int) -> None:
            for chunk in plan[shard]:
                self.chunks.discard(chunk)

        run_chunks(
            store,
            compute,
            process_index=process_index,
            num_processes=num_processes,
            committed=remove_chunks,
            description="shards",
        )

    def finish(self, output_dir: Path, header: CacheHeader, command: Sequence[str]) -> None:
        """Describe the shards and move them to their names; the manifest comes last. For the main process, alone."""
        if not self.is_done:
            write_manifest(self.folder, self._describe(output_dir, header, command))
        manifest = parse_manifest((self.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        for shard, entry in enumerate(manifest.shards):
            source = self._store().path(shard) / ROWS_NAME
            if source.is_file():  # else it was moved before a kill
                os.replace(source, output_dir / entry.file)
        write_manifest(output_dir, manifest)
        remove_folder(self.folder)

    def _describe(self, output_dir: Path, header: CacheHeader, command: Sequence[str]):
        store, shards, left_out = self._store(), [], []
        for shard in range(len(store.chunks)):
            folder = store.path(shard)
            facts = self._facts(store, shard)
            file = json.loads((folder / COMPLETE_NAME).read_bytes())["files"][ROWS_NAME]
            name = shard_name(shard, len(store.chunks))
            entry = ShardEntry(file=name, bytes=file["bytes"], sha256=file["sha256"], rows=facts["rows"])
            shards.append((folder / ROWS_NAME, entry))
            left_out += facts["left_out"]
        return describe_cache(output_dir, replace(header, left_out=tuple(left_out)), shards, command)[1]

    def _batches(self, chunks: Sequence[int]) -> Iterator[pa.RecordBatch]:
        for chunk in chunks:
            problems = self.chunks.problems(chunk)
            if problems:
                self.chunks.discard(chunk)
                raise ValueError(f"{problems[0]}; it was removed, run the same command again to compute it anew")
            with pa.memory_map(str(self.chunks.path(chunk) / ROWS_NAME)) as source, pa.ipc.open_stream(source) as reader:
                yield from reader

    def _plan(self) -> list[list[int]] | None:
        path = self.folder / "plan.json"
        return json.loads(path.read_bytes())["shards"] if path.is_file() else None

    def _store(self) -> ChunkStore:
        return ChunkStore(self.folder / "shards", Chunks(len(self._plan() or ()), 1))

    @staticmethod
    def _facts(store: ChunkStore, chunk: int) -> dict[str, Any]:
        return json.loads((store.path(chunk) / FACTS_NAME).read_bytes())
