"""Samples in chunks: the same bits however they were run, resumed, refused where settings differ."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from tiny_models import tiny_vae, trained, write_export

from drift_accel.data.latent_export import Workers
from drift_accel.foundation.locks import exclusive_lock
from drift_accel.sampling import SampleStore, load_trained
from drift_accel.sampling.pictures import GeneratedPictures, sample_labels
from drift_accel.sampling.vae_choice import open_decoder

NUM_SAMPLES = 2000


class Sums:
    """A measure: the sum of each picture."""

    def __call__(self, batch):
        return {"sums": batch.model_space.sum(axis=(1, 2, 3))}

    def identity(self):
        return {"measure": "sums"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    # Processes are forked below, and torch's thread pool does not survive that.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def make(model):
    def pictures(count=NUM_SAMPLES, **options):
        labels = sample_labels(range(4), count)
        return GeneratedPictures(model, labels, **{"guidance_scale": 1.5, "seed": 3, **options})

    return pictures


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """The samples of one process."""
    store = SampleStore(tmp_path_factory.mktemp("whole"), make(), Sums(), keep_pixels=True)
    store.compute()
    return store.rows("pixels"), store.rows("sums")


def assert_same(store, whole):
    assert np.array_equal(store.rows("pixels"), whole[0])
    assert np.array_equal(store.rows("sums"), whole[1])


def start(store, count):
    """Forked processes that share a store."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def work(index):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        store.compute(workers=Workers(index=index, count=count, wait=lambda: barrier.wait(60)), log=lambda text: None)

    processes = [context.Process(target=work, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    return processes


def test_one_process_of_batch_seven_makes_the_same(make, whole, tmp_path):
    store = SampleStore(tmp_path / "store", make(batch_size=7), Sums(), keep_pixels=True)
    store.compute()
    assert_same(store, whole)
    pictures = make()
    pieces = [pictures.batch(range(start, min(start + 7, 150))) for start in range(0, 150, 7)]
    assert np.array_equal(np.concatenate([piece.pixels for piece in pieces]), whole[0][:150])


@pytest.mark.multiprocess
def test_two_processes_make_the_same(make, whole, tmp_path):
    store = SampleStore(tmp_path / "store", make(), Sums(), keep_pixels=True)
    processes = start(store, 2)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same(store, whole)


@pytest.mark.multiprocess
def test_killed_five_times_it_goes_on_to_the_same(make, whole, tmp_path):
    store = SampleStore(tmp_path / "store", make(), Sums(), keep_pixels=True)
    kills = 0
    while kills < 5:
        before = len(store.chunks.complete())
        processes = start(store, 1 + kills % 2)
        while len(store.chunks.complete()) < before + 2 and any(process.is_alive() for process in processes):
            time.sleep(0.001)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [-signal.SIGKILL] * len(processes)
        kills += 1
    there = len(store.chunks.complete())
    assert 10 <= there < len(store.chunks.chunks)
    messages = []
    store.compute(log=messages.append)
    assert messages and "chunks are there already" in messages[0]
    assert_same(store, whole)


def test_a_sample_depends_on_seed_index_label_and_guidance_alone(make, whole, model):
    fewer = make(100).batch(range(100))
    assert np.array_equal(fewer.pixels, whole[0][:100])
    assert not np.array_equal(make(64, seed=4).batch(range(64)).pixels, whole[0][:64])
    assert not np.array_equal(make(64, guidance_scale=2.0).batch(range(64)).pixels, whole[0][:64])
    labels = sample_labels(range(4), 64)
    labels[5] = 0
    other = GeneratedPictures(model, labels, guidance_scale=1.5, seed=3).batch(range(64))
    assert not np.array_equal(other.pixels[5], whole[0][5])
    assert np.array_equal(np.delete(other.pixels, 5, axis=0), np.delete(whole[0][:64], 5, axis=0))


def test_decoded_latents_do_not_depend_on_the_batch(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    model = load_trained(write_export(tmp_path / "export", channels=4))
    decoder = open_decoder(model, str(tmp_path / "vae"), batch=3)
    sets = [
        GeneratedPictures(model, [0] * 40, guidance_scale=1.0, seed=0, decoder=decoder, batch_size=size).batch(range(40))
        for size in (64, 5)
    ]
    assert sets[0].pixels.shape == (40, 8, 8, 3) and sets[0].model_space.shape == (40, 4, 8, 8)
    assert np.array_equal(sets[0].pixels, sets[1].pixels)
    bare = GeneratedPictures(model, [0] * 4, guidance_scale=1.0, seed=0)
    assert bare.batch(range(4)).pixels is None
    with pytest.raises(ValueError, match="there are only latents: name their VAE"):
        SampleStore(tmp_path / "store", bare, keep_pixels=True).compute()


def test_other_settings_are_shown_and_refused(make, tmp_path):
    SampleStore(tmp_path / "store", make(70), Sums()).compute()
    for other, difference in (
        (SampleStore(tmp_path / "store", make(70, seed=4), Sums()), "'seed': 4"),
        (SampleStore(tmp_path / "store", make(71), Sums()), "'num_pictures': 71"),
        (SampleStore(tmp_path / "store", make(70), Sums(), keep_pixels=True), "keep_pixels: False there, True now"),
    ):
        with pytest.raises(ValueError, match="unfinished work with other settings") as error:
            other.compute()
        assert difference in str(error.value)
    SampleStore(tmp_path / "store", make(70, batch_size=9), Sums()).compute()


def test_folders_with_other_things_and_running_work_are_refused(make, tmp_path):
    (tmp_path / "things").mkdir()
    (tmp_path / "things/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other things"):
        SampleStore(tmp_path / "things", make(3), Sums()).compute()
    store = SampleStore(tmp_path / "store", make(3), Sums())
    with exclusive_lock(tmp_path / "store/lock", "another"), pytest.raises(ValueError, match="is already running"):
        store.compute()
    with pytest.raises(ValueError, match="process 1 does not see"):
        SampleStore(tmp_path / "unseen", make(3), Sums()).compute(workers=Workers(index=1, count=2))


def test_a_damaged_chunk_is_named_and_a_cut_one_is_made_again(make, tmp_path):
    store = SampleStore(tmp_path / "store", make(70), Sums())
    store.compute()
    path = store.chunks.path(1) / "sums.npy"
    expected = store.rows("sums")
    content = path.read_bytes()
    path.write_bytes(content[:20])
    with pytest.raises(ValueError, match="sums.npy cannot be read .*: remove"):
        store.rows("sums")
    store.compute()
    assert np.array_equal(store.rows("sums"), expected)


def test_pictures_that_are_not_finite_are_counted(make, tmp_path, monkeypatch):
    pictures = make(70)
    monkeypatch.setattr(
        "drift_accel.sampling.pictures.generate", lambda generator, labels, **other: torch.full((len(labels), 1, 8, 8), torch.nan)
    )
    store = SampleStore(tmp_path / "store", pictures, keep_pixels=True)
    store.compute()
    assert store.num_non_finite() == 70 and store.rows("pixels").max() == 0
    assert json.loads((store.chunks.path(1) / "facts.json").read_text()) == {"non_finite": 6}


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([], {}, "at least one label"),
        ([4], {}, "labels reach from 4 to 4: the generator has 0 to 3"),
        ([-1], {}, "labels reach from -1"),
        ([0], {"guidance_scale": 0.9}, "guidance starts at 1"),
        ([0], {"guidance_scale": float("inf")}, "guidance starts at 1"),
        ([0], {"batch_size": 0}, "batch_size is 0"),
        ([0], {"seed": -1}, "seed is -1"),
        ([0], {"quantizer": "floor"}, "quantiser is 'floor'"),
    ],
)
def test_impossible_samples_are_refused(model, labels, options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedPictures(model, labels, **{"guidance_scale": 1.0, "seed": 0, **options})


def test_balanced_labels_of_chosen_classes():
    assert sample_labels([3, 1], 5).tolist() == [3, 1, 3, 1, 3]
    assert np.bincount(sample_labels(range(1000), 50_000)).tolist() == [50] * 1000
    with pytest.raises(ValueError, match="at least one class and one sample"):
        sample_labels([], 5)
