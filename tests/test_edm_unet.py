"""The EDM network: its size, its arithmetic against diffusers' and by hand in float64, its layers and what it refuses."""

import math

import numpy as np
import pytest
import torch
from edm_networks import SMALL, TINY, diffusers_twin, published_shapes, random_network, twin_weights

from drift_accel.models import EdmUNet, check_edm_config
from drift_accel.models.edm_blocks import AdmBlock, attention, noise_embedding, resampled
from drift_accel.models.edm_preconditioning import preconditioning
from drift_accel.models.exports import load_export

# ADM's table 11 (arXiv 2105.05233, appendix I): "ImageNet 64, Model size 296M", channels 192, depth 3, multiples 1,2,3,4, heads
# of 64 channels, attention at 32, 16, 8, BigGAN up/downsample. EDM's network (arXiv 2206.00364, appendix F) is that one. Its file
# in float32 has 1.18 GB (huggingface.co/openai/diffusers-ct_imagenet64, unet/diffusion_pytorch_model.safetensors).
PUBLISHED_MILLIONS = 296
PUBLISHED_GIGABYTES = 1.18


@pytest.fixture(scope="module")
def published() -> EdmUNet:
    """The default network, without values."""
    with torch.device("meta"):
        return EdmUNet()


@pytest.fixture(scope="module")
def tiny() -> EdmUNet:
    return random_network(TINY)


def inputs(config: dict, count: int = 2, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(7)
    size = config["input_size"]
    images = torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype) * 2 - 1
    return images, torch.randint(config["num_classes"], (count,), generator=generator)


def count_by_level(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """{"enc.64x64": parameters, ..}: by half and size; the embedding's and the output's layers apart."""
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        level = name.split("_")[0] if name.startswith(("enc.", "dec.")) else name.rpartition(".")[0]
        counts[level] = counts.get(level, 0) + math.prod(shape)
    return counts


# Size


def test_the_number_of_weights_is_the_published_one(published):
    count = sum(parameter.numel() for parameter in published.parameters())
    assert count == 295_899_267
    assert round(count / 1e6) == PUBLISHED_MILLIONS
    assert round(4 * count / 1e9, 2) == PUBLISHED_GIGABYTES
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in diffusers_twin(dict(published.config)).parameters()) == count


def test_names_and_shapes_are_those_of_two_listings(published):
    """See `published_shapes`: 553 tensors in DMD2's file, of which 12 are constant filters."""
    listed = published_shapes()
    filters = [name for name in listed if name.endswith("resample_filter")]
    assert (len(listed), len(filters)) == (553, 12)
    ours = {f"model.{name}": tuple(value.shape) for name, value in published.state_dict().items()}
    assert ours == {name: shape for name, shape in listed.items() if name not in filters}


def test_each_level_has_its_share_of_the_weights(published):
    """The levels' numbers are those of diffusers' network, whose resampling blocks count to the level that they lead to."""
    counts = count_by_level({name: tuple(value.shape) for name, value in published.named_parameters()})
    assert counts == {
        "map_layer0": 192 * 768 + 768,
        "map_layer1": 768 * 768 + 768,
        "map_label": 768 * 1000,
        "enc.64x64": 2_885_376,
        "enc.32x32": 11_887_872,
        "enc.16x16": 27_048_768,
        "enc.8x8": 48_476_544,
        "dec.8x8": 107_121_792,
        "dec.16x16": 59_175_168,
        "dec.32x32": 28_710_912,
        "dec.64x64": 9_080_448,
        "out_norm": 2 * 192,
        "out_conv": 192 * 3 * 9 + 3,
    }
    assert published.map_label.weight.shape == (768, 1000)


# Arithmetic


@pytest.mark.parametrize(
    "config", [SMALL, {**SMALL, "channel_mult": [1, 2], "attention_resolutions": [16, 8]}], ids=["three", "two"]
)
def test_outputs_are_those_of_diffusers_network(config):
    """The network F from an independent implementation with the same weights, the preconditioning from the paper's formulas.

    diffusers computes the frequencies of the noise embedding in float32, hence 1e-7.
    """
    model = random_network(config)
    twin = diffusers_twin(config).double()
    twin.load_state_dict(twin_weights(model.state_dict(), config))
    images, labels = inputs(config)
    sigma = torch.tensor([0.7, 80.0], dtype=torch.float64)
    total = sigma**2 + 0.25
    with torch.no_grad():
        output = twin(images / total.sqrt()[:, None, None, None], sigma.log() / 4, labels).sample
        ours = model(images, sigma, labels)
    skip, scale = 0.25 / total, 0.5 * sigma / total.sqrt()
    expected = skip[:, None, None, None] * images + scale[:, None, None, None] * output
    assert (ours - expected).norm() / expected.norm() < 1e-7
    assert output.std() > 0.1, "an output of nothing would agree with anything"


@pytest.mark.slow
def test_the_full_network_is_diffusers_network():
    model = random_network({}, dtype=torch.float32)
    config = dict(model.config)
    with torch.device("meta"):
        twin = diffusers_twin(config)
    twin.load_state_dict(twin_weights(model.state_dict(), config), assign=True)
    images, labels = inputs(config, 1, torch.float32)
    with torch.no_grad():
        ours = model.generate(images, labels)
        sigma = torch.tensor([80.0])
        factors = preconditioning(sigma, 0.5)
        output = twin(factors.input * 80 * images, factors.noise, labels).sample
        expected = factors.skip * 80 * images + factors.output * output
    assert torch.isfinite(ours).all() and ours.shape == (1, 3, 64, 64)
    assert (ours - expected).norm() / expected.norm() < 1e-5


def test_attention_by_its_definition():
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(2, 3 * 24, 3, 5, generator=generator, dtype=torch.float64)
    ours = attention(qkv, num_heads=2)
    expected = np.empty((2, 24, 15))
    values = qkv.reshape(2, 72, 15).numpy()
    for b in range(2):
        for head in range(2):
            rows = values[b, 36 * head : 36 * head + 36]
            query, key, value = rows[0::3], rows[1::3], rows[2::3]  # [12, 15] each
            weights = np.exp(query.T @ key / np.sqrt(12))
            expected[b, 12 * head : 12 * head + 12] = value @ (weights / weights.sum(axis=1, keepdims=True)).T
    assert np.abs(ours.reshape(2, 24, 15).numpy() - expected).max() < 1e-12


def normalised(x: np.ndarray, groups: int, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Group norm of [C, H, W]."""
    parts = x.reshape(groups, -1)
    parts = (parts - parts.mean(axis=1, keepdims=True)) / np.sqrt(parts.var(axis=1, keepdims=True) + 1e-5)
    return parts.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]


def convolved(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 3x3 or 1x1 convolution of [C, H, W] that keeps the size."""
    margin = weight.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))  # [C, H, W, k, k]
    return np.einsum("chwij,ocij->ohw", windows, weight) + bias[:, None, None]


@pytest.mark.parametrize("resampling", [None, "down", "up"])
def test_a_block_by_hand(resampling):
    """In numpy; 16 channels are 4 groups of a norm, 24 are 6."""
    torch.manual_seed(0)
    block = AdmBlock(16, 24, 10, resampling=resampling).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.4)
    x, embedding = torch.randn(16, 4, 6, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    with torch.no_grad():
        ours = block(x[None], embedding[None])[0].numpy()

    weights = {name: value.numpy() for name, value in block.state_dict().items()}

    def silu(values):
        return values / (1 + np.exp(-values))

    def resize(values):
        c, height, width = values.shape
        if resampling == "up":
            return np.kron(values, np.ones((1, 2, 2)))
        return values.reshape(c, height // 2, 2, width // 2, 2).mean(axis=(2, 4)) if resampling == "down" else values

    inner = silu(normalised(x.numpy(), 4, weights["norm0.weight"], weights["norm0.bias"]))
    inner = convolved(resize(inner), weights["conv0.weight"], weights["conv0.bias"])
    scale, shift = np.split(weights["affine.weight"] @ embedding.numpy() + weights["affine.bias"], 2)
    inner = normalised(inner, 6, weights["norm1.weight"], weights["norm1.bias"])
    inner = convolved(
        silu(inner * (1 + scale[:, None, None]) + shift[:, None, None]), weights["conv1.weight"], weights["conv1.bias"]
    )
    expected = inner + convolved(resize(x.numpy()), weights["skip.weight"], weights["skip.bias"])
    assert ours.shape == expected.shape
    assert np.abs(ours - expected).max() < 1e-11


def test_resampling_is_the_published_filter():
    """The buffers of the checkpoints: a 2x2 mean with stride 2, and its transpose times 4."""
    x = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    mean = torch.full((2, 1, 2, 2), 0.25)
    assert torch.allclose(resampled(x, "down"), torch.conv2d(x, mean, stride=2, groups=2), atol=1e-7)
    assert torch.equal(resampled(x, "up"), torch.conv_transpose2d(x, 4 * mean, stride=2, groups=2))


def test_the_noise_embedding_is_cosines_then_sines():
    noise = torch.tensor([-1.5, 0.0, 1.0955], dtype=torch.float64)
    frequencies = 10_000.0 ** -(np.arange(96) / 96)
    angles = noise.numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    assert np.abs(noise_embedding(noise, 192).numpy() - expected).max() < 1e-12


# Preconditioning


def test_the_factors_are_the_papers():
    """Table 1 in float64, and what they are derived from: unit variance of the network's input and target at every level."""
    for sigma in (1e-3, 0.002, 0.1, 0.5, 1.0, 7.3, 80.0):
        factors = preconditioning(torch.tensor([sigma], dtype=torch.float64), 0.5)
        skip, output, scale, noise = (float(getattr(factors, name)) for name in ("skip", "output", "input", "noise"))
        assert skip == pytest.approx(0.5**2 / (sigma**2 + 0.5**2), rel=1e-13)
        assert output == pytest.approx(sigma * 0.5 / math.sqrt(0.5**2 + sigma**2), rel=1e-13)
        assert scale == pytest.approx(1 / math.sqrt(sigma**2 + 0.5**2), rel=1e-13)
        assert noise == pytest.approx(math.log(sigma) / 4, abs=1e-13)
        assert scale**2 * (0.5**2 + sigma**2) == pytest.approx(1)
        # The target (y - c_skip (y + n)) / c_out of images y of deviation 0.5 and noise n.
        assert ((1 - skip) ** 2 * 0.5**2 + skip**2 * sigma**2) / output**2 == pytest.approx(1)


def test_without_noise_the_image_comes_back_and_at_high_noise_the_network_alone_counts():
    model = random_network({**TINY, "sigma_min": 1e-8, "sigma_max": 1e8})
    images, labels = inputs(TINY)
    with torch.no_grad():
        change = {sigma: float((model(images, sigma, labels) - images).abs().max()) for sigma in (1e-3, 1e-5, 1e-7)}
        far = [model(offset + images, 1e8, labels) for offset in (0, 1)]
    assert 0 < change[1e-7] < 1e-6
    assert change[1e-5] / change[1e-7] == pytest.approx(100, rel=0.5) and change[1e-3] / change[1e-5] == pytest.approx(
        100, rel=0.5
    )
    assert far[0].abs().max() > 1e-3 and (far[0] - far[1]).abs().max() < 1e-6


@pytest.mark.parametrize("sigma", [0, 0.0, -1.0, math.nan, math.inf, 1e-3, 80.5, 999])
def test_a_noise_level_outside_of_the_range_is_refused(sigma, tiny):
    images, labels = inputs(TINY)
    for value in (sigma, torch.tensor(sigma), torch.tensor([1.0, sigma])):
        with pytest.raises(ValueError, match=r"sigma is .*; give noise levels from 0.002 to 80"):
            tiny(images, value, labels)
        with pytest.raises(ValueError, match="sigma is"):
            tiny.feature_maps(images, labels=labels, sigma=value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_limits_themselves_are_in_the_range(dtype):
    model = random_network(TINY, dtype=dtype)
    images, labels = inputs(TINY, dtype=dtype)
    for sigma in (0.002, 80.0, 80, torch.tensor([0.002, 80.0])):
        assert torch.isfinite(model(images, sigma, labels)).all()


# Inputs


def test_labels_are_classes_rows_or_none(tiny):
    images, labels = inputs(TINY)
    rows = torch.eye(5, dtype=torch.float64)[labels]
    expected = tiny(images, 3.0, labels)
    assert torch.equal(tiny(images, 3.0, rows), expected)
    assert torch.equal(tiny(images, 3.0, labels.int()), expected)
    none = tiny(images, 3.0, None)
    assert torch.equal(none, tiny(images, 3.0, torch.zeros(2, 5)))
    assert (none - expected).abs().max() > 1e-3


def test_each_image_has_its_own_noise_level_and_class(tiny):
    images, labels = inputs(TINY, 3)
    levels = torch.tensor([0.5, 80.0, 3.0], dtype=torch.float64)
    together = tiny(images, levels, labels)
    for i in range(3):
        assert torch.allclose(tiny(images[i : i + 1], levels[i], labels[i : i + 1]), together[i : i + 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 9, 9)}, r"images has shape \[2, 3, 9, 9\]; wanted \[\*, 3, 8, 8\]"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images has dtype torch.uint8"),
        ({"images": [[0]]}, "images is a list"),
        ({"sigma": torch.ones(3)}, r"sigma has shape \[3\]"),
        ({"sigma": torch.ones(2, 1, 1, 1)}, r"sigma has shape \[2, 1, 1, 1\]"),
        ({"labels": torch.tensor([0, 5])}, "labels run from 0 to 5; this network has classes 0 to 4"),
        ({"labels": torch.tensor([-1, 2])}, "labels run from -1 to 2"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels has dtype torch.float32; wanted int64"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"labels has shape \[3\]"),
        ({"labels": torch.zeros(2, 6)}, r"labels has shape \[2, 6\]; wanted \[2, 5\]"),
        ({"labels": torch.zeros(2, 5, dtype=torch.long)}, "labels has dtype torch.int64"),
        ({"labels": 3}, "labels is a int"),
    ],
)
def test_wrong_inputs_are_refused(change, message, tiny):
    images, labels = inputs(TINY)
    with pytest.raises(ValueError, match=message):
        tiny(**{"images": images, "sigma": 1.0, "labels": labels, **change})


def test_one_step_is_the_denoiser_at_the_highest_level(tiny):
    noise, labels = inputs(TINY)
    assert torch.equal(tiny.generate(noise, labels), tiny(80.0 * noise, torch.full((2,), 80.0), torch.eye(5)[labels]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_give_wide_images(dtype):
    model = random_network(TINY, dtype=dtype)
    wide = random_network(TINY, dtype=torch.float32)
    images, labels = inputs(TINY, dtype=torch.float32)
    narrow, expected = model.generate(images, labels), wide.generate(images, labels)
    assert narrow.dtype == torch.float32
    assert (narrow - expected).norm() / expected.norm() < {torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]


# Layers


def hooked(model: EdmUNet, names: list[str], run) -> dict[str, torch.Tensor]:
    """What forward hooks on the layers' modules see."""
    seen = {}
    handles = [
        model.get_submodule(model.layer_modules()[name]).register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in names
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def test_the_layers_of_the_published_network_and_their_shapes(published):
    """Every layer, as hooks see it. DMD2's discriminator takes 768 channels of 8x8 from the bottleneck (edm_guidance.py)."""
    images, sigma = torch.empty(2, 3, 64, 64, device="meta"), torch.empty(2, device="meta")
    maps = hooked(
        published, list(published.layer_modules()), lambda: published(images, sigma, torch.empty(2, 1000, device="meta"))
    )
    shapes = {name: tuple(value.shape) for name, value in maps.items()}
    assert shapes["encoder_bottleneck"] == shapes["midblock"] == (2, 768, 8, 8)
    assert published.layer_modules()["encoder_bottleneck"] == "enc.8x8_block2"
    assert published.layer_modules()["midblock"] == "dec.8x8_in0"
    blocks = [name for name in published.map_names if "." in name]
    assert len(blocks) == (1 + 3) + 3 * (1 + 3) + (2 + 4) + 3 * (1 + 4)
    for name in blocks:
        size = int(name.removeprefix("enc.").removeprefix("dec.").partition("x")[0])
        # A resampling block has the channels of the level that it comes from.
        width = {64: 192, 32: 384, 16: 576, 8: 768}[
            size * 2 if name.endswith("_down") else size // 2 if name.endswith("_up") else size
        ]
        assert shapes[name] == (2, width, size, size), name
    assert [shapes[f"encoder_block_{i}"] for i in range(16)] == [shapes[name] for name in blocks[:16]]
    assert [shapes[f"decoder_block_{i}"] for i in range(21)] == [shapes[name] for name in blocks[16:]]


def test_feature_maps_are_what_hooks_see_in_the_one_step(tiny):
    images, labels = inputs(TINY)
    names = list(tiny.layer_modules())
    seen = hooked(tiny, names, lambda: tiny(80.0 * images, 80.0, labels))
    maps = tiny.feature_maps(images, names, labels=labels)
    assert list(maps) == names
    assert all(torch.equal(maps[name], seen[name]) for name in names)
    assert list(tiny.feature_maps(images)) == list(tiny.map_names)
    assert list(tiny.feature_maps(images, tiny.default_features)) == ["encoder_bottleneck", "midblock"]
    assert tiny.feature_maps(images, []) == {}


def test_layers_differ_from_each_other_and_depend_on_image_class_and_level(tiny):
    images, labels = inputs(TINY)
    names = ("encoder_bottleneck", "midblock")
    maps = tiny.feature_maps(images, names, labels=labels)
    assert (maps["encoder_bottleneck"] - maps["midblock"]).abs().max() > 1e-3
    others = (
        tiny.feature_maps(-images, names, labels=labels),
        tiny.feature_maps(images, names, labels=(labels + 1) % 5),
        tiny.feature_maps(images, names, labels=labels, sigma=1.0),
    )
    for other in others:
        assert all((maps[name] - other[name]).abs().max() > 1e-3 for name in names)


def test_blocks_behind_the_last_wanted_map_are_not_computed(tiny):
    images, labels = inputs(TINY)
    blocks = [name for name in tiny.map_names if "." in name]
    for wanted, last in (("encoder_bottleneck", "enc.4x4_block1"), ("midblock", "dec.4x4_in0"), ("enc.8x8_conv", "enc.8x8_conv")):
        seen = hooked(tiny, blocks, lambda wanted=wanted: tiny.feature_maps(images, [wanted], labels=labels))
        assert list(seen)[-1] == last


def test_an_unknown_layer_is_refused(tiny):
    with pytest.raises(ValueError, match=r"no layer is called \['bottleneck'\]; this network has \['encoder_bottleneck'"):
        tiny.feature_maps(inputs(TINY)[0], ["midblock", "bottleneck"])


# Construction


def test_weights_depend_on_the_seed_alone_and_blocks_start_as_their_shortcuts():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second = EdmUNet(**TINY), EdmUNet(**TINY)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    second.initialize_weights(torch.Generator().manual_seed(9))
    assert not torch.equal(first.map_layer0.weight, second.map_layer0.weight)
    images, labels = inputs(TINY, dtype=torch.float32)
    maps = first.feature_maps(images, ["encoder_block_0", "dec.4x4_in0", "encoder_bottleneck", "dec.4x4_in1"], labels=labels)
    assert torch.equal(maps["dec.4x4_in0"], maps["encoder_bottleneck"]) and torch.equal(maps["dec.4x4_in1"], maps["dec.4x4_in0"])
    assert torch.equal(first(images, 80.0, labels), first(images, 80.0, None)), "the output starts without the network"


def test_a_saved_network_comes_back(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "network")
    again = load_export(tmp_path / "network", EdmUNet)
    settings = {name: value for name, value in tiny.config.items() if not name.startswith("_")}
    assert {name: again.config[name] for name in settings} == settings
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in tiny.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_size": 0}, "input_size is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"in_channels": 3.0}, "in_channels is 3.0"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"channel_mult": []}, r"channel_mult is \[\]"),
        ({"channel_mult": 4}, "channel_mult is 4"),
        ({"channel_mult": [1, 0.5]}, r"channel_mult\[1\] is 0.5"),
        ({"attention_resolutions": [32, "8"]}, r"attention_resolutions\[1\] is '8'"),
        ({"attention_resolutions": [32, 7]}, r"attention_resolutions \[7\] are no sizes .* \[64, 32, 16, 8\]"),
        ({"input_size": 60}, "input_size 60 cannot be halved 3 times"),
        ({"model_channels": 191}, "model_channels is 191; give an even number"),
        ({"num_head_channels": 100}, "num_head_channels 100 does not divide the 384 channels"),
        ({"channel_mult": [1, 2], "attention_resolutions": [], "num_head_channels": 100}, "100 does not divide the 384"),
        ({"model_channels": 144, "num_head_channels": 16}, "gives a map of 144 channels"),
        ({"sigma_data": 0}, "sigma_data is 0"),
        ({"sigma_max": math.inf}, "sigma_max is inf"),
        ({"sigma_min": -1.0}, "sigma_min is -1.0"),
        ({"sigma_min": 80.0}, "sigma_min 80.0 is not below sigma_max 80.0"),
        ({"dropout": 0.1}, r"EdmUNet has no setting \['dropout'\]"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_built(change, message):
    with pytest.raises(ValueError, match=message):
        check_edm_config(**change)
    if "dropout" not in change:
        with pytest.raises(ValueError, match=message):
            EdmUNet(**change)
