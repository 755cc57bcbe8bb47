"""Pictures with labels on disk: a folder of class folders, or an image dataset saved by `datasets`."""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class ImageSource:
    """Pictures by index, with a label and a name each, in an order that depends on the names alone.

    `labels` is int64 [len]; `class_ids` are the keys of the classes on disk (folder names, wnids), by label; `class_names`
    are the names for people.
    """

    labels: np.ndarray
    class_ids: tuple[str, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The name of a picture, the same on every machine."""
        raise NotImplementedError

    def load(self, index: int) -> Image.Image:
        """The decoded picture. Raises OSError, naming the picture, where it cannot be read, for whatever reason."""
        try:
            image = Image.open(self._open(index))
            image.load()
        except MemoryError:
            raise
        # Pillow's decoders raise whatever damaged bytes lead them to: struct.error, SyntaxError, KeyError, zlib.error, ...
        except Exception as error:
            raise OSError(f"{self.name(index)}: {error or type(error).__name__}") from error
        return image

    def use_classes(self, ids: Sequence[str], names: Sequence[str]) -> None:
        """Take the labels from a list of classes: a picture's label becomes the place of its class in `ids`.

        Classes of the list without pictures stay empty, so that two folders of one data set agree on what a label is.
        Raises ValueError for a class that is not in the list.
        """
        places = {key: place for place, key in enumerate(ids)}
        unknown = [key for key in self.class_ids if key not in places]
        if unknown:
            raise ValueError(
                f"{len(unknown)} of {len(self.class_ids)} classes are not in the class table ({', '.join(unknown[:3])}, ...): "
                "give the table of this data set, or none"
            )
        self.labels = np.array([places[key] for key in self.class_ids], dtype=np.int64)[self.labels]
        self.class_ids, self.class_names = tuple(ids), tuple(names)

    def fingerprint(self) -> str:
        """The SHA-256 over all classes, names and labels; contents of the pictures are not read."""
        digest = hashlib.sha256()
        for text in self.class_ids:
            digest.update(f"{text}\0".encode("utf-8", "backslashreplace"))
        for index in range(len(self)):
            digest.update(f"{self.name(index)}\0{self.labels[index]}\n".encode())
        return digest.hexdigest()

    def _open(self, index: int):
        raise NotImplementedError


class ImageFolder(ImageSource):
    """root/CLASS/**/PICTURE: one label a class folder; or pictures in `root` itself, which are then one class.

    Class folders are sorted as text (wnids), or as numbers where all of them are numbers, so that 10 comes after 9. Hidden
    files and files without a picture's suffix are left out; links are followed.
    Raises FileNotFoundError if there is no folder, ValueError for a class folder without pictures, for pictures beside class
    folders, and for numeric folders of the same number ("1" and "01").
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root} is no folder: give the folder that holds one folder a class")
        with os.scandir(self.root) as entries:
            entries = [entry for entry in entries if not entry.name.startswith(".")]
        folders = sort_class_names([entry.name for entry in entries if entry.is_dir()])
        loose = sorted(entry.name for entry in entries if entry.is_file() and _is_picture(entry.name))
        if folders and loose:
            raise ValueError(f"{self.root} holds class folders and pictures ({loose[0]}): move the pictures into a class folder")
        if not folders and not loose:
            raise ValueError(f"{self.root} holds no class folders and no pictures ({', '.join(IMAGE_SUFFIXES)})")
        self.class_ids = tuple(folders) if folders else (self.root.resolve().name,)
        self.class_names = self.class_ids
        names, labels = [], []
        for label, folder in enumerate(folders):
            found = list(_pictures_below(self.root / folder, folder))
            if not found:
                raise ValueError(f"{self.root / folder} holds no pictures: remove this class folder or fill it")
            names += found
            labels += [label] * len(found)
        self._names = names if folders else loose
        self.labels = np.array(labels if folders else [0] * len(loose), dtype=np.int64)

    def name(self, index: int) -> str:
        """The path below the root, with forward slashes; bytes that are no UTF-8 are written as escapes."""
        return self._names[index].encode("utf-8", "backslashreplace").decode("utf-8")

    def path(self, index: int) -> Path:
        """The file of a picture."""
        return self.root / self._names[index]

    def _open(self, index: int) -> Path:
        return self.path(index)


class ImageDataset(ImageSource):
    """An image dataset that `datasets` saved to disk: a column of pictures and a column of labels.

    `split` chooses one of a saved DatasetDict. The image column is found by its type; labels are class labels or integers
    from 0. Raises FileNotFoundError if there is no such folder, ValueError for columns that are missing, ambiguous or unfit.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str = "label",
    ):
        import datasets  # brings pandas and more: only for those who have such a dataset

        dataset = datasets.load_from_disk(str(path))
        if isinstance(dataset, datasets.DatasetDict):
            if split not in dataset:
                raise ValueError(f"{path} has the splits {', '.join(dataset)}: choose one with --split, not {split!r}")
            dataset = dataset[split]
        pictures = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if image_column is None and len(pictures) != 1:
            raise ValueError(f"{path} has {len(pictures)} image columns ({', '.join(pictures)}): choose one with --image_column")
        image_column = image_column or pictures[0]
        if image_column not in pictures:
            raise ValueError(f"{path} has no image column {image_column!r}: it has {', '.join(pictures) or 'none'}")
        if label_column not in dataset.features:
            raise ValueError(f"{path} has no column {label_column!r}: choose one of {', '.join(dataset.features)} as label")
        feature = dataset.features[label_column]
        if getattr(feature, "dtype", None) not in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"):
            raise ValueError(f"column {label_column!r} of {path} is {feature}: wanted class labels or integers")
        self.labels = np.asarray(dataset.with_format("numpy")[label_column][:], dtype=np.int64)
        self._check_labels(path, label_column)
        named = isinstance(feature, datasets.ClassLabel) and feature.names
        self.class_names = tuple(feature.names if named else map(str, range(int(self.labels.max()) + 1)))
        if self.labels.max() >= len(self.class_names):
            raise ValueError(f"labels of {path} reach {self.labels.max()}, but there are {len(self.class_names)} class names")
        self.class_ids = self.class_names
        self._image_column = image_column
        # Undecoded: threads decode, and damaged pictures are met one at a time.
        self._rows = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))

    def name(self, index: int) -> str:
        """The row's number: saved datasets keep no file names that could be relied on."""
        return f"row {index}"

    def _open(self, index: int):
        cell = self._rows[index][self._image_column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("no picture in this row")
        return io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]

    def _check_labels(self, path, label_column: str) -> None:
        if not len(self.labels):
            raise ValueError(f"{path} has no rows")
        if self.labels.min() < 0:
            row = int(np.flatnonzero(self.labels < 0)[0])
            raise ValueError(f"column {label_column!r} of {path} is {self.labels[row]} in row {row}: remove unlabelled rows")


def open_image_source(
    path: str | os.PathLike,
    *,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
) -> ImageSource:
    """Open `path`: a dataset saved by `datasets`, or else a folder of class folders. Raises as these two do."""
    path = Path(path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return ImageDataset(path, split=split, image_column=image_column, label_column=label_column)
    if split is not None or image_column is not None:
        raise ValueError(f"{path} is a folder of pictures: a split or an image column is for datasets saved by `datasets`")
    return ImageFolder(path)


def sort_class_names(names: Sequence[str]) -> list[str]:
    """Names in label order: as numbers where all are numbers, else as text.

    Raises ValueError for two spellings of one number.
    """
    if not names or not all(re.fullmatch(r"[0-9]+", name) for name in names):
        return sorted(names)
    numbers = {}
    for name in sorted(names):
        if int(name) in numbers:
            raise ValueError(f"class folders {numbers[int(name)]!r} and {name!r} are the same number: merge or rename them")
        numbers[int(name)] = name
    return [numbers[number] for number in sorted(numbers)]


def _pictures_below(folder: Path, prefix: str) -> Iterator[str]:
    """Paths of all pictures below a class folder, in the order of their names."""
    with os.scandir(folder) as entries:
        entries = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        name = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _pictures_below(folder / entry.name, name)
        elif _is_picture(entry.name) and entry.is_file():
            yield name


def _is_picture(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)
