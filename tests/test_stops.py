"""training.stops and training.finite_gate: wishes, their exchange, and steps that are not finite, on one process."""

import os
import signal
import threading

import pytest
import torch

from drift_accel.training.finite_gate import FiniteGate, NonFiniteError, tolerated_steps
from drift_accel.training.stops import EXIT_STOPPED, REASONS, Exchange, StopWishes


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")])
def test_a_signal_becomes_a_wish_and_a_second_one_changes_nothing(number, name):
    before = signal.getsignal(number)
    with StopWishes() as wishes:
        assert wishes.code == 0
        os.kill(os.getpid(), number)
        assert REASONS[wishes.code] == name
        os.kill(os.getpid(), signal.SIGTERM)
        assert REASONS[wishes.code] == name
    assert signal.getsignal(number) == before
    assert EXIT_STOPPED == os.EX_TEMPFAIL


def test_the_time_limit_becomes_a_wish():
    now = [100.0]
    wishes = StopWishes(0.5, clock=lambda: now[0])
    assert wishes.code == 0
    now[0] += 1800
    assert REASONS[wishes.code] == "max_hours"


def test_another_thread_catches_no_signals():
    def catch():
        with StopWishes() as wishes:
            codes.append(wishes.code)

    codes = []
    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    assert codes == [0]


def test_an_exchange_is_read_one_later():
    exchange = Exchange(torch.device("cpu"))
    assert exchange.swap(2, 0) == (0, 0)
    assert exchange.swap(0, 1) == (2, 0)
    assert exchange.swap(0, 0) == (0, 1)
    assert exchange.agree(3) == (3,)


def test_policies():
    assert (tolerated_steps("stop"), tolerated_steps("skip:3")) == (0, 3)
    for policy in ("skip", "skip:", "skip:0", "skip:-1", "skip:1.5", "go", "", "skip:²"):
        with pytest.raises(ValueError, match="nonfinite is .*skip:3"):
            tolerated_steps(policy)


def flag(value: float) -> torch.Tensor:
    return torch.tensor(value)


METRICS = {"scale/conv1": torch.tensor(float("nan")), "loss": torch.tensor(1.0)}


def test_the_gate_names_the_step_one_later_and_stays_shut():
    gate = FiniteGate()
    gate.watch(1, flag(0.0), METRICS)
    gate.watch(2, flag(1.0), METRICS)
    assert gate.held.item() == 1
    with pytest.raises(NonFiniteError, match=r"step 2: not finite: scale/conv1\. The weights are untouched"):
        gate.watch(3, flag(1.0), METRICS)
    gate.check()


def test_the_gate_names_the_gradient_where_all_metrics_are_finite():
    gate = FiniteGate()
    gate.watch(1, flag(1.0), {"loss": torch.tensor(1.0)})
    with pytest.raises(NonFiniteError, match="step 1: not finite: the gradient"):
        gate.check()


def test_tolerated_steps_are_counted_in_a_row_and_in_all():
    told = []
    gate = FiniteGate("skip:2", log=told.append)
    for step, value in enumerate([1, 1, 0, 1, 1], start=1):
        gate.watch(step, flag(float(value)), METRICS)
    gate.check()
    assert gate.held is None and gate.skipped == 4 and len(told) == 4
    assert "step 2: not finite: scale/conv1. The step is skipped (2 in a row, 2 are tolerated)" in told[1]
    gate.watch(6, flag(1.0), METRICS)
    with pytest.raises(NonFiniteError, match="step 3 in a row; nonfinite tolerates 2"):
        gate.check()
