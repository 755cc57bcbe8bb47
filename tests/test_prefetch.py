"""Prefetch: order, look-ahead, errors, end."""

import threading

import pytest

from drift_accel.training.prefetch import Prefetch


def test_batches_come_in_order_and_one_step_ahead():
    drawn, drew = [], threading.Event()

    def draw(step):
        drawn.append(step)
        drew.set()
        return step * 10

    prefetch = Prefetch(draw, 3, 7)
    assert prefetch.take() == 30
    while drawn[-1] != 4:  # step 4 is drawn although nobody has asked for it
        drew.wait(5)
    assert [prefetch.take() for _ in range(3)] == [40, 50, 60]
    assert drawn == [3, 4, 5, 6]
    with pytest.raises(RuntimeError, match="after step 6"):
        prefetch.take()
    prefetch.close()


def test_an_error_reaches_the_step_it_belongs_to():
    def draw(step):
        if step == 1:
            raise ValueError("class 3 has no images")
        return step

    prefetch = Prefetch(draw, 0, 5)
    assert prefetch.take() == 0
    with pytest.raises(ValueError, match="class 3"):
        prefetch.take()
    prefetch.close()


def test_waiting_is_measured_and_reset():
    release = threading.Event()
    prefetch = Prefetch(lambda step: release.wait(0.05), 0, 2)
    prefetch.take()
    assert prefetch.read_waited() > 0.01
    assert prefetch.read_waited() == 0
    prefetch.close()


def test_nothing_is_drawn_for_a_finished_run():
    prefetch = Prefetch(lambda step: pytest.fail("drawn"), 5, 5)
    prefetch.close()
