"""Samples that do not depend on how they are asked for.

Sample i has its own noise and style indices, and always runs at row i % chunk of a batch of `chunk` rows, whatever else
is asked for: matrix products may round differently for another batch shape or another row.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from drift_accel.sampling.draws import sample_noise, sample_styles

CHUNK = 64


def balanced_labels(num_samples: int, num_classes: int) -> Tensor:
    """Return the labels of samples 0..num_samples-1, int64 [num_samples]: sample i has class i % num_classes.

    Classes differ by at most one sample; 50,000 samples of 1,000 classes are exactly 50 each. The label of a sample does
    not depend on num_samples. Raises ValueError for a negative number of samples or fewer than one class.
    """
    if num_samples < 0 or num_classes < 1:
        raise ValueError(f"need num_samples >= 0 and num_classes >= 1, got {num_samples} and {num_classes}")
    return torch.arange(num_samples, dtype=torch.int64) % num_classes


def generate(
    generator: nn.Module,
    labels: Tensor | Sequence[int],
    *,
    guidance_scale: float | Tensor | Sequence[float],
    seed: int,
    first_index: int = 0,
    chunk: int = CHUNK,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the generator's output for samples first_index..first_index+N-1, float32 [N, C, H, W], in its own space.

    labels [N] in [0, num_classes); guidance_scale: one number, or one a sample [N]; seed: an integer in [0, 2^64);
    device: where the result is gathered (None: where the generator lies, which is where it is computed).
    The same sample has the same bits however the indices are cut into calls, for one device, library version, thread
    count and `chunk`. The generator runs in evaluation mode and gets its mode back; no gradient is recorded.
    Raises ValueError for labels out of range and lengths that differ.
    """
    config = generator.config
    labels = torch.as_tensor(labels, dtype=torch.int64).cpu()
    if labels.ndim != 1:
        raise ValueError(f"labels must be one-dimensional, got shape {list(labels.shape)}; pass one label a sample")
    outside = labels[(labels < 0) | (labels >= config.num_classes)]
    if outside.numel():
        raise ValueError(f"label {outside[0].item()} is outside [0, {config.num_classes}), the generator's classes")
    guidance = torch.as_tensor(guidance_scale, dtype=torch.float32).cpu()
    if guidance.ndim > 1 or (guidance.ndim == 1 and guidance.shape != labels.shape):
        raise ValueError(f"guidance_scale must be a number or [{len(labels)}], got shape {list(guidance.shape)}")
    guidance = guidance.expand(labels.shape)
    if chunk < 1 or first_index < 0:
        raise ValueError(f"need chunk >= 1 and first_index >= 0, got {chunk} and {first_index}")

    device = next(generator.parameters()).device if device is None else torch.device(device)
    shape = (len(labels), config.in_channels, config.input_size, config.input_size)
    # Made outside inference mode, so that the caller gets an ordinary tensor.
    images = torch.empty(shape, dtype=torch.float32, device=device)
    end = first_index + len(labels)
    with _evaluation_mode(generator), torch.inference_mode():
        for start in range(first_index - first_index % chunk, end, chunk):
            indices = range(max(start, first_index), min(start + chunk, end))
            asked = slice(indices.start - first_index, indices.stop - first_index)
            rows = slice(indices.start - start, indices.stop - start)
            output = _run_chunk(generator, labels[asked], guidance[asked], seed, indices, rows, chunk)
            images[asked] = output[rows].to(device=device, dtype=torch.float32)
    return images


def _run_chunk(
    generator: nn.Module, labels: Tensor, guidance: Tensor, seed: int, indices: range, rows: slice, chunk: int
) -> Tensor:
    """Return the output [chunk, C, H, W] with samples `indices` at `rows`; the other rows are padding."""
    config, device = generator.config, next(generator.parameters()).device

    def padded(values: Tensor, fill: float) -> Tensor:
        batch = torch.full((chunk, *values.shape[1:]), fill, dtype=values.dtype)
        batch[rows] = values
        return batch.to(device)

    noise = padded(sample_noise(config, seed, indices), 0.0)  # [chunk, C, H, W]
    styles = padded(sample_styles(config, seed, indices), 0)  # [chunk, K]
    return generator(noise, padded(labels, 0), padded(guidance, 1.0), styles)


@contextlib.contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode, and each back in its own mode afterwards."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
