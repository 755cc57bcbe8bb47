"""Access to the recorded values of the official release in tests/goldens, and the norm-wise comparison with them."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"


def unpack_artifact(name: str, destination: Path) -> Path:
    """Unpack the artifact folder `name` (metadata.json, ema_params.msgpack) below `destination` and return it."""
    folder = destination / name
    folder.mkdir(parents=True)
    shutil.copy(GOLDENS / name / "metadata.json", folder)
    packed = (GOLDENS / name / "ema_params.msgpack.gz").read_bytes()
    (folder / "ema_params.msgpack").write_bytes(gzip.decompress(packed))
    return folder


def load_arrays(name: str) -> dict[str, Tensor]:
    """Read `name`.npz; integers become int64, floating arrays keep their dtype."""
    with np.load(GOLDENS / f"{name}.npz") as archive:
        tensors = {key: torch.from_numpy(np.array(archive[key])) for key in archive.files}
    return {key: t if t.is_floating_point() else t.long() for key, t in tensors.items()}


def channels_first(images: Tensor) -> Tensor:
    """Turn [B, H, W, C] into [B, C, H, W]."""
    return images.permute(0, 3, 1, 2).contiguous()


def assert_norm_close(got: Tensor, wanted: Tensor, limit: float, name: str = "value") -> None:
    """Require |got - wanted| <= limit |wanted| in the Euclidean norm, and equal shapes."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    difference = got.detach().double() - wanted.double()
    relative = (difference.norm() / wanted.double().norm().clamp(min=1e-30)).item()
    largest, mean = difference.abs().max().item(), difference.abs().mean().item()
    message = f"{name}: off by {relative:.2e} norm-wise (limit {limit:.0e}), largest {largest:.2e}, mean {mean:.2e}"
    assert relative <= limit, message
