"""Writing a cache: tables of rows, shards, and the small files that make a folder of shards a complete cache."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from drift_accel.data.cache_format import (
    CLASS_INDEX_NAME,
    HEADER_NAME,
    CacheHeader,
    CacheManifest,
    ShardEntry,
    header_text,
    text_sha256,
    write_manifest,
)
from drift_accel.data.cache_shards import arrow_schema, column_values, open_shard
from drift_accel.data.class_index import build_class_index, write_class_index
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.storage import atomic_write_json, atomic_write_text, sha256_file

INFO_NAME, STATE_NAME, PROVENANCE_NAME = "dataset_info.json", "state.json", "provenance.json"


def dataset_features(header: CacheHeader):
    """The columns as `datasets.Features`, so that `load_from_disk` knows what they are."""
    import datasets  # brings pandas and more: reading a cache does without

    def feature(kind: str, length: int | None):
        if kind == "image":
            return datasets.Image()
        return datasets.Value(kind) if length is None else datasets.List(datasets.Value(kind), length=length)

    return datasets.Features({name: feature(*values) for name, values in header.features().items()})


def dataset_schema(header: CacheHeader) -> pa.Schema:
    """The schema of the shards with the metadata of `datasets`."""
    return arrow_schema(header).with_metadata(dataset_features(header).arrow_schema.metadata)


def record_batch(
    schema: pa.Schema,
    rows: dict[str, np.ndarray | Sequence[bytes]],
    labels: Sequence[int],
    sources: Sequence[str],
    image_indices: Sequence[int],
    views: Sequence[int],
) -> pa.RecordBatch:
    """A table of rows: `rows` maps each column to an array [n, ...] or to n compressed pictures."""
    columns = {"label": labels, "source": sources, "image_index": image_indices, "view": views}
    arrays = []
    for field in schema:
        if field.name in columns:
            arrays.append(pa.array(columns[field.name], type=field.type))
        elif pa.types.is_struct(field.type):
            arrays.append(pa.array([{"bytes": content, "path": None} for content in rows[field.name]], type=field.type))
        else:
            values = pa.array(np.ascontiguousarray(rows[field.name]).reshape(-1), type=field.type.value_type)
            arrays.append(pa.FixedSizeListArray.from_arrays(values, field.type.list_size))
    return pa.record_batch(arrays, schema=schema)


def write_shard(path: str | os.PathLike, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """Write record batches into one Arrow file as `datasets` does; returns the number of rows. Raises OSError."""
    rows = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows


def shard_name(shard: int, num_shards: int) -> str:
    """File name of a shard, as `datasets` names them."""
    return f"data-{shard:05d}-of-{num_shards:05d}.arrow"


def describe_cache(
    folder: str | os.PathLike, header: CacheHeader, shards: Sequence[tuple[Path, ShardEntry]], command: Sequence[str] = ()
) -> tuple[CacheHeader, CacheManifest]:
    """Write all of a cache's small files except the manifest into `folder`; returns the completed header and the manifest.

    `shards` are the finished files, where they lie now and what the manifest is to say of them. The header's counts by class
    are filled in. Raises ValueError for shards that are not the header's, for labels outside of its classes, OSError.
    """
    folder = Path(folder)
    schema = arrow_schema(header)
    labels = [np.zeros(0, np.int64)]
    for path, entry in shards:
        batches = open_shard(path.parent, dataclasses.replace(entry, file=path.name), schema)
        labels += [np.array(column_values(batch, "label")) for batch in batches]
    index = build_class_index(np.concatenate(labels), len(header.classes))
    counts = index.counts.tolist()
    classes = tuple(dataclasses.replace(entry, rows=counts[entry.index]) for entry in header.classes)
    header = dataclasses.replace(header, classes=classes)
    entries = tuple(entry for _, entry in shards)

    atomic_write_text(folder / HEADER_NAME, header_text(header))
    write_class_index(folder, index)
    atomic_write_json(folder / PROVENANCE_NAME, collect_provenance(command=command))
    _write_dataset_files(folder, header, entries)
    files = tuple(
        ShardEntry(file=name, bytes=os.stat(folder / name).st_size, sha256=sha256_file(folder / name))
        for name in (CLASS_INDEX_NAME, INFO_NAME, STATE_NAME, PROVENANCE_NAME)
    )
    manifest = CacheManifest(
        rows=sum(entry.rows for entry in entries),
        num_classes=len(classes),
        header_sha256=text_sha256(header_text(header)),
        shards=entries,
        files=files,
    )
    return header, manifest


def write_cache(
    folder: str | os.PathLike, header: CacheHeader, shards: Iterable[Iterable[pa.RecordBatch]], num_shards: int
) -> CacheManifest:
    """Write a complete cache from record batches (of `dataset_schema`), one iterable a shard.

    Not resumable: for caches made of arrays at hand. Raises FileExistsError for a folder that exists, and as `describe_cache`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    schema = dataset_schema(header)
    written = []
    for number, batches in enumerate(shards):
        path = folder / shard_name(number, num_shards)
        rows = write_shard(path, schema, batches)
        entry = ShardEntry(file=path.name, bytes=os.stat(path).st_size, sha256=sha256_file(path), rows=rows)
        written.append((path, entry))
    if len(written) != num_shards:
        raise ValueError(f"there were {len(written)} shards, not {num_shards}: give as many as you announce")
    _, manifest = describe_cache(folder, header, written)
    write_manifest(folder, manifest)
    return manifest


def _write_dataset_files(folder: Path, header: CacheHeader, shards: Sequence[ShardEntry]) -> None:
    """dataset_info.json and state.json, with which `datasets.load_from_disk` opens the folder."""
    import datasets

    info: dict[str, Any] = dataclasses.asdict(datasets.DatasetInfo(features=dataset_features(header)))
    # Through json, because `datasets` hands out dictionaries that know more than plain ones.
    atomic_write_json(folder / INFO_NAME, json.loads(json.dumps({key: info[key] for key in sorted(info)})))
    atomic_write_json(folder / STATE_NAME, dataset_state({entry.file: entry.sha256 for entry in shards}))


def dataset_state(files: Mapping[str, str]) -> dict[str, Any]:
    """The content of state.json of a folder with these Arrow files, in this order, each with its SHA-256."""
    return {
        "_data_files": [{"filename": name} for name in files],
        "_fingerprint": hashlib.sha256("".join(files.values()).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
