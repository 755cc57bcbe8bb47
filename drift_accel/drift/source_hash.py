"""The hash by which a compiled drift op knows its sources. setup.py runs this file by its path: nothing of the package here."""

import hashlib
from pathlib import Path

SUFFIXES = (".h", ".cuh", ".cpp", ".cu")


def hash_sources(folder: str | Path, *, cuda: bool) -> str:
    """16 hex digits of the SHA-256 of every source file under `folder` (csrc) by name; `cuda` False leaves out its cuda/."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        name = path.relative_to(folder).as_posix()
        if cuda or not name.startswith("cuda/"):
            digest.update(f"{name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
