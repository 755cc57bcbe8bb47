"""data.latent_export: the right rows, the same ones however often it was killed and by how many processes it was made."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from small_caches import SCALE, SHIFT, SIZE, write_pictures, write_tiny_vae
from tiny_runs import launch_environment

from drift_accel.data.cache_checks import verify_cache
from drift_accel.data.crops import ImageCrop
from drift_accel.data.image_sources import ImageFolder, ImageSource
from drift_accel.data.latent_cache import LatentCache
from drift_accel.data.latent_export import ExportConfig, Workers, export_cache
from drift_accel.data.row_encoders import PixelEncoder, VaeEncoder, weights_hash
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.foundation.random_streams import random_stream
from drift_accel.foundation.storage import sha256_file
from drift_accel.models.autoencoder import vae_scaling

ROOT = Path(__file__).resolve().parents[1]
SEED = 5
SMALL = {"chunk_size": 4, "batch_size": 3, "shard_bytes": 6000, "num_threads": 2, "seed": SEED}
NUM_PICTURES = 21


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Children are forked, and torch's threads do not survive that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `pictures` and `vae`."""
    place = tmp_path_factory.mktemp("export")
    write_pictures(place / "pictures")
    write_tiny_vae(place / "vae")
    return place


@pytest.fixture(scope="module")
def vae(place):
    return AutoencoderKL.from_pretrained(place / "vae").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def export(place, vae):
    """Export the pictures (or `source`) into a folder."""

    def run(folder: Path, *, source=None, encoder=None, workers=None, log=lambda text: None, encoding=None, **changes) -> Path:
        settings = {**SMALL, "crop": ImageCrop(size=SIZE, seed=SEED), **changes}
        encoder = encoder or VaeEncoder(vae, name=str(place / "vae"), size=SIZE, seed=SEED, **(encoding or {}))
        source = source or ImageFolder(place / "pictures")
        return export_cache(source, encoder, folder, ExportConfig(**settings), workers=workers, log=log)

    return run


@pytest.fixture(scope="module")
def whole(place, export):
    """The uninterrupted export of one process."""
    return export(place / "whole")


def contents(cache: Path) -> dict[str, str]:
    """Hashes of a cache's files, without those that say when and how it was made."""
    names = sorted(path.name for path in cache.iterdir() if path.is_file())
    return {name: sha256_file(cache / name) for name in names if name not in ("provenance.json", "manifest.json")}


def pixels_of(source: ImageFolder, origin, crop: ImageCrop) -> np.ndarray:
    return crop(source.load(origin.image_index), origin.image_index, origin.view)


# The rows.


@pytest.mark.parametrize("sampling", ["sample", "mean", "moments"])
def test_rows_are_the_posteriors_of_diffusers(tmp_path, place, export, vae, sampling):
    cache = LatentCache(export(tmp_path / "cache", encoding={"sampling": sampling}))
    source, crop = ImageFolder(place / "pictures"), ImageCrop(size=SIZE)
    assert (len(cache), cache.image_shape, cache.header.scale, cache.header.shift) == (NUM_PICTURES, (4, 8, 8), SCALE, SHIFT)
    for row, origin in enumerate(cache.origins(np.arange(len(cache)))):
        for flipped in (False, True):
            pixels = pixels_of(source, origin, crop)
            image = torch.from_numpy(pixels[:, ::-1].copy() if flipped else pixels).permute(2, 0, 1)[None] / 127.5 - 1
            posterior = vae.encode(image).latent_dist
            noise = random_stream(SEED, "export/posterior", origin.image_index, int(flipped)).standard_normal(
                (4, 8, 8), dtype=np.float32
            )
            drawn = posterior.mean + posterior.std * torch.from_numpy(noise)
            latents = (
                [posterior.mean, posterior.std] if sampling == "moments" else [drawn if sampling == "sample" else posterior.mean]
            )
            expected = torch.stack([(latents[0] - SHIFT) * SCALE, *(std * SCALE for std in latents[1:])], dim=1)[0]
            stored = cache.stored_rows([row], flipped)[0].reshape(expected.shape)
            np.testing.assert_allclose(stored, expected.numpy(), atol=2e-3, rtol=1e-3)


def test_every_picture_is_there_once_with_its_label_in_a_shuffled_order(place, whole):
    cache, source = LatentCache(whole), ImageFolder(place / "pictures")
    origins = cache.origins(np.arange(len(cache)))
    assert sorted(origin.image_index for origin in origins) == list(range(NUM_PICTURES))
    assert [origin.source for origin in origins] == [source.name(origin.image_index) for origin in origins]
    assert [source.labels[origin.image_index] for origin in origins] == cache.labels.tolist()
    assert cache.labels.tolist() != sorted(cache.labels.tolist())
    assert cache.class_ids == ("n00", "n01", "n02")


def test_the_header_says_how_the_rows_were_made(place, vae, whole):
    header = LatentCache(whole).header
    assert header.vae == {
        "name": str(place / "vae"),
        "revision": None,
        "weights_sha256": weights_hash(vae),
        "dtype": "float32",
        "class": "AutoencoderKL",
    }
    assert header.pixel_operations[-1] == "x / 127.5 - 1" and "box filter" in header.pixel_operations[1]
    assert header.source["num_pictures"] == NUM_PICTURES and len(header.source["fingerprint"]) == 64
    assert [entry.rows for entry in header.classes] == [7, 7, 7] and header.versions["torch"]
    assert json.loads((whole / "provenance.json").read_text())["versions"]
    assert len(list(whole.glob("data-*.arrow"))) > 2 and not (whole / "in_progress").exists()
    assert verify_cache(whole, "full").findings == []


def test_seeds_change_order_and_draws(tmp_path, export, whole, vae, place):
    encoder = VaeEncoder(vae, name="x", size=SIZE, seed=SEED + 1)
    other = LatentCache(export(tmp_path / "cache", encoder=encoder, seed=SEED + 1))
    mine = LatentCache(whole)
    order, other_order = ([origin.image_index for origin in cache.origins(np.arange(NUM_PICTURES))] for cache in (mine, other))
    assert order != other_order and sorted(order) == sorted(other_order)
    assert not np.array_equal(mine.rows([order.index(3)]), other.rows([other_order.index(3)]))


def test_random_crops_give_as_many_views_as_asked(tmp_path, export, place):
    crop = ImageCrop(kind="random", size=SIZE, seed=SEED)
    cache = LatentCache(export(tmp_path / "cache", encoder=PixelEncoder(size=SIZE), crop=crop, views=3))
    origins = cache.origins(np.arange(len(cache)))
    assert Counter(origin.image_index for origin in origins) == dict.fromkeys(range(NUM_PICTURES), 3)
    assert {origin.view for origin in origins} == {0, 1, 2}
    source = ImageFolder(place / "pictures")
    for row, origin in enumerate(origins):
        assert np.array_equal(cache.stored_rows([row])[0].transpose(1, 2, 0), pixels_of(source, origin, crop))


@pytest.mark.parametrize("encoding", ["uint8", "png", "jpeg"])
def test_pixels(tmp_path, export, place, encoding):
    cache = LatentCache(export(tmp_path / "cache", encoder=PixelEncoder(size=SIZE, encoding=encoding)))
    source, crop = ImageFolder(place / "pictures"), ImageCrop(size=SIZE)
    assert (len(cache), cache.image_shape, cache.header.encoding) == (NUM_PICTURES, (3, SIZE, SIZE), encoding)
    for row, origin in enumerate(cache.origins(np.arange(len(cache)))):
        expected = pixels_of(source, origin, crop).transpose(2, 0, 1) / 127.5 - 1
        error = np.abs(cache.rows([row])[0] - expected)
        assert error.max() < 1e-6 if encoding != "jpeg" else error.mean() < 0.05
    assert verify_cache(cache.path, "full").findings == []


def test_a_class_without_pictures_stays_in_the_table(tmp_path, export, place):
    source = ImageFolder(place / "pictures")
    source.use_classes(["n00", "n01", "n015", "n02"], ["zero", "one", "between", "two"])
    cache = LatentCache(export(tmp_path / "cache", source=source))
    assert cache.class_names[2] == "between" and len(cache.class_rows(3)) == 7
    with pytest.raises(ValueError, match=r"class 2 \(between\) has no rows"):
        cache.class_rows(2)


def test_so_many_rows_of_the_shuffled_order(tmp_path, export, whole):
    cache = LatentCache(export(tmp_path / "cache", max_rows=10))
    assert np.array_equal(cache.rows(np.arange(8), True), LatentCache(whole).rows(np.arange(8), True))
    assert len(cache) == 10 and set(cache.labels.tolist()) == {0, 1, 2}


def test_global_seeds_change_nothing(tmp_path, export, whole):
    torch.manual_seed(9)
    np.random.seed(9)
    assert contents(export(tmp_path / "cache")) == contents(whole)


# Processes and kills.


def start(run, folder: Path, num_processes: int) -> list:
    """Forked processes that share an export."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(num_processes)

    def work(index: int) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(folder, workers=Workers(index=index, count=num_processes, wait=lambda: barrier.wait(60)))

    processes = [context.Process(target=work, args=(index,)) for index in range(num_processes)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [2, 3])
def test_several_processes_make_the_same_cache(tmp_path, export, whole, num_processes):
    processes = start(export, tmp_path / "cache", num_processes)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * num_processes
    assert contents(tmp_path / "cache") == contents(whole)


def assert_whole_or_refused(folder: Path, whole: Path) -> bool:
    """That what a kill left is a whole cache or is taken for none; whether nothing is left to do."""
    if (folder / "manifest.json").is_file():
        assert contents(folder) == contents(whole) and verify_cache(folder, "full").findings == []
        return not (folder / "in_progress").exists()
    if folder.is_dir():
        with pytest.raises(ValueError, match="still being written|is no cache"):
            LatentCache(folder)
        assert not verify_cache(folder).is_good
    return False


def kill_and_resume(folder: Path, export, whole: Path, kills: int, num_processes: list[int], chance: random.Random) -> None:
    """Kill an export at `kills` random instants of its work, made by the numbers of processes in turn; then let it end."""
    began = time.monotonic()
    for process in start(export, folder.with_name("timed"), 1):
        process.join()
    duration = time.monotonic() - began
    met = 0
    for turn in range(20 * kills):
        processes = start(export, folder, num_processes[turn % len(num_processes)])
        time.sleep(chance.uniform(0, duration))
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        met += all(process.exitcode == -signal.SIGKILL for process in processes)
        if assert_whole_or_refused(folder, whole):
            shutil.rmtree(folder)  # begin again
        if met == kills:
            break
    assert met == kills, "the export ends before it can be killed"
    export(folder)
    assert_resumed(folder, whole)


@pytest.mark.multiprocess
def test_killed_at_random_instants_it_goes_on_to_the_same_cache(tmp_path, export, whole):
    kill_and_resume(tmp_path / "cache", export, whole, 3, [1, 2, 3], random.Random(0))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("num_processes", [[1], [2], [1, 2]])
def test_killed_twenty_times_it_goes_on_to_the_same_cache(tmp_path, export, whole, num_processes):
    kill_and_resume(tmp_path / "cache", export, whole, 20, num_processes, random.Random(1))


CHANGES = ("rename", "replace", "mkdir", "unlink", "rmdir")


def die_at(run, folder: Path, number: int, before: bool, names=CHANGES, suffix: str = "") -> bool:
    """Run an export that is killed before or after its change `number` of the disk, counted from 1; whether it was.

    `names` are the functions of os that count, `suffix` the end of what they make or remove.
    """

    def work() -> None:
        calls = 0

        def counted(function):
            def wrapped(*arguments, **keywords):
                nonlocal calls
                is_counted = any(str(argument).endswith(suffix) for argument in arguments[-2:])
                calls += is_counted
                is_met = is_counted and calls == number
                if is_met and before:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return function(*arguments, **keywords)
                finally:  # also where it made a folder that was there already
                    if is_met:
                        os.kill(os.getpid(), signal.SIGKILL)

            return wrapped

        for name in names:
            setattr(os, name, counted(getattr(os, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        run(folder)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def assert_resumed(folder: Path, whole: Path) -> None:
    """That a cache is the uninterrupted one and nothing else lies in its folder."""
    assert contents(folder) == contents(whole)
    assert [name for name in os.listdir(folder) if name.startswith(".") or name == "in_progress"] == []


@pytest.mark.multiprocess
def test_killed_again_and_again_it_goes_on_to_the_same_cache(tmp_path, export, whole):
    """Each run goes on where the one before it died and comes a little further, so that every stage is met."""
    folder, kills = tmp_path / "cache", 0
    while die_at(export, folder, 2 + kills, kills % 2 == 0):
        kills += 1
        assert kills < 200, "it does not get on"
        assert_whole_or_refused(folder, whole)
    assert kills > 10
    assert_resumed(folder, whole)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [1, 3, 6])
@pytest.mark.parametrize("before", [True, False])
def test_killed_while_shards_get_their_names_it_goes_on_to_the_same_cache(tmp_path, export, whole, number, before):
    folder = tmp_path / "cache"
    assert die_at(export, folder, number, before, ("replace",), ".arrow")
    assert len(list(folder.glob("*.arrow"))) == number - before
    assert not (folder / "manifest.json").exists() and not assert_whole_or_refused(folder, whole)
    export(folder)
    assert_resumed(folder, whole)


@pytest.mark.multiprocess
def test_killed_behind_the_manifest_it_is_a_whole_cache(tmp_path, export, whole):
    folder = tmp_path / "cache"
    assert die_at(export, folder, 1, False, ("replace",), "cache/manifest.json")
    assert (folder / "in_progress").is_dir() and not assert_whole_or_refused(folder, whole)
    assert np.array_equal(LatentCache(folder).rows(np.arange(NUM_PICTURES)), LatentCache(whole).rows(np.arange(NUM_PICTURES)))
    export(folder)
    assert_resumed(folder, whole)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_change_of_the_disk_it_goes_on_to_the_same_cache(tmp_path, export, whole, before):
    number, folder = 1, tmp_path / "cache"
    while die_at(export, folder, number, before):
        assert_whole_or_refused(folder, whole)
        export(folder)
        assert_resumed(folder, whole)
        shutil.rmtree(folder)
        number += 1
    assert number > 50


def command(place: Path, folder: Path, num_processes: int) -> list[str]:
    """The tool under `accelerate launch` on this machine's CPU, with the settings of the other tests."""
    several = ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
    launch = [sys.executable, "-m", "accelerate.commands.launch", *several, "--num_processes", str(num_processes)]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "tools/export_latents.py")]
    launch += ["--source", str(place / "pictures"), "--vae", str(place / "vae"), "--output_dir", str(folder), "--cpu"]
    values = {**SMALL, "image_size": SIZE}
    return [*launch, *(text for name, value in values.items() for text in (f"--{name}", str(value)))]


ENVIRONMENT = {**launch_environment(), "PYTHONUNBUFFERED": "1"}  # what the tool prints is seen at once


@pytest.mark.multiprocess
def test_the_tool_in_two_processes_makes_the_same_cache(tmp_path, place, whole):
    result = subprocess.run(command(place, tmp_path / "cache", 2), env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert contents(tmp_path / "cache") == contents(whole)
    assert "21 rows (float16) will take about" in result.stdout and "next: python tools/verify_cache.py" in result.stdout


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_tool_killed_in_one_and_in_two_processes_makes_the_same_cache(tmp_path, place, whole):
    chance, folder, kills, met = random.Random(2), tmp_path / "cache", 8, 0
    for turn in range(10 * kills):
        process = subprocess.Popen(command(place, folder, 1 + turn % 2), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if "will take about" in line or "complete already" in line:
                break
        time.sleep(chance.uniform(0, 0.3))
        met += process.poll() is None
        kill_with_children(process.pid)
        process.wait()
        process.stdout.close()
        if assert_whole_or_refused(folder, whole):
            shutil.rmtree(folder)  # begin again
        if met == kills:
            break
    assert met == kills, "the tool ends before it can be killed"
    assert subprocess.run(command(place, folder, 2), env=ENVIRONMENT, capture_output=True, timeout=200).returncode == 0
    assert contents(folder) == contents(whole)


def kill_with_children(pid: int) -> None:
    """kill -9 a launcher and what it started, which it puts into sessions of their own."""
    try:
        launcher = psutil.Process(pid)
        processes = [launcher, *launcher.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


# Going on, and what is refused.


def stop_after(source: ImageFolder, pictures: int) -> ImageFolder:
    """A source that fails like an interrupted run after so many pictures."""
    load, seen = source.load, []

    def limited(index):
        seen.append(index)
        if len(seen) > pictures:
            raise KeyboardInterrupt
        return load(index)

    source.load = limited
    return source


@pytest.fixture
def unfinished(tmp_path, place, export):
    """A folder with a part of an export."""
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "cache", source=stop_after(ImageFolder(place / "pictures"), 13))
    return tmp_path / "cache"


def test_an_unfinished_export_computes_only_what_is_missing(unfinished, place, export, whole):
    with pytest.raises(ValueError, match="is a cache still being written, or its export was stopped"):
        LatentCache(unfinished)
    assert "still being written" in verify_cache(unfinished).findings[0].problem
    there = len([name for name in os.listdir(unfinished / "in_progress/chunks") if name.isdecimal()])
    source = ImageFolder(place / "pictures")
    seen, load = [], source.load
    source.load = lambda index: seen.append(index) or load(index)
    export(unfinished, source=source)
    assert there >= 1 and len(seen) == NUM_PICTURES - 4 * there
    assert contents(unfinished) == contents(whole)


def test_other_settings_are_shown_and_refused(unfinished, export, whole, place, tmp_path):
    for folder, kind in ((unfinished, "an unfinished export"), (whole, "a finished cache")):
        with pytest.raises(ValueError, match=rf"holds {kind} with other settings:(.|\n)*batch_size: 3 there, 2 now"):
            export(folder, batch_size=2)
        with pytest.raises(ValueError, match="sampling: 'sample' there, 'mean' now"):
            export(folder, encoding={"sampling": "mean"})
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures/n01/more.png")
    with pytest.raises(ValueError, match="fingerprint"):
        export(unfinished, source=ImageFolder(tmp_path / "pictures"))


def test_a_complete_cache_is_left_as_it_is(whole, export, place):
    messages = []
    times = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    export(whole, source=stop_after(ImageFolder(place / "pictures"), 0), log=messages.append)
    assert messages == [f"{whole} is complete already"]
    assert times == {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}


def test_what_a_kill_left_of_the_unfinished_parts_is_removed_at_last(export, whole, tmp_path):
    """The last thing that an export does is to remove its parts, which may take long."""
    folder = shutil.copytree(whole, tmp_path / "cache")
    process = multiprocessing.get_context("fork").Process()
    process.start()
    process.join()
    left = folder / f".in_progress.trash-{process.pid}-{socket.gethostname()}"
    (left / "shards").mkdir(parents=True)
    export(folder)
    assert not left.exists() and contents(folder) == contents(whole)


def test_a_damaged_chunk_is_found_and_computed_again(unfinished, export, whole):
    chunk = unfinished / "in_progress/chunks/00000000/rows.arrow"
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match="00000000/rows.arrow: content changed .* it was removed, run the same command again"):
        export(unfinished)
    export(unfinished)
    assert contents(unfinished) == contents(whole)


@pytest.fixture
def damaged(tmp_path, place):
    """Pictures of which two cannot be read."""
    shutil.copytree(place / "pictures", tmp_path / "damaged")
    for name in ("n00/3.png", "n02/5.png"):
        path = tmp_path / "damaged" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return tmp_path / "damaged"


def test_unreadable_pictures_stop_the_export_by_name(tmp_path, export, damaged):
    with pytest.raises(ValueError, match=r"1 pictures cannot be read, max_bad allows 0:\n  n0[02]/[35].png: "):
        export(tmp_path / "cache", source=ImageFolder(damaged))
    with pytest.raises(ValueError, match=r"2 pictures cannot be read, max_bad allows 1:\n(.|\n)*n00/3.png(.|\n)*--max_bad N"):
        export(tmp_path / "cache2", source=ImageFolder(damaged), max_bad=1, chunk_size=64)


def test_allowed_unreadable_pictures_are_left_out_and_recorded(tmp_path, export, damaged, whole):
    cache = LatentCache(export(tmp_path / "cache", source=ImageFolder(damaged), max_bad=2))
    assert len(cache) == NUM_PICTURES - 2
    assert sorted(text.split(":")[0] for text in cache.header.left_out) == ["n00/3.png", "n02/5.png"]
    mine, complete = cache.origins(np.arange(len(cache))), LatentCache(whole)
    places = {origin.source: row for row, origin in enumerate(complete.origins(np.arange(NUM_PICTURES)))}
    rows = [places[origin.source] for origin in mine]
    assert rows == sorted(rows)
    assert np.array_equal(cache.rows(np.arange(len(cache)), True), complete.rows(rows, True))
    assert verify_cache(cache.path, "full").findings == []


def test_unreadable_pictures_of_all_processes_count_together(tmp_path, export, place, whole):
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    first, second = LatentCache(whole).origins([0, SMALL["chunk_size"]])  # of the first and of the second process
    for origin in (first, second):
        (tmp_path / "pictures" / origin.source).write_bytes(b"no picture")
    barrier = threading.Barrier(2)

    def work(index: int) -> str:
        workers = Workers(index=index, count=2, wait=lambda: barrier.wait(60))
        try:
            export(tmp_path / "cache", source=ImageFolder(tmp_path / "pictures"), workers=workers, max_bad=1)
        except ValueError as error:
            barrier.abort()
            return str(error)
        except threading.BrokenBarrierError:
            return "the other one stopped"
        return "done"

    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(work, range(2)))
    assert messages[0].startswith("2 pictures cannot be read, max_bad allows 1:") and messages[1] == "the other one stopped"
    assert first.source in messages[0] and second.source in messages[0]
    assert not (tmp_path / "cache/manifest.json").exists()


def test_a_shard_without_a_readable_picture_is_empty(tmp_path, export, damaged):
    shards = {"chunk_size": 1, "shard_bytes": 1}
    folder = export(tmp_path / "cache", source=ImageFolder(damaged), max_bad=2, encoder=PixelEncoder(size=SIZE), **shards)
    cache, report = LatentCache(folder), verify_cache(folder, "full")
    assert sorted(entry.rows for entry in cache.manifest.shards) == [0, 0, *[1] * (NUM_PICTURES - 2)]
    assert report.findings == [] and report.statistics["class_rows"] == [6, 7, 6]
    assert len(datasets.load_from_disk(str(folder))) == NUM_PICTURES - 2
    source, crop = ImageFolder(damaged), ImageCrop(size=SIZE)
    for row, origin in enumerate(cache.origins(np.arange(len(cache)))):
        assert np.array_equal(cache.stored_rows([row])[0].transpose(1, 2, 0), pixels_of(source, origin, crop))


def test_repaired_pictures_get_in(tmp_path, export, damaged, place, whole):
    for max_bad in (1, 0):
        with pytest.raises(ValueError, match="cannot be read"):
            export(tmp_path / "cache", source=ImageFolder(damaged), max_bad=max_bad)
    for name in ("n00/3.png", "n02/5.png"):
        shutil.copy(place / "pictures" / name, damaged / name)
    export(tmp_path / "cache", source=ImageFolder(damaged))
    assert contents(tmp_path / "cache") == contents(whole)


def test_nothing_readable_is_no_cache(tmp_path, export):
    for number in range(3):
        (tmp_path / "pictures/a").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"pictures/a/{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no picture could be read"):
        export(tmp_path / "cache", source=ImageFolder(tmp_path / "pictures"), max_bad=3)


def test_folders_with_other_things_are_refused(tmp_path, export):
    (tmp_path / "things").mkdir()
    (tmp_path / "things" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other things \(notes.txt\)"):
        export(tmp_path / "things")
    assert os.listdir(tmp_path / "things") == ["notes.txt"]
    with pytest.raises(ValueError, match="notes.txt is no folder"):
        export(tmp_path / "things" / "notes.txt")


def test_two_exports_into_one_folder_are_refused(unfinished, export):
    with exclusive_lock(unfinished / "in_progress/lock", "another"), pytest.raises(ValueError, match="is already running"):
        export(unfinished)


class ManyPictures(ImageSource):
    """As many names as ImageNet has."""

    def __init__(self, count: int):
        self.labels, self.class_ids, self.class_names = np.zeros(count, np.int64), ("a",), ("a",)

    def name(self, index: int) -> str:
        return "a"

    def fingerprint(self) -> str:
        return "0" * 64


def test_the_disk_is_checked_first_and_the_size_is_said(tmp_path, export, monkeypatch):
    messages = []
    usage = shutil._ntuple_diskusage(10**12, 9 * 10**11, 10**11)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"1,281,167 rows \(uncompressed pixels\) needs 252\.\d+ GB .* only 100.000 GB"):
        export(
            tmp_path / "cache",
            source=ManyPictures(1281167),
            encoder=PixelEncoder(size=256),
            crop=ImageCrop(),
            shard_bytes=10**8,
            log=messages.append,
        )
    assert "1,281,167 rows (uncompressed pixels) will take about 252.0" in messages[0]
    assert not (tmp_path / "cache").exists()


def test_rows_that_are_not_finite_are_refused_by_name(tmp_path, export):
    with pytest.raises(ValueError, match=r"n0\d/\d.(png|jpg): its latent is not finite in float16. Encode with --dtype float32"):
        export(tmp_path / "cache", encoding={"scale": 1e9})


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path, export):
    with pytest.raises(ValueError, match="process 1 does not see .*: give a folder that all machines share"):
        export(tmp_path / "cache", workers=Workers(index=1, count=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"max_bad": -1}, "max_bad is -1"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"views": 2}, "views is 2, but the crop 'adm' gives every view the same pixels"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExportConfig(**settings)


# Encoders.


def test_impossible_encoders_are_refused(vae):
    with pytest.raises(ValueError, match="sampling is 'twice': choose one of sample, mean, moments"):
        VaeEncoder(vae, name="x", size=SIZE, sampling="twice")
    with pytest.raises(ValueError, match="image size 17 is no multiple of 2"):
        VaeEncoder(vae, name="x", size=17)
    with pytest.raises(ValueError, match="scale is 0.0"):
        VaeEncoder(vae, name="x", size=SIZE, scale=0)
    with pytest.raises(ValueError, match="encoding is 'gif'"):
        PixelEncoder(size=SIZE, encoding="gif")
    with pytest.raises(ValueError, match="JPEG quality is 101"):
        PixelEncoder(size=SIZE, encoding="jpeg", jpeg_quality=101)


def test_rows_do_not_depend_on_their_place_or_neighbours(vae):
    encoder = VaeEncoder(vae, name="x", size=SIZE)
    pixels = np.random.Generator(np.random.Philox(key=2)).integers(256, size=(4, SIZE, SIZE, 3), dtype=np.uint8)
    rows = encoder.encode(pixels, [5, 6, 7, 8], [0, 0, 1, 0])
    again = encoder.encode(np.concatenate([pixels[2:3], 0 * pixels[:3]]), [7], [1])
    for column in ("latent", "latent_flipped"):
        assert np.array_equal(rows[column][2], again[column][0])


def test_scales_by_channel_undo_what_decoding_does(vae):
    config = type("Config", (), {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2], "latents_std": [2.0, 4.0]})
    assert vae_scaling(config) == ((0.25, 0.125), (0.1, -0.2))
    assert vae_scaling(vae.config) == (SCALE, SHIFT)
    assert vae_scaling(type("Config", (), {"scaling_factor": None})) == (1.0, 0.0)


def test_given_scales_replace_the_configurations(tmp_path, export, whole):
    cache = LatentCache(export(tmp_path / "cache", encoding={"scale": 2.0, "shift": 0.0}))
    latents = LatentCache(whole).rows(np.arange(21)) / SCALE + SHIFT
    np.testing.assert_allclose(cache.rows(np.arange(21)), 2 * latents, rtol=2**-10, atol=1e-3)  # both are rounded to float16
    assert (cache.header.scale, cache.header.shift) == (2.0, 0.0)


def test_weights_have_one_hash_whatever_their_type(vae, place):
    again = AutoencoderKL.from_pretrained(place / "vae")
    assert weights_hash(again) == weights_hash(vae)
    with torch.no_grad():
        next(again.parameters()).view(-1)[0] += 1
    assert weights_hash(again) != weights_hash(vae)
