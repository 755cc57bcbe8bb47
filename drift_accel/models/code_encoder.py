"""An encoder that a function of the user's makes, checked before anything depends on it."""

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

INPUT_SPACES = ("latent", "pixel")
DEFAULT_CHANNELS = {"latent": 4, "pixel": 3}
DEFAULT_SIZE = 32
NUM_IMAGES = 2
# What the training step and the prefixes of several encoders are called.
RESERVED_KEY, SEPARATOR = "global", "/"


def load_code_encoder(target: str) -> nn.Module:
    """Call `module:function` without arguments and return the nn.Module that it makes, frozen and in evaluation mode.

    This runs code of the user's: ask for their consent before. The module needs
    - `feature_maps(images, names=None) -> {name: [B,C,H,W] or [B,T,S]}`: the maps called `names`, None for all of `map_names`;
    - `input_space`: "latent" or "pixel" (images in [-1, 1]); `map_names`; `default_features`, some of them;
    and may have `in_channels` (3 for pixels, 4 for latents), `input_size` (32, for the check below), `encoder_input(images)`,
    `final_maps` and `has_norm_x` (see PixelEncoder).

    It is tried on two small images: maps by the right names and shapes, finite, with a gradient to the images.

    Raises:
        ValueError: a target that cannot be imported or called, or a module without the interface, saying what is wrong.
    """
    encoder = _make(target)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"encoder.path {target} returned a {type(encoder).__name__}: let it return an nn.Module")
    encoder = encoder.eval().requires_grad_(False)
    _check_attributes(encoder, target)
    _check_maps(encoder, target)
    return encoder


def _make(target: str):
    module_name, _, function_name = target.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"encoder.path is {target!r}: give module:function, for example my_encoders.clip:make")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"encoder.path {target} cannot be imported ({error}): start from the folder that holds it, or set PYTHONPATH"
        ) from error
    try:
        return function()
    except Exception as error:  # whatever the user's code raises: the message must say where it came from
        raise ValueError(f"encoder.path {target}: the function failed when called without arguments: {error!r}") from error


def _check_attributes(encoder: nn.Module, target: str) -> None:
    if not callable(getattr(encoder, "feature_maps", None)):
        raise ValueError(f"encoder.path {target}: the module has no method feature_maps(images, names=None)")
    space = getattr(encoder, "input_space", None)
    if space not in INPUT_SPACES:
        raise ValueError(f"encoder.path {target}: input_space is {space!r}; set it to 'latent' or 'pixel'")
    for name in ("map_names", "default_features"):
        value = getattr(encoder, name, None)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value or len(set(value)) != len(value):
            raise ValueError(f"encoder.path {target}: {name} is {value!r}; set it to a tuple of different names")
    strange = [name for name in encoder.map_names if not isinstance(name, str) or name == RESERVED_KEY or SEPARATOR in name]
    if strange:
        raise ValueError(
            f"encoder.path {target}: map_names holds {strange}: use strings without {SEPARATOR!r}; {RESERVED_KEY!r} is taken"
        )
    for name in ("default_features", "final_maps"):
        unknown = [value for value in getattr(encoder, name, ()) if value not in encoder.map_names]
        if unknown:
            raise ValueError(f"encoder.path {target}: {name} names {unknown}, which map_names does not have")


def _check_maps(encoder: nn.Module, target: str) -> None:
    channels = getattr(encoder, "in_channels", DEFAULT_CHANNELS[encoder.input_space])
    size = getattr(encoder, "input_size", DEFAULT_SIZE)
    values = torch.linspace(-1, 1, NUM_IMAGES * channels * size * size).sin()
    images = values.reshape(NUM_IMAGES, channels, size, size).requires_grad_()
    try:
        everything, some = encoder.feature_maps(images), encoder.feature_maps(images, names=encoder.default_features)
    except Exception as error:  # as above
        raise ValueError(f"encoder.path {target}: feature_maps failed on images {list(images.shape)}: {error!r}") from error
    for maps, wanted in ((everything, encoder.map_names), (some, encoder.default_features)):
        held = sorted(maps) if isinstance(maps, dict) else type(maps).__name__
        if held != sorted(wanted):
            raise ValueError(f"encoder.path {target}: feature_maps returned {held}, wanted a dict of {sorted(wanted)}")
    for name, value in everything.items():
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.ndim in (3, 4) and len(value) == NUM_IMAGES
        if not fits:
            shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"encoder.path {target}: map {name} is {shape}, wanted real [{NUM_IMAGES},C,H,W] or [{NUM_IMAGES},T,S]"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"encoder.path {target}: map {name} is not finite on images between -1 and 1")
    total = sum(value.float().square().sum() for value in everything.values())
    gradient = torch.autograd.grad(total, images, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None or not torch.isfinite(gradient).all():
        raise ValueError(
            f"encoder.path {target}: no finite gradient reaches the images; the generator learns through it, so leave out "
            "no_grad, detach and rounding"
        )
