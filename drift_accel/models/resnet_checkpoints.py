"""Published checkpoints of ResNet-18 and ResNet-50: which of their tensors are the network's, and which are heads.

Every tensor of a file is either one of the network's or a head that its layout lists; anything else is refused by name.
torchvision and timm name the tensors alike (conv1, bn1, layer1.0.conv1, layer1.0.downsample.0, .., fc).

Layouts, as their repositories write them:
- supervised: torchvision and timm (arXiv 1512.03385), the names themselves.
- moco_v2: github.com/facebookresearch/moco (arXiv 2003.04297): `module.encoder_q.*` is the network, `module.encoder_k.*` its
  average, `module.queue*` the dictionary.
- simclr (arXiv 2002.05709), by the prefix of the network's tensors: none, the original converted by
  github.com/tonylins/simclr-converter; `backbone.` github.com/sthalles/SimCLR and github.com/vturrisi/solo-learn;
  `encoder.` github.com/Spijkervet/SimCLR and older solo-learn; `convnet.` github.com/AndrewAtanov/simclr-pytorch;
  `_feature_blocks.` github.com/facebookresearch/vissl.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .checkpoint_file import read_tensors

VISSL_TRUNK = ("classy_state_dict", "base_model", "model", "trunk")
# Counts the batches of a momentum that is None; published files have it or not, and evaluation does not use it.
UNUSED_BUFFER = "num_batches_tracked"
MARKER = "conv1.weight"  # behind the prefix of a layout

_AFFINE = r"(weight|bias)"
_NORM = r"(weight|bias|running_mean|running_var)"


@dataclass(frozen=True)
class Layout:
    """Names of one kind of file: `prefix` before the network's tensors, `heads` patterns of what else belongs there."""

    prefix: str
    heads: tuple[str, ...]


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "supervised": (Layout("", (rf"fc\.{_AFFINE}",)),),
    "moco_v2": (
        Layout("encoder_q.", (rf"encoder_q\.fc\.([02]\.)?{_AFFINE}", r"encoder_k\..+", r"queue(_ptr)?")),
    ),
    "simclr": (
        Layout("backbone.", (rf"backbone\.fc\.([02]\.)?{_AFFINE}", rf"projector\.[02]\.{_AFFINE}", rf"classifier\.{_AFFINE}")),
        Layout("encoder.", (rf"encoder\.fc\.{_AFFINE}", rf"projector\.[02]\.{_AFFINE}", rf"classifier\.{_AFFINE}")),
        Layout("convnet.", (rf"convnet\.fc\.{_AFFINE}", r"projection\.fc[12]\.weight", rf"projection\.bn[12]\.{_NORM}")),
        Layout("_feature_blocks.", ()),
        Layout("", (rf"fc\.{_AFFINE}",)),
    ),
}  # fmt: skip

ADVICE = {
    "supervised": (
        "download https://download.pytorch.org/models/resnet50-0676ba61.pth (resnet18-f37072fd.pth), or model.safetensors of a "
        "timm resnet50 or resnet18, and give the file"
    ),
    "moco_v2": (
        "download https://dl.fbaipublicfiles.com/moco/moco_checkpoints/moco_v2_800ep/moco_v2_800ep_pretrain.pth.tar "
        "(linked by github.com/facebookresearch/moco) and give the file"
    ),
    "simclr": (
        "convert an original checkpoint with github.com/tonylins/simclr-converter, or take one of github.com/sthalles/SimCLR, "
        "Spijkervet/SimCLR, AndrewAtanov/simclr-pytorch, vturrisi/solo-learn or facebookresearch/vissl, and give the file"
    ),
}


def read_resnet_weights(path: str | Path, layout: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors called like those of `wanted` (a state dict without its `fc`) from a checkpoint of `layout`.

    Raises:
        FileNotFoundError: no such file, saying what to get.
        ValueError: a file that cannot be read or is of another layout, or a tensor that is missing, unknown or of another shape.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"encoder.path {path} is no file: {ADVICE[layout]}")
    containers = [VISSL_TRUNK] if layout == "simclr" else []
    found = {name: tensor for name, tensor in _without_wrapper(read_tensors(path, containers)).items() if _is_weight(name)}
    kind = _layout_of(found, layout, path)

    heads = re.compile("|".join(kind.heads) or r"(?!)")
    network = {name: tensor for name, tensor in found.items() if not heads.fullmatch(name)}
    expected = {kind.prefix + name for name in wanted if _is_weight(name)}
    missing, unknown = sorted(expected - set(network)), sorted(set(network) - expected)
    if missing or unknown:
        raise ValueError(
            f"encoder.path {path} is no {layout} checkpoint of this ResNet: missing tensors {missing[:5]} ({len(missing)}), "
            f"unknown tensors {unknown[:5]} ({len(unknown)}); check encoder.architecture and encoder.weights"
        )
    weights = {name.removeprefix(kind.prefix): tensor.float() for name, tensor in network.items()}
    for name, tensor in weights.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"encoder.path {path}: {kind.prefix}{name} has shape {list(tensor.shape)}, wanted {list(wanted[name].shape)}; "
                "only the ImageNet form of the network is built (7x7 stem, width 1)"
            )
    return weights


def _is_weight(name: str) -> bool:
    return not name.endswith(UNUSED_BUFFER)


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the `module.` that DistributedDataParallel puts before every name."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _layout_of(found: Mapping[str, Tensor], layout: str, path: str | Path) -> Layout:
    for kind in LAYOUTS[layout]:
        if kind.prefix + MARKER in found:
            return kind
    prefixes = " or ".join(repr(kind.prefix + MARKER) for kind in LAYOUTS[layout])
    fitting = [name for name, kinds in LAYOUTS.items() if any(kind.prefix + MARKER in found for kind in kinds)]
    hint = f"it looks like {' or '.join(fitting)}" if fitting else f"it begins with {sorted(found)[:3]}"
    raise ValueError(f"encoder.path {path} has no tensor {prefixes}, as a {layout} checkpoint would: {hint}; set encoder.weights")
