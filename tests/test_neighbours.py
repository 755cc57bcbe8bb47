"""Nearest training pictures: equal to brute force, copies found, the picture, the tool."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_models import call_tool, write_encoder, write_export

from drift_accel.evaluation.neighbour_search import shown_samples
from drift_accel.evaluation.neighbours import find_neighbours, neighbour_picture, summarise


def points(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 7)).astype(np.float32)


@pytest.mark.parametrize("cut", [[], [1, 5, 6], list(range(4, 90, 4))])
def test_neighbours_are_those_of_brute_force(cut):
    queries, training = points(11, 0), points(90, 1)
    found = find_neighbours(queries, np.split(training, cut), k=4)
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - training[None], axis=2)
    assert np.array_equal(found.indices, np.argsort(distances, axis=1, kind="stable")[:, :4])
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :4], rtol=1e-12)


def test_copies_are_at_distance_zero_and_ties_go_to_the_smaller_index():
    training = points(30, 1) + 1e4  # far from zero, where an expanded square would lose the small distance
    training[20] = training[3]
    found = find_neighbours(training[[3, 7]], np.array_split(training, 4), k=2)
    assert found.distances[0].tolist() == [0.0, 0.0] and found.indices[0].tolist() == [3, 20]
    assert found.distances[1, 0] == 0.0 and found.distances[1, 1] > 0.1


def test_memorised_samples_are_seen_in_the_summary():
    training, held_out = points(500, 0), points(300, 1)
    fresh, copied = points(300, 2), training[:300] + 0.01
    nearest = {
        name: find_neighbours(queries, [training], k=1).distances[:, 0]
        for name, queries in (("held_out", held_out), ("fresh", fresh), ("copied", copied))
    }
    assert summarise(nearest["fresh"], nearest["held_out"])["share_nearer_than_real"] < 0.05
    assert summarise(nearest["copied"], nearest["held_out"])["share_nearer_than_real"] > 0.9
    alone = summarise(nearest["fresh"], None)
    assert alone["held_out"] is None and alone["generated"]["0"] == nearest["fresh"].min()


def test_the_picture_shows_each_training_picture_in_its_place():
    samples = np.full((2, 8, 8, 1), 9, np.uint8)
    training = np.stack([np.full((8, 8, 3), 10 * index + 5, np.uint8) for index in range(6)])
    queries = np.array([[0.1], [4.2]], np.float32)
    found = find_neighbours(queries, [np.arange(6, dtype=np.float32)[:, None]], k=3)
    picture = neighbour_picture(samples, [0, 1], found, lambda index: training[index])
    row = picture[14 + 16 + 32]  # the middle of the first row of cells
    seen = [value for value in dict.fromkeys(row[:, 0].tolist()) if value % 10 == 5 and value < 60]
    assert seen == [5, 15, 25] and 9 in row[:, 0]


def test_shown_samples_are_balanced_over_classes():
    labels = np.arange(60) % 20
    assert shown_samples(labels, 2) == [index for label in range(10) for index in (label, label + 20)]
    assert shown_samples(np.array([3, 3, 1]), 1) == [2, 0]


@pytest.mark.parametrize(
    ("queries", "arrays", "k", "message"),
    [
        (points(0, 0), [points(5, 1)], 1, "at least one row"),
        (points(2, 0), [points(5, 1)], 0, "k at least 1"),
        (points(2, 0), [points(5, 1)], 6, "there are 5 training pictures, 6 neighbours were asked for"),
        (points(2, 0), [np.zeros((5, 3), np.float32)], 1, "use one network"),
        (np.full((2, 7), np.nan), [points(5, 1)], 1, "queries hold a NaN"),
        (points(2, 0), [np.full((5, 7), np.inf)], 1, "training features hold a NaN"),
    ],
)
def test_refuses_bad_input(queries, arrays, k, message):
    with pytest.raises(ValueError, match=message):
        find_neighbours(queries, arrays, k)


def test_the_tool(tmp_path):
    write_export(tmp_path / "export")
    network = ("--protocol", "encoder", "--network", write_encoder(tmp_path / "mae"), "--layer", "layer1_blk1", "--cpu")
    command = (tmp_path / "export", "--training", "digits:train", "--held_out", "digits", "--num_held_out", 100, *network)
    command += ("--num_samples", 40, "--output", tmp_path / "near")
    printed = call_tool("nearest_neighbours", *command)
    assert "held-out" in printed and "samples nearer than the nearest 1 %" in printed
    record = json.loads((tmp_path / "near.json").read_text())
    assert record["training"]["source"] == "digits, train" and record["held_out"]["num_pictures"] == 100
    assert record["nearest_distance"]["held_out"]["0.5"] > 0 and record["protocol"]["network_sha256"]
    assert Image.open(tmp_path / "near.png").size[1] > 4 * 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "mae", "near.json", "near.png"]
    assert "add --overwrite" in call_tool("nearest_neighbours", *command, status=2)
    small = (*command[:1], "--training", "digits", "--k", 601, *network, "--num_samples", 4, "--output", tmp_path / "x")
    assert "there are 600 training pictures, 601 neighbours" in call_tool("nearest_neighbours", *small, status=2)
