"""What a cache of latents or pixels is on disk: its files, its header, its manifest.

- header.json: what the rows are and how they were made
- manifest.json: rows and SHA-256 of every shard, SHA-256 of the header and the small files; written last
- data-00012-of-00079.arrow, dataset_info.json, state.json: what `datasets.load_from_disk` opens
- class_index.npy: int64, where each class begins [classes + 1], then the rows sorted by class [rows]
- provenance.json: command, machine and time of the export
- in_progress/: parts of an export that is not finished; nothing in it belongs to a cache
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from drift_accel.foundation.storage import atomic_write_text, json_text, plain_value

FORMAT = 1
HEADER_NAME = "header.json"
MANIFEST_NAME = "manifest.json"
CLASS_INDEX_NAME = "class_index.npy"
PROGRESS_NAME = "in_progress"
LATENTS, PIXELS = "latents", "pixels"
SAMPLINGS = ("sample", "mean", "moments")
PIXEL_ENCODINGS = ("uint8", "png", "jpeg")
SCALE_TOLERANCE = 1e-5

Scale = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CacheClass:
    """One class: its label, its key at the source (folder name, wnid), its name for people, and how many rows it has."""

    index: int
    id: str
    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """What the rows of a cache are and how they were made. Raises ValueError for values that contradict each other."""

    kind: str
    """"latents" (through a VAE) or "pixels"."""
    encoding: str
    """How a row is stored: "float16" for latents; "uint8", "png" or "jpeg" for pixels."""
    image_shape: tuple[int, int, int]
    """(C, H, W) of a row as it is read."""
    sampling: str | None
    """Latents: "sample" (a draw of the posterior), "mean", or "moments" (mean and deviation, drawn at reading)."""
    flip_stored: bool
    """Whether the flipped picture was encoded too. Pixels are flipped at reading."""
    scale: Scale | None
    """Latents: model space = (VAE latent - shift) * scale; one number, or one a channel."""
    shift: Scale | None
    """See scale."""
    vae: Mapping[str, Any] | None
    """Latents: name, revision, weights_sha256, dtype and class of the autoencoder."""
    pixel_operations: tuple[str, ...]
    """What was done to the pixels before they were encoded, in this order."""
    crop: Mapping[str, Any]
    """The settings of the crop: kind, size, scale, seed."""
    views: int
    """Rows a picture (several for random crops)."""
    seed: int
    """Seed of the row order and of the posterior's draws."""
    chunk_size: int
    """Rows that were computed together."""
    batch_size: int
    """Rows that the VAE saw at once; rounding depends on it."""
    source: Mapping[str, Any]
    """Number of pictures and the fingerprint of their names and labels."""
    classes: tuple[CacheClass, ...]
    """All classes, by label."""
    left_out: tuple[str, ...] = ()
    """Pictures that could not be read, by name."""
    versions: Mapping[str, Any] = field(default_factory=dict)
    """Package versions that made the rows."""
    format: int = FORMAT
    """Version of this format."""

    def __post_init__(self):
        expected = ("float16",) if self.kind == LATENTS else PIXEL_ENCODINGS
        if self.kind not in (LATENTS, PIXELS) or self.encoding not in expected:
            raise ValueError(f"header: kind {self.kind!r} with encoding {self.encoding!r} is no kind of cache")
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(f"header: image_shape is {self.image_shape}, wanted (C, H, W)")
        if self.kind == LATENTS and (self.sampling not in SAMPLINGS or self.scale is None or self.shift is None):
            raise ValueError(
                f"header: latents need scale ({self.scale}), shift ({self.shift}) and a sampling of {', '.join(SAMPLINGS)}, "
                f"not {self.sampling!r}"
            )
        if [entry.index for entry in self.classes] != list(range(len(self.classes))):
            raise ValueError("header: the classes are not numbered from 0 in order")

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row as it is stored: (C, H, W), or (2, C, H, W) for mean and deviation."""
        return (2, *self.image_shape) if self.sampling == "moments" else self.image_shape

    @property
    def dtype(self) -> np.dtype:
        """Type of a stored number."""
        return np.dtype(np.float16 if self.kind == LATENTS else np.uint8)

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one stored orientation of a row; None for compressed pictures."""
        return None if self.encoding in ("png", "jpeg") else math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold the rows, the flipped one last."""
        if self.kind == LATENTS:
            return ("latent", "latent_flipped") if self.flip_stored else ("latent",)
        return ("pixels",) if self.encoding == "uint8" else ("image",)

    def features(self) -> dict[str, tuple[str, int | None]]:
        """Column -> (type, length of a list or None), in the order of the table."""
        kind = "image" if self.columns == ("image",) else self.dtype.name
        length = None if kind == "image" else math.prod(self.row_shape)
        return {
            **dict.fromkeys(self.columns, (kind, length)),
            "label": ("int64", None),
            "source": ("string", None),
            "image_index": ("int64", None),
            "view": ("int32", None),
        }

    def require_model(
        self,
        *,
        in_channels: int | None = None,
        input_size: int | None = None,
        num_classes: int | None = None,
        scale: Scale | Sequence[float] | None = None,
        shift: Scale | Sequence[float] | None = None,
    ) -> None:
        """Raise ValueError, listing everything that differs, unless rows of this cache are what a model is made for.

        `in_channels`, `input_size` (side) and `num_classes` are the model's, `scale` and `shift` those of the VAE that decodes
        what it generates; None leaves a value unchecked.
        """
        channels, height, width = self.image_shape
        problems = []
        if in_channels is not None and in_channels != channels:
            problems.append(f"rows have {channels} channels, the model {in_channels}")
        if input_size is not None and (input_size, input_size) != (height, width):
            problems.append(f"rows are {height}x{width}, the model's input {input_size}x{input_size}")
        if num_classes is not None and num_classes != len(self.classes):
            problems.append(f"the cache has {len(self.classes)} classes, the model {num_classes}")
        for name, mine, wanted in (("scale", self.scale, scale), ("shift", self.shift, shift)):
            if wanted is None:
                continue
            if mine is None:
                problems.append(f"rows are pixels, but the model's VAE has {name} {wanted}")
            elif not same_scale(mine, wanted):
                problems.append(f"rows were made with VAE {name} {mine}, the model's VAE has {wanted}")
        if problems:
            made_with = f" (made with {self.vae.get('name')})" if self.vae else ""
            raise ValueError(
                f"this cache{made_with} does not fit the model: {'; '.join(problems)}. "
                "Choose the model's own cache, or export one with its VAE and size"
            )


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One file of rows, or with None rows another file of the cache."""

    file: str
    bytes: int
    sha256: str
    rows: int | None = None

    def __post_init__(self):
        _require_counts(f"the entry of {self.file}", self.bytes, 0 if self.rows is None else self.rows)


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """The files of a complete cache, their sizes and hashes."""

    rows: int
    num_classes: int
    header_sha256: str
    shards: tuple[ShardEntry, ...]
    files: tuple[ShardEntry, ...]
    format: int = FORMAT

    def __post_init__(self):
        _require_counts("rows, classes", self.rows, self.num_classes)
        if any(entry.rows is None for entry in self.shards):
            raise ValueError("a shard without its number of rows")


def header_text(header: CacheHeader) -> str:
    """The header as the text of header.json."""
    return json_text(dataclasses.asdict(header), indent=2) + "\n"


def write_manifest(folder: str | os.PathLike, manifest: CacheManifest) -> None:
    """Write manifest.json, which makes the folder a complete cache."""
    atomic_write_text(Path(folder) / MANIFEST_NAME, json_text(dataclasses.asdict(manifest), indent=2) + "\n")


def parse_header(text: str, name: str = HEADER_NAME) -> CacheHeader:
    """Read a header back. Raises ValueError naming the file for text that is none."""
    values = _object(text, name)
    classes = values.get("classes")
    if not isinstance(classes, list):
        raise ValueError(f"{name}: is no header of a cache, it has no list of classes")
    values["classes"] = tuple(_build(CacheClass, entry, name) for entry in classes)
    for key in ("image_shape", "pixel_operations", "left_out"):
        values[key] = tuple(values.get(key) or ())
    for key in ("scale", "shift"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    return _build(CacheHeader, values, name)


def parse_manifest(text: str, name: str = MANIFEST_NAME) -> CacheManifest:
    """Read a manifest back. Raises ValueError naming the file for text that is none."""
    values = _object(text, name)
    for key in ("shards", "files"):
        values[key] = tuple(_build(ShardEntry, entry, name) for entry in values.get(key) or ())
        for entry in values[key]:
            if Path(entry.file).name != entry.file:
                raise ValueError(f"{name}: names {entry.file!r}, which is not in the folder")
    return _build(CacheManifest, values, name)


def read_description(folder: str | os.PathLike) -> tuple[CacheHeader, CacheManifest]:
    """Header and manifest of a complete cache, without opening its shards.

    Raises FileNotFoundError if there is no folder, ValueError for a folder that is no cache, for a cache that is still being
    written, for files of another format, and for a header that is not the one the manifest knows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the folder that tools/export_latents.py wrote")
    if not (folder / MANIFEST_NAME).is_file():
        if (folder / PROGRESS_NAME).is_dir():
            raise ValueError(
                f"{folder} is a cache still being written, or its export was stopped: wait for it, or run the same "
                "tools/export_latents.py command again and it goes on where it was"
            )
        raise ValueError(f"{folder} is no cache: it has no {MANIFEST_NAME}; tools/export_latents.py writes one")
    manifest = parse_manifest(_read(folder / MANIFEST_NAME), str(folder / MANIFEST_NAME))
    text = _read(folder / HEADER_NAME)
    if text_sha256(text) != manifest.header_sha256:
        raise ValueError(
            f"{folder / HEADER_NAME} is not the header that this cache was written with (its sha256 is not the one in "
            f"{MANIFEST_NAME}): put the original file back; editing it does not change what the rows are"
        )
    return parse_header(text, str(folder / HEADER_NAME)), manifest


def text_sha256(text: str) -> str:
    """The SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def same_scale(first: Scale | Sequence[float], second: Scale | Sequence[float]) -> bool:
    """Whether two scales or shifts, a number or one a channel, mean the same."""
    first, second = np.atleast_1d(first), np.atleast_1d(second)
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        return False
    return bool(np.allclose(first, second, rtol=SCALE_TOLERANCE, atol=SCALE_TOLERANCE))


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each key of two settings that differs, `old` first."""
    old, new = plain_value(old), plain_value(new)
    keys = [*old, *(key for key in new if key not in old)]
    return [f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys if old.get(key) != new.get(key)]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not as text, which would hide changed line ends
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): put the file back, or export the cache again") from error


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: is no JSON ({error}): put the file back, or export the cache again") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise ValueError(f"{name}: has format {found!r}, this version reads format {FORMAT}")
    return values


def _require_counts(name: str, *values: Any) -> None:
    if any(not isinstance(value, int) or value < 0 for value in values):
        raise ValueError(f"{name}: {', '.join(map(repr, values))}, wanted whole numbers")


def _build(kind: type, values: Any, name: str):
    """A dataclass from a JSON object. Raises ValueError for missing and unknown keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: holds {values!r} where a {kind.__name__} was wanted")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
