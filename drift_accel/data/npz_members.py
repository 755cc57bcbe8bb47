"""Arrays inside `.npz` files without reading the whole file into memory."""

import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np


def mapped_member(path: Path, name: str) -> np.ndarray | None:
    """An array of an uncompressed `.npz` as a memory map; None where it is compressed or not there."""
    with zipfile.ZipFile(path) as archive:
        if name not in archive.namelist() or archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            return None
        with archive.open(name) as member:
            shape, fortran, dtype = _read_header(member)
            header_bytes = member.tell()
        info = archive.getinfo(name)
    if fortran or dtype.hasobject:
        return None
    with open(path, "rb") as file:  # the member's data begins behind its local header, whose length is in it
        file.seek(info.header_offset)
        local = file.read(30)
    start = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return np.memmap(path, dtype=dtype, mode="r", offset=start + header_bytes, shape=shape)


def unpacked_member(path: Path, name: str, folder: Path | None = None) -> np.ndarray:
    """An array of a compressed `.npz` as a memory map of a nameless temporary file, which goes with the array.

    `folder`: where that file lies; None: the system's folder for such files. Raises KeyError where there is no such array,
    ValueError for one that cannot be mapped (objects, columns first).
    """
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        shape, fortran, dtype = _read_header(member)
        if fortran or dtype.hasobject:
            raise ValueError(f"{name} of {path} is no plain array in row order")
        with tempfile.TemporaryFile(dir=folder) as file:
            shutil.copyfileobj(member, file, 1 << 20)
            file.flush()
            return np.memmap(file, dtype=dtype, mode="r", shape=shape)


def member_layout(path: Path, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, dtype) of an array of an `.npz`, from its head alone. Raises KeyError where there is no such array."""
    with zipfile.ZipFile(path) as archive, archive.open(name) as member:
        shape, _, dtype = _read_header(member)
    return shape, dtype


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)
