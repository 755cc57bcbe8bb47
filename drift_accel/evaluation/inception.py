"""The two Inception networks of FID, opened and fed by clean-fid, and the release's resizing.

Shapes: b pictures of a batch, x [b, 3, H, W] in [0, 255], features [b, 2048], logits [b, 1008].
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.protocols import Protocol
from drift_accel.foundation.storage import sha256_file
from drift_accel.sampling.pictures import PictureBatch

SIDE = 299
DIMENSION = 2048
SPATIAL_CHANNELS = 7  # of the 17x17 map: 2,023 numbers, as many as the pooled features (Nash et al. 2021, arXiv 2103.03841)
# The layers of the file up to the map that sFID looks at; its own modules are run one after another.
SPATIAL_PATH = (
    *("conv", "conv_1", "conv_2", "pool0", "conv_3", "conv_4", "pool1"),
    *("mixed", "mixed_1", "mixed_2", "mixed_3", "mixed_4", "mixed_5"),
)


def resize_by_grid(images: Tensor, side: int = SIDE) -> Tensor:
    """Resize x [b, 3, H, W] to [b, 3, side, side] as the TF-ported Inception does: corners stay where they are in TF's old way.

    Bilinear; the identity's grid is shifted by (1/W - 1/side, 1/H - 1/side); align_corners false, border padding.
    """
    height, width = images.shape[2:]
    theta = torch.eye(2, 3, device=images.device, dtype=images.dtype)
    theta[0, 2] += 1 / width - 1 / side
    theta[1, 2] += 1 / height - 1 / side
    grid = F.affine_grid(theta.expand(len(images), 2, 3), [len(images), images.shape[1], side, side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class TorchscriptInception(FeatureNetwork):
    """inception-2015-12-05.pt through clean-fid's wrapper, for clean, legacy_tensorflow and release.

    Raises ValueError for a file that is no such network, and for `spatial` where it does not show its mixed_6 map.
    """

    def __init__(self, path: Path, protocol: Protocol, *, device: torch.device | str, batch: int, spatial: bool = False):
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        super().__init__(path, protocol, sha256_file(path), device=device, batch=batch)
        try:
            self.network = InceptionV3W(str(path.parent), download=False, resize_inside=protocol.name == "legacy_tensorflow")
        except (RuntimeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path} is no Inception in TorchScript ({str(error).splitlines()[0]}): get the file again"
            ) from None
        self.network.to(self.device).requires_grad_(False)
        self._resize = build_resizer("clean") if protocol.name == "clean" else None
        self._output = _output_weights(self.network.base.state_dict())
        self.provides = ("features", *(("logits",) if self._output is not None else ()), *(("spatial",) if spatial else ()))
        if spatial:
            layers = dict(self.network.layers.named_children())
            missing = [name for name in (*SPATIAL_PATH, "mixed_6") if name not in layers]
            if missing or not hasattr(layers["mixed_6"], "conv"):
                raise ValueError(
                    f"{path} does not show its mixed_6 map ({', '.join(missing) or 'mixed_6.conv'} is not there): no sFID"
                )
            self._spatial = [*(layers[name] for name in SPATIAL_PATH), layers["mixed_6"].conv]

    def prepare(self, batch: PictureBatch) -> Tensor:
        """Pictures in [0, 255]; for clean already 299x299."""
        if self._resize is not None:
            return self.resized(batch, self._resize)
        return torch.from_numpy(self.rgb(batch)).permute(0, 3, 1, 2).float()

    def compute(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """Features, and logits and map where they are asked for."""
        if self.protocol.name == "release":
            inputs = resize_by_grid(inputs)
        features = self.network(inputs)  # [b, 2048]
        outputs = {"features": features}
        if self._output is not None:
            outputs["logits"] = features @ self._output.T
        if "spatial" in self.provides:
            hidden = (inputs if inputs.shape[2:] == (SIDE, SIDE) else resize_by_grid(inputs)) - 128
            hidden = hidden / 128
            for layer in self._spatial:
                hidden = layer(hidden)
            outputs["spatial"] = hidden[:, :SPATIAL_CHANNELS].flatten(1)  # [b, 7 * 17 * 17]
        return outputs


class PytorchInception(FeatureNetwork):
    """pytorch-fid's port of the same weights, as clean-fid builds it, for legacy_pytorch.

    Raises ValueError for a file that does not hold exactly its weights.
    """

    def __init__(self, path: Path, protocol: Protocol, *, device: torch.device | str, batch: int):
        from cleanfid import inception_pytorch
        from cleanfid.resize import build_resizer

        super().__init__(path, protocol, sha256_file(path), device=device, batch=batch)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        own = inception_pytorch.load_state_dict_from_url
        # clean-fid builds this network from its download alone; here the download is the file that the user gave.
        inception_pytorch.load_state_dict_from_url = lambda *args, **kwargs: weights
        try:
            self.network = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
        except RuntimeError as error:
            raise ValueError(
                f"{path} does not hold the weights of this Inception ({str(error).splitlines()[0]}): get it again"
            ) from None
        finally:
            inception_pytorch.load_state_dict_from_url = own
        self.network.eval().to(self.device)
        self._resize = build_resizer("legacy_pytorch")
        self._output = weights["fc.weight"].float().to(self.device)
        self.provides = ("features", "logits")

    def prepare(self, batch: PictureBatch) -> Tensor:
        """Pictures in [0, 255], 299x299."""
        return self.resized(batch, self._resize)

    def compute(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """Features and logits."""
        features = self.network(inputs / 255)[0].flatten(1)  # [b, 2048]
        return {"features": features, "logits": features @ self._output.T}


def _output_weights(state: Mapping[str, Tensor]) -> Tensor | None:
    """The weights [classes, 2048] of the file's classifier, or None where it has no single one."""
    found = [tensor for tensor in state.values() if tensor.ndim == 2 and tensor.shape[1] == DIMENSION]
    return found[0].float() if len(found) == 1 else None
