"""data.archive_extraction: class folders are whole or absent whatever is killed, and the same command goes on."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from archive_building import WNID_OF, Archives, digest, make_archives, read_tree

from drift_accel.data import archive_extraction, imagenet_archives
from drift_accel.data.imagenet_archives import PrepareConfig, prepare_imagenet


@pytest.fixture
def archives(tmp_path) -> Archives:
    return make_archives(tmp_path)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "output"


def test_what_dead_and_seemingly_living_processes_left_is_redone(archives, output):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid(), 1):
        left = output / "train" / f".n01440764.partial-{pid}-{socket.gethostname()}"
        left.mkdir(parents=True)
        (left / "n01440764_1.JPEG").write_bytes(b"half")
    others = output / f".latents.partial-{os.getpid()}-{socket.gethostname()}"
    others.mkdir()
    prepare_imagenet(archives.config(output))
    assert read_tree(output / "train") == archives.train
    assert others.is_dir(), "the output folder may hold what other commands are writing"


def test_a_finished_split_whose_state_was_not_removed_is_cleaned_up(archives, output, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt  # not sent as a signal: a suite in the background of a shell ignores SIGINT

    monkeypatch.setattr(imagenet_archives, "remove_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_imagenet(archives.config(output))
    monkeypatch.undo()
    assert (output / "in_progress").exists()
    assert prepare_imagenet(archives.config(output))["train"].extracted == 0
    assert not (output / "in_progress").exists()


def test_a_disk_that_fills_up_leaves_no_folder_and_the_command_goes_on(archives, output, monkeypatch):
    def full(folder, pictures):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive_extraction, "_flush", full)
    with pytest.raises(
        OSError, match="train/n01440764 could not be extracted .*free some space, then run the same command again"
    ):
        prepare_imagenet(archives.config(output))
    assert os.listdir(output / "train") == []
    monkeypatch.undo()
    prepare_imagenet(archives.config(output))
    assert read_tree(output / "train") == archives.train


def test_what_the_disk_holds_is_compared_with_the_headers(archives, output, monkeypatch):
    monkeypatch.setattr(archive_extraction, "_copy_picture", lambda archive, picture, folder, job: "")
    with pytest.raises(ValueError, match="'n01440764_1.JPEG' has None bytes on the disk and [0-9]+ in the archive"):
        prepare_imagenet(archives.config(output))
    assert os.listdir(output / "train") == []


@dataclass
class Bulk:
    """Archives that take a moment, what an uninterrupted run makes of them, and how long it extracts (seconds)."""

    archives: Archives
    reference: dict[str, str]
    manifest: bytes
    seconds: dict[int, float]


@pytest.fixture(scope="module")
def bulk(tmp_path_factory) -> Bulk:
    folder = tmp_path_factory.mktemp("bulk")
    draw = random.Random(7)
    pictures = {
        wnid: {f"{wnid}_{k}.JPEG": draw.randbytes(draw.randrange(40_000)) for k in range(150)} for wnid in WNID_OF.values()
    }
    archives = Archives(folder, {}, {})
    archives.write(pictures, [draw.randbytes(draw.randrange(20_000)) for _ in range(200)], seed=1)
    seconds = {}
    for num_workers in (1, 2):
        output = folder / f"output_{num_workers}"
        process, start = start_extraction(archives, output, num_workers)
        process.join()
        assert process.exitcode == 0
        seconds[num_workers] = time.monotonic() - start
        assert read_tree(output / "train") == archives.train
    reference = digest({f"train/{name}": data for name, data in archives.train.items()})
    reference |= digest({f"val/{name}": data for name, data in archives.val.items()})
    return Bulk(archives, reference, (output / "manifest.json").read_bytes(), seconds)


def start_extraction(archives: Archives, output: Path, num_workers: int) -> tuple[multiprocessing.Process, float]:
    """Start the work in a process group of its own and wait for the instant at which it begins to extract."""
    config = archives.config(output, num_workers=num_workers)
    process = multiprocessing.get_context("fork").Process(target=prepare_in_a_group, args=(config,))
    process.start()
    while not (output / "in_progress/val.json").exists() and process.is_alive():
        time.sleep(0.001)
    return process, time.monotonic()


def prepare_in_a_group(config: PrepareConfig) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    prepare_imagenet(config, log=lambda line: None)


def living_members(group: int) -> list[int]:
    """Processes of a group that still run (zombies do not)."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, _, process_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(process_group) == group and state != "Z":
                found.append(int(entry.name))
    return found


def kill(process: multiprocessing.Process, victim: str, draw: random.Random) -> bool:
    """kill -9: the command alone, all of its group, or one worker; False where that was too late."""
    workers = [pid for pid in living_members(process.pid) if pid != process.pid] if victim == "worker" else []
    if process.is_alive() and (workers or victim != "worker"):
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(draw.choice(workers) if workers else process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 20
    while living_members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert living_members(process.pid) == [], f"workers outlived the command ({victim} killed)"
    return process.exitcode != 0


def check_killed_runs(bulk: Bulk, output: Path, draw: random.Random, kills: list[tuple[str, int]]) -> None:
    """Kill the command at random instants, (victim, number of workers) after each other, and let it go on at last."""
    for number, (victim, num_workers) in enumerate(kills, start=1):
        while True:
            process, _ = start_extraction(bulk.archives, output, num_workers)
            time.sleep(draw.uniform(0, bulk.seconds[num_workers] / number))  # a later run has less to do
            if kill(process, victim, draw):
                break
            shutil.rmtree(output)  # it had finished: once more from nothing
        folders = check_nothing_is_half(output, bulk.reference)
        print(f"{victim} killed, {num_workers} workers, exit {process.exitcode}, {folders} of 8 folders")
    prepare_imagenet(bulk.archives.config(output, num_workers=2))
    check_result(output, bulk.reference, bulk.manifest)


def check_nothing_is_half(output: Path, reference: dict[str, str]) -> int:
    """Every visible class folder is whole, and a manifest speaks of whole splits alone; returns the number of folders."""
    visible = {name: value for name, value in digest(read_tree(output)).items() if "/." not in name}
    visible = {name: value for name, value in visible.items() if name.startswith(("train/", "val/"))}
    whole = {folder: names_in(reference, folder) for folder in map(os.path.dirname, visible)}
    assert {folder: names_in(visible, folder) for folder in whole} == whole
    manifest = output / "manifest.json"
    for split in json.loads(manifest.read_text())["splits"] if manifest.exists() else ():
        assert {name for name in visible if name.startswith(split)} == {name for name in reference if name.startswith(split)}
    return len(whole)


def check_result(output: Path, reference: dict[str, str], manifest: bytes) -> None:
    found = read_tree(output)
    assert digest({name: data for name, data in found.items() if "/" in name}) == reference
    assert found["manifest.json"] == manifest
    assert set(json.loads(found["provenance.json"])) == {"train", "val"}
    assert set(os.listdir(output)) == {*(name.partition("/")[0] for name in found), "train", "val"}
    for split in ("train", "val"):
        assert set(os.listdir(output / split)) == set(WNID_OF.values())


def names_in(tree: dict[str, str], folder: str) -> dict[str, str]:
    return {name: value for name, value in tree.items() if os.path.dirname(name) == folder}


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes in /proc")


@needs_proc
@pytest.mark.multiprocess
@pytest.mark.parametrize(("victim", "num_workers"), [("command", 1), ("command", 2), ("worker", 2)])
def test_killed_at_a_random_instant_it_goes_on_to_the_same_result(bulk, tmp_path, victim, num_workers):
    check_killed_runs(bulk, tmp_path / "output", random.Random(f"{victim} {num_workers}"), [(victim, num_workers)])


@needs_proc
@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("num_kills", [1, 2])
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_many_random_instants_it_goes_on_to_the_same_result(bulk, tmp_path, seed, num_kills):
    draw = random.Random(100 * num_kills + seed)
    choices = [("command", 1), ("command", 2), ("group", 1), ("group", 2), ("worker", 2)]
    check_killed_runs(bulk, tmp_path / "output", draw, draw.choices(choices, k=num_kills))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_before_and_after_every_renaming_it_goes_on_to_the_same_result(archives, tmp_path):
    """Renamings are the points at which something becomes visible: here none of them is left to chance."""
    reference_dir = tmp_path / "reference"
    prepare_imagenet(archives.config(reference_dir))
    reference = {name: value for name, value in digest(read_tree(reference_dir)).items() if "/" in name}
    manifest = (reference_dir / "manifest.json").read_bytes()
    for call in range(1000):
        output = tmp_path / f"output_{call}"
        process = multiprocessing.get_context("fork").Process(target=die_at_a_renaming, args=(archives.config(output), call))
        process.start()
        process.join()
        check_nothing_is_half(output, reference)
        prepare_imagenet(archives.config(output))
        check_result(output, reference, manifest)
        if process.exitcode == 0:
            break
        shutil.rmtree(output)
    print(f"killed at {call} places")
    assert call >= 2 * (8 + 8 + 5)  # class folders, their records, table, archives, provenance, manifest


def die_at_a_renaming(config: PrepareConfig, call: int) -> None:
    """Kill this process before (even `call`) or after (odd) its renaming number call // 2."""
    remaining = [call]

    def wrap(rename):
        def renamed(*paths):
            for work in (lambda: None, lambda: rename(*paths)):
                work()
                if remaining[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                remaining[0] -= 1

        return renamed

    os.rename, os.replace = wrap(os.rename), wrap(os.replace)
    prepare_in_a_group(config)


def die(job, output_dir):
    os.kill(os.getpid(), signal.SIGKILL)


@needs_proc
@pytest.mark.multiprocess
def test_a_killed_worker_ends_the_run_with_a_reason(archives, output, monkeypatch):
    monkeypatch.setattr(archive_extraction, "extract_class", die)
    with pytest.raises(OSError, match="a worker process was killed .*the same command again, or with fewer --num_workers"):
        prepare_imagenet(archives.config(output, num_workers=2))
    monkeypatch.undo()
    prepare_imagenet(archives.config(output, num_workers=2))
    assert read_tree(output / "train") == archives.train
