"""Files and folders that are whole or absent, whatever kills the writer.

A file is written beside its place and renamed over it. A folder is written under a hidden name, every file in it is
flushed to the disk and hashed, the list goes into COMPLETE.json, and only then the folder takes its name. A folder is
removed by first losing its name. Hidden names end in `.partial-<pid>-<host>` or `.trash-<pid>-<host>`.
"""

import contextlib
import errno
import hashlib
import json
import math
import numbers
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy

COMPLETE_NAME = "COMPLETE.json"
_FORMAT = 1
_HIDDEN_NAME = re.compile(r"^\.(?P<name>.+)\.(?P<kind>partial|trash)-(?P<pid>\d+)-(?P<host>.+)$", re.DOTALL)
_HASHING_THREADS = 4
# Hidden paths that this very process is writing: its own process number alone cannot tell them from the leftovers of an
# earlier process that had the same number, which is the rule in containers.
_being_written: set[str] = set()


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Replace the file at `path` by `data` so that a reader sees the old content or the new one, never a part.

    Missing parent folders are made. The content is on the disk when this returns. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(path, "partial")
    _being_written.add(str(temporary))
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        _being_written.discard(str(temporary))
    _flush_to_disk(path.parent)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """`atomic_write_bytes` of the text in UTF-8, line ends as they are. Raises OSError."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike, value: Any) -> None:
    """`atomic_write_text` of `json_text(value, indent=2)`. Raises OSError, and TypeError as `json_text` does."""
    atomic_write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Any, indent: int | None = None) -> str:
    """`value` as strict JSON, keys in the order given.

    NaN and infinities become null: JSON has no word for them, and a file that only Python can read helps nobody.
    Takes what `plain_value` takes and raises TypeError as it does.
    """
    return json.dumps(_without_non_finite(plain_value(value)), indent=indent, ensure_ascii=False, allow_nan=False)


def plain_value(value: Any, name: str = "value") -> Any:
    """`value` made of dict, list, str, int, float, bool and None only: tuples become lists, paths strings.

    numpy scalars become Python numbers. A tensor is refused, because reading it would wait for its device unseen.
    Raises TypeError naming the place (`name`, dotted) of anything else.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain_value(value.value, name)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, numpy.bool_):
        return bool(value)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name}: a key must be a string, got {key!r}")
        return {str(key): plain_value(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item, f"{name}[{place}]") for place, item in enumerate(value)]
    raise TypeError(f"{name}: a {type(value).__name__} cannot be written as text; give numbers or strings")


def sha256_file(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def require_free_space(path: str | os.PathLike, num_bytes: int, purpose: str) -> None:
    """Raise OSError (ENOSPC) unless the disk that holds `path` has `num_bytes` free for `purpose`.

    `path` may not exist yet: its nearest existing parent is asked.
    """
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"{purpose} needs {num_bytes / 1e9:.3f} GB at {path}, but only {free / 1e9:.3f} GB are free there; "
            "free some space or choose a folder on another disk",
        )


@contextlib.contextmanager
def committed_folder(final_path: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """Write a folder that appears at `final_path` complete or not at all.

    Yields a hidden sibling folder to write into. On a clean exit every file is flushed to the disk and hashed,
    COMPLETE.json lists {"files": {relative path: {"bytes", "sha256"}}}, and the folder is renamed; on an error it is
    removed. With `replace` an existing folder is exchanged at the very end: killed between the two renames, the new
    folder gets its name at the next `remove_partial_folders`.
    Raises FileExistsError if `final_path` exists and `replace` is False, ValueError for symbolic links in the folder
    (what they point to would not be covered) and for a file called COMPLETE.json, OSError.
    """
    final_path = Path(final_path)
    if final_path.exists() and not replace:
        raise FileExistsError(f"{final_path} exists already; remove it first, or ask for it to be replaced")
    final_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(final_path, "partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    _being_written.add(str(temporary))
    try:
        temporary.mkdir()
        yield temporary
        _complete_folder(temporary)
        if final_path.exists() and replace:
            old = _move_to_trash(final_path)
            os.rename(temporary, final_path)
            _flush_to_disk(final_path.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, final_path)
            _flush_to_disk(final_path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _being_written.discard(str(temporary))


def verify_folder(folder: str | os.PathLike, full: bool = True) -> list[str]:
    """What is wrong with a committed folder, one line a problem that names the file; an empty list if nothing is.

    Compares each file that COMPLETE.json lists with its size and, if `full`, its SHA-256 (reads everything).
    Files that it does not list are ignored. Never raises for a damaged folder.
    """
    folder = Path(folder)
    try:
        listing = json.loads((folder / COMPLETE_NAME).read_bytes())
    except FileNotFoundError:
        return [f"{folder}: {COMPLETE_NAME} is missing, so the folder was never completed"]
    except (OSError, ValueError) as error:
        return [f"{folder / COMPLETE_NAME}: cannot be read ({error})"]
    files = listing.get("files") if isinstance(listing, dict) else None
    if not isinstance(files, dict) or listing.get("format") != _FORMAT:
        return [f"{folder / COMPLETE_NAME}: is not a list of files in format {_FORMAT}"]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        problems = pool.map(lambda item: _file_problem(folder, item[0], item[1], full), sorted(files.items()))
        return [problem for problem in problems if problem is not None]


def remove_folder(path: str | os.PathLike) -> None:
    """Delete a folder; it loses its name first, so that a half-deleted one is never taken for complete.

    Raises FileNotFoundError if there is none, OSError.
    """
    shutil.rmtree(_move_to_trash(Path(path)))


def remove_partial_folders(parent: str | os.PathLike) -> list[str]:
    """Clean up in `parent` what killed writers left: hidden files and folders of this module; returns their names.

    A hidden folder that was already complete and whose name is free is not removed but gets its name. What a living
    process of this machine is writing stays. Writers on other machines cannot be seen: call this where there are none,
    at the start of a run on its main process. A missing `parent` is no error.
    """
    parent = Path(parent)
    cleaned = []
    for entry in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = _HIDDEN_NAME.match(entry.name)
        if match is None or _writer_is_alive(entry, int(match["pid"]), match["host"]):
            continue
        final_path = parent / match["name"]
        if match["kind"] == "partial" and entry.is_dir() and not final_path.exists() and not verify_folder(entry):
            os.rename(entry, final_path)
            _flush_to_disk(parent)
        elif entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
        cleaned.append(entry.name)
    return cleaned


def is_partial_name(name: str) -> bool:
    """Whether a file or folder name is one of this module's hidden names."""
    return _HIDDEN_NAME.match(name) is not None


def _complete_folder(folder: Path) -> None:
    files = []
    for entry in sorted(folder.rglob("*")):
        if entry.is_symlink():
            raise ValueError(f"{entry} is a symbolic link; copy what it points to")
        if entry.is_file():
            files.append(entry)
    names = [file.relative_to(folder).as_posix() for file in files]
    if COMPLETE_NAME in names:
        raise ValueError(f"{COMPLETE_NAME} is written by committed_folder itself; give that file another name")
    for entry in (*files, *(entry for entry in folder.rglob("*") if entry.is_dir())):
        _flush_to_disk(entry)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = list(pool.map(sha256_file, files))
    listing = {
        name: {"bytes": file.stat().st_size, "sha256": sha256} for name, file, sha256 in zip(names, files, hashes, strict=True)
    }
    # Also flushes the folder itself, and with it the names of its files.
    atomic_write_json(folder / COMPLETE_NAME, {"format": _FORMAT, "files": listing})


def _file_problem(folder: Path, name: str, expected: Any, full: bool) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return f"{folder / COMPLETE_NAME}: lists {name!r}, which is outside of the folder"
    path = folder / relative
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
        return f"{folder / COMPLETE_NAME}: gives no size and sha256 for {name!r}"
    try:
        if not path.is_file():
            return f"{path}: is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path}: has {size} bytes instead of {expected['bytes']}"
        if full and sha256_file(path) != expected["sha256"]:
            return f"{path}: content changed (its sha256 is not the one in {COMPLETE_NAME})"
    except (OSError, ValueError) as error:
        return f"{path}: cannot be read ({error})"
    return None


def _hidden_sibling(path: Path, kind: str) -> Path:
    path = path.absolute()
    return path.parent / f".{path.name}.{kind}-{os.getpid()}-{socket.gethostname()}"


def _move_to_trash(path: Path) -> Path:
    trash = _hidden_sibling(path, "trash")
    if trash.exists():
        shutil.rmtree(trash)
    os.rename(path, trash)
    _flush_to_disk(path.parent)
    return trash


def _writer_is_alive(path: Path, pid: int, host: str) -> bool:
    if host != socket.gethostname():
        return False
    if pid == os.getpid():
        return str(path.absolute()) in _being_written
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _without_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
