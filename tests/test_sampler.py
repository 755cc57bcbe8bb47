"""Samples depend on (seed, index, label, guidance) alone, not on how they are asked for."""

from types import SimpleNamespace

import pytest
import torch

from drift_accel.models import Generator
from drift_accel.sampling import balanced_labels, generate, sample_noise, sample_styles

TINY = {
    "input_size": 8,
    "in_channels": 1,
    "patch_size": 2,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 10,
    "num_style_tokens": 3,
    "style_codebook_size": 5,
    "num_context_tokens": 2,
}


@pytest.fixture(scope="module")
def generator() -> Generator:
    model = Generator(**TINY)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # the initial output layer is zero
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=random))
    return model


def test_draws_depend_on_seed_and_index_alone():
    config = SimpleNamespace(**TINY)
    noise, styles = sample_noise(config, 3, range(100)), sample_styles(config, 3, range(100))
    assert noise.shape == (100, 1, 8, 8) and noise.dtype == torch.float32
    assert styles.shape == (100, 3) and styles.dtype == torch.int64
    assert styles.min() == 0 and styles.max() == 4
    assert torch.equal(sample_noise(config, 3, [70, 5]), noise[[70, 5]])
    assert torch.equal(sample_styles(config, 3, [70, 5]), styles[[70, 5]])
    assert not torch.equal(sample_noise(config, 4, [5]), noise[[5]])
    assert len(noise.unique(dim=0)) == 100
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05


def test_a_generator_without_style_gets_no_style_indices():
    config = SimpleNamespace(**{**TINY, "num_style_tokens": 0})
    assert sample_styles(config, 0, range(4)).shape == (4, 0)
    model = Generator(**{**TINY, "num_style_tokens": 0})
    assert generate(model, [1, 2], guidance_scale=1.0, seed=0).shape == (2, 1, 8, 8)


def test_balanced_labels():
    assert torch.equal(balanced_labels(50_000, 1000).bincount(), torch.full((1000,), 50))
    assert balanced_labels(5, 3).tolist() == [0, 1, 2, 0, 1]
    assert balanced_labels(0, 3).tolist() == []
    with pytest.raises(ValueError, match="num_classes >= 1"):
        balanced_labels(5, 0)


@pytest.mark.parametrize("cuts", [[150], [1, 63, 64, 65], [30, 31, 129], list(range(10, 150, 10))])
def test_pieces_equal_the_whole_bit_by_bit(generator, cuts):
    labels = balanced_labels(150, 10)
    guidance = torch.linspace(1.0, 3.0, 150)
    whole = generate(generator, labels, guidance_scale=guidance, seed=7)
    assert whole.shape == (150, 1, 8, 8) and whole.dtype == torch.float32
    assert len(whole.unique(dim=0)) == 150
    borders = [0, *cuts, 150]
    pieces = [
        generate(generator, labels[start:end], guidance_scale=guidance[start:end], seed=7, first_index=start)
        for start, end in zip(borders, borders[1:], strict=False)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_matches_a_direct_call_and_other_chunks_up_to_rounding(generator):
    labels = balanced_labels(20, 10)
    images = generate(generator, labels, guidance_scale=1.5, seed=2, first_index=50)
    indices = range(50, 70)
    with torch.no_grad():
        direct = generator(
            sample_noise(generator.config, 2, indices), labels, torch.full((20,), 1.5),
            sample_styles(generator.config, 2, indices),
        )  # fmt: skip
    torch.testing.assert_close(images, direct, rtol=1e-4, atol=1e-5)
    other = generate(generator, labels, guidance_scale=1.5, seed=2, first_index=50, chunk=7)
    torch.testing.assert_close(images, other, rtol=1e-4, atol=1e-5)


def test_every_chunk_has_one_shape(generator, monkeypatch):
    shapes = []
    monkeypatch.setattr(generator, "forward", lambda noise, *others: shapes.append(tuple(noise.shape)) or noise)
    assert generate(generator, [0] * 70, guidance_scale=1.0, seed=0, first_index=60).shape[0] == 70
    assert shapes == [(64, 1, 8, 8)] * 3


def test_modes_gradients_and_global_generator_stay_as_they_were(generator):
    generator.train()
    generator.blocks[0].eval()
    before = torch.get_rng_state()
    images = generate(generator, [0], guidance_scale=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert generator.training and not generator.blocks[0].training and generator.blocks[1].training
    assert not images.requires_grad
    weight = torch.ones(1, requires_grad=True)
    (images * weight).sum().backward()  # an inference tensor could not be saved for backward


def test_modes_are_restored_after_an_error(generator, monkeypatch):
    def fail(*inputs):
        raise RuntimeError("broken")

    monkeypatch.setattr(generator, "forward", fail)
    generator.train()
    with pytest.raises(RuntimeError, match="broken"):
        generate(generator, [0], guidance_scale=1.0, seed=0)
    assert generator.training


def test_no_labels_give_no_images(generator):
    assert generate(generator, [], guidance_scale=1.0, seed=0).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([3, 10], {}, r"label 10 is outside \[0, 10\)"),
        ([-1], {}, "label -1 is outside"),
        ([[1, 2]], {}, "one-dimensional"),
        ([1, 2], {"guidance_scale": [1.0]}, "guidance_scale must be a number or .2."),
        ([1], {"chunk": 0}, "chunk >= 1"),
        ([1], {"first_index": -1}, "first_index >= 0"),
    ],
)
def test_refuses_bad_input(generator, labels, options, message):
    with pytest.raises(ValueError, match=message):
        generate(generator, labels, **{"guidance_scale": 1.0, "seed": 0, **options})
