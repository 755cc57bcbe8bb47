"""Which settings of the EDM network go together."""

import math
from collections.abc import Mapping
from typing import Any

from .checks import check_counts
from .edm_blocks import num_groups

COUNTS = ("input_size", "in_channels", "num_classes", "model_channels", "num_blocks", "num_head_channels", "embedding_mult")


def check_edm_settings(values: Mapping[str, Any]) -> None:
    """Refuse an impossible set of all settings of EdmUNet.

    Raises:
        ValueError: names the setting, its value and what to set instead.
    """
    check_counts(values, COUNTS)
    for name, least in (("channel_mult", 1), ("attention_resolutions", 0)):
        entries = values[name]
        if not isinstance(entries, list | tuple) or len(entries) < least:
            raise ValueError(f"{name} is {entries!r}; give a list of at least {least} integers")
        named = {f"{name}[{index}]": entry for index, entry in enumerate(entries)}
        check_counts(named, named)
    _check_sizes(values)
    _check_widths(values)
    for name in ("sigma_data", "sigma_min", "sigma_max"):
        value = values[name]
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}; set it to a positive number (published: 0.5, 0.002 and 80)")
    if values["sigma_min"] >= values["sigma_max"]:
        raise ValueError(f"sigma_min {values['sigma_min']} is not below sigma_max {values['sigma_max']}; give a range")


def _sizes(values: Mapping[str, Any]) -> list[int]:
    """Side of the maps of each level."""
    return [values["input_size"] >> level for level in range(len(values["channel_mult"]))]


def _check_sizes(values: Mapping[str, Any]) -> None:
    size, halvings = values["input_size"], len(values["channel_mult"]) - 1
    if size % 2**halvings:
        raise ValueError(
            f"input_size {size} cannot be halved {halvings} times, as the {halvings + 1} entries of channel_mult ask for; "
            f"give a multiple of {2**halvings}"
        )
    strange = sorted(set(values["attention_resolutions"]) - set(_sizes(values)))
    if strange:
        raise ValueError(f"attention_resolutions {strange} are no sizes of this network's maps, which are {_sizes(values)}")


def _check_widths(values: Mapping[str, Any]) -> None:
    channels, head = values["model_channels"], values["num_head_channels"]
    if channels % 2:
        raise ValueError(f"model_channels is {channels}; give an even number: half of the noise embedding are cosines")
    widths = [channels * factor for factor in values["channel_mult"]]
    # The middle of the network has attention whatever the sizes.
    attended = [w for w, size in zip(widths, _sizes(values), strict=True) if size in values["attention_resolutions"]]
    for width in [*attended, widths[-1]]:
        if width % head:
            raise ValueError(f"num_head_channels {head} does not divide the {width} channels of a level with attention")
    # A block of the decoder reads its map beside one of the encoder's, of the same or of a neighbouring level.
    joined = [a + b for level, a in enumerate(widths) for b in widths[max(0, level - 1) : level + 2]]
    for width in [*widths, *joined]:
        if width < 4 or width % num_groups(width):
            raise ValueError(
                f"model_channels {channels} with channel_mult {list(values['channel_mult'])} gives a map of {width} channels, "
                f"which the group norms cannot divide evenly; take multiples of 32"
            )
