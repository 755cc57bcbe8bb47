"""The named ways from pictures to numbers. Numbers of different protocols are never compared.

A protocol fixes the quantiser, the resizing, the network and its input; `docs` say each operation in order, and every result
carries them. clean, legacy_tensorflow, legacy_pytorch: clean-fid (Parmar et al. 2022, arXiv 2104.11222). release: the evaluation
of the official release of arXiv 2602.04770, whose Inception is the one of the 2015-12-05 file with the same resizing.
"""

from dataclasses import dataclass

TORCHSCRIPT_INCEPTION, PYTORCH_INCEPTION = "torchscript_inception", "pytorch_inception"
ENCODER, TIMM, DINOV2 = "encoder", "timm", "dinov2"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way from pictures to numbers."""

    name: str
    network: str
    """Kind of the network, see networks.py."""
    quantizer: str
    """How generated pixels become 256 levels."""
    operations: tuple[str, ...]
    """What is done to a picture, in this order."""

    @property
    def is_inception(self) -> bool:
        """Whether its Frechet distance is what papers call FID, and its logits give an inception score."""
        return self.network in (TORCHSCRIPT_INCEPTION, PYTORCH_INCEPTION)

    @property
    def frechet_name(self) -> str:
        """The key of the Frechet distance in a result."""
        return "fid" if self.is_inception else f"frechet_{self.name}"


_LOGITS = "logits: features times the output weights, without the bias"
_PROTOCOLS = (
    Protocol(
        name="clean",
        network=TORCHSCRIPT_INCEPTION,
        quantizer="round",
        operations=(
            "uint8 levels by rounding",
            "each channel as float, PIL bicubic to 299x299 with antialiasing, clipped to [0, 255]",
            "(x - 128) / 128",
            "Inception 2015-12-05, pooled features [2048]",
            _LOGITS,
        ),
    ),
    Protocol(
        name="legacy_tensorflow",
        network=TORCHSCRIPT_INCEPTION,
        quantizer="round",
        operations=(
            "uint8 levels by rounding",
            "resized to 299x299 inside of the network file: bilinear, no antialiasing",
            "(x - 128) / 128",
            "Inception 2015-12-05, pooled features [2048]",
            _LOGITS,
        ),
    ),
    Protocol(
        name="legacy_pytorch",
        network=PYTORCH_INCEPTION,
        quantizer="round",
        operations=(
            "uint8 levels by rounding",
            "torch bilinear to 299x299, no antialiasing, align_corners false, clipped to [0, 255]",
            "2 x / 255 - 1",
            "pytorch-fid's port of Inception 2015-12-05, pooled features [2048]",
            _LOGITS,
        ),
    ),
    Protocol(
        name="release",
        network=TORCHSCRIPT_INCEPTION,
        quantizer="truncate",
        operations=(
            "x in [0, 1], NaN to 0, uint8 levels by truncation of clip(255 x, 0, 255)",
            "bilinear to 299x299 by affine_grid of the identity shifted by (1/width - 1/299, 1/height - 1/299) and grid_sample, "
            "align_corners false, border padding",
            "(x - 128) / 128",
            "Inception 2015-12-05, pooled features [2048]",
            _LOGITS,
        ),
    ),
    Protocol(
        name="encoder",
        network=ENCODER,
        quantizer="round",
        operations=(
            "images or latents in model space as the generator makes them",
            "one map of a masked autoencoder, mean over places",
        ),
    ),
    Protocol(
        name="timm",
        network=TIMM,
        quantizer="round",
        operations=(
            "uint8 levels by rounding",
            "each channel as float, PIL bicubic with antialiasing to the model's input size, clipped to [0, 255]",
            "x / 255, then the model's mean and std",
            "pooled features of the timm model",
        ),
    ),
    Protocol(
        name="dinov2",
        network=DINOV2,
        quantizer="round",
        operations=(
            "uint8 levels by rounding",
            "each channel as float, PIL bicubic with antialiasing to 224x224, clipped to [0, 255]",
            "x / 255, then ImageNet's mean and std",
            "class token after the last norm",
        ),
    ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}


def get_protocol(name: str) -> Protocol:
    """The protocol of a name. Raises ValueError naming those there are."""
    if name not in PROTOCOLS:
        raise ValueError(f"there is no protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
