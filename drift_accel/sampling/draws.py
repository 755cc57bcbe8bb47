"""What a sample is made of, as a function of (seed, sample index) alone: its noise and its style indices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from drift_accel.foundation.random_streams import integer_draws, normal_draws

# Stream names are part of the meaning of a seed: renaming one changes every sample.
NOISE_STREAM = "sample_noise"
STYLE_STREAM = "sample_styles"


def sample_noise(generator_config: Any, seed: int, indices: Sequence[int]) -> Tensor:
    """Return the input noise of the samples `indices`, float32 [N, C, H, W] on the CPU, standard normal.

    `generator_config` has `in_channels` and `input_size` (a Generator's `config`). Row i depends on (seed, indices[i])
    alone. Raises ValueError for a seed or an index outside [0, 2^64).
    """
    shape = (generator_config.in_channels, generator_config.input_size, generator_config.input_size)
    return torch.from_numpy(normal_draws(seed, NOISE_STREAM, 0, indices, shape))


def sample_styles(generator_config: Any, seed: int, indices: Sequence[int]) -> Tensor:
    """Return the style indices of the samples `indices`, int64 [N, K] on the CPU, uniform in [0, codebook size).

    `generator_config` has `num_style_tokens` (K, may be 0) and `style_codebook_size`. Row i depends on
    (seed, indices[i]) alone. Raises ValueError for a seed or an index outside [0, 2^64).
    """
    num_tokens = generator_config.num_style_tokens
    if num_tokens == 0:
        return torch.zeros((len(indices), 0), dtype=torch.int64)
    return torch.from_numpy(integer_draws(seed, STYLE_STREAM, 0, indices, (num_tokens,), generator_config.style_codebook_size))
