"""The tensors of one weights file, safetensors or torch, without running code that lies in it."""

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where training scripts put the tensors beside epoch, optimizer and the like.
CONTAINERS = ("state_dict", "model_state_dict", "model")


def read_tensors(path: str | Path, containers: Iterable[tuple[str, ...]] = ()) -> dict[str, Tensor]:
    """Read name -> tensor from `path` on the CPU: the file's own mapping, or the one below a usual or given key.

    Args:
        containers: more places to look at, each the keys from the outside in.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one with Python objects (torch files are read with weights_only=True), or no tensors in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for keys in (*containers, *((name,) for name in CONTAINERS), ()):
        tensors = _below(content, keys)
        if isinstance(tensors, Mapping) and tensors and all(isinstance(value, Tensor) for value in tensors.values()):
            return dict(tensors)
    held = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(f"{path} holds no mapping of names to tensors (it has {held}), neither itself nor in {list(CONTAINERS)}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): download it again") from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" not in str(error):
            raise ValueError(f"{path} is no file of torch.save, or damaged: download it again") from None
        raise ValueError(
            f"{path} holds Python objects beside its tensors, and reading those would run code from the file. If you trust it, "
            "read it with weights_only=False once and save its tensors alone: torch.save({'state_dict': TENSORS}, NEW_FILE)"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is no file of torch.save, or damaged ({error}): download it again") from None


def _below(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
