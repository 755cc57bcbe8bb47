"""Samples as files that other programs take: class folders of PNGs, a `datasets` folder, the `.npz` of the ADM suite."""

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from drift_accel.data.class_table import ClassTable
from drift_accel.foundation.storage import atomic_write_json, committed_folder
from drift_accel.sampling.class_choice import folder_names
from drift_accel.sampling.quantization import to_rgb
from drift_accel.sampling.sample_store import PIXELS, SampleStore

RECORD_NAME = "samples.json"
PNG_THREADS = 4


def write_image_folder(
    store: SampleStore, table: ClassTable, output: str | os.PathLike, record: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Write OUTPUT/CLASS/000123.png, the name being the sample's index, and the record as OUTPUT/samples.json.

    Class folders are named by wnid, or by zero-padded labels where keys would not sort like labels; the folder appears complete
    or not at all. Raises FileExistsError unless `replace`.
    """
    names, labels = folder_names(table), store.pictures.labels
    digits = max(6, len(str(len(labels) - 1)))
    with committed_folder(output, replace=replace) as folder:
        for label in sorted(set(labels.tolist())):
            (folder / names[label]).mkdir()

        def write(index: int, pixels: np.ndarray) -> None:
            _picture(pixels).save(folder / names[labels[index]] / f"{index:0{digits}d}.png")

        with ThreadPoolExecutor(PNG_THREADS) as pool:
            for indices, chunk in _numbered(store):
                list(pool.map(write, indices, chunk))
        atomic_write_json(folder / RECORD_NAME, record)


def write_npz(store: SampleStore, output: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Write an uncompressed `.npz`: arr_0 uint8 [N, H, W, 3], arr_1 the labels int64 [N], record as JSON text.

    Streamed: memory holds one chunk. The file appears complete or not at all; an existing one is replaced.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shape = (len(store.pictures), *to_rgb(next(store.arrays(PIXELS))).shape[1:])
    try:
        with open(temporary, "wb") as raw:
            with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_2_0(member, header)
                    for chunk in store.arrays(PIXELS):
                        member.write(to_rgb(chunk).tobytes())
                for name, array in (("arr_1", store.pictures.labels), ("record", np.array(json.dumps(record)))):
                    with archive.open(f"{name}.npy", "w") as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)


def write_dataset(
    store: SampleStore, table: ClassTable, output: str | os.PathLike, record: Mapping[str, Any], *, replace: bool = False
) -> None:
    """Write a folder for `datasets.load_from_disk`: image (PNG), label (ClassLabel), index; the record beside it.

    It appears complete or not at all. Raises FileExistsError unless `replace`.
    """
    import datasets  # brings pandas and more: only for those who want this format
    from datasets.arrow_writer import ArrowWriter

    # Names of people are not unique (two ImageNet classes are cranes), keys are.
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(table.wnids)), "index": datasets.Value("int64")}
    )
    labels = store.pictures.labels
    with committed_folder(output, replace=replace) as folder:
        scratch = store.folder / "scratch.arrow"  # `datasets` refuses to save into the folder it reads from
        with ArrowWriter(features=features, path=str(scratch)) as writer, ThreadPoolExecutor(PNG_THREADS) as pool:
            for indices, chunk in _numbered(store):
                for index, content in zip(indices, pool.map(_png, chunk), strict=True):
                    row = {"image": {"bytes": content, "path": None}, "label": int(labels[index]), "index": index}
                    writer.write(row)
            writer.finalize()
        datasets.Dataset.from_file(str(scratch)).save_to_disk(folder)
        scratch.unlink()
        atomic_write_json(folder / RECORD_NAME, record)


def _numbered(store: SampleStore) -> Iterator[tuple[range, np.ndarray]]:
    """Each chunk's pictures with their indices."""
    start = 0
    for chunk in store.arrays(PIXELS):
        yield range(start, start + len(chunk)), chunk
        start += len(chunk)


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    _picture(pixels).save(content, format="PNG")
    return content.getvalue()
