"""Random numbers as a pure function of (seed, stream, index, slot).

Every draw of a run has an address: the run's seed, the name of what is drawn ("noise", "labels"), an index (the
training step or the sample's number) and a slot (the position in the batch). An address always gives the same numbers,
so any number of processes, any micro-batch and any restart see the same draws, and no state has to be saved.
No global generator is read or written.

The numbers come from Philox 4x64: the key is (seed, 64-bit hash of the stream name); the counter's two high words are
(slot, index) and its two low words count the blocks of one stream, so streams cannot overlap before 2^128 blocks.
numpy fixes Philox itself for good, and its distributions within a version: provenance records numpy's version.
"""

import hashlib
import operator
from collections.abc import Sequence

import numpy

_WORD = 2**64
_FLOAT_DTYPES = ("float32", "float64")


def random_stream(seed: int, stream: str, index: int, slot: int = 0) -> numpy.random.Generator:
    """The generator that belongs to one address, at its first number.

    `seed`, `index` and `slot` are integers in [0, 2^64); `stream` is a name that is not empty.
    Raises ValueError for an integer out of range or an empty name, TypeError for something that is no integer.
    """
    key = numpy.array([_word(seed, "seed"), _stream_word(stream)], dtype=numpy.uint64)
    counter = numpy.array([0, 0, _word(slot, "slot"), _word(index, "index")], dtype=numpy.uint64)
    return numpy.random.Generator(numpy.random.Philox(counter=counter, key=key))


def normal_draws(
    seed: int, stream: str, index: int, slots: Sequence[int], shape: Sequence[int], dtype: str = "float32"
) -> numpy.ndarray:
    """Standard normal numbers, [len(slots), *shape], one independent stream a slot.

    `dtype` is "float32" or "float64". Both draw in float32 and float64 is the exact cast, so a float64 run sees the
    same draws as a float32 run. Raises ValueError for another dtype and as `random_stream` does.
    """
    return _float_draws(
        lambda generator, size: generator.standard_normal(size, dtype=numpy.float32), seed, stream, index, slots, shape, dtype
    )


def uniform_draws(
    seed: int, stream: str, index: int, slots: Sequence[int], shape: Sequence[int], dtype: str = "float32"
) -> numpy.ndarray:
    """Numbers uniform in [0, 1), [len(slots), *shape], one independent stream a slot.

    `dtype` is "float32" or "float64"; both draw in float32 (steps of 2^-24), see `normal_draws`.
    Raises ValueError for another dtype and as `random_stream` does.
    """
    return _float_draws(
        lambda generator, size: generator.random(size, dtype=numpy.float32), seed, stream, index, slots, shape, dtype
    )


def integer_draws(seed: int, stream: str, index: int, slots: Sequence[int], shape: Sequence[int], high: int) -> numpy.ndarray:
    """Integers uniform in [0, high), int64 [len(slots), *shape], one independent stream a slot.

    Raises ValueError unless 1 <= high <= 2^63, and as `random_stream` does.
    """
    high = operator.index(high)
    if not 1 <= high <= 2**63:
        raise ValueError(f"high must be in [1, 2^63], got {high}")
    draws = numpy.empty((len(slots), *shape), dtype=numpy.int64)
    for row, slot in enumerate(slots):
        draws[row] = random_stream(seed, stream, index, slot).integers(high, size=tuple(shape), dtype=numpy.int64)
    return draws


def _float_draws(draw, seed, stream, index, slots, shape, dtype) -> numpy.ndarray:
    # float16 is refused: rounding could turn a uniform number into 1.0, and the caller can cast where that is harmless.
    if dtype not in _FLOAT_DTYPES:
        raise ValueError(f"dtype must be one of {_FLOAT_DTYPES}, got {dtype!r}")
    draws = numpy.empty((len(slots), *shape), dtype=dtype)
    for row, slot in enumerate(slots):
        draws[row] = draw(random_stream(seed, stream, index, slot), tuple(shape))
    return draws


def _word(value: int, name: str) -> int:
    value = operator.index(value)
    if not 0 <= value < _WORD:
        raise ValueError(f"{name} must be in [0, 2^64), got {value}")
    return value


def _stream_word(stream: str) -> int:
    if not isinstance(stream, str) or not stream:
        raise ValueError(f"the stream needs a name, a string that is not empty, got {stream!r}")
    return int.from_bytes(hashlib.blake2b(stream.encode("utf-8"), digest_size=8).digest(), "little")
