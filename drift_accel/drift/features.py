"""The feature keys of the drift: location vectors and pooled statistics of an encoder's maps.

Shapes: B images, C channels, H x W map, T locations (row-major), S features of a location. Source: arXiv 2602.04770, A.5.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS = ("mean", "std")
VARIANCE_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which keys are made of an encoder's maps; the defaults are the release's.

    Raises ValueError for unknown or empty choices.
    """

    maps: tuple[str, ...] | None = None
    """Names of the encoder's maps to use; None takes the encoder's own `default_features`."""
    vectors: bool = True
    """One key `name` with a vector a location."""
    statistics: tuple[str, ...] = STATISTICS
    """Pooled statistics, of "mean" and "std": keys `name_mean` over the whole map, `name_mean_2` over windows."""
    windows: tuple[int, ...] = (2, 4)
    """Side of the non-overlapping square windows; one is left out where it does not divide the map's size."""
    norm_x: bool | None = None
    """The key `norm_x`: root mean square over space of each input channel of the encoder; None asks the encoder, whose
    `has_norm_x` is taken as true where it has none (the release uses the key with its masked autoencoder alone)."""

    def __post_init__(self):
        if self.maps is not None and not self.maps:
            raise ValueError("features.maps is empty: name at least one map, or null for the encoder's default")
        for name in ("maps", "statistics", "windows"):
            values = getattr(self, name) or ()
            if len(set(values)) != len(values):
                raise ValueError(f"features.{name} is {values}: list each value once")
        unknown = [name for name in self.statistics if name not in STATISTICS]
        if unknown:
            raise ValueError(f"features.statistics holds {unknown}: choose of {', '.join(STATISTICS)}")
        if any(window < 2 for window in self.windows):
            raise ValueError(f"features.windows is {self.windows}: a window needs a side of at least 2 locations")
        if not (self.vectors or self.statistics) and self.norm_x is False:
            raise ValueError("features: vectors, statistics and norm_x are all off: nothing would be compared")


def multi_scale_features(encoder, images: Tensor, config: FeatureConfig | None = None) -> dict[str, Tensor]:
    """Extract every feature key of `images` [B,C,H,W]: a dict of [B,T,S] in the release's key names, without `global`.

    The encoder offers `feature_maps(images) -> {name: [B,C,H,W] or [B,T,S]}` and `default_features`; where its own input
    differs from the images (patchified pixels), also `encoder_input(images)`. Maps that it names in `final_maps` are keys as
    they are: nothing is pooled from them. Location vectors keep the map's type, pooled statistics are float32 (float64 for
    float64 maps). Raises ValueError for a map that the encoder does not have, for two keys of one name and where none is left.
    """
    config = FeatureConfig() if config is None else config
    final = getattr(encoder, "final_maps", ())
    keys: dict[str, Tensor] = {}
    if getattr(encoder, "has_norm_x", True) if config.norm_x is None else config.norm_x:
        grid = encoder.encoder_input(images) if hasattr(encoder, "encoder_input") else images
        keys["norm_x"] = channel_norm(grid)
    wanted = encoder.default_features if config.maps is None else config.maps
    maps = _extract_maps(encoder, images, wanted)
    for name in wanted:
        if name not in maps:
            raise ValueError(f"features.maps names {name!r}, which the encoder does not have: it has {', '.join(maps)}")
        made = {name: map_locations(maps[name])} if name in final else map_features(name, maps[name], config)
        twice = sorted(set(made) & set(keys))
        if twice:
            raise ValueError(f"two of the encoder's maps make the key {', '.join(twice)}: leave one out with features.maps")
        keys.update(made)
    if not keys:
        raise ValueError("features: vectors and statistics are off and the encoder has no norm_x: nothing would be compared")
    return keys


def _extract_maps(encoder, images: Tensor, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The encoder's maps; one that takes `names` keeps no others in memory."""
    if "names" not in inspect.signature(encoder.feature_maps).parameters:
        return encoder.feature_maps(images)
    return encoder.feature_maps(images, names=wanted)


def map_locations(feature_map: Tensor) -> Tensor:
    """A map [B,C,H,W] as one vector a location, row-major: [B,T,S]; [B,T,S] as it is."""
    return feature_map.flatten(2).transpose(1, 2) if feature_map.ndim == 4 else feature_map


def map_features(name: str, feature_map: Tensor, config: FeatureConfig) -> dict[str, Tensor]:
    """All keys of one map [B,C,H,W] or [B,T,S]; windows need the two axes of an image."""
    keys: dict[str, Tensor] = {}
    is_image = feature_map.ndim == 4
    vectors = map_locations(feature_map)  # [B,T,S]
    if config.vectors:
        keys[name] = vectors
    if not config.statistics:
        return keys
    keys.update(_pooled(name, "", _widen(vectors).unsqueeze(1), config))
    for window in config.windows:
        if is_image and feature_map.shape[2] % window == 0 and feature_map.shape[3] % window == 0:
            keys.update(_pooled(name, f"_{window}", windows_of(_widen(feature_map), window), config))
    return keys


def windows_of(feature_map: Tensor, window: int) -> Tensor:
    """Cut [B,C,H,W] into non-overlapping windows, row-major: [B, number of windows, window * window, C]."""
    B, C, H, W = feature_map.shape
    cut = feature_map.reshape(B, C, H // window, window, W // window, window)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // window) * (W // window), window * window, C)


def channel_norm(grid: Tensor) -> Tensor:
    """norm_x: sqrt(mean over space of x^2 + 1e-6) of each channel of [B,C,H,W]: [B,1,C], float32 or wider."""
    return (_widen(grid).square().mean((2, 3)) + VARIANCE_EPSILON).sqrt().unsqueeze(1)


def _pooled(name: str, suffix: str, members: Tensor, config: FeatureConfig) -> dict[str, Tensor]:
    """Mean and standard deviation over axis 2 of [B,T,members,S]; the epsilon inside the root keeps its gradient finite."""
    mean = members.mean(2)
    keys = {}
    if "mean" in config.statistics:
        keys[f"{name}_mean{suffix}"] = mean
    if "std" in config.statistics:
        variance = (members - mean.unsqueeze(2)).square().mean(2)
        keys[f"{name}_std{suffix}"] = (variance + VARIANCE_EPSILON).sqrt()
    return keys


def _widen(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
