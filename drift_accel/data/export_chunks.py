"""One chunk of an export: pictures read and cropped by threads, encoded in batches of one shape, written as a table."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from drift_accel.data.cache_writing import record_batch, write_shard
from drift_accel.data.crops import ImageCrop
from drift_accel.data.image_sources import ImageSource
from drift_accel.data.row_encoders import RowEncoder, Rows
from drift_accel.foundation.storage import atomic_write_json

ROWS_NAME, FACTS_NAME = "rows.arrow", "facts.json"
BATCHES_AHEAD = 3
NAMES_SHOWN = 20


class ChunkWriter:
    """Makes the rows of items, an item being picture * views + view, and counts the pictures that cannot be read.

    `max_bad`: so many of them are left out; with one more, `write` raises.
    """

    def __init__(
        self,
        source: ImageSource,
        encoder: RowEncoder,
        crop: ImageCrop,
        schema: pa.Schema,
        *,
        views: int,
        batch_size: int,
        max_bad: int,
    ):
        self.source, self.encoder, self.crop, self.schema = source, encoder, crop, schema
        self.views, self.batch_size, self.max_bad = views, batch_size, max_bad
        self._bad: list[str] = []

    def load(self, item: int) -> np.ndarray | Exception:
        """The pixels of an item, uint8 [S, S, 3], or the reason why they cannot be had, which names the picture."""
        image_index, view = divmod(item, self.views)
        try:
            return self.crop(self.source.load(image_index), image_index, view)
        except OSError as error:
            return error
        except ValueError as error:
            return ValueError(f"{self.source.name(image_index)}: {error}")

    def write(self, items: np.ndarray, folder: Path, advance: Callable[[int], None], pool: Executor) -> None:
        """Write the rows of `items` [n] and their facts into `folder`.

        Raises ValueError for too many unreadable pictures, all of them named, and for rows that are not finite.
        """
        pictures = _map_ahead(pool, self.load, items.tolist(), BATCHES_AHEAD * self.batch_size)
        parts, kept, bad = [], [], []
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            # One shape always, because rounding depends on it; places of unreadable pictures stay black and are dropped.
            pixels = np.zeros((self.batch_size, self.crop.size, self.crop.size, 3), dtype=np.uint8)
            good = []
            for place, picture in enumerate(islice(pictures, len(batch))):
                if isinstance(picture, np.ndarray):
                    pixels[place] = picture
                    good.append(place)
                else:
                    bad.append(str(picture))
            images, views = np.divmod(batch, self.views)
            rows = self.encoder.encode(pixels, images.tolist(), views.tolist())
            parts.append({name: _take(values, good) for name, values in rows.items()})
            kept.append(batch[good])
            advance(len(batch))
        self._bad += bad
        refuse_unreadable(self._bad, self.max_bad)
        images, views = np.divmod(np.concatenate(kept), self.views)
        rows = {name: _concatenate([part[name] for part in parts]) for name in parts[0]}
        self._refuse_not_finite(rows, images)
        names = [self.source.name(int(image)) for image in images]
        table = record_batch(self.schema, rows, self.source.labels[images], names, images, views)
        write_shard(folder / ROWS_NAME, self.schema, [table])
        atomic_write_json(folder / FACTS_NAME, {"rows": len(images), "left_out": bad})

    def _refuse_not_finite(self, rows: Rows, images: np.ndarray) -> None:
        for name, values in rows.items():
            if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
                continue
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if not finite.all():
                picture = self.source.name(int(images[np.flatnonzero(~finite)[0]]))
                raise ValueError(
                    f"{picture}: its {name} is not finite in float16. Encode with --dtype float32; if it still is not, the VAE's "
                    "weights are damaged or its scale is far too large"
                )


def refuse_unreadable(names: Sequence[str], max_bad: int) -> None:
    """Raise ValueError listing `names` if there are more than `max_bad`."""
    if len(names) > max_bad:
        shown = "\n  ".join(names[:NAMES_SHOWN])
        more = f"\n  and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        raise ValueError(
            f"{len(names)} pictures cannot be read, max_bad allows {max_bad}:\n  {shown}{more}\n"
            "Repair them, or leave them out with --max_bad N, and run the same command again; without them it is "
            "other work, which begins anew"
        )


def _map_ahead(pool: Executor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Iterator[Any]:
    """`function` of each item in order, with at most `ahead` of them computed before they are asked for."""
    items = iter(items)
    waiting = deque(pool.submit(function, item) for item in islice(items, ahead))
    try:
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result
    finally:
        for future in waiting:
            future.cancel()


def _take(values: np.ndarray | list[bytes], places: list[int]) -> np.ndarray | list[bytes]:
    return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]


def _concatenate(parts: list) -> np.ndarray | list[bytes]:
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else [row for part in parts for row in part]
