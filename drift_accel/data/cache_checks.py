"""The verification of a cache: every file against the manifest, every row against the header, the header against a model."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from drift_accel.data.cache_format import (
    CLASS_INDEX_NAME,
    HEADER_NAME,
    LATENTS,
    MANIFEST_NAME,
    PIXELS,
    PROGRESS_NAME,
    CacheHeader,
    CacheManifest,
    ShardEntry,
    parse_header,
    parse_manifest,
    text_sha256,
)
from drift_accel.data.cache_shards import ADVICE, arrow_schema, column_values, decode_picture, open_shard, picture_bytes
from drift_accel.data.class_index import build_class_index, read_class_index
from drift_accel.foundation.progress import Progress
from drift_accel.foundation.storage import sha256_file

MODES = ("quick", "full")
TABLE_ROWS = 1024  # looked at together, which bounds the memory
QUICK_ROWS = 16  # of so many that are looked at in quick mode
STD_RANGE = (0.8, 1.2)  # of latents in model space: their scale is chosen to make it 1
EXPORT_AGAIN = "remove the cache and export it again with tools/export_latents.py"
CLASSES_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong ("error") or suspicious ("warning"): in which file, what, and what to do."""

    level: str
    file: str
    problem: str
    advice: str


@dataclass
class CheckReport:
    """What a verification found and measured."""

    path: str
    mode: str
    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def is_good(self) -> bool:
        """Whether nothing is wrong; warnings do not count."""
        return not any(finding.level == "error" for finding in self.findings)

    def error(self, file: str, problem: str, advice: str) -> None:
        """Note that something is wrong."""
        self.findings.append(Finding("error", file, problem, advice))

    def warn(self, file: str, problem: str, advice: str) -> None:
        """Note that something is suspicious."""
        self.findings.append(Finding("warning", file, problem, advice))

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return {**dataclasses.asdict(self), "is_good": self.is_good}


def verify_cache(
    path: str | os.PathLike,
    mode: str = "quick",
    *,
    model: Mapping[str, Any] | None = None,
    vae: Mapping[str, Any] | None = None,
    show_progress: bool = False,
) -> CheckReport:
    """Check a cache; a damaged one is reported, not raised.

    "quick" compares sizes, counts, labels and the small files' hashes and looks at some rows of every shard; "full" also
    hashes every shard and looks at every row. `model` has in_channels, input_size and num_classes (as far as given) of a model,
    `vae` has scale, shift and weights_sha256 of the VAE that is to decode. Raises ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}: choose one of {', '.join(MODES)}")
    folder, report = Path(path), CheckReport(str(path), mode)
    manifest = _check_manifest(folder, report)
    if manifest is None:
        return report
    header = _check_header(folder, manifest, report)
    for entry in manifest.files:
        _check_file(folder, entry, True, report)
    _check_strangers(folder, manifest, report)
    if header is None:
        return report
    if len(header.classes) != manifest.num_classes:
        problem = f"says {manifest.num_classes} classes, the header lists {len(header.classes)}"
        report.error(MANIFEST_NAME, problem, ADVICE)
    _check_shards(folder, header, manifest, report, show_progress)
    _check_fit(header, model, vae, report)
    return report


def model_requirements(folder: str | os.PathLike) -> dict[str, int]:
    """in_channels, input_size and num_classes of an exported model's config.json.

    Raises ValueError if there is no such file or it lacks one of them.
    """
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_bytes())
        return {key: int(config[key]) for key in ("in_channels", "input_size", "num_classes")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of an exported model ({error!r}): give its folder") from None


def _check_manifest(folder: Path, report: CheckReport) -> CacheManifest | None:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        problem, advice = "is missing: this folder is no cache", "give the folder that tools/export_latents.py wrote"
        if (folder / PROGRESS_NAME).is_dir():
            problem = "is missing: the cache is still being written, or its export was stopped"
            advice = "wait, or run the same tools/export_latents.py command again: it goes on where it was"
        report.error(MANIFEST_NAME, problem, advice)
        return None
    try:
        manifest = parse_manifest(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        report.error(MANIFEST_NAME, f"cannot be read ({error})", ADVICE)
        return None
    rows = sum(entry.rows for entry in manifest.shards)
    if rows != manifest.rows:
        report.error(MANIFEST_NAME, f"says {manifest.rows} rows, its shards have {rows} together", ADVICE)
    report.statistics.update(rows=manifest.rows, classes=manifest.num_classes, shards=len(manifest.shards))
    report.statistics["bytes"] = sum(entry.bytes for entry in manifest.shards)
    return manifest


def _check_header(folder: Path, manifest: CacheManifest, report: CheckReport) -> CacheHeader | None:
    try:
        text = (folder / HEADER_NAME).read_bytes().decode("utf-8")
        if text_sha256(text) != manifest.header_sha256:
            report.error(HEADER_NAME, "was changed after the export (its sha256 is not the manifest's)", ADVICE)
        return parse_header(text)
    except (OSError, ValueError) as error:
        report.error(HEADER_NAME, f"cannot be read ({error})", ADVICE)
        return None


def _check_file(folder: Path, entry: ShardEntry, hashed: bool, report: CheckReport) -> bool:
    """Existence, size and (if `hashed`) content of one file; whether they are as they were."""
    path = folder / entry.file
    rebuilt = entry.file == CLASS_INDEX_NAME
    advice = "remove it: it is built again when the cache is opened" if rebuilt else ADVICE
    if not path.is_file():
        if rebuilt:
            report.warn(entry.file, "is missing", "nothing to do: it is built again when the cache is opened")
        else:
            report.error(entry.file, "is missing", advice)
        return False
    size = path.stat().st_size
    if size != entry.bytes:
        report.error(entry.file, f"has {size} bytes instead of {entry.bytes}: it was cut or written over", advice)
        return False
    if hashed and sha256_file(path) != entry.sha256:
        report.error(entry.file, "has other content than at the export (its sha256 is not the manifest's)", advice)
        return False
    return True


def _check_strangers(folder: Path, manifest: CacheManifest, report: CheckReport) -> None:
    known = {entry.file for entry in manifest.shards}
    for name in sorted(path.name for path in folder.glob("data-*.arrow")):
        if name not in known:
            report.warn(name, "is not in the manifest and is never read", "remove it")


def _check_shards(folder: Path, header: CacheHeader, manifest: CacheManifest, report: CheckReport, show: bool) -> None:
    schema, values = arrow_schema(header), _Values(header, report)
    labels: list[np.ndarray] = []
    origins: list[np.ndarray] = []
    readable = True
    with Progress(manifest.rows, description=f"verify {report.mode}", enabled=show) as progress:
        for entry in manifest.shards:
            tables = _open_tables(folder, entry, schema, report)
            readable = readable and tables is not None
            first = 0
            for batch in tables or ():
                labels.append(_check_labels(batch, entry.file, first, header, report))
                origins.append(np.stack([np.array(column_values(batch, name)) for name in ("image_index", "view")]))
                values.check(batch, entry.file, first)
                first += batch.num_rows
                progress.update(batch.num_rows)
    values.finish()
    if readable:  # with a shard missing every count would be wrong, which says nothing new
        _check_classes(folder, np.concatenate([np.zeros(0, np.int64), *labels]), header, report)
        pairs = np.concatenate([np.zeros((2, 0), np.int64), *origins], axis=1)
        repeated = pairs.shape[1] - np.unique(pairs, axis=1).shape[1]
        if repeated:
            report.error(MANIFEST_NAME, f"{repeated} rows come from a picture and view that another row has too", EXPORT_AGAIN)


def _open_tables(folder: Path, entry: ShardEntry, schema: pa.Schema, report: CheckReport) -> list[pa.RecordBatch] | None:
    """The rows of one shard in tables that fit into memory; None where the file is damaged, which is noted."""
    if not _check_file(folder, entry, report.mode == "full", report):
        return None  # what changed bytes say of their rows is worth nothing
    try:
        batches = open_shard(folder, entry, schema)
        for batch in batches:
            batch.validate(full=True)
    except ValueError as error:
        problem = str(error).removeprefix(f"{folder / entry.file} ").removesuffix(f": {ADVICE}")
        report.error(entry.file, problem, ADVICE)
        return None
    return [batch.slice(start, TABLE_ROWS) for batch in batches for start in range(0, batch.num_rows, TABLE_ROWS)]


def _check_labels(batch: pa.RecordBatch, file: str, first: int, header: CacheHeader, report: CheckReport) -> np.ndarray:
    labels = np.array(column_values(batch, "label"))
    outside = np.flatnonzero((labels < 0) | (labels >= len(header.classes)))
    if len(outside):
        row = int(outside[0])
        problem = f"row {first + row} has label {labels[row]}, but there are {len(header.classes)} classes, from 0"
        report.error(file, f"{problem} ({len(outside)} such rows near it)", EXPORT_AGAIN)
    return labels


def _check_classes(folder: Path, labels: np.ndarray, header: CacheHeader, report: CheckReport) -> None:
    """Rows a class against the header, classes without rows, the class index against the labels."""
    num_classes = len(header.classes)
    inside = labels[(labels >= 0) & (labels < num_classes)]
    counts = np.bincount(inside, minlength=num_classes)
    report.statistics["class_rows"] = counts.tolist()
    wrong = [entry for entry in header.classes if entry.rows != counts[entry.index]]
    if wrong:
        shown = "; ".join(
            f"class {entry.index} ({entry.name}) has {counts[entry.index]} rows, not {entry.rows}"
            for entry in wrong[:CLASSES_SHOWN]
        )
        report.error(HEADER_NAME, f"counts of {len(wrong)} classes are not those of the shards: {shown}", EXPORT_AGAIN)
    empty = [f"{entry.index} ({entry.name})" for entry in header.classes if not counts[entry.index]]
    if empty:
        advice = "export again with pictures of them, or with a class table without them"
        report.error(HEADER_NAME, f"{len(empty)} classes have no rows: {', '.join(empty[:CLASSES_SHOWN])}", advice)
    path = folder / CLASS_INDEX_NAME
    if path.is_file() and len(inside) == len(labels):
        try:
            index = read_class_index(folder, num_classes, len(labels))
            good = np.array_equal(index.array, build_class_index(labels, num_classes).array)
        except ValueError:
            good = False
        if not good:
            advice = "remove it: it is built again when the cache is opened"
            report.error(CLASS_INDEX_NAME, "does not list the rows of the shards by class", advice)


class _Values:
    """Finite numbers, mean and deviation of the rows that are looked at."""

    def __init__(self, header: CacheHeader, report: CheckReport):
        self.header, self.report = header, report
        self._count, self._sum, self._squares = 0, 0.0, 0.0

    def check(self, batch: pa.RecordBatch, file: str, first: int) -> None:
        """Look at the rows of one table, whose first row is row `first` of `file`."""
        rows = np.arange(batch.num_rows)
        if self.report.mode == "quick" and len(rows) > QUICK_ROWS:
            rows = np.linspace(0, len(rows) - 1, QUICK_ROWS).astype(np.int64)
        for column in self.header.columns:
            if column == "image":
                self._check_pictures(batch, rows, file, first)
                continue
            stored = column_values(batch, column).reshape(batch.num_rows, *self.header.row_shape)
            chosen = torch.from_numpy(stored[rows]).float()  # [n, *row_shape]
            bad = ~torch.isfinite(chosen).flatten(1).all(1)
            if self.header.sampling == "moments":
                bad |= (chosen[:, 1] < 0).flatten(1).any(1)
            if bad.any():
                row = first + int(rows[int(bad.nonzero()[0])])
                what = "values that are not finite" if self.header.sampling != "moments" else "values that are no moments"
                problem = f"row {row}, column {column}: holds {what} ({int(bad.sum())} such rows near it)"
                self.report.error(file, problem, EXPORT_AGAIN)
            self._add(chosen[~bad])

    def _check_pictures(self, batch: pa.RecordBatch, rows: Sequence[int], file: str, first: int) -> None:
        pictures = picture_bytes(batch)
        for row in rows:
            try:
                pixels = decode_picture(pictures[row], self.header.image_shape)
                self._add(torch.from_numpy(pixels.copy())[None].float())
            except ValueError as error:
                self.report.error(file, f"row {first + row}: the picture cannot be decoded ({error})", EXPORT_AGAIN)

    def _add(self, values: torch.Tensor) -> None:
        """Count values [n, C, H, W] in, or moments [n, 2, C, H, W], as what is read: mean and squares of a drawn row."""
        if self.header.kind == PIXELS:
            values = values / 127.5 - 1
        if self.header.sampling == "moments":
            values, deviation = values.unbind(1)
            self._squares += deviation.square().sum(dtype=torch.float64).item()
        self._count += values.numel()
        self._sum += values.sum(dtype=torch.float64).item()
        self._squares += values.square().sum(dtype=torch.float64).item()

    def finish(self) -> None:
        """Judge mean and deviation."""
        if not self._count:
            return
        mean = self._sum / self._count
        std = max(self._squares / self._count - mean**2, 0.0) ** 0.5
        self.report.statistics.update(mean=mean, std=std)
        if self.header.kind == LATENTS and not STD_RANGE[0] <= std <= STD_RANGE[1]:
            problem = f"the latents' deviation is {std:.3f}, usual is {STD_RANGE[0]} to {STD_RANGE[1]}"
            advice = f"if these are natural images, scale {self.header.scale} or shift {self.header.shift} is not this VAE's"
            self.report.warn(HEADER_NAME, problem, advice)


def _check_fit(header: CacheHeader, model: Mapping[str, Any] | None, vae: Mapping[str, Any] | None, report: CheckReport) -> None:
    wanted = {**(model or {})}
    if vae:
        wanted.update(scale=vae["scale"], shift=vae["shift"])
    try:
        header.require_model(**wanted)
    except ValueError as error:
        report.error(HEADER_NAME, str(error), "train on the model's own cache, or decode with the cache's VAE")
    mine, other = (header.vae or {}).get("weights_sha256"), (vae or {}).get("weights_sha256")
    if mine and other and mine != other:
        problem = (
            f"the rows were made with other VAE weights ({header.vae.get('name')}, sha256 {mine[:12]}..., not {other[:12]}...)"
        )
        report.error(HEADER_NAME, problem, "decode with the cache's VAE")
