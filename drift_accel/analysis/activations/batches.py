"""Batch files of activations, in two formats with the same content: `.npz` with `.json`, and Arrow.

A batch holds n consecutive samples of a set: for each layer an array [n, D] (D = C, or C*H*W flattened in that order) and for
each sample its class and where it came from. `.npz` and `.json` are what other tools read; Arrow is mapped, not read.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from drift_accel.foundation.storage import json_text

ARROW, NPZ = "arrow", "npz"
STORAGES = (ARROW, NPZ)
SUFFIXES = {ARROW: (".arrow",), NPZ: (".npz", ".json")}
DTYPES = ("float32", "float16")
NO_CLASS = -1  # class_id of a sample whose class is not known
_ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
_TEXT_COLUMNS = ("synset_id", "class_name", "original_path", "image_path")
ADVICE = "copy the set again from where it was made, or extract it again"
# "file" is what numpy calls the first argument of savez.
RESERVED_NAMES = ("class_id", *_TEXT_COLUMNS, "file")


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """What is known of one sample beside its activations."""

    class_id: int
    """From 0; -1 where the class is not known."""
    synset_id: str
    """The class's key: a WordNet synset such as n01440764, or a folder's name; empty where the class is not known."""
    class_name: str
    original_path: str
    """Where the picture came from: a file, a row of a data set, a sample of a generator."""
    image_path: str | None = None
    """The picture, relative to the folder that holds activations/, images/ and metadata/; None where none was kept."""


class BatchError(ValueError):
    """A batch file that is missing, damaged or of another layout."""


def batch_name(batch: int) -> str:
    """The name of a batch file without its suffix."""
    return f"batch_{batch:06d}"


def arrow_schema(shapes: Mapping[str, Sequence[int]], dtype: str) -> pa.Schema:
    """The columns of an Arrow batch file; each layer's shape and the number type are in the schema's metadata too."""
    fields = [("class_id", pa.int64()), *((name, pa.string()) for name in _TEXT_COLUMNS)]
    fields += [(layer, pa.list_(_ARROW_TYPES[dtype], prod(shape))) for layer, shape in shapes.items()]
    described = json.dumps({layer: list(shape) for layer, shape in shapes.items()})
    return pa.schema(fields, metadata={"shapes": described})


def arrow_rows(schema: pa.Schema, activations: Mapping[str, np.ndarray], samples: Sequence[SampleRecord]) -> pa.RecordBatch:
    """Activations [n, D] by layer and n samples as a table of `arrow_schema`."""
    columns = []
    for field in schema:
        if field.name in RESERVED_NAMES:
            columns.append(pa.array([getattr(sample, field.name) for sample in samples], type=field.type))
        else:
            kind = field.type.value_type.to_pandas_dtype()
            values = np.ascontiguousarray(activations[field.name], dtype=kind).reshape(-1)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(values, type=field.type.value_type), field.type.list_size))
    return pa.record_batch(columns, schema=schema)


def write_npz_batch(
    path: Path, activations: Mapping[str, np.ndarray], samples: Sequence[SampleRecord], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Write PATH.npz (compressed, one array [n, D] a layer) and PATH.json (batch_size, layers, shapes, samples)."""
    np.savez_compressed(path.with_name(f"{path.name}.npz"), **{layer: activations[layer] for layer in shapes})
    described = {
        "batch_size": len(samples),
        "layers": list(shapes),
        "shapes": {layer: list(shape) for layer, shape in shapes.items()},
        "samples": [{"batch_index": place, **asdict(sample)} for place, sample in enumerate(samples)],
    }
    path.with_name(f"{path.name}.json").write_text(json_text(described, indent=1) + "\n", encoding="utf-8")


class NpzBatch:
    """One PATH.npz with its PATH.json: samples are parsed and layers decompressed when they are asked for, and not kept.

    Raises BatchError naming the file that is missing, damaged or of another layout.
    """

    def __init__(self, path: Path):
        self.path = path
        content = self.metadata
        self.layer_names = list(content["layers"])
        self.known_shapes: dict[str, list[int]] = content.get("shapes") or {}
        """As far as the description has them."""
        self._count = len(content["samples"])

    def __len__(self) -> int:
        return self._count

    @property
    def metadata(self) -> dict[str, Any]:
        """batch_size, layers, shapes and samples, as the `.json` says them."""
        path = self.path.with_name(f"{self.path.name}.json")
        try:
            content = json.loads(path.read_bytes())
            if not isinstance(content["layers"], list) or not all("class_id" in sample for sample in content["samples"]):
                raise ValueError("layers or samples are no lists as they should be")
        except FileNotFoundError:
            raise BatchError(f"{path} is missing: {ADVICE}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BatchError(f"{path} is no description of a batch ({error!r}): {ADVICE}") from None
        return content

    @property
    def class_ids(self) -> np.ndarray:
        """int64 [n]."""
        return np.array([sample["class_id"] for sample in self.metadata["samples"]], dtype=np.int64)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of each layer; (D,) where the description has none, as in files of other tools."""
        known = self.known_shapes
        return {layer: tuple(known[layer]) if layer in known else self.array(layer).shape[1:] for layer in self.layer_names}

    def array(self, layer: str) -> np.ndarray:
        """The layer [n, D] as it is stored."""
        path = self.path.with_name(f"{self.path.name}.npz")
        try:
            with np.load(path, allow_pickle=False) as archive:
                array = archive[layer]
        except FileNotFoundError:
            raise BatchError(f"{path} is missing: {ADVICE}") from None
        except Exception as error:  # zipfile, zlib and numpy each raise their own for damaged bytes
            raise BatchError(f"layer {layer} of {path} cannot be read ({error!r}): {ADVICE}") from None
        size = prod(self.known_shapes[layer]) if layer in self.known_shapes else array.shape[-1]
        if array.shape != (len(self), size):
            raise BatchError(f"layer {layer} of {path} is {list(array.shape)}, its .json says {[len(self), size]}: {ADVICE}")
        return array

    def segments(self, layer: str) -> Iterator[np.ndarray]:
        """The layer in one piece."""
        yield self.array(layer)

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of samples."""
        found = self.metadata["samples"]
        return [found[row] for row in rows]


class ArrowBatch:
    """One PATH.arrow, mapped while it is looked at: nothing is read before it is asked for, and no map is kept.

    Maps that stay open would count as this process's memory until all of a set lies in it.
    Raises BatchError naming the file that is missing, damaged or of another layout.
    """

    def __init__(self, path: Path):
        self.path = path.with_name(f"{path.name}.arrow")
        schema, parts = self._open()
        try:
            self.known_shapes: dict[str, list[int]] = json.loads((schema.metadata or {})[b"shapes"])
        except (KeyError, ValueError) as error:
            raise BatchError(f"{self.path} does not say the shapes of its layers ({error!r}): {ADVICE}") from None
        missing = {"class_id", *_TEXT_COLUMNS, *self.known_shapes} - set(schema.names)
        if missing:
            raise BatchError(f"{self.path} has no column {', '.join(sorted(missing))}: {ADVICE}")
        self.layer_names = list(self.known_shapes)
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _open(self) -> tuple[pa.Schema, list[pa.RecordBatch]]:
        try:
            with pa.memory_map(str(self.path)) as source, pa.ipc.open_stream(source) as reader:
                schema, parts = reader.schema, [part for part in reader if part.num_rows]
            for part in parts:
                part.validate()  # damaged lengths reach beyond the bytes, and Arrow ends the process where they are used
        except FileNotFoundError:
            raise BatchError(f"{self.path} is missing: {ADVICE}") from None
        except (pa.ArrowException, OSError) as error:
            raise BatchError(f"{self.path} is no batch of activations ({error}): {ADVICE}") from None
        return schema, parts

    @property
    def class_ids(self) -> np.ndarray:
        """int64 [n]."""
        return np.concatenate([np.zeros(0, np.int64), *(part.column("class_id").to_numpy() for part in self._open()[1])])

    @property
    def metadata(self) -> dict[str, Any]:
        """The same description as in the `.json` of the other format."""
        rows = [row for part in self._open()[1] for row in part.select(["class_id", *_TEXT_COLUMNS]).to_pylist()]
        samples = [{"batch_index": place, **row} for place, row in enumerate(rows)]
        return {"batch_size": len(self), "layers": self.layer_names, "shapes": self.known_shapes, "samples": samples}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one sample of each layer."""
        return {layer: tuple(shape) for layer, shape in self.known_shapes.items()}

    def array(self, layer: str) -> np.ndarray:
        """The layer [n, D] as it is stored; a copy where the file has several pieces."""
        parts = list(self.segments(layer))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def segments(self, layer: str) -> Iterator[np.ndarray]:
        """The layer piece by piece, each [rows, D], without a copy; a piece keeps the file mapped as long as it lives."""
        for part in self._open()[1]:
            yield part.column(layer).flatten().to_numpy(zero_copy_only=True).reshape(part.num_rows, -1)

    def samples(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """What is known of samples."""
        names = ["class_id", *_TEXT_COLUMNS]
        tables = [part.select(names) for part in self._open()[1]]
        found = pa.Table.from_batches(tables).take(pa.array(rows, type=pa.int64()))
        return found.to_pylist()


def open_batch(path: Path, storage: str) -> NpzBatch | ArrowBatch:
    """The batch file at `path` (without its suffix). Raises BatchError for one that is missing or damaged."""
    return ArrowBatch(path) if storage == ARROW else NpzBatch(path)
