"""What reaches a pretrained network of pixels: colours, size, types; and that nothing about it can be trained."""

import numpy as np
import pytest
import torch
from torch import nn

from drift_accel.models.pixel_encoder import NORMALIZATIONS, PixelEncoder, draw_weights


class OneConvolution(PixelEncoder):
    """Its maps are its input and a normalised convolution of it."""

    map_names = ("input", "norm")
    default_features = ("norm",)

    def __init__(self, **settings):
        super().__init__(**settings)
        self.convolution, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.freeze()

    def network_maps(self, pixels, wanted):
        return {"input": pixels, "norm": self.norm(self.convolution(pixels))}


def images(*shape, dtype=torch.float64):
    values = np.random.default_rng(list(shape)).uniform(-1, 1, shape)
    return torch.from_numpy(values).to(dtype)


def network_input(encoder, x):
    return encoder.feature_maps(x, names=["input"])["input"]


def triangle_resize(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Bilinear resize with half-pixel centres: a triangle as wide as the larger of the two pixels, renormalised at borders."""
    length = x.shape[axis]
    scale = length / size
    centers = (np.arange(size) + 0.5) * scale
    distance = np.abs(centers[:, None] - (np.arange(length) + 0.5)[None]) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    weights /= weights.sum(1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, x, (1, axis)), 0, axis)


@pytest.mark.parametrize("side", [9, 16, 40, 64])
def test_images_are_resized_bilinearly_with_antialiasing(side):
    x = images(2, 3, side, side)
    encoder = OneConvolution(image_size=16, normalization="unit").double()
    wanted = triangle_resize(triangle_resize((x.numpy() + 1) / 2, 16, 2), 16, 3)
    assert np.abs(network_input(encoder, x).numpy() - wanted).max() < 1e-12


def test_imagenet_colours():
    x = images(2, 3, 8, 8)
    mean, deviation = (np.array(v).reshape(1, 3, 1, 1) for v in NORMALIZATIONS["imagenet"])
    got = network_input(OneConvolution(image_size=8).double(), x).numpy()
    assert np.abs(got - ((x.numpy() + 1) / 2 - mean) / deviation).max() < 1e-6  # the constants are stored in float32


def test_values_outside_are_not_clipped_and_keep_their_gradient():
    x = (5 * images(1, 3, 8, 8)).requires_grad_()
    got = network_input(OneConvolution(image_size=8, normalization="unit").double(), x)
    assert torch.equal(got.detach(), (x.detach() + 1) / 2)
    got.sum().backward()
    assert (x.grad == 0.5).all()


def test_the_trainer_cannot_train_it():
    """Neither train() nor a batch changes anything: batch norm keeps its statistics, weights have no gradient."""
    encoder = nn.Sequential(OneConvolution(image_size=8)).train()[0]
    assert not encoder.training and not any(module.training for module in encoder.modules())
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    x = images(4, 3, 8, 8, dtype=torch.float32).requires_grad_()
    together = encoder.feature_maps(x)["norm"]
    together.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    alone = encoder.feature_maps(x[:1])["norm"]
    assert torch.allclose(alone, together[:1], atol=1e-6)


def test_unknown_maps_and_wrong_images_are_refused():
    encoder = OneConvolution(image_size=8)
    with pytest.raises(ValueError, match=r"no feature map is called \['other'\]; this encoder has \['input', 'norm'\]"):
        encoder.feature_maps(images(1, 3, 8, 8), names=["other"])
    with pytest.raises(ValueError, match=r"images has shape \[1, 1, 8, 8\]; wanted \[\*, 3, \*, \*\]"):
        encoder.feature_maps(images(1, 1, 8, 8))
    with pytest.raises(ValueError, match="images has dtype torch.int64"):
        encoder.feature_maps(torch.zeros(1, 3, 8, 8, dtype=torch.int64))


def test_only_asked_maps_come_back_in_the_order_of_map_names():
    encoder = OneConvolution(image_size=8)
    assert list(encoder.feature_maps(images(1, 3, 8, 8), names=["norm"])) == ["norm"]
    assert list(encoder.feature_maps(images(1, 3, 8, 8), names=["norm", "input"])) == ["input", "norm"]


def test_random_weights_depend_on_the_generator_alone():
    def weights(seed):
        network = nn.Sequential(nn.Conv2d(3, 64, 5), nn.BatchNorm2d(64))
        network[1].running_mean.fill_(7)
        draw_weights(network, torch.Generator().manual_seed(seed))
        return network.state_dict()

    state = torch.get_rng_state()
    first = weights(0)
    assert all(torch.equal(first[name], value) for name, value in weights(0).items())
    assert not torch.equal(first["0.weight"], weights(1)["0.weight"])
    assert first["0.weight"].std().item() == pytest.approx((2 / 75) ** 0.5, rel=0.05)
    assert (first["1.weight"] == 1).all() and not first["0.bias"].any() and not first["1.running_mean"].any()
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        draw_weights(nn.Sequential(), torch.Generator())
        assert torch.equal(torch.get_rng_state(), state)
