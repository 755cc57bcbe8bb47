"""Caches, pictures and a VAE that are small enough for the suite."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from PIL import Image

from drift_accel.data.cache_format import CacheClass, CacheHeader
from drift_accel.data.cache_writing import dataset_schema, record_batch, write_cache, write_shard
from drift_accel.data.digit_images import coloured_digit
from drift_accel.data.digits import load_digits
from drift_accel.foundation.storage import sha256_file

SIZE = 16  # side of the pictures that the tiny VAE takes
SCALE, SHIFT = 0.95, 0.05  # of the tiny VAE: the deviation of its latents is about 1, as it should be


def small_header(**changes) -> CacheHeader:
    """The header of sampled latents [2, 3, 3] of three classes."""
    values = {
        "kind": "latents", "encoding": "float16", "image_shape": (2, 3, 3), "sampling": "sample", "flip_stored": True,
        "scale": 0.5, "shift": 0.1, "vae": {"name": "tiny", "weights_sha256": "aa"}, "pixel_operations": ("none",),
        "crop": {}, "views": 1, "seed": 0, "chunk_size": 4, "batch_size": 2, "source": {"num_pictures": 12},
        "classes": tuple(CacheClass(index=index, id=f"n0{index}", name=f"class {index}", rows=0) for index in range(3)),
    }  # fmt: skip
    return CacheHeader(**{**values, **changes})


def small_rows(header: CacheHeader, count: int) -> dict[str, np.ndarray]:
    """Rows of `count` different pictures; the deviation is about 1."""
    stream = np.random.Generator(np.random.Philox(key=3))
    if header.kind == "pixels":
        return {"pixels": stream.integers(256, size=(count, *header.row_shape), dtype=np.uint8)}
    rows = {column: stream.standard_normal((count, *header.row_shape)).astype(np.float16) for column in header.columns}
    if header.sampling == "moments":
        for values in rows.values():
            values[:, 1] = np.abs(values[:, 1])
    return rows


def write_small_cache(path: Path, header: CacheHeader | None = None, *, labels=None, rows=None, shards: int = 3) -> dict:
    """A cache of 12 rows in 3 shards (of two tables each, where they have several rows); returns its rows by column."""
    header = header or small_header()
    labels = np.arange(12) % len(header.classes) if labels is None else np.asarray(labels)
    rows = small_rows(header, len(labels)) if rows is None else rows
    schema = dataset_schema(header)

    def table(places: np.ndarray):
        part = {name: values[places] for name, values in rows.items()}
        return record_batch(schema, part, labels[places], [f"p{p}.png" for p in places], places, np.zeros(len(places)))

    pieces = np.array_split(np.arange(len(labels)), shards)
    write_cache(path, header, ([table(half) for half in np.array_split(piece, 2)] for piece in pieces), shards)
    return rows


def small_pixels(path: Path, encoding: str = "uint8", count: int = 12) -> np.ndarray:
    """A cache of pixels [3, 6, 6]; returns what was written, uint8 [rows, 3, 6, 6]."""
    values = {"kind": "pixels", "encoding": encoding, "image_shape": (3, 6, 6), "flip_stored": False}
    header = small_header(**values, sampling=None, scale=None, shift=None, vae=None)
    pixels = np.repeat(np.random.Generator(np.random.Philox(key=1)).integers(200, size=(count, 3, 1, 1), dtype=np.uint8), 6, 2)
    pixels = (pixels + 3 * np.arange(6, dtype=np.uint8)).astype(np.uint8)
    if encoding == "uint8":
        write_small_cache(path, header, rows={"pixels": pixels}, labels=np.arange(count) % 3)
        return pixels
    contents = []
    for picture in pixels:
        content = io.BytesIO()
        Image.fromarray(picture.transpose(1, 2, 0)).save(
            content, format=encoding, **({"quality": 95} if encoding == "jpeg" else {})
        )
        contents.append(content.getvalue())
    places = np.arange(count)
    names = [f"p{place}" for place in places]
    batch = record_batch(dataset_schema(header), {"image": contents}, places % 3, names, places, 0 * places)
    write_cache(path, header, [[batch.slice(0, 5), batch.slice(5)]], 1)
    return pixels


def reseal(path: Path, **header_changes) -> None:
    """Make manifest, sizes and hashes fit files that were changed: as if the export itself had been wrong."""
    header = path / "header.json"
    if header_changes:
        header.write_text(json.dumps({**json.loads(header.read_text()), **header_changes}))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["header_sha256"] = sha256_file(header)
    for entry in (*manifest["shards"], *manifest["files"]):
        file = path / entry["file"]
        if file.is_file():
            entry["bytes"], entry["sha256"] = file.stat().st_size, sha256_file(file)
    (path / "manifest.json").write_text(json.dumps(manifest))


def rewrite_shard(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    """Give a shard other rows: `change` takes and returns its table."""
    table = change(pa.ipc.open_stream(path.read_bytes()).read_all())
    write_shard(path, table.schema, table.combine_chunks().to_batches())


def with_column(table: pa.Table, name: str, values: list) -> pa.Table:
    """The table with other values in one column, None for an empty place."""
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(place), pa.array(values, type=table.schema.field(place).type))


def without_rows(header: CacheHeader, label: int) -> CacheHeader:
    """The header with another name for a class that will have no rows."""
    classes = tuple(replace(entry, name="empty") if entry.index == label else entry for entry in header.classes)
    return replace(header, classes=classes)


def write_pictures(root: Path, classes: int = 3, each: int = 7) -> Path:
    """Class folders of small PNGs and JPEGs of several sizes and modes, the same ones always."""
    for label in range(classes):
        (root / f"n{label:02d}").mkdir(parents=True, exist_ok=True)
        for number in range(each):
            stream = np.random.Generator(np.random.Philox(key=1000 * label + number))
            height, width = stream.integers(SIZE - 4, 3 * SIZE, size=2)
            image = Image.fromarray(stream.integers(256, size=(height, width, 3), dtype=np.uint8))
            image = image.convert(("RGB", "L", "CMYK", "RGB")[number % 4])
            image.save(root / f"n{label:02d}" / f"{number}.{'png' if number % 2 else 'jpg'}")  # CMYK is an even one
    return root


def write_digit_pictures(root: Path, count: int) -> Path:
    """Class folders of the first `count` digits as coloured 64x64 PNGs, for the bundled VAE."""
    digits = load_digits("train")
    for row in range(count):
        target = root / str(digits.labels[row])
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coloured_digit(digits.images[row, 0], 0, row)).save(target / f"{row:05d}.png")
    return root


def write_tiny_vae(path: Path) -> Path:
    """An AutoencoderKL with random weights: 16x16 pictures to 4x8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            scaling_factor=SCALE,
            shift_factor=SHIFT,
        )
    vae.save_pretrained(path)
    return path
