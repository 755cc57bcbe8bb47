"""foundation.progress: a bar on a terminal, lines elsewhere, silence where it is not enabled."""

import io
import re

import pytest
import torch

from drift_accel.foundation import progress
from drift_accel.foundation.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    seconds = 1000.0

    def monotonic(self):
        return self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_file_gets_one_line_a_minute_and_a_last_one(clock):
    stream = io.StringIO()
    with Progress(1000, 100, "training", stream=stream) as bar:
        for step in range(150):
            clock.seconds += 1
            bar.update(loss=step / 4, phase="warm") if step % 10 == 0 else bar.update()
        assert bar.step == 250
    bar.close()
    assert stream.getvalue().splitlines() == [
        "training: step 160/1000, 1 steps/s, 00:14:00 left, loss 12.5, phase warm",
        "training: step 220/1000, 1 steps/s, 00:13:00 left, loss 27.5, phase warm",
        "training: step 250/1000, 1 steps/s, 00:12:30 left, loss 35, phase warm",
    ]


def test_the_line_at_the_end_and_long_waits(clock):
    stream = io.StringIO()
    with Progress(3, stream=stream, seconds_between_lines=10) as bar:
        clock.seconds += 10 + 2 * 86400
        bar.update()
        bar.update(2)
    first, last = stream.getvalue().splitlines()
    assert first.endswith("4d 00:00:20 left")
    assert last.startswith("step 3/3, ") and "left" not in last


def test_nothing_is_printed_without_steps_or_when_not_enabled(clock):
    for stream in (io.StringIO(), Terminal()):
        with Progress(10, enabled=False, stream=stream) as bar:
            clock.seconds += 1000
            bar.update(loss=1.0)
            bar.log("message")
        assert bar.step == 1
        assert stream.getvalue() == ""
    stream = io.StringIO()
    Progress(10, stream=stream).close()
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_and_messages_above_it():
    stream = Terminal()
    with Progress(10, 2, "sampling", stream=stream) as bar:
        bar.update(loss=0.123456)
        bar.log("a message")
        bar.update(7)
    bar.log("afterwards")
    text = stream.getvalue()
    assert re.search(r"\ra message\n", text.replace(" \r", "\r")) or "a message\n" in text
    assert text.endswith("afterwards\n")
    assert "sampling" in text and "10/10" in text and "loss=0.1235" in text
    assert text.count("a message") == 1


def test_messages_of_a_log_file_are_lines():
    stream = io.StringIO()
    with Progress(10, stream=stream) as bar:
        bar.log("a message")
    assert stream.getvalue() == "a message\n"


def test_a_tensor_is_not_read(clock):
    stream = io.StringIO()
    with Progress(2, stream=stream) as bar:
        bar.update(loss=torch.zeros((), device="meta"))
    assert "loss <Tensor>" in stream.getvalue()


@pytest.mark.parametrize(("total", "initial"), [(-1, 0), (3, 4), (3, -1)])
def test_impossible_counts_are_refused(total, initial):
    with pytest.raises(ValueError, match="0 <= initial <= total"):
        Progress(total, initial)
