"""foundation.storage: whole or absent whenever the writer is killed; damage is found and named."""

import errno
import hashlib
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from enum import Enum
from pathlib import Path

import numpy
import pytest
import torch

from drift_accel.foundation import storage

REPOSITORY = Path(__file__).resolve().parent.parent
FILES = {"weights.bin": bytes(range(256)) * 40, "state/counter.txt": b"12", "empty": b""}


def write_files(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def committed(tmp_path):
    with storage.committed_folder(tmp_path / "final") as folder:
        write_files(folder)
    return tmp_path / "final"


def hidden_names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def dead_name(name: str, kind: str = "partial") -> str:
    process = subprocess.Popen(["true"])
    process.wait()
    return f".{name}.{kind}-{process.pid}-{socket.gethostname()}"


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "zweite Fassung: ä\n"):
        storage.atomic_write_text(path, text)
        assert path.read_text("utf-8") == text
    storage.atomic_write_bytes(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert os.listdir(path.parent) == ["file.txt"]
    assert storage.sha256_file(path) == hashlib.sha256(b"\0\1").hexdigest()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    storage.atomic_write_text(path, "old")

    def full_disk(_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        storage.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_json_is_strict_and_keeps_numbers(tmp_path):
    class Colour(str, Enum):
        RED = "red"

    value = {
        "z": numpy.float32(0.5),
        "a": (1, numpy.int64(2)),
        "nan": math.nan,
        "deep": [{"inf": -math.inf}],
        "path": Path("a/b"),
        "flag": numpy.bool_(True),
        "colour": Colour.RED,
        "none": None,
        "text": "ä",
    }
    storage.atomic_write_json(tmp_path / "value.json", value)
    text = (tmp_path / "value.json").read_text("utf-8")

    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "z": 0.5,
        "a": [1, 2],
        "nan": None,
        "deep": [{"inf": None}],
        "path": "a/b",
        "flag": True,
        "colour": "red",
        "none": None,
        "text": "ä",
    }
    assert list(json.loads(text)) == list(value)
    assert math.isnan(storage.plain_value(math.nan))


@pytest.mark.parametrize(
    ("value", "place"),
    [({"a": {"b": [0, object()]}}, r"value\.a\.b\[1\]"), ({"a": torch.zeros(())}, r"value\.a"), ({1: 2}, "key")],
)
def test_json_refuses_what_is_no_plain_value(value, place):
    with pytest.raises(TypeError, match=place):
        storage.json_text(value)


def test_free_space(tmp_path):
    storage.require_free_space(tmp_path / "not" / "yet", 1, "a checkpoint")
    with pytest.raises(OSError, match=r"a checkpoint needs 1000000000\.000 GB .* but only .* GB are free") as caught:
        storage.require_free_space(tmp_path / "not" / "yet", 10**18, "a checkpoint")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "not").exists()


def test_a_committed_folder_lists_its_files(committed):
    assert storage.verify_folder(committed) == []
    listing = json.loads((committed / "COMPLETE.json").read_text())["files"]
    assert listing.keys() == FILES.keys()
    for name, content in FILES.items():
        assert listing[name] == {"bytes": len(content), "sha256": storage.sha256_file(committed / name)}
        assert (committed / name).read_bytes() == content
    assert hidden_names(committed.parent) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), storage.committed_folder(tmp_path / "final") as folder:
        write_files(folder)
        raise error
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_refused_or_replaced(committed):
    with pytest.raises(FileExistsError, match="final"), storage.committed_folder(committed):
        pass
    assert storage.verify_folder(committed) == []
    with storage.committed_folder(committed, replace=True) as folder:
        (folder / "other").write_text("other")
        assert (committed / "weights.bin").exists()
    assert sorted(os.listdir(committed)) == ["COMPLETE.json", "other"]
    assert hidden_names(committed.parent) == []


def test_links_and_a_foreign_listing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="symbolic link"), storage.committed_folder(tmp_path / "final") as folder:
        (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="COMPLETE.json"), storage.committed_folder(tmp_path / "final") as folder:
        (folder / "COMPLETE.json").write_text("{}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["weights.bin", "state/counter.txt"])
def test_one_flipped_byte_is_found_and_named(committed, name):
    content = bytearray((committed / name).read_bytes())
    for place in {0, len(content) // 2, len(content) - 1}:
        flipped = content.copy()
        flipped[place] ^= 1
        (committed / name).write_bytes(flipped)
        (problem,) = storage.verify_folder(committed)
        assert str(committed / name) in problem and "content changed" in problem
        assert storage.verify_folder(committed, full=False) == []
    (committed / name).write_bytes(content)
    assert storage.verify_folder(committed) == []


@pytest.mark.parametrize("full", [True, False])
def test_missing_and_cut_files_are_named(committed, full):
    (committed / "weights.bin").write_bytes(b"short")
    (committed / "state" / "counter.txt").unlink()
    (cut,) = [line for line in storage.verify_folder(committed, full) if "weights.bin" in line]
    (missing,) = [line for line in storage.verify_folder(committed, full) if "counter.txt" in line]
    assert "weights.bin: has 5 bytes instead of 10240" in cut
    assert "counter.txt: is missing" in missing


def test_a_missing_or_broken_listing_is_a_problem(committed, tmp_path):
    assert "never completed" in storage.verify_folder(tmp_path / "nowhere")[0]
    listing = committed / "COMPLETE.json"
    entry = {"bytes": 0, "sha256": ""}
    for text in (
        "{",
        "[]",
        "{}",
        '{"format": 1, "files": []}',
        '{"format": 2, "files": {}}',
        "\xff",
        json.dumps({"format": 1, "files": {"../outside": entry}}),
        json.dumps({"format": 1, "files": {"/etc/hostname": entry}}),
        json.dumps({"format": 1, "files": {"empty": entry, "a\0b": entry}}),
        json.dumps({"format": 1, "files": {"empty": {"bytes": 0}}}),
    ):
        listing.write_bytes(text.encode("latin-1"))
        assert storage.verify_folder(committed), text
    listing.unlink()
    assert "COMPLETE.json is missing" in storage.verify_folder(committed)[0]


def test_a_removed_folder_loses_its_name_first(committed, monkeypatch):
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(OSError("stopped here")))
    with pytest.raises(OSError, match="stopped here"):
        storage.remove_folder(committed)
    assert not committed.exists()
    assert ".final.trash-" in hidden_names(committed.parent)[0]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        storage.remove_folder(committed)


def test_leftovers_are_cleaned_and_living_writers_are_not(committed):
    parent = committed.parent
    (parent / dead_name("unfinished")).mkdir()
    (parent / dead_name("settings.yaml")).write_text("half")
    (parent / dead_name("old", "trash")).mkdir()
    shutil.copytree(committed, parent / dead_name("whole"))
    shutil.copytree(committed, parent / dead_name("final"))
    (parent / f".elsewhere.partial-{os.getppid()}-another-machine").mkdir()
    # An earlier process with this process's number, as in a restarted container.
    (parent / f".mine.partial-{os.getpid()}-{socket.gethostname()}").mkdir()
    alive = f".alive.partial-{os.getppid()}-{socket.gethostname()}"
    (parent / alive).mkdir()
    (parent / ".gitignore").write_text("")
    with storage.committed_folder(parent / "open") as folder:
        assert len(storage.remove_partial_folders(parent)) == 7
        assert sorted(hidden_names(parent)) == sorted([alive, ".gitignore", folder.name])
    assert [storage.verify_folder(parent / name) for name in ("open", "whole", "final")] == [[], [], []]
    assert storage.remove_partial_folders(parent / "nowhere") == []


# Kills

KILLED_AT_EVERY_CALL = """
import os, signal, sys
from pathlib import Path
from drift_accel.foundation import storage
root, files = Path(sys.argv[1]), 3
def write(final, content, replace):
    with storage.committed_folder(final, replace=replace) as folder:
        for number in range(files):
            (folder / f"{number}.bin").write_bytes(content * 1000)
def child(case, place, after):
    calls = 0
    def counted(function):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == place and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments)
            if calls == place:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return wrapped
    final = root / f"{case}_{place}_{after}" / "final"
    if case != "new":
        write(final, b"a", False)
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    if case == "removed":
        storage.remove_folder(final)
    else:
        write(final, b"b", case == "replaced")
    os._exit(0)
for case in ("new", "replaced", "removed"):
    for after in (False, True):
        place, killed = 1, True
        while killed:
            process = os.fork()
            if process == 0:
                child(case, place, after)
            killed = os.WIFSIGNALED(os.waitpid(process, 0)[1])
            place += 1
print("done")
"""


def check_content(folder: Path, letters: bytes) -> None:
    assert storage.verify_folder(folder) == []
    contents = {(folder / f"{number}.bin").read_bytes() for number in range(3)}
    assert len(contents) == 1 and contents <= {bytes([letter]) * 1000 for letter in letters}


def test_killed_at_every_system_call(tmp_path):
    root = tmp_path / "root"
    result = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_CALL, root],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=120,
    )
    assert result.stdout == "done\n", result.stderr
    folders = sorted(root.iterdir())
    assert len(folders) > 30
    for folder in folders:
        case = folder.name.split("_")[0]
        letters = {"new": b"b", "replaced": b"ab", "removed": b"a"}[case]
        if (folder / "final").exists():
            check_content(folder / "final", letters)
        storage.remove_partial_folders(folder)
        assert hidden_names(folder) == []
        if (folder / "final").exists():
            check_content(folder / "final", letters)
        else:
            assert case != "replaced", "a kill lost both the old and the new folder"


def test_killed_at_random_instants(tmp_path):
    script = textwrap.dedent("""
        import itertools, sys
        from pathlib import Path
        from drift_accel.foundation.storage import committed_folder
        print("started", flush=True)
        for turn in itertools.count():
            with committed_folder(Path(sys.argv[1]) / f"final_{turn % 4}", replace=True) as folder:
                for number in range(3):
                    (folder / f"{number}.bin").write_bytes(bytes([turn % 256]) * 1000)
    """)
    chance = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", script, tmp_path],
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        process.stdout.readline()
        time.sleep(chance.uniform(0.005, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for _ in range(2):
            for folder in tmp_path.iterdir():
                if not folder.name.startswith("."):
                    check_content(folder, bytes(range(256)))
            storage.remove_partial_folders(tmp_path)
        assert hidden_names(tmp_path) == []
