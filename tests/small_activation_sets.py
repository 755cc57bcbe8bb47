"""Small sets of activations, made without any model."""

import json
from pathlib import Path

import numpy as np

from drift_accel.analysis.activations.batches import SampleRecord
from drift_accel.analysis.activations.staging import StagedSet

SHAPES = {"pooled": (5,), "maps": (3, 2, 2)}
CLASSES = (("n01440764", "tench"), ("n01443537", "goldfish"), ("n02012849", "crane"))


def small_values(count: int) -> dict[str, np.ndarray]:
    """Rows of both layers; the same ones always."""
    stream = np.random.Generator(np.random.Philox(key=7))
    return {layer: stream.standard_normal((count, *shape)).astype(np.float32) for layer, shape in SHAPES.items()}


def small_labels(count: int) -> np.ndarray:
    """Classes in turn."""
    return np.arange(count) % len(CLASSES)


def write_small_set(
    folder: Path, name: str = "real", *, count: int = 23, values=None, shapes=SHAPES, at_once: int = 4, overwrite=False, **options
) -> dict[str, np.ndarray]:
    """Write a set of `count` samples with a picture each; returns its values by layer."""
    values = small_values(count) if values is None else values
    labels = small_labels(count)
    staged = StagedSet(folder, name, {"seed": 0}, shapes=shapes, num_samples=count, **{"batch_size": 10, **options})

    def record(place: int, images: Path) -> SampleRecord:
        picture = images / f"sample_{place:06d}.png"
        picture.write_bytes(b"picture %d" % place)
        key, class_name = CLASSES[labels[place]]
        return SampleRecord(
            class_id=int(labels[place]),
            synset_id=key,
            class_name=class_name,
            original_path=f"/data/{key}/{place}.JPEG",
            image_path=f"images/{name}/{picture.name}",
        )

    def compute(places, writer, advance):
        for start in range(places.start, places.stop, at_once):
            rows = range(start, min(start + at_once, places.stop))
            activations = {layer: array[rows.start : rows.stop] for layer, array in values.items()}
            writer.add(activations, [record(place, writer.images) for place in rows])
            advance(len(rows))
        return []

    staged.write(compute, overwrite=overwrite, log=lambda message: None)
    return values


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path; the time and machine of the record are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.name == "dataset_info.json":
                record = json.loads(content)
                record.pop("provenance", None)
                content = json.dumps(record).encode()
            found[str(path.relative_to(folder))] = content
    return found
