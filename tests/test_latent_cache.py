"""data.latent_cache: rows as they were written, by index and class, in every process; refusals."""

import dataclasses
import json
import multiprocessing
import os
import pickle

import datasets
import numpy as np
import pytest
import torch
from small_caches import reseal, small_header, small_pixels, small_rows, without_rows, write_small_cache

from drift_accel.data import labelled_images
from drift_accel.data.cache_format import header_text, parse_header, read_description, settings_difference
from drift_accel.data.cache_writing import dataset_schema, record_batch, write_cache
from drift_accel.data.latent_cache import LatentCache
from drift_accel.foundation.random_streams import random_stream


@pytest.fixture
def cache(tmp_path):
    write_small_cache(tmp_path / "cache")
    return LatentCache(tmp_path / "cache")


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("shards", [1, 3, 12])
def test_rows_are_what_was_written(tmp_path, shards, in_memory):
    rows = write_small_cache(tmp_path / "cache", shards=shards)
    cache = LatentCache(tmp_path / "cache", in_memory=in_memory)
    assert (len(cache), cache.num_classes, cache.image_shape) == (12, 3, (2, 3, 3))
    assert cache.class_names == ("class 0", "class 1", "class 2") and cache.class_ids == ("n00", "n01", "n02")
    indices = np.array([[11, 0, 5], [5, 5, 3]])
    mask = np.array([[True, False, True], [False, True, False]])
    expected = np.where(mask[..., None, None, None], rows["latent_flipped"][indices], rows["latent"][indices])
    for flipped, wanted in (
        (None, rows["latent"][indices]),
        (True, rows["latent_flipped"][indices]),
        (False, rows["latent"][indices]),
        (mask, expected),
    ):
        read = cache.rows(indices, flipped)
        assert (read.dtype, read.shape) == (np.float32, (2, 3, 2, 3, 3)) and np.array_equal(read, wanted.astype(np.float32))
        stored = cache.stored_rows(indices, flipped)
        assert stored.dtype == np.float16 and np.array_equal(stored, wanted)
        read[:] = 7  # a copy
    assert np.array_equal(cache.rows(np.arange(12)), rows["latent"].astype(np.float32))
    assert cache.rows(4).shape == (2, 3, 3) and cache.rows([]).shape == (0, 2, 3, 3)


def test_it_has_the_interface_of_labelled_images(cache):
    images = labelled_images.LabelledImages(cache.rows(np.arange(12)), cache.labels, cache.class_names)
    for name in (name for name in dir(images) if not name.startswith("_") and name not in ("images",)):
        mine, theirs = getattr(cache, name), getattr(images, name)
        if not callable(theirs):
            assert np.array_equal(mine, theirs), name
    for label in range(3):
        assert np.array_equal(cache.class_rows(label), images.class_rows(label))
    assert np.array_equal(cache.rows(np.array([[3, 1]])), images.rows(np.array([[3, 1]])))


def test_every_float16_is_converted_exactly(tmp_path):
    values = np.arange(2**16, dtype=np.uint16).view(np.float16)
    values = values[np.isfinite(values)]
    values = np.resize(values, (12, 6000 * 3 * 3 // 9, 3, 3))
    header = small_header(image_shape=values.shape[1:], flip_stored=False)
    write_small_cache(tmp_path / "cache", header, rows={"latent": values})
    assert np.array_equal(LatentCache(tmp_path / "cache").rows(np.arange(12)), values.astype(np.float32))


def test_labels_and_classes(tmp_path):
    write_small_cache(tmp_path / "cache", labels=[2, 0, 2, 1, 2, 0, 0, 2, 1, 1, 2, 2])
    cache = LatentCache(tmp_path / "cache")
    assert cache.labels.tolist() == [2, 0, 2, 1, 2, 0, 0, 2, 1, 1, 2, 2]
    assert [cache.class_rows(label).tolist() for label in range(3)] == [[1, 5, 6], [3, 8, 9], [0, 2, 4, 7, 10, 11]]
    assert [entry.rows for entry in cache.header.classes] == [3, 3, 6]


def test_classes_without_rows_or_that_do_not_exist(tmp_path):
    write_small_cache(tmp_path / "cache", without_rows(small_header(), 1), labels=[0, 2] * 6)
    cache = LatentCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"class 1 \(empty\) has no rows"):
        cache.class_rows(1)
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"class {label} does not exist: there are 3"):
            cache.class_rows(label)


def test_datasets_opens_the_same_folder(tmp_path):
    rows = write_small_cache(tmp_path / "cache")
    table = datasets.load_from_disk(str(tmp_path / "cache"))
    assert len(table) == 12 and table.features["latent"].length == 18
    assert np.array_equal(np.array(table.with_format("numpy")[5]["latent"]).reshape(2, 3, 3), rows["latent"][5])
    assert table[5]["label"] == 2 and table[5]["source"] == "p5.png"


def test_origins(cache):
    assert [tuple(origin) for origin in cache.origins([7, 0])] == [("p7.png", 7, 0), ("p0.png", 0, 0)]


# Moments and pixels.


def test_moments_are_drawn_at_reading_from_the_given_stream(tmp_path):
    rows = write_small_cache(tmp_path / "cache", small_header(sampling="moments"))
    cache = LatentCache(tmp_path / "cache")
    indices, flips = np.array([[3, 1], [0, 3]]), np.array([[True, False], [False, False]])
    assert cache.is_sampled_at_read
    stored = cache.stored_rows(indices, flips).astype(np.float32)
    assert np.array_equal(stored[0, 0], rows["latent_flipped"][3].astype(np.float32))
    noise = random_stream(0, "test", 1).standard_normal((2, 2, 2, 3, 3), dtype=np.float32)
    drawn = cache.rows(indices, flips, random_stream(0, "test", 1))
    assert np.array_equal(drawn, stored[:, :, 0] + stored[:, :, 1] * noise) and drawn.dtype == np.float32
    # One stream a slot: a slot's draws do not depend on the others.
    slots = [random_stream(0, "test", 1, slot) for slot in range(2)]
    both = cache.rows(indices, flips, slots)
    assert np.array_equal(both[1:], cache.rows(indices[1:], flips[1:], [random_stream(0, "test", 1, 1)]))
    with pytest.raises(ValueError, match="1 streams for indices of shape"):
        cache.rows(indices, None, slots[:1])
    with pytest.raises(ValueError, match="moments: give the stream"):
        cache.rows(indices)


def test_a_stream_where_nothing_is_drawn_is_refused(cache, tmp_path):
    with pytest.raises(ValueError, match=r"drawn already \(sample\): leave the stream out"):
        cache.rows([0], None, random_stream(0, "test", 0))
    small_pixels(tmp_path / "pixels")
    with pytest.raises(ValueError, match="holds pixels: nothing is drawn"):
        LatentCache(tmp_path / "pixels").rows([0], None, random_stream(0, "test", 0))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("encoding", ["uint8", "png", "jpeg"])
def test_pixels_are_given_in_model_space_and_flipped_at_reading(tmp_path, encoding, in_memory):
    pixels = small_pixels(tmp_path / "cache", encoding, count=40)
    cache = LatentCache(tmp_path / "cache", in_memory=in_memory)
    indices = np.arange(40)[::-1].reshape(4, 10)
    mask = (indices % 3 == 0) & (indices > 5)
    expected = np.where(mask[..., None, None, None], pixels[indices][..., ::-1], pixels[indices]) / 127.5 - 1
    read = cache.rows(indices, mask)
    assert read.dtype == np.float32 and cache.has_flipped and read.shape == (4, 10, 3, 6, 6)
    assert np.abs(read - expected).max() < (0.1 if encoding == "jpeg" else 1e-6)
    assert cache.stored_rows([3]).dtype == np.uint8
    if encoding != "uint8":
        picture = datasets.load_from_disk(str(tmp_path / "cache"))[7]["image"]
        assert picture.size == (6, 6)


# The class index.


def test_the_class_index_is_rebuilt_where_it_is_missing_or_unfit(tmp_path):
    write_small_cache(tmp_path / "cache")
    path = tmp_path / "cache" / "class_index.npy"
    content = path.read_bytes()
    for damage in (None, b"", content[:-8], b"no array"):
        path.unlink() if damage is None else path.write_bytes(damage)
        assert LatentCache(tmp_path / "cache").class_rows(1).tolist() == [1, 4, 7, 10]
        assert path.read_bytes() == content


def test_the_class_index_of_a_folder_that_cannot_be_written_stays_in_memory(tmp_path, monkeypatch):
    write_small_cache(tmp_path / "cache")
    (tmp_path / "cache" / "class_index.npy").unlink()

    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr("drift_accel.data.class_index.atomic_write_bytes", refuse)
    assert LatentCache(tmp_path / "cache").class_rows(2).tolist() == [2, 5, 8, 11]
    assert not (tmp_path / "cache" / "class_index.npy").exists()


# Processes.


def read_in_child(cache: LatentCache, indices: np.ndarray, sender) -> None:
    sender.send((cache.rows(indices, True), cache.class_rows(1).tolist(), cache.labels.tolist()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_read_the_same_rows(tmp_path, method):
    header = small_header(image_shape=(4, 64, 64))
    write_small_cache(tmp_path / "cache", header)
    cache = LatentCache(tmp_path / "cache")
    indices = np.arange(12).repeat(3)
    threads = torch.get_num_threads()
    try:
        # A pool of threads that a forked child does not have: converting through it would hang.
        torch.set_num_threads(2)
        expected = cache.rows(indices, True)
        torch.ones(1 << 20).mul(2).sum()
        context = multiprocessing.get_context(method)
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=read_in_child, args=(cache, indices, sender), daemon=True)
        child.start()
        assert receiver.poll(120), "the child hangs"
        rows, members, labels = receiver.recv()
        child.join(60)
    finally:
        torch.set_num_threads(threads)
    assert child.exitcode == 0 and np.array_equal(rows, expected)
    assert members == [1, 4, 7, 10] and labels == cache.labels.tolist()


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_pickled_cache_carries_its_path_alone(tmp_path, in_memory):
    write_small_cache(tmp_path / "cache")
    cache = LatentCache(tmp_path / "cache", in_memory=in_memory)
    content = pickle.dumps(cache)
    assert len(content) < 500
    again = pickle.loads(content)
    assert np.array_equal(again.rows([1]), cache.rows([1])) and again.in_memory == in_memory


@pytest.mark.parametrize("encoding", [None, "uint8", "png"])
def test_rows_in_memory_do_not_need_their_files_and_mapped_ones_are_no_copy(tmp_path, encoding):
    path = tmp_path / "cache"
    write_small_cache(path) if encoding is None else small_pixels(path, encoding)
    mapped, read = LatentCache(path), LatentCache(path, in_memory=True)
    before = read.stored_rows(np.arange(12), True)
    assert np.array_equal(mapped.stored_rows(np.arange(12), True), before)
    for shard in path.glob("*.arrow"):
        with open(shard, "r+b") as file:  # in place, so that the mapping sees it
            file.write(bytes(shard.stat().st_size))
    assert np.array_equal(read.stored_rows(np.arange(12), True), before)
    if encoding == "png":
        with pytest.raises(ValueError, match=r"row \d+ of .*: the picture cannot be decoded"):
            mapped.stored_rows(np.arange(12), True)
    else:
        assert not mapped.stored_rows(np.arange(12), True).any()


def test_more_rows_than_memory_are_refused(tmp_path, monkeypatch):
    write_small_cache(tmp_path / "cache")
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(ValueError, match="in memory, this machine has"):
        LatentCache(tmp_path / "cache", in_memory=True)


def test_many_files_need_no_file_descriptors(tmp_path):
    write_small_cache(tmp_path / "cache", shards=12)
    before = len(os.listdir("/proc/self/fd"))
    cache = LatentCache(tmp_path / "cache")
    assert len(os.listdir("/proc/self/fd")) <= before + 1 and len(cache) == 12


# Refusals.


@pytest.mark.parametrize("index", [-1, 12])
def test_rows_that_do_not_exist_are_refused(cache, index):
    for read in (cache.rows, cache.stored_rows, cache.origins):
        with pytest.raises(IndexError, match=f"row {index} does not exist: .* has 12 rows"):
            read([0, index])


def test_indices_and_flips_of_other_kinds_are_refused(cache):
    for wrong in (np.array([0.0, 1.0]), np.array([True, False])):
        with pytest.raises(ValueError, match="wanted integers"):
            cache.rows(wrong)
    for wrong in (np.array([1, 0]), np.array([True]), 1):
        with pytest.raises(ValueError, match=r"wanted booleans \(2,\)"):
            cache.rows([0, 1], wrong)


def test_flips_that_were_not_stored_are_refused(tmp_path):
    write_small_cache(tmp_path / "cache", small_header(flip_stored=False))
    cache = LatentCache(tmp_path / "cache")
    assert not cache.has_flipped and cache.rows([0, 1], np.zeros(2, bool)).shape == (2, 2, 3, 3)
    with pytest.raises(ValueError, match="no flipped views: export it without --no_flip"):
        cache.rows([0, 1], np.array([False, True]))


def test_folders_that_are_no_complete_cache_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        LatentCache(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no cache: it has no manifest.json"):
        LatentCache(tmp_path)
    (tmp_path / "in_progress").mkdir()
    with pytest.raises(ValueError, match="still being written, or its export was stopped"):
        LatentCache(tmp_path)


def edit(path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("header.json", {"seed": 5}, "is not the header that this cache was written with"),
        ("manifest.json", {"format": 9}, "has format 9, this version reads format 1"),
        ("manifest.json", {"rows": 13}, "has 12 rows of 3 classes, its manifest says 13 of 3"),
        ("manifest.json", {"rows": "12"}, "wanted whole numbers"),
        ("manifest.json", {"surplus": 1}, "surplus"),
        ("manifest.json", {"shards": [{"file": "../x", "bytes": 1, "sha256": "", "rows": 1}]}, "not in the folder"),
        ("manifest.json", {"shards": [{"file": "x", "bytes": 1, "sha256": ""}]}, "without its number of rows"),
    ],
)
def test_edited_descriptions_are_refused(tmp_path, file, change, message):
    write_small_cache(tmp_path / "cache")
    edit(tmp_path / "cache" / file, **change)
    with pytest.raises(ValueError, match=message):
        LatentCache(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_damaged_shards_are_refused_by_name(tmp_path, damage):
    write_small_cache(tmp_path / "cache")
    shard = tmp_path / "cache" / "data-00001-of-00003.arrow"
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"data-00001-of-00003.arrow .*(copy the file again)"):
        LatentCache(tmp_path / "cache")


def test_a_header_of_other_rows_is_refused(tmp_path):
    write_small_cache(tmp_path / "cache")
    reseal(tmp_path / "cache", image_shape=[2, 3, 4])
    with pytest.raises(ValueError, match="data-00000-of-00003.arrow has the columns .*, not the header's"):
        LatentCache(tmp_path / "cache")
    reseal(tmp_path / "cache", kind="sounds")
    with pytest.raises(ValueError, match="kind 'sounds' with encoding 'float16' is no kind of cache"):
        LatentCache(tmp_path / "cache")
    (tmp_path / "cache" / "header.json").unlink()
    with pytest.raises(ValueError, match="header.json cannot be read"):
        LatentCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"in_channels": 4}, "rows have 2 channels, the model 4"),
        ({"input_size": 32}, "rows are 3x3, the model's input 32x32"),
        ({"num_classes": 1000}, "3 classes, the model 1000"),
        ({"scale": 0.18215}, "VAE scale 0.5, the model's VAE has 0.18215"),
        ({"shift": 0.0}, "VAE shift 0.1, the model's VAE has 0.0"),
        ({"scale": (0.5, 0.6)}, r"VAE scale 0.5, the model's VAE has \(0.5, 0.6\)"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(cache, wanted, message):
    fitting = {"in_channels": 2, "input_size": 3, "num_classes": 3, "scale": 0.5, "shift": 0.1}
    cache.require_model(**fitting)
    cache.require_model(scale=[0.5, 0.5], shift=np.float32(0.1))
    with pytest.raises(ValueError, match=message):
        cache.require_model(**{**fitting, **wanted})


def test_a_vae_for_pixels_is_refused(tmp_path):
    small_pixels(tmp_path / "cache")
    cache = LatentCache(tmp_path / "cache")
    cache.require_model(in_channels=3, input_size=6)
    with pytest.raises(ValueError, match="rows are pixels, but the model's VAE has scale 0.5"):
        cache.require_model(scale=0.5)


@pytest.mark.parametrize("sampling", ["mean", "moments"])
def test_a_header_is_read_back_as_it_was_written(sampling):
    header = small_header(sampling=sampling, scale=(0.5, 0.25), left_out=("a.png: cut",))
    assert parse_header(header_text(header)) == header
    other = dataclasses.replace(header, seed=3)
    assert settings_difference(dataclasses.asdict(header), dataclasses.asdict(other)) == ["seed: 0 there, 3 now"]


def test_headers_that_contradict_themselves_are_refused():
    for changes in ({"image_shape": (2, 3)}, {"sampling": "twice"}, {"scale": None}, {"encoding": "png"}):
        with pytest.raises(ValueError, match="header: "):
            small_header(**changes)
    swapped = small_header().classes[::-1]
    with pytest.raises(ValueError, match="not numbered from 0"):
        small_header(classes=swapped)


def test_reading_the_description_opens_no_shard(tmp_path):
    write_small_cache(tmp_path / "cache")
    for shard in (tmp_path / "cache").glob("*.arrow"):
        shard.unlink()
    header, manifest = read_description(tmp_path / "cache")
    assert manifest.rows == 12 and header.row_shape == (2, 3, 3)


def test_writing_what_was_not_announced_is_refused(tmp_path):
    header = small_header()
    table = record_batch(dataset_schema(header), small_rows(header, 2), [0, 1], ["a", "b"], [0, 1], [0, 0])
    with pytest.raises(ValueError, match="there were 1 shards, not 2"):
        write_cache(tmp_path / "cache", header, [[table]], 2)
    with pytest.raises(ValueError, match="row 1 has label 9, but there are 3 classes"):
        write_small_cache(tmp_path / "labels", labels=[0, 9, 2])
