"""Encoders of the user's own: what a good one needs, and that each way of being wrong is named before training."""

import itertools
import textwrap

import pytest
import torch

from drift_accel.drift import multi_scale_features
from drift_accel.models.configuration import EncoderConfig, load_encoder

NUMBERS = itertools.count()
GOOD = """
    import torch
    from torch import nn

    class Blur(nn.Module):
        input_space = "pixel"
        map_names = ("fine", "coarse")
        default_features = ("coarse",)

        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 5, 3, padding=1)
            self.norm = nn.BatchNorm2d(5)

        def feature_maps(self, images, names=None):
            fine = self.norm(self.convolution(images))
            maps = {"fine": fine, "coarse": nn.functional.avg_pool2d(fine, 4)}
            return {name: maps[name] for name in (self.map_names if names is None else names)}

    def make():
        return Blur()
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads the encoder of GOOD with one change, each in a module of its own."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write_and_load(old="", new="", target=None):
        text = textwrap.dedent(GOOD)
        assert old in text
        name = f"their_encoder_{next(NUMBERS)}"  # a name of its own: modules are imported once
        (tmp_path / f"{name}.py").write_text(text.replace(old, new))
        return load_encoder(EncoderConfig(kind="code", path=target or f"{name}:make", allow_code=True))

    return write_and_load


def test_a_good_encoder_is_frozen_and_makes_the_usual_keys(load):
    encoder = load()
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    features = multi_scale_features(encoder, torch.rand(2, 3, 16, 16))
    assert set(features) == {"norm_x", "coarse", *(f"coarse_{s}{w}" for s in ("mean", "std") for w in ("", "_2", "_4"))}


def test_it_may_say_that_its_maps_are_final(load):
    encoder = load('input_space = "pixel"', 'input_space = "pixel"; final_maps = ("coarse",); has_norm_x = False')
    assert set(multi_scale_features(encoder, torch.rand(2, 3, 16, 16))) == {"coarse"}


def test_code_runs_only_when_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "not_allowed_encoder.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(ValueError, match="would run not_allowed_encoder:make with all rights.*allow_code to true"):
        load_encoder(EncoderConfig(kind="code", path="not_allowed_encoder:make"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("return Blur()", "return Blur", "returned a type: let it return an nn.Module"),
        ("return Blur()", "raise KeyError('weights')", r"failed when called without arguments: KeyError\('weights'\)"),
        ("def make():", "def make(size):", "failed when called without arguments: TypeError"),
        ("def feature_maps", "def maps", r"no method feature_maps\(images, names=None\)"),
        ('input_space = "pixel"', 'input_space = "rgb"', "input_space is 'rgb'; set it to 'latent' or 'pixel'"),
        ('map_names = ("fine", "coarse")', 'map_names = "fine"', "map_names is 'fine'; set it to a tuple"),
        ('("coarse",)', "()", r"default_features is \(\)"),
        ('("coarse",)', '("coarse", "coarse")', r"default_features is \('coarse', 'coarse'\)"),
        ('("coarse",)', '("other",)', r"default_features names \['other'\], which map_names does not have"),
        ('"fine"', '"global"', r"map_names holds \['global'\]"),
        ('"fine"', '"a/b"', r"map_names holds \['a/b'\]"),
        ('input_space = "pixel"', 'input_space = "latent"', r"feature_maps failed on images \[2, 4, 32, 32\]: RuntimeError"),
        (", names=None):", "):", r"feature_maps failed on images \[2, 3, 32, 32\]: (TypeError|NameError)"),
        ('maps = {"fine": fine,', 'maps = {"fine": fine.round().long(),', "map fine is .*wanted real"),
        ('{"fine": fine,', '{"fine": fine[:1],', r"map fine is \[1, 5, 32, 32\], wanted real \[2,C,H,W\] or \[2,T,S\]"),
        ('{"fine": fine,', '{"fine": fine.flatten(1),', r"map fine is \[2, 5120\]"),
        ('{"fine": fine,', '{"fine": fine / 0,', "map fine is not finite"),
        ("(self.map_names if names is None else names)", "self.map_names", r"returned \['coarse', 'fine'\], wanted a dict of"),
        ("return {name: maps[name]", "return {name: maps[name].detach()", "no finite gradient reaches the images.*no_grad"),
        ("self.convolution(images)", "self.convolution(images.detach())", "no finite gradient reaches the images"),
    ],
)
def test_what_is_wrong_is_said_on_loading(old, new, message, load):
    with pytest.raises(ValueError, match=message):
        load(old, new)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module_anywhere:make", "cannot be imported .*no_such_module_anywhere.*PYTHONPATH"),
        ("json:make", "cannot be imported .*has no attribute 'make'"),
        ("json", "path is 'json': give module:function"),
        (":make", "path is ':make': give module:function"),
    ],
)
def test_a_target_that_cannot_be_found_is_refused(target, message, load):
    with pytest.raises(ValueError, match=message):
        load(target=target)
