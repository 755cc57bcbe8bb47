"""foundation.random_streams: one address gives the same numbers, another one others, nothing global is used."""

import numpy
import pytest
import torch

from drift_accel.foundation.random_streams import integer_draws, normal_draws, random_stream, uniform_draws

SHAPE = (2, 3)
DRAWS = {
    "normal": lambda seed=5, stream="noise", index=7, slots=range(6): normal_draws(seed, stream, index, slots, SHAPE),
    "uniform": lambda seed=5, stream="noise", index=7, slots=range(6): uniform_draws(seed, stream, index, slots, SHAPE),
    "integer": lambda seed=5, stream="noise", index=7, slots=range(6): integer_draws(
        seed, stream, index, slots, SHAPE, high=1 << 40
    ),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_rows_do_not_depend_on_the_order_or_the_split_of_the_slots(draw):
    whole = draw()
    assert whole.shape == (6, *SHAPE)
    for split in ([[0, 1, 2], [3, 4, 5]], [[0], [1, 2, 3, 4], [5]], [[5], [3, 1], [0, 2, 4]]):
        for slots in reversed(split):
            numpy.testing.assert_array_equal(draw(slots=slots), whole[slots])


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_part_of_the_address_counts(draw):
    rows = [draw(**part) for part in ({}, {"seed": 6}, {"stream": "noisf"}, {"index": 8}, {"slots": range(6, 12)})]
    values = numpy.concatenate([row.reshape(-1) for row in rows])
    # 180 numbers of 24 bits or more: about one pair in a thousand such tests would be equal by chance.
    assert len(numpy.unique(values)) == len(values)


def test_index_and_slot_are_not_exchangeable_and_blocks_do_not_run_into_the_next_slot():
    streams = [random_stream(1, "noise", index, slot) for index in range(3) for slot in range(3)]
    words = [stream.bit_generator.random_raw(4000) for stream in streams]
    assert len(numpy.unique(numpy.concatenate(words))) == 9 * 4000


def test_the_stream_is_pinned():
    # Philox is fixed for good: a change here would change every run that anybody resumes.
    generator = random_stream(1, "a", 2, 3)
    assert generator.bit_generator.random_raw(2).tolist() == [11360905196665795680, 1103609046618705882]


def test_float64_is_the_cast_of_float32():
    for draw in (normal_draws, uniform_draws):
        single, double = (draw(0, "noise", 0, [4, 9], (50,), dtype) for dtype in ("float32", "float64"))
        assert single.dtype == numpy.float32
        assert double.dtype == numpy.float64
        numpy.testing.assert_array_equal(single.astype(numpy.float64), double)


def test_statistics():
    # 200,000 numbers: the bounds are five standard errors.
    normal = normal_draws(3, "noise", 0, range(200), (1000,), "float64")
    assert abs(normal.mean()) < 5 / 200_000**0.5
    assert abs(normal.var() - 1) < 5 * (2 / 200_000) ** 0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / 200_000) ** 0.5
    neighbours = (normal[:-1] * normal[1:]).mean()
    assert abs(neighbours) < 5 / 199_000**0.5
    uniform = uniform_draws(3, "noise", 0, range(200), (1000,), "float64")
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5
    counts = numpy.bincount(integer_draws(3, "labels", 0, range(200), (1000,), high=10).reshape(-1), minlength=10)
    assert len(counts) == 10
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 35  # chi-squared, 9 degrees of freedom: p = 6e-5


def test_extreme_arguments():
    last = 2**64 - 1
    assert random_stream(last, "noise", last, last).random() < 1
    assert integer_draws(0, "labels", 0, [0], (3,), high=1).tolist() == [[0, 0, 0]]
    assert integer_draws(0, "labels", 0, [0], (3,), high=2**63).min() >= 0
    assert normal_draws(0, "noise", 0, [], (2,)).shape == (0, 2)
    assert normal_draws(numpy.int64(0), "noise", numpy.int64(0), numpy.arange(2), ()).shape == (2,)


def test_no_global_generator_is_read_or_changed(monkeypatch):
    before = {name: draw() for name, draw in DRAWS.items()}
    numpy.random.seed(123)
    torch.manual_seed(123)
    numpy_state, torch_state = numpy.random.get_state()[1].copy(), torch.get_rng_state()

    def poisoned(*_, **__):
        raise AssertionError("a global generator was used")

    for owner, name in (
        (numpy.random, "normal"),
        (numpy.random, "rand"),
        (numpy.random, "randint"),
        (numpy.random, "default_rng"),
        (torch, "randn"),
        (torch, "rand"),
        (torch, "randint"),
    ):
        monkeypatch.setattr(owner, name, poisoned)
    for name, draw in DRAWS.items():
        numpy.testing.assert_array_equal(draw(), before[name])
    numpy.testing.assert_array_equal(numpy.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("name", ["seed", "index", "slot"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_integers_out_of_range_are_refused(name, value):
    arguments = {"seed": 0, "index": 0, "slot": 0} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be in"):
        random_stream(stream="noise", **arguments)


def test_other_refusals():
    with pytest.raises(ValueError, match="name"):
        random_stream(0, "", 0)
    with pytest.raises(TypeError):
        random_stream(0.5, "noise", 0)
    with pytest.raises(ValueError, match="dtype"):
        normal_draws(0, "noise", 0, [0], (1,), "float16")
    for high in (0, -1, 2**63 + 1):
        with pytest.raises(ValueError, match="high"):
            integer_draws(0, "labels", 0, [0], (1,), high=high)
