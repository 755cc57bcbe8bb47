"""Pictures that exist already: folders, `datasets` folders, `.npz` files, latent caches, the bundled digits."""

import hashlib
import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from drift_accel.data.cache_format import MANIFEST_NAME, PIXELS
from drift_accel.data.crops import ImageCrop
from drift_accel.data.digits import load_digits
from drift_accel.data.image_sources import ImageSource, open_image_source
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.npz_members import mapped_member
from drift_accel.foundation.chunks import Chunks, ChunkStore
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import sha256_file
from drift_accel.sampling.pictures import PictureBatch, Pictures
from drift_accel.sampling.quantization import count_non_finite, to_uint8
from drift_accel.sampling.sample_store import PIXELS as STORED_PIXELS
from drift_accel.sampling.sample_store import SETTINGS_NAME
from drift_accel.sampling.sampler import CHUNK

READING_THREADS = 8
DIGITS = "digits"  # a source that is a name, not a path: the test split; "digits:train" is the other one
# What an .npz of tools/sample.py says of its pictures, and a result must not lose.
_GENERATED_KEYS = ("weights_sha256", "labels_sha256", "guidance_scale", "seed", "vae", "quantizer", "num_non_finite")
ORDER_STREAM, POSTERIOR_STREAM = "evaluation/order", "evaluation/posterior"


def open_pictures(
    path: str | os.PathLike,
    *,
    image_size: int | None = None,
    crop: str = "adm",
    split: str | None = None,
    image_column: str | None = None,
    limit: int | None = None,
) -> Pictures:
    """The pictures at `path`: a folder (class folders or pictures), a dataset saved by `datasets`, an `.npz` with arr_0, a cache.

    "digits" and "digits:train" are scikit-learn's. `image_size` crops pictures of folders and datasets (`crop` as in the
    export); without it all must have one size. `limit` takes so many, chosen by a fixed shuffle, in their order.
    Raises FileNotFoundError, and ValueError for a place without pictures, pictures of unequal size, or a limit that is too high.
    """
    pictures = _open(path, image_size, crop, split, image_column)
    if limit is None:
        return pictures
    if not 1 <= limit <= len(pictures):
        raise ValueError(f"{path} has {len(pictures)} pictures, {limit} were asked for: give a number from 1 to {len(pictures)}")
    return ChosenPictures(pictures, np.sort(random_stream(0, ORDER_STREAM, 0).permutation(len(pictures))[:limit]))


def _open(path, image_size, crop, split, image_column) -> Pictures:
    if str(path) in (DIGITS, f"{DIGITS}:train"):
        kind = "train" if str(path).endswith("train") else "test"
        return RowPictures(load_digits(kind), {"source": f"digits, {kind}"}, latents=False)
    path = Path(path)
    if path.suffix == ".npz" and path.is_file():
        return ArrayPictures(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a folder of pictures, a saved dataset, a cache or an .npz")
    if (path / MANIFEST_NAME).is_file():
        cache = LatentCache(path)
        identity = {
            "source": "cache",
            "header_sha256": cache.manifest.header_sha256,
            "shards": [s.sha256 for s in cache.manifest.shards],
        }
        return RowPictures(cache, identity, latents=cache.header.kind != PIXELS)
    if not path.is_dir():
        raise ValueError(
            f"{path} is neither a folder nor an .npz: give a folder of pictures, a saved dataset, a cache or an .npz"
        )
    if (path / SETTINGS_NAME).is_file() and (path / "chunks").is_dir():
        return ShardPictures(path)
    source = open_image_source(path, split=split, image_column=image_column)
    return FilePictures(source, None if image_size is None else ImageCrop(kind=crop, size=image_size), path)


class FilePictures:
    """Pictures of files or of a saved dataset; cropped, or all of one size as they are."""

    def __init__(self, source: ImageSource, crop: ImageCrop | None, path: Path):
        self._source, self._crop, self._path = source, crop, path
        self.labels = source.labels
        if crop is None:
            self._require_one_size()

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, items: range) -> PictureBatch:
        """The pictures `items`, decoded by threads."""
        with ThreadPoolExecutor(READING_THREADS) as pool:
            return PictureBatch(np.stack(list(pool.map(self._load, items))), None, 0)

    def identity(self) -> dict[str, Any]:
        """Names, labels and the crop; contents are not read."""
        operations = ["as they are, RGB"] if self._crop is None else self._crop.operations()
        return {
            "source": "pictures",
            "num_pictures": len(self),
            "fingerprint": self._source.fingerprint(),
            "pixel_operations": list(operations),
        }

    def _load(self, index: int) -> np.ndarray:
        picture = self._source.load(index)
        if self._crop is not None:
            return self._crop(picture, index)
        return np.asarray(picture.convert("RGB"))

    def _size(self, index: int) -> tuple[int, int]:
        try:
            with Image.open(self._source._open(index)) as picture:  # the header alone
                return picture.size
        except Exception as error:  # Pillow raises whatever damaged bytes lead it to
            raise ValueError(
                f"{self._source.name(index)} of {self._path} cannot be read ({error}): repair or remove it"
            ) from None

    def _require_one_size(self) -> None:
        with ThreadPoolExecutor(READING_THREADS) as pool:
            sizes = list(pool.map(self._size, range(len(self))))
        other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
        if other is not None:
            names = [self._source.name(index) for index in (0, other)]
            raise ValueError(
                f"pictures of {self._path} are of unequal size: {names[0]} is {sizes[0]}, {names[1]} is {sizes[other]} "
                "(width, height); give --image_size to crop all to one"
            )


class ArrayPictures:
    """uint8 arr_0 [N, H, W, 3] of an `.npz`, mapped where it is not compressed; arr_1, where there, are labels.

    `origin` is the model that made them where the file says so, as those of tools/sample.py do; else None.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._array = mapped_member(path, "arr_0.npy")
            with np.load(path, allow_pickle=False) as archive:
                if self._array is None and "arr_0" in archive.files:
                    self._array = archive["arr_0"]
                labels = archive["arr_1"] if "arr_1" in archive.files else None
                record = json.loads(str(archive["record"])) if "record" in archive.files else {}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({error})") from None
        if self._array is None or self._array.ndim != 4 or self._array.dtype != np.uint8 or self._array.shape[3] not in (1, 3):
            found = "none" if self._array is None else f"{self._array.dtype} {list(self._array.shape)}"
            raise ValueError(f"{path} has no pictures: wanted arr_0 uint8 [N, H, W, 3], found {found}")
        fits = labels is not None and labels.shape == self._array.shape[:1] and labels.dtype.kind in "iu"
        self.labels = labels.astype(np.int64) if fits else None
        self.origin: dict[str, Any] | None = record.get("model") if isinstance(record, dict) else None
        self._generated = {key: record[key] for key in _GENERATED_KEYS if key in record} if self.origin else {}

    def __len__(self) -> int:
        return len(self._array)

    def batch(self, items: range) -> PictureBatch:
        """The pictures `items`."""
        return PictureBatch(np.array(self._array[items.start : items.stop]), None, 0)

    def identity(self) -> dict[str, Any]:
        """The file's hash, and how it says that its pictures were generated."""
        return {**self._generated, "source": "npz", "num_pictures": len(self), "sha256": sha256_file(self._path)}


class ShardPictures:
    """The chunks that a generation with kept pictures left: settings.json and chunks/. All must be there."""

    def __init__(self, path: Path):
        self._settings = json.loads((path / SETTINGS_NAME).read_bytes())
        self._count = int(self._settings["pictures"]["num_pictures"])
        self._store = ChunkStore(path / "chunks", Chunks(self._count, CHUNK))
        missing = len(self._store.chunks) - len(self._store.complete())
        if missing:
            raise ValueError(f"{path} lacks {missing} of {len(self._store.chunks)} chunks: let its generation finish first")
        if not self._settings["keep_pixels"]:
            raise ValueError(f"{path} holds features without pictures: generate with kept pictures")
        self.labels = None

    def __len__(self) -> int:
        return self._count

    def batch(self, items: range) -> PictureBatch:
        """The pictures `items`."""
        chunks = range(items.start // CHUNK, -(-items.stop // CHUNK))
        paths = [self._store.path(chunk) / f"{STORED_PIXELS}.npy" for chunk in chunks]
        pixels = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
        start = items.start - chunks.start * CHUNK
        return PictureBatch(pixels[start : start + len(items)], None, 0)

    def identity(self) -> dict[str, Any]:
        """What the generation said of them."""
        return {**self._settings["pictures"], "source": "shards"}


class RowPictures:
    """Rows of a cache or of images in memory: model space as the generator makes it, and pixels where it is pixels."""

    def __init__(self, rows: LatentCache | LabelledImages, identity: dict[str, Any], *, latents: bool):
        self._rows, self._identity, self._latents = rows, identity, latents
        self.labels = np.asarray(rows.labels)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, items: range) -> PictureBatch:
        """The rows `items`; a posterior that is drawn at reading is drawn by the row's number."""
        if self._rows.is_sampled_at_read:
            streams = [random_stream(0, POSTERIOR_STREAM, 0, index) for index in items]
            images = self._rows.rows(np.arange(items.start, items.stop), None, streams)
        else:
            images = self._rows.rows(np.arange(items.start, items.stop))
        images = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
        pixels = None if self._latents else to_uint8(images)
        return PictureBatch(pixels, images.numpy(), count_non_finite(images))

    def identity(self) -> dict[str, Any]:
        """The cache's hashes, or the name of the data set."""
        return {**self._identity, "num_pictures": len(self)}


class ChosenPictures:
    """Some of other pictures, by index."""

    def __init__(self, pictures: Pictures, indices: np.ndarray):
        self._pictures, self._indices = pictures, indices
        self.labels = None if pictures.labels is None else pictures.labels[indices]

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, items: range) -> PictureBatch:
        """The chosen pictures `items`."""
        parts = [self._pictures.batch(range(i, i + 1)) for i in self._indices[items.start : items.stop].tolist()]
        pixels, model_space = (
            None if arrays[0] is None else np.concatenate(arrays) for arrays in zip(*(part[:2] for part in parts), strict=True)
        )
        return PictureBatch(pixels, model_space, sum(part.non_finite for part in parts))

    def identity(self) -> dict[str, Any]:
        """The whole set, and which of it."""
        chosen = hashlib.sha256(self._indices.astype(np.int64).tobytes()).hexdigest()
        return {**self._pictures.identity(), "num_pictures": len(self), "chosen_sha256": chosen}
