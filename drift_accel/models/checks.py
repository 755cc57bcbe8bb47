"""Checks of model configurations and inputs: they look at shapes and types only, so they never wait for a device."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def complete_config(model_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the defaults of `model_class` filled in.

    Keys that begin with an underscore are metadata of a saved config.json and are left out.

    Raises:
        ValueError: a key that `model_class` does not have.
    """
    parameters = inspect.signature(model_class.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise ValueError(f"{model_class.__name__} has no setting {unknown}; it has {sorted(defaults)}")
    return {**defaults, **given}


def check_counts(config: Mapping[str, Any], names: Iterable[str], minimum: int = 1) -> None:
    """Refuse a named setting that is no integer of at least `minimum`.

    Raises:
        ValueError: names the setting, its value and the smallest value allowed.
    """
    for name in names:
        value = config[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name} is {value!r}; set it to an integer of at least {minimum}")


def check_tensor(name: str, tensor: Any, shape: tuple[int | None, ...], kind: str) -> None:
    """Refuse an input of another shape or kind; None in `shape` stands for any size.

    Args:
        kind: "float" (any floating dtype), "index" (int64 or int32) or "mask" (any floating dtype, or bool).

    Raises:
        ValueError: names the input, what was wanted and what was given.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is a {type(tensor).__name__}; pass a tensor of shape {_spell(shape)}")
    fits = tensor.ndim == len(shape) and all(w is None or w == g for w, g in zip(shape, tensor.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; wanted {_spell(shape)}")
    allowed = {
        "float": tensor.is_floating_point(),
        "index": tensor.dtype in (torch.int64, torch.int32),
        "mask": tensor.is_floating_point() or tensor.dtype == torch.bool,
    }
    if not allowed[kind]:
        wanted = {"float": "a floating dtype", "index": "int64", "mask": "a floating dtype or bool"}[kind]
        raise ValueError(f"{name} has dtype {tensor.dtype}; wanted {wanted}")


def _spell(shape: tuple[int | None, ...]) -> str:
    """Write a wanted shape with * for any size."""
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"
