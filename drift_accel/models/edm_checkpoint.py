"""Published weights of EDM and DMD2 for ImageNet 64x64, by their tensors' names, as an EdmUNet.

Layouts, as their repositories write them:
- EDM (github.com/NVlabs/edm, edm-imagenet-64x64-cond-adm.pkl): a pickled network, which is code and not read here; its state
  dict is. Tensors are called `model.enc.64x64_conv.weight` and the like, `model.` being the network inside the preconditioning.
- DMD2 (github.com/tianweiy/DMD2, huggingface.co/tianweiy/DMD2, model/imagenet/...): `pytorch_model.bin` is the generator with
  the same names, `pytorch_model_1.bin` the guidance model (`real_unet.`, `fake_unet.`, `cls_pred_branch.`).
Both hold `resample_filter` buffers, the constant 2x2 mean of which `resampled` is made, and nothing else beside the weights.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint_file import read_tensors
from .edm_unet import EdmUNet, check_edm_config
from .exports import load_export

WEIGHT_FILES = ("pytorch_model.bin", "model.safetensors")
INNER_PREFIX = "model."
GUIDANCE_PREFIXES = ("real_unet.", "fake_unet.", "cls_pred_branch.")
RESAMPLE_FILTER = re.compile(r"(enc|dec)\.\d+x\d+_(down|up)\.(conv0|skip)\.resample_filter")
SHOWN = 5

PICKLE_ADVICE = (
    "is a pickled network, and reading it would run code from the file. If you trust it, save its tensors once, in a checkout of "
    "github.com/NVlabs/edm: python -c \"import pickle, torch; network = pickle.load(open('FILE.pkl', 'rb'))['ema']; "
    "torch.save(network.state_dict(), 'FILE.pt')\", and give FILE.pt"
)


def load_edm_unet(path: str | Path, config: Mapping[str, Any] | None = None) -> EdmUNet:
    """An EdmUNet with published weights: float32, on the CPU, in evaluation mode, without gradients for the weights.

    Args:
        path: a file of tensors (torch or safetensors), a folder with one (DMD2's), or a folder that `save_pretrained` wrote.
        config: settings of EdmUNet other than the defaults, which are ImageNet 64x64; a saved folder has its own.

    Raises:
        FileNotFoundError: nothing there, saying what to get.
        ValueError: an impossible configuration, a pickled network, a file that cannot be read, or a tensor that is missing,
            unknown or of another shape.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        if config:
            raise ValueError(f"{path} has a config.json of its own: leave the configuration {dict(config)} out")
        return load_export(path, EdmUNet).eval().requires_grad_(False)
    file = find_edm_weights(path)
    if file is None:
        raise FileNotFoundError(
            f"{path} is no file of weights and no folder with {' or '.join(WEIGHT_FILES)}: download pytorch_model.bin of a "
            "generator in huggingface.co/tianweiy/DMD2 (model/imagenet), or convert EDM's edm-imagenet-64x64-cond-adm.pkl"
        )
    if file.suffix == ".pkl":
        raise ValueError(f"{file} {PICKLE_ADVICE}")
    settings = dict(config or {})
    check_edm_config(**settings)
    with torch.device("meta"):
        model = EdmUNet(**settings)
    model.load_state_dict(fit_edm_weights(read_tensors(file, [("ema",)]), model.state_dict(), file), assign=True)
    return model.eval().requires_grad_(False)


def find_edm_weights(path: str | Path) -> Path | None:
    """The file of weights that a path leads to: itself, or the one of WEIGHT_FILES in a folder; None where there is none."""
    path = Path(path)
    return next((file for file in (path, *(path / name for name in WEIGHT_FILES)) if file.is_file()), None)


def fit_edm_weights(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file at `path` by the names and shapes of `wanted`, a state dict of EdmUNet, in float32.

    Raises:
        ValueError: names the tensors that are missing, unknown, of another shape or not of floats.
    """
    found = _strip(_strip(dict(tensors), "module."), INNER_PREFIX)
    guidance = [name for name in found if name.startswith(GUIDANCE_PREFIXES)]
    if guidance:
        raise ValueError(f"{path} holds DMD2's guidance model ({guidance[0]}): give the generator's file, pytorch_model.bin")
    filters = {name: found.pop(name) for name in list(found) if RESAMPLE_FILTER.fullmatch(name)}
    for name, values in filters.items():
        if not torch.equal(values.float(), torch.full((1, 1, 2, 2), 0.25)):
            raise ValueError(f"{path}: {name} is not the mean of 2x2 pixels, the only filter that this network resamples with")
    missing, unknown = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unknown:
        raise ValueError(
            f"{path} holds other weights than this network's: missing tensors {missing[:SHOWN]} ({len(missing)}), unknown "
            f"tensors {unknown[:SHOWN]} ({len(unknown)}); give EDM's or DMD2's ImageNet 64x64 network, or another's configuration"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, wanted {list(wanted[name].shape)}; "
                "give the configuration of another network than ImageNet 64x64"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}; wanted floating-point weights")
    return {name: tensor.float() for name, tensor in found.items()}


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Without a prefix that all names have."""
    if tensors and all(name.startswith(prefix) for name in tensors):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors
