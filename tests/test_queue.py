"""The sample queue against an independent simulation with plain lists, its refusals, and its state."""

from collections import deque

import numpy as np
import pytest
from tiny_runs import checkpoint_tensors, generator_arguments, metrics, tiny_encoder

from drift_accel import train
from drift_accel.data.labelled_images import LabelledImages
from drift_accel.data.queue import QueueConfig, SampleQueue


def source_of(counts, names=None):
    """Images whose single pixel is their row number."""
    labels = np.repeat(np.arange(len(counts)), counts)
    order = np.random.default_rng(5).permutation(len(labels))
    images = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
    return LabelledImages(images, labels[order], names or [f"class {k}" for k in range(len(counts))])


CONFIG = QueueConfig(per_class=8, unconditional=30, push=6)


def queue_of(source, config=CONFIG, seed=3, positives=4, negatives=5):
    return SampleQueue(source, config, seed, positives=positives, negatives=negatives)


def test_contents_age_and_coverage_equal_a_simulation_over_500_steps():
    """Every step pushes `push` new rows of shuffled passes; a class keeps its last 8, the whole stream its last 30."""
    source = source_of([40, 25, 10])
    queue = queue_of(source)
    by_class, everything, pushed = [deque(maxlen=8) for _ in range(3)], deque(maxlen=30), []
    ages, seen = [], set()
    queue.warm_up()
    warm = queue.state.pushes
    for step in range(500):
        queue.advance(step)
        pushes = queue.state.pushes
        assert pushes == warm + step + 1
        while len(pushed) < pushes * 6:  # the passes themselves: every row once a pass, taken from what the queue holds last
            fresh = queue.state.ring[(len(pushed) + np.arange(6)) % 30] if len(pushed) // 6 == pushes - 1 else None
            if fresh is None:
                fresh = replay(source, len(pushed) // 6)
            for row in fresh:
                pushed.append(int(row))
                by_class[source.labels[row]].append(int(row))
                everything.append(int(row))
        for label in range(3):
            held = queue.state.class_rings[label]
            assert sorted(held[held >= 0]) == sorted(by_class[label])
        assert sorted(queue.state.ring[queue.state.ring >= 0]) == sorted(everything)
        rows = queue.negatives(step, np.array([0]))[0]
        ages += [len(pushed) - 1 - max(i for i, row in enumerate(pushed) if row == r) for r in rows]
        seen |= set(rows.tolist())
    for start in range(0, len(pushed) - 75, 75):
        assert sorted(pushed[start : start + 75]) == list(range(75)), "a pass repeats or misses a row"
    assert max(ages) < 30 and abs(np.mean(ages) - 14.5) < 1.5  # negatives are uniform over the last 30
    assert seen == set(range(75))


def replay(source, push):
    """The rows of one push of the warm-up, from a second queue."""
    other = queue_of(source)
    for _ in range(push + 1):
        other.push()
    return other.state.ring[(push * 6 + np.arange(6)) % 30]


def test_draws_are_of_the_class_without_repeats_and_independent_of_the_split():
    queue = queue_of(source_of([400, 250, 300]))
    queue.warm_up()
    labels = np.array([2, 0, 1, 2, 1])
    for step in range(60):
        queue.advance(step)
        rows = queue.positives(step, np.arange(5), labels)
        assert (queue.source.labels[rows] == labels[:, None]).all()
        assert all(len(set(draw)) == 4 for draw in rows.tolist())
        assert np.array_equal(queue.positives(step, np.arange(2, 4), labels[2:4]), rows[2:4])
        negatives = queue.negatives(step, np.arange(5))
        assert all(len(set(draw)) == 5 for draw in negatives.tolist())
        assert np.array_equal(queue.negatives(step, np.array([4])), negatives[4:])


def test_uniform_over_what_the_class_queue_holds():
    queue = queue_of(source_of([30, 30]))
    queue.warm_up()
    for _ in range(40):
        queue.push()
    held = set(queue.state.class_rings[1].tolist())
    rows, counts = np.unique(queue.positives(0, np.arange(4000), np.ones(4000, int)), return_counts=True)
    assert set(rows) == held
    assert np.allclose(counts, 4000 * 4 / len(held), rtol=0.1)


def test_a_row_that_is_held_twice_is_drawn_once():
    """A class as small as its ring: the ring spans the end of a pass and holds some rows twice."""
    queue = queue_of(source_of([10]), QueueConfig(per_class=8, unconditional=30, push=6), positives=4)
    for _ in range(40):
        queue.push()
        rows = queue.positives(queue.state.pushes, np.arange(20), np.zeros(20, int))
        assert all(len(set(draw)) == 4 for draw in rows.tolist())


def test_warm_up_reports_and_stops_when_every_class_is_ready():
    reports = []
    queue = queue_of(source_of([60, 3]))
    queue.warm_up(lambda ready, wanted: reports.append((ready, wanted)))
    assert reports[-1] == (2, 2) and all(ready < 2 for ready, _ in reports[:-1])
    assert queue.positives(0, np.arange(1), np.array([1])).shape == (1, 4)  # 3 images for 4 places: some repeat


def test_a_class_without_images_is_named():
    source = source_of([5, 0, 5, 0], ["ant", "bee", "cat", "dog"])
    with pytest.raises(ValueError, match="no samples of class bee, dog: add images"):
        queue_of(source).warm_up()


def test_queues_smaller_than_a_draw_are_refused():
    with pytest.raises(ValueError, match="queue.per_class is 8, fewer than the 9 positives"):
        queue_of(source_of([20]), positives=9)
    with pytest.raises(ValueError, match="queue.unconditional is 30, fewer than the 31 negatives"):
        queue_of(source_of([20]), negatives=31)


def test_state_goes_on_where_it_was_and_refuses_other_sizes_and_steps_out_of_turn():
    source = source_of([40, 25])
    first, second = queue_of(source), queue_of(source)
    first.warm_up()
    for step in range(7):
        first.advance(step)
    saved = {name: array.copy() for name, array in first.state_arrays().items()}
    first.advance(7)
    second.load_state_arrays(saved)
    second.advance(7)
    assert np.array_equal(
        first.positives(7, np.arange(3), np.array([0, 1, 1])), second.positives(7, np.arange(3), np.array([0, 1, 1]))
    )
    with pytest.raises(RuntimeError, match="stands at step 8 and cannot serve step 10"):
        first.advance(10)
    with pytest.raises(ValueError, match="sample queue has arrays"):
        queue_of(source, QueueConfig(per_class=9, unconditional=30, push=6)).load_state_arrays(saved)


def test_a_run_with_a_queue_resumes_to_the_bit(tmp_path):
    encoder = tiny_encoder(tmp_path / "mae")
    queue = ("--data.queue.per_class", "10", "--data.queue.unconditional", "40", "--data.queue.push", "16")
    for name, stops in (("whole", ("6",)), ("parts", ("4", "6"))):
        for steps in stops:
            train.main(generator_arguments(encoder, tmp_path / name, *queue, "--steps", steps, "--checkpoint.every", "2"))
    whole, parts = (checkpoint_tensors(tmp_path / name, 6) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and "data/class_rings" in whole
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert [r["loss"] for r in metrics(tmp_path / "whole").values()] == [r["loss"] for r in metrics(tmp_path / "parts").values()]
