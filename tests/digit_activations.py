"""Sets of activations of digits, real and as generators of several faults would make them, and sets of any numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from drift_accel.analysis.activations.batches import SampleRecord, batch_name, write_npz_batch
from drift_accel.analysis.activations.store import ACTIVATIONS, IMAGES, INFO_NAME, METADATA
from drift_accel.data.digits import load_digits


def write_set(
    folder: Path,
    name: str,
    layers: Mapping[str, np.ndarray],
    labels: Sequence[int],
    *,
    pictures: np.ndarray | None = None,
    classes: Mapping[int, str] | None = None,
    metadata: Mapping | None = None,
) -> Path:
    """Write layers {name: [N, C] or [N, C, H, W]} with labels [N] (-1 unknown), grey pictures uint8 [N, H, W]; the set's path."""
    for kind in (ACTIVATIONS, IMAGES, METADATA):
        (folder / kind / name).mkdir(parents=True)
    records = []
    for index, label in enumerate(np.asarray(labels).tolist()):
        place = None
        if pictures is not None:
            place = f"{IMAGES}/{name}/sample_{index:06d}.png"
            Image.fromarray(pictures[index]).save(folder / place)
        known = label >= 0
        key = (classes or {}).get(label, f"class {label}") if known else ""
        records.append(
            SampleRecord(class_id=label, synset_id=key, class_name=key, original_path=f"{name}/{index}", image_path=place)
        )
    flat = {layer: np.asarray(values, dtype=np.float32).reshape(len(records), -1) for layer, values in layers.items()}
    shapes = {layer: values.shape[1:] for layer, values in layers.items()}
    write_npz_batch(folder / ACTIVATIONS / name / batch_name(0), flat, records, shapes)
    (folder / METADATA / name / INFO_NAME).write_text(json.dumps({"name": name, **(metadata or {})}))
    return folder / ACTIVATIONS / name


def digit_sets(folder: Path, count: int = 240) -> dict[str, Path]:
    """Real test digits and four stand-ins for generators, as pixels [1, 8, 8] and 16 fixed random features of them.

    finished: training digits; collapsed: the same without 3 and 7; prototypes: one image a class; early: half noise.
    """
    test, train = load_digits("test"), load_digits("train")
    random = np.random.default_rng(0)
    projection = random.standard_normal((64, 16)) / 8
    names = {digit: f"digit {digit}" for digit in range(10)}
    real = np.asarray(test.rows(np.arange(count)), dtype=np.float32)
    good, labels = np.asarray(train.rows(np.arange(count)), dtype=np.float32), train.labels[:count]
    kept = ~np.isin(labels, (3, 7))
    first = {int(label): int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)}
    images = {
        "real": (real, test.labels[:count]),
        "early": (0.5 * good + 0.8 * random.standard_normal(good.shape), labels),
        "collapsed": (good[kept], labels[kept]),
        "prototypes": (good[[first[int(label)] for label in labels]], labels),
        "finished": (good, labels),
    }
    paths = {}
    for name, (rows, its_labels) in images.items():
        flat = rows.reshape(len(rows), -1)
        pictures = ((rows[:, 0] + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        layers = {"pixels": rows, "features": np.tanh(flat @ projection)}
        paths[name] = write_set(folder, name, layers, its_labels, pictures=pictures, classes=names)
    return paths
