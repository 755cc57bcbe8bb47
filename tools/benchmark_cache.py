"""How fast a cache is read: python tools/benchmark_cache.py [--folder DIR]

Random batches of a synthetic cache against the same rows in one np.memmap, alternating in the same processes: as stored
(float16) and as training gets them (float32). Then anonymous memory over many batches, and the times to open a cache of
ImageNet's size in two orientations and to build its class index. Everything is written to a temporary folder and removed.
"""

import argparse
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from drift_accel.data.cache_format import CLASS_INDEX_NAME, CacheClass, CacheHeader
from drift_accel.data.cache_writing import dataset_schema, record_batch, write_cache
from drift_accel.data.latent_cache import LatentCache
from drift_accel.foundation.provenance import collect_provenance
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import atomic_write_json, require_free_space

TABLE_ROWS = 1024  # rows written or touched together
BLOCK = 8  # batches between two changes of the reader, short enough that both meet the same load
OPEN_SHARDS = 79  # of ImageNet's 1,281,167 rows in two orientations, 256 MB each


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made (default: the system's place)")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the caches that are read (default: 200,000)")
    parser.add_argument("--shape", type=int, nargs=3, default=(4, 32, 32), help="C H W of a latent (default: 4 32 32)")
    parser.add_argument("--batch_size", type=int, default=512, help="rows a batch (default: 512)")
    parser.add_argument("--batches", type=int, default=1600, help="batches each reader is timed on (default: 1600)")
    parser.add_argument("--shards", type=int, nargs="+", default=(1, 50), help="numbers of shards (default: 1 50)")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2), help="numbers of processes (default: 1 2)")
    parser.add_argument("--memory_batches", type=int, default=100_000, help="batches of the memory test (default: 100,000)")
    parser.add_argument("--open_rows", type=int, default=1_281_167, help="rows of the cache that is opened (default: ImageNet's)")
    parser.add_argument("--open_shape", type=int, nargs=3, default=(4, 4, 4), help="its latents; small, as none is read")
    parser.add_argument("--report", type=Path, help="write the numbers there as JSON")
    arguments = parser.parse_args()
    row_bytes = 2 * math.prod(arguments.shape)
    needed = arguments.rows * row_bytes * (1 + len(arguments.shards)) + arguments.open_rows * 4 * math.prod(arguments.open_shape)
    try:
        require_free_space(arguments.folder or tempfile.gettempdir(), int(1.1 * needed), "the benchmark")
    except OSError as error:
        raise SystemExit(f"benchmark_cache: {error}") from None
    folder = Path(tempfile.mkdtemp(prefix="benchmark_cache_", dir=arguments.folder))
    try:
        results = measure(folder, arguments)
    finally:
        shutil.rmtree(folder)
    if arguments.report:
        atomic_write_json(arguments.report, {**results, "provenance": collect_provenance(command=sys.argv)})


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    """All measurements; each line is printed as soon as it is known."""
    shape = tuple(arguments.shape)
    raw = folder / "rows.npy"
    write_raw(raw, arguments.rows, shape)
    results = {"rates": []}
    print(f"{arguments.rows:,} rows x float16{list(shape)}, batches of {arguments.batch_size} random rows, page cache warm")
    print(f"{'shards':>6} {'processes':>9} {'rows as':>8} {'np.memmap ms':>13} {'cache ms':>9} {'ratio of rates':>15}")
    caches = {}
    for shards in arguments.shards:
        caches[shards] = folder / f"cache_{shards}"
        write_synthetic(caches[shards], np.load(raw, mmap_mode="r"), arguments.rows, shape, shards, flip=False)
        for processes in arguments.processes:
            for kind in ("float16", "float32"):
                times = run_readers(processes, raw, caches[shards], kind, arguments.batches, arguments.batch_size)
                memmap, cache = np.median(times, axis=(0, 1)) * 1e3
                print(f"{shards:6} {processes:9} {kind:>8} {memmap:13.3f} {cache:9.3f} {memmap / cache:14.2f}x")
                entry = {"shards": shards, "processes": processes, "rows_as": kind}
                results["rates"].append({**entry, "memmap_ms": memmap, "cache_ms": cache, "ratio": memmap / cache})
    results["memory"] = run_alone(measure_memory, caches[max(caches)], arguments.memory_batches, arguments.batch_size)
    print(
        "anonymous memory over {batches:,} batches: {first_mb:.1f} MB after the first 1 %, {last_mb:.1f} MB at the end, "
        "{largest_mb:.1f} MB at most; {ms:.2f} ms a float32 batch".format(**results["memory"])
    )
    large = folder / "large"
    shards = min(OPEN_SHARDS, -(-arguments.open_rows // TABLE_ROWS))
    write_synthetic(large, None, arguments.open_rows, tuple(arguments.open_shape), shards, flip=True)
    results["open"] = run_alone(measure_open, large)
    print(
        f"{arguments.open_rows:,} rows in two orientations, {shards} shards: open {results['open']['open_s']:.3f} s, building "
        f"the class index {results['open']['class_index_s']:.3f} s more, all labels {results['open']['labels_s']:.3f} s"
    )
    return results


def write_raw(path: Path, rows: int, shape: tuple[int, ...]) -> None:
    """Random rows as one .npy file."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(rows, *shape))
    block = random_stream(0, "benchmark/rows", 0).standard_normal((TABLE_ROWS, *shape), dtype=np.float32).astype(np.float16)
    for start in range(0, rows, TABLE_ROWS):
        part = array[start : start + TABLE_ROWS]
        part[:] = block[: len(part)]
        part[:, 0, 0, 0] = start // TABLE_ROWS  # rows of different places differ
    array.flush()


def write_synthetic(path: Path, rows: np.ndarray | None, num_rows: int, shape: tuple, num_shards: int, *, flip: bool) -> None:
    """A cache of `rows`, or of zeros, with random labels of 1,000 classes."""
    header = CacheHeader(
        kind="latents", encoding="float16", image_shape=shape, sampling="sample", flip_stored=flip, scale=1.0, shift=0.0,
        vae=None, pixel_operations=(), crop={}, views=1, seed=0, chunk_size=TABLE_ROWS, batch_size=1, source={},
        classes=tuple(CacheClass(index=index, id=str(index), name=str(index), rows=0) for index in range(1000)),
    )  # fmt: skip
    labels = random_stream(0, "benchmark/labels", 0).integers(1000, size=num_rows)
    schema = dataset_schema(header)

    def batches(start: int, stop: int) -> Iterator[pa.RecordBatch]:
        places = np.arange(start, stop)
        values = np.zeros((len(places), *shape), dtype=np.float16) if rows is None else rows[start:stop]
        names = [f"n00000000/n00000000_{place}.JPEG" for place in places]
        table = dict.fromkeys(header.columns, values)
        yield record_batch(schema, table, labels[places], names, places, np.zeros(len(places), dtype=np.int32))

    ends = np.linspace(0, num_rows, num_shards + 1).astype(int).tolist()
    write_cache(path, header, (batches(*span) for span in zip(ends[:-1], ends[1:], strict=True)), num_shards)


def run_readers(processes: int, raw: Path, cache: Path, kind: str, batches: int, batch_size: int) -> np.ndarray:
    """Seconds a batch [processes, blocks, 2] of np.memmap and of the cache, all processes reading at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    queue = context.SimpleQueue()
    arguments = (raw, cache, kind, batches, batch_size, barrier, queue)
    readers = [context.Process(target=time_readers, args=(index, *arguments)) for index in range(processes)]
    for reader in readers:
        reader.start()
    times = [queue.get() for _ in readers]
    for reader in readers:
        reader.join()
    return np.array(times)


def time_readers(
    index: int, raw: Path, path: Path, kind: str, batches: int, batch_size: int, barrier, queue
) -> None:  # fmt: skip
    """One process of `run_readers`."""
    torch.set_num_threads(1)
    rows, cache = np.load(raw, mmap_mode="r"), LatentCache(path)
    stream = random_stream(0, "benchmark/batches", index)
    readers = (
        (lambda chosen: rows[chosen].astype(np.float32), cache.rows)
        if kind == "float32"
        else (lambda chosen: rows[chosen], cache.stored_rows)
    )
    chosen = stream.integers(len(cache), size=batch_size)
    if not np.array_equal(*(reader(chosen) for reader in readers)):
        raise ValueError("the cache does not give the rows that were written")
    for first in range(0, len(cache), TABLE_ROWS):  # every page once
        places = np.arange(first, min(first + TABLE_ROWS, len(cache)))
        for reader in (rows.__getitem__, cache.stored_rows):
            reader(places)
    times = []
    barrier.wait()
    for _ in range(max(1, batches // BLOCK)):
        times.append([])
        for reader in readers:
            draws = stream.integers(len(cache), size=(BLOCK, batch_size))
            start = time.perf_counter()
            for chosen in draws:
                reader(chosen)
            times[-1].append((time.perf_counter() - start) / BLOCK)
    queue.put(times)


def run_alone(function, *arguments):
    """The result of `function` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(function, arguments)


def measure_memory(path: Path, batches: int, batch_size: int) -> dict[str, float]:
    """Anonymous memory of this process while it reads random batches."""
    cache, stream = LatentCache(path), random_stream(0, "benchmark/memory", 0)
    seen = []
    start = time.perf_counter()
    for batch in range(batches):
        cache.rows(stream.integers(len(cache), size=batch_size))
        if batch % max(1, batches // 100) == 0:
            seen.append(anonymous_megabytes())
    seconds = time.perf_counter() - start
    seen.append(anonymous_megabytes())
    first = seen[1] if len(seen) > 2 else seen[0]
    return {
        "batches": batches,
        "first_mb": first,
        "last_mb": seen[-1],
        "largest_mb": max(seen[1:]),
        "ms": 1e3 * seconds / batches,
    }


def anonymous_megabytes() -> float:
    """Memory of this process that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e3
    return float("nan")


def measure_open(path: Path) -> dict[str, float]:
    """Seconds to open a cache with and without its class index."""
    times = {}
    LatentCache(path)  # files of the interpreter and the page cache are warm afterwards
    start = time.perf_counter()
    cache = LatentCache(path)
    times["open_s"] = time.perf_counter() - start
    cache.class_rows(0)
    start = time.perf_counter()
    if len(cache.labels) != len(cache):
        raise ValueError("labels are missing")
    times["labels_s"] = time.perf_counter() - start
    os.remove(path / CLASS_INDEX_NAME)
    start = time.perf_counter()
    LatentCache(path)
    times["class_index_s"] = time.perf_counter() - start - times["open_s"]
    return times


if __name__ == "__main__":
    main()
