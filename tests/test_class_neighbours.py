"""Positives nearest to, or farthest from, a row of their class: the order, the table on disk, the draws, and runs."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from small_caches import small_header, write_digit_pictures, write_small_cache
from tiny_runs import TINY_GENERATOR, TINY_MAE, checkpoint_tensors, generator_arguments, run_tool, tiny_encoder
from trainer_processes import run_trainer

from drift_accel import train, train_mae
from drift_accel.data import LabelledImages, LatentCache
from drift_accel.data.class_neighbours import ClassNeighbours, PositivesConfig, neighbour_order, open_class_neighbours
from drift_accel.data.digits import load_digits
from drift_accel.data.samplers import NeighbourSampler
from drift_accel.data.subset import BalancedSubset
from drift_accel.foundation import chunks as chunks_module
from drift_accel.foundation.storage import verify_folder
from drift_accel.models.configuration import EncoderConfig, load_encoder


def points(sizes=(7, 3, 5), num_classes=4, dimensions=3) -> LabelledImages:
    """Random images [C,1,1] of classes of these sizes, in a mixed order; the last class is empty."""
    stream = np.random.Generator(np.random.Philox(key=4))
    labels = stream.permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = stream.standard_normal((len(labels), dimensions, 1, 1), dtype=np.float32)
    return LabelledImages(images, labels, [f"class {k}" for k in range(num_classes)])


def flat(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).flatten(1)


def table_of(source, folder, choice="nearest", count=4, extract=flat, **more):
    settings = {"choice": choice, "count": count, "description": {"rows_sha256": "x"}, "log": lambda line: None}
    return open_class_neighbours(folder, source, extract, **{**settings, **more})


def by_loops(source, anchor: int, choice: str, count: int) -> list[int]:
    """The definition: the class's rows sorted by distance to the anchor, the first of them repeated where they do not suffice."""
    members = [row for row in range(len(source)) if source.labels[row] == source.labels[anchor]]
    place = source.images.astype(np.float64)
    distance = {row: float(np.sqrt(((place[row] - place[anchor]) ** 2).sum())) for row in members}
    ordered = sorted(members, key=lambda row: distance[row] if choice == "nearest" else -distance[row])
    return [ordered[k % len(ordered)] for k in range(count)]


@pytest.mark.parametrize("choice", ["nearest", "farthest"])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_table_is_the_definition(choice, count, tmp_path):
    source = points()
    table = table_of(source, tmp_path, choice, count)
    for label in range(3):
        for place, anchor in enumerate(source.class_rows(label)):
            assert table.order(label, place).tolist() == by_loops(source, anchor, choice, count)
            assert choice == "farthest" or table.order(label, place)[0] == anchor
    assert table.count == count


@pytest.mark.parametrize("choice", ["nearest", "farthest"])
def test_the_order_does_not_depend_on_offset_scale_rotation_or_blocks(choice, monkeypatch):
    """A large common offset would cost float32 all digits of the distances."""
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    wanted = neighbour_order(features, choice, 40)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert np.array_equal(neighbour_order(features.double() * 3 @ rotation + 1e4, choice, 40), wanted)
    assert np.array_equal(neighbour_order(features, choice, 7), wanted[:, :7])
    assert np.array_equal(np.sort(wanted, axis=1), np.tile(np.arange(40), (40, 1)))
    monkeypatch.setattr("drift_accel.data.class_neighbours.BLOCK_DISTANCES", 100)
    assert np.array_equal(neighbour_order(features, choice, 40), wanted)


def test_equal_rows_come_in_their_order_after_the_anchor():
    features = torch.tensor([[1.0], [1.0], [1.0], [5.0]])
    assert neighbour_order(features, "nearest", 4).tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]]
    assert neighbour_order(features, "farthest", 2).tolist() == [[3, 1], [3, 0], [3, 0], [0, 1]]


def test_features_that_are_not_finite_name_the_class(tmp_path):
    def broken(images):
        return flat(images) / 0

    with pytest.raises(ValueError, match=r"class 0 \(class 0\): the features of member 0 of the class are not finite"):
        table_of(points(), tmp_path, extract=broken)
    assert not [path for path in tmp_path.iterdir() if verify_folder(path) == []]


# Draws


def test_draws_are_functions_of_seed_step_and_slot_and_every_row_is_an_anchor_alike(tmp_path):
    source = points((6, 4), 2)
    sampler = NeighbourSampler(source, 5, table_of(source, tmp_path, count=3), negatives=2)
    labels = np.array([0, 1, 0, 1])
    whole = sampler.positives(7, np.arange(4), labels)
    for slot in range(4):
        assert np.array_equal(sampler.positives(7, np.array([slot]), labels[slot : slot + 1]), whole[slot : slot + 1])
    assert not np.array_equal(sampler.positives(8, np.arange(4), labels), whole)
    assert not np.array_equal(
        NeighbourSampler(source, 6, sampler.neighbours, negatives=2).positives(7, np.arange(4), labels), whole
    )
    anchors = [sampler.positives(step, np.array([0]), np.array([0]))[0, 0] for step in range(3000)]
    counts = np.array([anchors.count(row) for row in source.class_rows(0)])
    assert counts.sum() == 3000 and ((counts - 500) ** 2 / 500).sum() < 20.5  # chi-square, 5 degrees: 0.999 quantile
    assert sampler.negatives(7, np.arange(4)).shape == (4, 2)


# The table on disk


def test_a_table_is_made_once_and_belongs_to_what_it_depends_on(tmp_path):
    source, calls = points(), []

    def counted(images):
        calls.append(len(images))
        return flat(images)

    first = table_of(source, tmp_path, extract=counted)
    assert sum(calls) == len(source)
    again = table_of(source, tmp_path, extract=counted)
    assert sum(calls) == len(source) and again.order(0, 3).tolist() == first.order(0, 3).tolist()
    for change in ({"choice": "farthest"}, {"count": 5}, {"description": {"rows_sha256": "y"}}):
        table_of(source, tmp_path, extract=counted, **change)
    assert sum(calls) == 4 * len(source)
    assert len([path for path in tmp_path.iterdir() if not path.name.startswith(".")]) == 4
    described = json.loads(next(tmp_path.glob("*/description.json")).read_text())
    assert {"choice", "count", "rows", "format", "rows_sha256"} == set(described)


def test_a_damaged_table_is_made_again(tmp_path):
    source = points()
    wanted = table_of(source, tmp_path).order(1, 2).tolist()
    file = next(tmp_path.glob("*/neighbours.npy"))
    file.write_bytes(file.read_bytes()[:-8])
    assert table_of(source, tmp_path).order(1, 2).tolist() == wanted


def make_and_die(folder, after):
    """Compute a table in a process that is killed once `after` classes are done."""
    compute, done = chunks_module.ChunkStore.write, []

    def write(store, chunk):
        if len(done) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(chunk)
        return compute(store, chunk)

    chunks_module.ChunkStore.write = write
    table_of(points(), folder)


def test_a_killed_run_keeps_its_classes(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=make_and_die, args=(tmp_path / "killed", 2))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    calls = []

    def counted(images):
        calls.append(len(images))
        return flat(images)

    table = table_of(points(), tmp_path / "killed", extract=counted)
    assert sum(calls) == 5  # the third class alone
    whole = table_of(points(), tmp_path / "whole")
    for label, size in enumerate((7, 3, 5)):
        assert all(np.array_equal(table.order(label, k), whole.order(label, k)) for k in range(size))


def test_a_folder_that_cannot_be_written_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written .*set positives.folder"):
        table_of(points(), tmp_path / "file")


@pytest.mark.parametrize("sampling", ["sample", "moments"])
def test_rows_of_a_cache_and_of_a_part_of_it(sampling, tmp_path):
    write_small_cache(tmp_path / "cache", small_header(sampling=sampling))
    cache = LatentCache(tmp_path / "cache")
    table = table_of(cache, tmp_path / "tables", count=4)
    part = BalancedSubset(cache, 6)
    of_part = table_of(part, tmp_path / "part", count=2)
    for label in range(3):
        for place, row in enumerate(cache.class_rows(label)):
            assert table.order(label, place)[0] == row and set(table.order(label, place)) == set(cache.class_rows(label))
        for place, row in enumerate(part.class_rows(label)):
            assert of_part.order(label, place)[0] == row and set(of_part.order(label, place)) == set(part.class_rows(label))


# Configuration and runs


def test_what_cannot_work_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="positives.choice is 'closest': choose one of random, nearest, farthest"):
        PositivesConfig(choice="closest")
    with pytest.raises(ValueError, match="positives.map is 'layer4', which random positives do not use"):
        PositivesConfig(map="layer4")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("mae"))


def test_an_unknown_map_and_a_queue_are_refused(encoder, tmp_path, capsys):
    nearest = ("--positives.choice", "nearest", "--positives.map", "layer9")
    with pytest.raises(SystemExit, match="positives.map is 'layer9', but the encoder has conv1"):
        train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "1", *nearest))
    with pytest.raises(SystemExit):
        train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "1", *nearest[:2], "--data.queue.push", "4"))
    assert "looks at whole classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="error: the table of neighbours cannot be written .*set positives.folder"):
        unwritable = (*nearest[:2], "--positives.folder", str(tmp_path / "file"))
        train.main(generator_arguments(encoder, tmp_path / "run", "--steps", "1", *unwritable))


def test_a_run_draws_the_rows_around_an_anchor_and_resumes(encoder, tmp_path):
    """In the feature space that it is told; the table of the first start serves the second."""
    nearest = ("--positives.choice", "nearest", "--positives.map", "layer2_blk1")
    run, straight = tmp_path / "run", tmp_path / "straight"
    train.main(generator_arguments(encoder, run, *nearest, "--steps", "2"))
    (table,) = (run / "class_neighbours").glob("*/neighbours.npy")
    made = table.stat().st_mtime_ns
    train.main(generator_arguments(encoder, run, *nearest, "--steps", "4"))
    assert table.stat().st_mtime_ns == made
    train.main(generator_arguments(encoder, straight, *nearest, "--steps", "4"))
    resumed = checkpoint_tensors(run, 4)
    for name, tensor in checkpoint_tensors(straight, 4).items():
        assert torch.equal(resumed[name], tensor), name
    with pytest.raises(SystemExit, match='positives.choice: "nearest" -> "farthest"'):
        train.main(generator_arguments(encoder, run, "--positives.choice", "farthest", *nearest[2:], "--steps", "5"))

    digits, network = load_digits("train"), load_encoder(EncoderConfig(path=str(encoder)))
    rows = digits.class_rows(3)
    with torch.no_grad():
        maps = network.feature_maps(torch.from_numpy(digits.rows(rows)), ["layer2_blk1"])
    space = LabelledImages(maps["layer2_blk1"].mean((2, 3))[..., None, None].numpy(), np.zeros(len(rows)).astype(int), ["3"])
    drawn = ClassNeighbours(digits, np.load(table))
    for place in range(0, len(rows), 10):
        assert drawn.order(3, place).tolist() == rows[by_loops(space, place, "nearest", 5)].tolist()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_equal_one(encoder, tmp_path):
    """Also in the table, which each number of processes makes anew."""
    exact = ("--precision", "float64", "--steps", "3", "--optimizer.lr", "1e-3", "--positives.choice", "nearest")
    for processes in (1, 2):
        arguments = generator_arguments(encoder, tmp_path / str(processes), *exact)
        run_trainer("drift_accel.train", arguments, tmp_path / f"logs{processes}", num_processes=processes)
    one, two = (next((tmp_path / str(processes)).glob("class_neighbours/*/neighbours.npy")) for processes in (1, 2))
    assert one.parent.name == two.parent.name and one.read_bytes() == two.read_bytes()
    others = checkpoint_tensors(tmp_path / "2", 3)
    for name, tensor in checkpoint_tensors(tmp_path / "1", 3).items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_the_table_lies_beside_a_cache_which_stays_good(tmp_path):
    """A pixel cache; a second run, of another seed, reads the same table."""
    pictures = write_digit_pictures(tmp_path / "pictures", 40)
    assert run_tool("export_latents", "--source", pictures, "--output_dir", tmp_path / "cache", "--encoding", "uint8",
                    "--image_size", 16, "--device", "cpu") == 0  # fmt: skip
    data = ("--data.source", "cache", "--data.path", str(tmp_path / "cache"))
    sizes = ("--mae.preset", "null", "--mae.in_channels", "3", "--mae.input_size", "16", "--mae.num_classes", "10")
    train_mae.main([*TINY_MAE, *sizes, *data, "--steps", "2", "--output_dir", str(tmp_path / "mae")])
    shape = ("--generator.in_channels", "3", "--generator.input_size", "16", "--generator.patch_size", "4")
    arguments = [*TINY_GENERATOR, *shape, *data, "--encoder.path", str(tmp_path / "mae/exports/ema_0.99"), "--steps", "1"]
    for seed in (0, 1):
        chosen = ("--positives.choice", "farthest", "--positives.map", "layer1", "--seed", str(seed))
        train.main([*arguments, *chosen, "--output_dir", str(tmp_path / f"run{seed}")])
    assert len(list((tmp_path / "cache/class_neighbours").glob("*/neighbours.npy"))) == 1
    assert run_tool("verify_cache", tmp_path / "cache", "--mode", "full") == 0
