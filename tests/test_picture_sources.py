"""Pictures that exist already, from every place, and what is refused before any work."""

import numpy as np
import pytest
from PIL import Image
from small_caches import small_header, write_small_cache
from tiny_models import trained

from drift_accel.data.digits import load_digits
from drift_accel.data.latent_cache import LatentCache
from drift_accel.evaluation.picture_sources import open_pictures
from drift_accel.sampling import SampleStore
from drift_accel.sampling.outputs import write_dataset, write_image_folder, write_npz
from drift_accel.sampling.pictures import GeneratedPictures


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """150 kept samples of two classes out of four."""
    place = tmp_path_factory.mktemp("store")
    pictures = GeneratedPictures(trained(place / "export"), [1, 3] * 75, guidance_scale=1.0, seed=0)
    store = SampleStore(place / "chunks", pictures, keep_pixels=True)
    store.compute()
    return store


def all_of(pictures):
    return pictures.batch(range(len(pictures))).pixels


def test_a_folder_of_class_folders_comes_back(store, tmp_path):
    write_image_folder(store, store.pictures.trained.table, tmp_path / "folder", {"seed": 0})
    assert sorted(p.name for p in (tmp_path / "folder").iterdir() if p.is_dir()) == ["n01443537", "n03126707"]
    assert sorted(p.name for p in (tmp_path / "folder/n01443537").iterdir())[:2] == ["000000.png", "000002.png"]
    pictures = open_pictures(tmp_path / "folder")
    assert len(pictures) == 150 and pictures.identity()["pixel_operations"] == ["as they are, RGB"]
    expected = store.rows("pixels")
    assert np.array_equal(all_of(pictures)[:, :, :, :1], np.concatenate([expected[::2], expected[1::2]]))
    with pytest.raises(FileExistsError):
        write_image_folder(store, store.pictures.trained.table, tmp_path / "folder", {})


def test_an_npz_comes_back_mapped_or_compressed(store, tmp_path):
    write_npz(store, tmp_path / "samples.npz", {"seed": 0})
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive["arr_0"].shape == (150, 8, 8, 3) and archive["arr_0"].dtype == np.uint8
        assert archive["arr_1"].tolist() == [1, 3] * 75 and str(archive["record"]) == '{"seed": 0}'
        whole = archive["arr_0"]
        np.savez_compressed(tmp_path / "small.npz", arr_0=whole)
    assert np.array_equal(whole[..., :1], store.rows("pixels"))
    for name in ("samples.npz", "small.npz"):
        pictures = open_pictures(tmp_path / name)
        assert np.array_equal(all_of(pictures), whole) and np.array_equal(pictures.batch(range(3, 9)).pixels, whole[3:9])
    assert open_pictures(tmp_path / "samples.npz").labels.tolist() == [1, 3] * 75
    assert isinstance(open_pictures(tmp_path / "samples.npz")._array, np.memmap)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_dataset_comes_back(store, tmp_path):
    write_dataset(store, store.pictures.trained.table, tmp_path / "dataset", {"seed": 0})
    pictures = open_pictures(tmp_path / "dataset")
    assert np.array_equal(all_of(pictures)[..., :1], store.rows("pixels")) and pictures.labels.tolist() == [1, 3] * 75


def test_kept_chunks_are_pictures(store, tmp_path):
    pictures = open_pictures(store.folder)
    assert np.array_equal(all_of(pictures), store.rows("pixels"))
    assert np.array_equal(pictures.batch(range(60, 70)).pixels, store.rows("pixels")[60:70])
    assert pictures.identity()["seed"] == 0 and pictures.identity()["source"] == "shards"
    other = SampleStore(tmp_path / "features", store.pictures)
    other.compute()
    with pytest.raises(ValueError, match="holds features without pictures"):
        open_pictures(tmp_path / "features")
    other.chunks.discard(1)
    with pytest.raises(ValueError, match="lacks 1 of 3 chunks"):
        open_pictures(tmp_path / "features")


def test_the_digits_and_caches_are_in_model_space(tmp_path):
    batch = open_pictures("digits").batch(range(3))
    assert np.array_equal(batch.model_space, load_digits("test").images[:3]) and batch.pixels.shape == (3, 8, 8, 1)
    assert len(open_pictures("digits:train")) != len(open_pictures("digits"))
    write_small_cache(tmp_path / "latents")
    latents = open_pictures(tmp_path / "latents")
    cache = LatentCache(tmp_path / "latents")
    assert latents.batch(range(12)).pixels is None
    assert np.array_equal(latents.batch(range(2, 5)).model_space, cache.rows(np.arange(2, 5)))
    write_small_cache(tmp_path / "moments", small_header(sampling="moments"))
    moments = open_pictures(tmp_path / "moments")
    assert np.array_equal(moments.batch(range(12)).model_space[4:6], moments.batch(range(4, 6)).model_space)


def test_a_limit_takes_the_same_pictures_always(store):
    some = open_pictures(store.folder, limit=40)
    assert len(some) == 40 and np.array_equal(all_of(some), all_of(open_pictures(store.folder, limit=40)))
    assert np.array_equal(some.batch(range(7, 9)).pixels, all_of(some)[7:9])
    assert some.identity() != open_pictures(store.folder).identity()
    with pytest.raises(ValueError, match="has 150 pictures, 151 were asked for"):
        open_pictures(store.folder, limit=151)


def test_unequal_sizes_are_refused_or_cropped(tmp_path):
    for number, size in enumerate(((20, 20), (20, 20), (30, 20))):
        Image.new("RGB", size, (number, 0, 0)).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match=r"unequal size: 0.png is \(20, 20\), 2.png is \(30, 20\).*give --image_size"):
        open_pictures(tmp_path)
    cropped = open_pictures(tmp_path, image_size=16)
    assert all_of(cropped).shape == (3, 16, 16, 3) and "16" in " ".join(cropped.identity()["pixel_operations"])


def test_places_without_pictures_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_pictures(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no class folders and no pictures"):
        open_pictures(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="neither a folder nor an .npz"):
        open_pictures(tmp_path / "notes.txt")
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="has no pictures: wanted arr_0 uint8 .N, H, W, 3., found none"):
        open_pictures(tmp_path / "stats.npz")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"found float64 \[2, 4, 4, 3\]"):
        open_pictures(tmp_path / "floats.npz")
    (tmp_path / "bad.npz").write_bytes(b"bad")
    with pytest.raises(ValueError, match="bad.npz cannot be read"):
        open_pictures(tmp_path / "bad.npz")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png of .* cannot be read"):
        open_pictures(tmp_path / "damaged")
