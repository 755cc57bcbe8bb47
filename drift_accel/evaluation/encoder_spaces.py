"""Chosen feature spaces: our own encoder's maps, a timm model, DINOv2, each from a local folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from drift_accel.data.row_encoders import weights_hash
from drift_accel.evaluation.feature_network import FeatureNetwork
from drift_accel.evaluation.protocols import Protocol
from drift_accel.models.configuration import EncoderConfig, load_encoder
from drift_accel.sampling.pictures import PictureBatch
from drift_accel.sampling.trained import align_memory

DINOV2_SIDE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class EncoderNetwork(FeatureNetwork):
    """One map of a masked autoencoder, averaged over its places: [b, channels of the map].

    The encoder sees what the generator makes: latents of an encoder of latents, pixels in [-1, 1] of the others.
    `encoder` is that of `path` where it is in memory already. Raises ValueError for a folder of another model and an unknown
    `layer`.
    """

    def __init__(
        self,
        path: Path,
        protocol: Protocol,
        *,
        device: torch.device | str,
        batch: int,
        layer: str | None = None,
        encoder: nn.Module | None = None,
    ):
        self.encoder = load_encoder(EncoderConfig(path=str(path))) if encoder is None else encoder
        align_memory(self.encoder)
        super().__init__(path, protocol, weights_hash(self.encoder), device=device, batch=batch)
        names = self.encoder.map_names
        if layer is not None and layer not in names:
            raise ValueError(f"--layer is {layer!r}: the encoder in {path} has {', '.join(names)}")
        self.layer = layer or names[-1]
        self.encoder.to(self.device)

    def identity(self) -> dict:
        """Also the map."""
        return {**super().identity(), "layer": self.layer}

    def prepare(self, batch: PictureBatch) -> Tensor:
        """Images or latents in model space."""
        config = self.encoder.config
        if batch.model_space is not None:
            inputs = torch.from_numpy(batch.model_space)
        elif config.in_channels not in (1, 3):
            raise ValueError(f"the encoder in {self.path} takes latents: give a latent cache in place of pictures")
        else:
            inputs = torch.from_numpy(batch.pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        wanted = (config.in_channels, config.input_size, config.input_size)
        if tuple(inputs.shape[1:]) != wanted:
            raise ValueError(f"the encoder in {self.path} takes images {wanted}, these are {tuple(inputs.shape[1:])}")
        return inputs

    def compute(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """The mean of the map over its places."""
        return {"features": self.encoder.feature_maps(inputs, [self.layer])[self.layer].flatten(2).mean(dim=2)}


class _ResizedNetwork(FeatureNetwork):
    """A network of pictures that are resized and normalised first."""

    def _set_input(self, side: int, mean, deviation) -> None:
        from cleanfid.resize import make_resizer

        self._resize = make_resizer("PIL", False, "bicubic", (side, side))
        self._mean, self._deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, deviation))

    def prepare(self, batch: PictureBatch) -> Tensor:
        """Pictures of the network's size, normalised."""
        return (self.resized(batch, self._resize) / 255 - self._mean) / self._deviation


class TimmNetwork(_ResizedNetwork):
    """The pooled features of a timm model, from a folder as timm saves one for the hub (config.json and weights).

    Raises ImportError saying what to install, ValueError for a folder that timm cannot read.
    """

    def __init__(self, path: Path, protocol: Protocol, *, device: torch.device | str, batch: int):
        try:
            import timm
        except ImportError:
            raise ImportError("protocol 'timm' needs the package timm: pip install drift_accel[encoders]") from None
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: give a folder that timm saved (timm.models.save_for_hf)")
        self.model = timm.create_model(f"local-dir:{path.resolve()}", pretrained=True, num_classes=0)
        self.model.eval().requires_grad_(False)
        super().__init__(path, protocol, weights_hash(self.model), device=device, batch=batch)
        self.model.to(self.device)
        config = timm.data.resolve_model_data_config(self.model)
        self._set_input(config["input_size"][-1], config["mean"], config["std"])

    def compute(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """Pooled features."""
        return {"features": self.model(inputs)}


class Dinov2Network(_ResizedNetwork):
    """The class token of a DINOv2 model, from a folder as transformers saves one (config.json and safetensors).

    Raises ValueError for a folder of another model or with missing weights.
    """

    def __init__(self, path: Path, protocol: Protocol, *, device: torch.device | str, batch: int):
        from transformers import Dinov2Model

        try:
            self.model, report = Dinov2Model.from_pretrained(
                path, local_files_only=True, use_safetensors=True, output_loading_info=True
            )  # fmt: skip
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no DINOv2 model: {str(error).splitlines()[0]}") from None
        if report["missing_keys"]:
            raise ValueError(f"{path}: weights are missing ({sorted(report['missing_keys'])[:3]} ...): download it again")
        align_memory(self.model.eval().requires_grad_(False))
        super().__init__(path, protocol, weights_hash(self.model), device=device, batch=batch)
        self.model.to(self.device)
        self._set_input(DINOV2_SIDE, IMAGENET_MEAN, IMAGENET_STD)

    def compute(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """The class token after the last norm."""
        return {"features": self.model(inputs).pooler_output}
