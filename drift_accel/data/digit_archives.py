"""scikit-learn's digits packed as ImageNet's three archives, so that the whole way from archives on can be tried in minutes.

The layout is the true one: a train tar of one tar a class, a flat val tar, a devkit with meta.mat and ground truth. The pictures
are coloured JPEGs of 64x64, ten classes of 1,000; nothing of ImageNet is in them.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from drift_accel.data.archive_listing import OFFICIAL
from drift_accel.data.digit_images import coloured_digit
from drift_accel.data.digits import load_digits
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import committed_folder, verify_folder

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WNIDS = tuple(f"n9000000{digit}" for digit in range(10))  # beyond WordNet's offsets: no true class has such a key
ROOT_WNID = "n90000010"
_DEVKIT_IDS = tuple(range(10, 0, -1))  # the devkit counts in another order than the wnids, as ImageNet's does
_FIELDS = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height", "num_train_images")
JPEG_QUALITY = 95
ORDER_STREAM = "digit_archives/order"


def write_digit_archives(folder: str | os.PathLike, *, per_class: int = 40, val_per_class: int = 10, seed: int = 0) -> bool:
    """Write the three archives under their official names into `folder`; False where they are there and whole already.

    `per_class` training digits of each class and `val_per_class` held-out ones, always the same pictures. The folder appears
    complete or not at all. Raises ValueError for counts below 1 or above what scikit-learn has, and for a folder that is there
    but not whole.
    """
    folder = Path(folder)
    if folder.exists():
        problems = verify_folder(folder)
        if problems:
            raise ValueError(f"{folder} is there but not whole: {problems[0]}; remove it")
        return False
    train, val = _chosen("train", per_class, seed), _chosen("test", val_per_class, seed)
    flat = [(label, content) for label, contents in enumerate(val) for content in contents]
    random_stream(seed, ORDER_STREAM, 0).shuffle(flat)
    with committed_folder(folder) as partial:
        classes = {f"{WNIDS[label]}.tar": _tar(_named(WNIDS[label], contents)) for label, contents in enumerate(train)}
        (partial / OFFICIAL["train"].name).write_bytes(_tar(classes))
        names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(flat) + 1)]
        pictures = {name: content for name, (_, content) in zip(names, flat, strict=True)}
        (partial / OFFICIAL["val"].name).write_bytes(_tar(pictures))
        (partial / OFFICIAL["devkit"].name).write_bytes(_devkit([label for label, _ in flat], per_class))
    return True


def _chosen(split: str, per_class: int, seed: int) -> list[list[bytes]]:
    """The first `per_class` digits of each class as JPEGs."""
    digits = load_digits(split)
    fewest = int(np.bincount(digits.labels, minlength=10).min())
    if not 1 <= per_class <= fewest:
        raise ValueError(f"{per_class} {split} pictures a class were asked for: give a number from 1 to {fewest}")
    first = 0 if split == "train" else len(load_digits("train"))  # no two pictures share their colours' draw
    rows = [np.flatnonzero(digits.labels == digit)[:per_class] for digit in range(10)]
    return [[_jpeg(coloured_digit(digits.images[row, 0], seed, first + int(row))) for row in chosen] for chosen in rows]


def _named(wnid: str, contents: list[bytes]) -> dict[str, bytes]:
    return {f"{wnid}_{number}.JPEG": content for number, content in enumerate(contents)}


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def _devkit(truth: list[int], per_class: int) -> bytes:
    """meta.mat, a structure [synsets, 1], with one inner synset above the ten classes; the ground truth in devkit numbers."""
    rows = [
        (float(_DEVKIT_IDS[digit]), WNIDS[digit], f"{NAMES[digit]}, handwritten {NAMES[digit]}", 0, np.empty(0))
        for digit in range(10)
    ]
    rows.append((11.0, ROOT_WNID, "digit", 10, np.arange(1.0, 11.0)))
    table = np.empty((len(rows), 1), dtype=[(field, object) for field in _FIELDS])
    for place, (number, wnid, text, children, below) in enumerate(rows):
        table[place, 0] = (number, wnid, text, text, float(children), below, float(bool(children)), float(per_class))
    mat = io.BytesIO()
    savemat(mat, {"synsets": table})
    lines = "".join(f"{_DEVKIT_IDS[label]}\n" for label in truth)
    root = Path(OFFICIAL["devkit"].name.removesuffix(".tar.gz"))
    files = {
        f"{root}/data/meta.mat": mat.getvalue(),
        f"{root}/data/ILSVRC2012_validation_ground_truth.txt": lines.encode(),
    }
    return _tar(files, "w:gz")
