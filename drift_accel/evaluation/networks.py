"""Feature networks: where their weights are looked for, and how a protocol's network is opened.

Nothing is downloaded and nothing is ever replaced by random weights: a missing file is an error that says what to get.
"""

import os
from pathlib import Path

import torch
from torch import nn

from drift_accel.evaluation.encoder_spaces import Dinov2Network, EncoderNetwork, TimmNetwork
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.inception import PytorchInception, TorchscriptInception
from drift_accel.evaluation.protocols import DINOV2, ENCODER, PYTORCH_INCEPTION, TIMM, TORCHSCRIPT_INCEPTION, Protocol

FOLDER_VARIABLE = "DRIFT_ACCEL_NETWORKS"
TORCHSCRIPT_FILE = "inception-2015-12-05.pt"
PYTORCH_FILE = "pt_inception-2015-12-05-6726825d.pth"
_FILES = {TORCHSCRIPT_INCEPTION: TORCHSCRIPT_FILE, PYTORCH_INCEPTION: PYTORCH_FILE}


def networks_folder() -> Path:
    """Where network files are looked for: $DRIFT_ACCEL_NETWORKS, else ~/.cache/drift_accel/networks."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache/drift_accel/networks")


def find_network(protocol: Protocol, path: str | os.PathLike | None = None) -> Path:
    """The file or folder of a protocol's network: `path`, or for Inception the usual file in `networks_folder()`.

    Raises FileNotFoundError saying which file to get and where it goes, ValueError where a path is needed.
    """
    if protocol.network not in _FILES:
        if path is None:
            raise ValueError(f"protocol {protocol.name!r} needs --network: the folder of its {protocol.network} model")
        if not Path(path).is_dir():
            raise FileNotFoundError(f"--network {path} is no folder: give the folder of the {protocol.network} model")
        return Path(path)
    name = _FILES[protocol.network]
    place = networks_folder() / name if path is None else Path(path)
    place = place / name if place.is_dir() else place
    if not place.is_file():
        raise FileNotFoundError(
            f"{place} is missing: protocol {protocol.name!r} needs the file {name} (clean-fid loads it from "
            f"{_address(protocol.network)}). Get it on a machine with a network and put it there, or give its place with "
            f"--network; {FOLDER_VARIABLE} names another folder for all such files"
        )
    if place.name != name:
        raise ValueError(f"--network {place}: clean-fid opens this network by the name {name}; give the file that name")
    return place


def open_network(
    protocol: Protocol,
    path: str | os.PathLike | None = None,
    *,
    device: torch.device | str = "cpu",
    batch: int = 64,
    layer: str | None = None,
    spatial: bool = False,
    run_code: bool = False,
    encoder: nn.Module | None = None,
) -> FeatureNetwork:
    """Open a protocol's network. `batch`: pictures it gets at once, padded to that number.

    `layer` is a map of an encoder (None: its last one), and `encoder` that of `path` where it is loaded already; `spatial` asks
    for the mixed_6 map of sFID; `run_code` allows a TorchScript file, which is a program. Raises FileNotFoundError as
    `find_network`, ValueError for a file or folder that is not what the protocol needs, and for options that it does not have.
    """
    place = find_network(protocol, path)
    if batch < 1:
        raise ValueError(f"the network's batch is {batch}: give at least 1")
    if layer is not None and protocol.network != ENCODER:
        raise ValueError(f"--layer is for the protocol 'encoder', not {protocol.name!r}")
    if spatial and protocol.network != TORCHSCRIPT_INCEPTION:
        raise ValueError(f"sFID needs the mixed_6 map of {TORCHSCRIPT_FILE}, which protocol {protocol.name!r} does not use")
    if protocol.network == TORCHSCRIPT_INCEPTION:
        if not run_code:
            raise ValueError(
                f"{place} is TorchScript, a program that runs on this machine: allow it with --run_torchscript if you trust "
                "where it came from"
            )
        return TorchscriptInception(place, protocol, device=device, batch=batch, spatial=spatial)
    if protocol.network == PYTORCH_INCEPTION:
        return PytorchInception(place, protocol, device=device, batch=batch)
    if protocol.network == ENCODER:
        return EncoderNetwork(place, protocol, device=device, batch=batch, layer=layer, encoder=encoder)
    kinds = {TIMM: TimmNetwork, DINOV2: Dinov2Network}
    return kinds[protocol.network](place, protocol, device=device, batch=batch)


def _address(kind: str) -> str:
    """Where clean-fid itself would load the file from."""
    if kind == TORCHSCRIPT_INCEPTION:
        from cleanfid.downloads_helper import inception_url

        return inception_url
    from cleanfid.inception_pytorch import FID_WEIGHTS_URL

    return FID_WEIGHTS_URL
