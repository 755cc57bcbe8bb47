"""ImageNet as arrays of small pictures: train_data_batch_1.npz ... train_data_batch_10.npz, val_data.npz (arXiv 1707.08819).

Each file holds `data` uint8 [n, 3*S*S] (all red values, all green ones, all blue ones) and `labels` [n] from 1. The numbers
follow an order of classes of that set's own, which is not the order of any published model: the set's map file tells it. Copies
whose labels were renumbered exist too, so nothing is assumed.
"""

import hashlib
import math
import os
import re
import threading
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from drift_accel.data.class_table import ClassTable
from drift_accel.data.image_sources import ImageSource
from drift_accel.data.npz_members import mapped_member, member_layout, unpacked_member

STANDARD = "standard"
_NUMBERED = re.compile(r"(.*?data_batch_)(\d+)\.npz")
_MAP_LINE = re.compile(r"(n\d{8})\s+(\d+)\s+(\S.*)")


class DownsampledImageNet(ImageSource):
    """The pictures of a folder of numbered files, sorted by number, or of one file.

    `map_file` has one line a class: wnid, number from 1, name (map_clsloc.txt); a picture's label becomes the rank of its wnid
    among them, as in every published model. `label_order` "standard" says that label - 1 is that rank already; `table` then
    names the classes. Exactly one of the two must be given.
    Raises FileNotFoundError, and ValueError for missing or doubled numbers, arrays or labels that do not fit, and a map that
    is none.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        map_file: str | os.PathLike | None = None,
        label_order: str | None = None,
        table: ClassTable | None = None,
    ):
        path = Path(path)
        self._files = numbered_files(path)
        ranks, self.class_ids, self.class_names = _class_order(path, map_file, label_order, table)
        labels, self._places = [], []
        self.side = 0
        for number, file in enumerate(self._files):
            found = self._read_labels(file, len(ranks))
            labels.append(ranks[found - 1])
            self._places.append(np.stack([np.full(len(found), number), np.arange(len(found))], axis=1))
        self.labels = np.concatenate(labels)
        self._places = np.concatenate(self._places)
        self._lock = threading.Lock()
        self._open_file: tuple[int, np.ndarray] | None = None

    def name(self, index: int) -> str:
        """File and row, such as "train_data_batch_3.npz row 17"."""
        file, row = self._places[index]
        return f"{self._files[file].name} row {row}"

    def load(self, index: int) -> Image.Image:
        """The picture. Raises OSError naming it where its file cannot be read."""
        file, row = self._places[index].tolist()
        try:
            values = self._data(file)[row]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise OSError(f"{self.name(index)}: {error}") from error
        return Image.fromarray(np.ascontiguousarray(values.reshape(3, self.side, self.side).transpose(1, 2, 0)))

    def fingerprint(self) -> str:
        """Also the sizes of the files; the pictures are not read."""
        sizes = "".join(f"{file.name}\0{file.stat().st_size}\n" for file in self._files)
        return hashlib.sha256(f"{super().fingerprint()}\n{sizes}".encode()).hexdigest()

    def _data(self, file: int) -> np.ndarray:
        # One file at a time: pictures are asked for in their order, and an unpacked file takes 1.6 GB of disk.
        with self._lock:  # threads ask at once where one file ends and the next begins
            if self._open_file is None or self._open_file[0] != file:
                self._open_file = (file, _pictures_of(self._files[file]))
            return self._open_file[1]

    def _read_labels(self, file: Path, num_classes: int) -> np.ndarray:
        try:
            shape, dtype = member_layout(file, "data.npy")
            with np.load(file, allow_pickle=False) as archive:
                labels = archive["labels"]
        except KeyError:
            raise ValueError(f"{file} lacks `data` or `labels`: wanted a file of the downsampled ImageNet") from None
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} cannot be read ({error}): download it again") from None
        side = math.isqrt(shape[-1] // 3)
        if len(shape) != 2 or shape[1] != 3 * side * side or dtype != np.uint8 or (self.side and side != self.side):
            raise ValueError(f"{file} has data {dtype} {list(shape)}: wanted uint8 [n, 3*S*S], the same S in all files")
        self.side = side
        labels = np.asarray(labels)
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(f"{file} has labels {labels.dtype} {list(labels.shape)} of {shape[0]} pictures")
        labels = labels.astype(np.int64)
        if len(labels) and not (labels.min() >= 1 and labels.max() <= num_classes):
            raise ValueError(
                f"labels of {file} reach from {labels.min()} to {labels.max()}: wanted 1 to {num_classes}, the classes of the "
                "map or table; a copy whose labels start at 0 is not the published one"
            )
        return labels


def is_downsampled_imagenet(path: str | os.PathLike) -> bool:
    """Whether a path is a folder of numbered `.npz` files of pictures, or one file with `data` and `labels`."""
    path = Path(path)
    if path.is_dir():
        return any(_NUMBERED.fullmatch(entry.name) for entry in path.iterdir())
    if path.suffix != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return {"data.npy", "labels.npy"} <= set(archive.namelist())


def numbered_files(path: Path) -> list[Path]:
    """The files of a folder by their numbers, so that 10 comes after 9; or the one file that `path` is.

    Raises FileNotFoundError where there is none, ValueError for a number that is missing or there twice, and two series.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: give the folder of train_data_batch_1.npz and so on, or one file")
    matches = [match for match in (_NUMBERED.fullmatch(entry.name) for entry in sorted(path.iterdir())) if match]
    if not matches:
        raise FileNotFoundError(f"{path} holds no train_data_batch_1.npz and so on")
    if len({match[1] for match in matches}) > 1:
        raise ValueError(f"{path} holds {matches[0][0]} and {matches[-1][0]}: keep one set a folder")
    numbers = sorted(int(match[2]) for match in matches)
    missing = sorted(set(range(1, numbers[-1] + 1)) - set(numbers))
    if missing or len(set(numbers)) < len(numbers):
        raise ValueError(f"{path} holds the numbers {numbers}: wanted each from 1 on once; missing are {missing or 'none'}")
    return [path / match[0] for match in sorted(matches, key=lambda match: int(match[2]))]


def read_map(path: str | os.PathLike) -> list[tuple[str, str]]:
    """(wnid, name) of the labels 1, 2, ... of a map file with lines like `n02119789 1 kit_fox`.

    Raises FileNotFoundError, ValueError for a line of another form, a number that is missing and a wnid that comes twice.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"--label_map {path} does not exist: it is called map_clsloc.txt in the set's devkit") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--label_map {path} is no text: {error}") from None
    found: dict[int, tuple[str, str]] = {}
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = _MAP_LINE.fullmatch(line.strip())
        if match is None or int(match[2]) in found:
            raise ValueError(f"--label_map {path}, line {place} is {line!r}: wanted wnid, a number of its own from 1, name")
        found[int(match[2])] = match[1], match[3].replace("_", " ")
    if sorted(found) != list(range(1, len(found) + 1)) or not found:
        raise ValueError(f"--label_map {path} has {len(found)} classes whose numbers are not 1 to {len(found)}")
    if len({wnid for wnid, _ in found.values()}) < len(found):
        raise ValueError(f"--label_map {path} names a wnid twice")
    return [found[number] for number in sorted(found)]


def _class_order(path, map_file, label_order, table) -> tuple[np.ndarray, tuple[str, ...], tuple[str, ...]]:
    """(rank of label 1, 2, ...; wnids by rank; names by rank)."""
    if (map_file is None) == (label_order is None):
        raise ValueError(
            f"{path} numbers its classes from 1 in an order of its own: give its map with --label_map map_clsloc.txt, or say "
            "--label_order standard where label - 1 is the rank of the sorted wnids; one of the two, it is never assumed"
        )
    if map_file is None:
        if label_order != STANDARD:
            raise ValueError(f"--label_order is {label_order!r}: the only order that needs no map is {STANDARD!r}")
        if table is None:
            raise ValueError("--label_order standard says nothing of names: give the classes with --class_table")
        return np.arange(len(table)), table.wnids, tuple(", ".join(entry.names) for entry in table)
    classes = read_map(map_file)
    by_rank = sorted(classes)
    places = {wnid: rank for rank, (wnid, _) in enumerate(by_rank)}
    ranks = np.array([places[wnid] for wnid, _ in classes], dtype=np.int64)
    return ranks, tuple(wnid for wnid, _ in by_rank), tuple(name for _, name in by_rank)


def _pictures_of(file: Path) -> np.ndarray:
    array = mapped_member(file, "data.npy")
    return unpacked_member(file, "data.npy") if array is None else array
