"""Outputs of modules by hooks: the right ones, untouched by what runs later, refused where they are no layers."""

import pytest
import torch
from torch import nn

from drift_accel.analysis.activations.layer_capture import LayerError, as_activations, captured, probe_modules


class Network(nn.Module):
    """Maps, an activation that writes into its input, tokens in a pair, counts, a module that runs twice, one that never does."""

    def __init__(self):
        super().__init__()
        self.maps, self.inplace = nn.Conv2d(1, 3, 1), nn.ReLU(inplace=True)
        self.twice, self.idle = nn.Identity(), nn.Identity()
        self.pair, self.count, self.flat = Pair(), Count(), nn.Flatten()

    def forward(self, images):
        x = self.inplace(self.maps(images))
        self.count(x)
        return self.twice(self.twice(self.flat(self.pair(x)[0])))


class Pair(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2), 7


class Count(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 2, dtype=torch.int64)


@pytest.fixture
def network():
    model = Network()
    with torch.no_grad():
        model.maps.weight.copy_(torch.tensor([1.0, -1.0, 2.0]).reshape(3, 1, 1, 1))
        model.maps.bias.zero_()
    return model


def test_layers_are_what_the_module_gave_not_what_came_of_it(network):
    images = torch.arange(8.0).reshape(2, 1, 2, 2)
    names = {"maps": "maps", "after": "inplace", "tokens": "pair", "again": "pair"}
    with torch.no_grad(), captured(network, names, 2, pooled=False) as found:
        network(images)
    torch.testing.assert_close(found["maps"], torch.cat([images, -images, 2 * images], dim=1))  # the negative ones are there
    assert found["after"].min() == 0
    torch.testing.assert_close(found["tokens"], found["after"].flatten(2)[:, :, None])  # [B,S,1,T]
    torch.testing.assert_close(found["again"], found["tokens"])
    with torch.no_grad(), captured(network, names, 2, pooled=True) as pooled:
        network(images)
    for name, values in found.items():
        torch.testing.assert_close(pooled[name], values.mean(dim=(2, 3)))
    assert not network.maps._forward_hooks  # nothing stays behind


def test_what_is_no_layer_is_refused_and_not_listed(network):
    images = torch.ones(2, 1, 2, 2)
    listed = probe_modules(network, lambda: network(images), 2, [name for name, _ in network.named_modules() if name])
    assert listed == {"maps": (3, 2, 2), "inplace": (3, 2, 2), "pair": (3, 1, 4), "flat": (12,)}
    for name, message in (("twice", "runs more than once"), ("count", r"gives torch.int64 \[2, 2\]")):
        with pytest.raises(LayerError, match=message), captured(network, {name: name}, 2, pooled=True):
            network(images)
    with pytest.raises(ValueError, match="no module 'nothing'"), captured(network, {"x": "nothing"}, 2, pooled=True):
        pass
    for value, message in ((7, "gives a int"), (torch.ones(3, 2), r"\[3, 2\]: wanted real \[2,"), (torch.ones(2), r"\[2\]")):
        with pytest.raises(LayerError, match=message):
            as_activations(value, "x", 2, pooled=True)


def test_activations_are_float32_copies():
    original = torch.ones(2, 3, dtype=torch.bfloat16)
    values = as_activations((original, None), "x", 2, pooled=True)
    original.zero_()
    assert values.dtype == torch.float32 and values.tolist() == [[1.0] * 3] * 2
