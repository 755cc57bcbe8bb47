"""What configurations of encoders accept and refuse, reading them from files, and random weights, which must be asked for."""

import re
from dataclasses import dataclass, field

import pytest
import torch
from golden_files import GOLDENS

from drift_accel.drift.encoders import EncoderEntryConfig
from drift_accel.foundation.command_line import configuration_text, parse_command
from drift_accel.models import MaskedAutoencoder
from drift_accel.models.configuration import DecoderConfig, EncoderConfig, load_encoder
from drift_accel.models.masked_autoencoder import MAE_PRESETS

RESNET = {"kind": "resnet", "path": "file.pth", "architecture": "resnet18", "weights": "moco_v2"}


def test_a_path_alone_is_a_masked_autoencoder():
    config = EncoderConfig(path="runs/mae/exports/ema_0.99")
    assert (config.kind, config.random, config.weight) == ("mae", False, 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "encoder.path is empty: give the folder of a trained masked autoencoder"),
        ({"kind": "convnextv2"}, "encoder.path is empty: give the folder of a ConvNeXt-V2"),
        ({"kind": "dinov2", "random": True}, "encoder.path is empty: give the folder of a DINOv2"),
        ({"kind": "vit", "path": "x"}, "encoder.kind is 'vit': choose one of mae, convnextv2, resnet, dinov2, code"),
        (
            {"path": "x", "architecture": "resnet18"},
            "architecture is 'resnet18', which belongs to kind resnet, not mae: leave it out",
        ),
        ({"path": "x", "image_size": 64}, "image_size is 64, which belongs to kind convnextv2, resnet, dinov2, not mae"),
        ({"path": "x", "preset": "latent-512"}, "encoder.preset is 'latent-512': choose one of tiny, latent-256, latent-640"),
        ({"kind": "dinov2", "path": "x", "preset": "tiny"}, "preset is 'tiny', which belongs to kind mae, not dinov2"),
        ({"path": "x", "allow_code": True}, "allow_code is True, which belongs to kind code"),
        ({"kind": "code", "path": "a:b", "allow_code": True, "random": True}, "random is True, which belongs to kind"),
        ({"kind": "code", "path": "a:b"}, "would run a:b with all rights of this process"),
        ({**RESNET, "architecture": None}, "architecture is None: choose one of resnet18, resnet50"),
        ({**RESNET, "architecture": "resnet101"}, "architecture is 'resnet101'"),
        ({**RESNET, "weights": None}, "weights is None: choose one of supervised, moco_v2, simclr"),
        ({**RESNET, "normalization": "none"}, "normalization is 'none': choose one of imagenet, unit"),
        ({**RESNET, "weights": "simclr"}, "normalization is null: SimCLR weights differ"),
        ({**RESNET, "image_size": 0}, "image_size is 0"),
        ({"kind": "dinov2", "path": "x", "blocks": ()}, r"blocks is \(\)"),
        ({"kind": "dinov2", "path": "x", "blocks": (2, 2)}, r"blocks is \(2, 2\): list each block once"),
        ({"kind": "dinov2", "path": "x", "blocks": (0, 2)}, r"blocks is \(0, 2\)"),
        ({"path": "x", "name": "a/b"}, "encoder.name is 'a/b'"),
        ({"path": "x", "weight": 0.0}, "encoder.weight of encoder is 0.0"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**settings)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 8}, ["width 8 instead of 16"]),
        ({"in_channels": 4}, ["in_channels 4 instead of 1"]),
        ({"blocks": (2, 2, 2, 1)}, [r"blocks \[2, 2, 2, 1\] instead of \(2, 2, 2, 2\)"]),
        ({"input_size": 16}, ["input_size 16 instead of 8"]),
        ({"input_size": 32, "input_patch_size": 4}, ["input_patch_size 4 instead of 1", "input_size 32 instead of 8"]),
        ({"num_classes": 3}, []),
    ],
)
def test_an_encoder_that_is_not_the_preset_is_refused_by_name(changes, named, tmp_path):
    MaskedAutoencoder(**{**MAE_PRESETS["tiny"], **changes}).save_pretrained(tmp_path)
    wanted = EncoderConfig(path=str(tmp_path), preset="tiny")
    if not named:
        assert load_encoder(wanted).config.num_classes == 3
        return
    with pytest.raises(ValueError, match="holds another encoder than encoder.preset tiny") as refusal:
        load_encoder(wanted)
    assert all(re.search(line, str(refusal.value)) for line in named)
    assert load_encoder(EncoderConfig(path=str(tmp_path))).config.width == changes.get("width", 16)


@dataclass(frozen=True, kw_only=True)
class Root:
    """A trainer's configuration with one encoder, and more beside it."""

    encoder: EncoderConfig
    more_encoders: tuple[EncoderEntryConfig, ...] = ()
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


FILE = """
encoder: {path: runs/mae, name: mae}
more_encoders:
- {kind: convnextv2, path: weights/convnextv2-base, name: convnext, weight: 0.5}
- {kind: resnet, path: moco.pth.tar, architecture: resnet50, weights: moco_v2, name: moco, features: {windows: []}}
decoder: {vae: digits, batch: 4, dtype: bfloat16}
"""


def read(tmp_path, text, *arguments):
    (tmp_path / "file.yaml").write_text(text)
    return parse_command(Root, "", ["--config", str(tmp_path / "file.yaml"), "--dry_run", *arguments]).config


def test_encoders_of_a_file_are_read_and_can_be_written_and_read_back(tmp_path):
    config = read(tmp_path, FILE, "--encoder.weight", "2")
    assert config.encoder == EncoderConfig(path="runs/mae", name="mae", weight=2.0)
    assert [entry.name for entry in config.more_encoders] == ["convnext", "moco"]
    assert config.more_encoders[1].features.windows == ()
    assert config.more_encoders[0].features.windows == (2, 4)
    assert config.decoder.dtype == "bfloat16"
    assert read(tmp_path, configuration_text(config)) == config


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("more_encoders: [{path: x, nmae: y}]", "nmae"),
        ("more_encoders: [{path: x, name: null}]", "encoder.name is None"),
        ("more_encoders: [{path: x, features: {maps: []}}]", "features.maps is empty"),
        ("more_encoders: [{kind: resnet, path: x}]", "encoder.architecture is None"),
        ("decoder: {dtype: float16}", "decoder.dtype is 'float16'"),
    ],
)
def test_a_wrong_entry_of_a_file_is_refused(text, fragment, tmp_path, capsys):
    with pytest.raises(SystemExit):
        read(tmp_path, "encoder: {path: x}\n" + text)
    assert fragment in capsys.readouterr().err


# Loading


@pytest.fixture(scope="module")
def mae_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    MaskedAutoencoder(width=8, blocks=(1, 1, 1, 1), in_channels=3, input_size=16, num_classes=2).save_pretrained(folder)
    return folder


def test_every_kind_is_frozen_and_knows_its_input(mae_folder):
    configs = [
        EncoderConfig(path=str(mae_folder)),
        EncoderConfig(kind="convnextv2", path=str(GOLDENS / "convnextv2"), image_size=64),
        EncoderConfig(kind="resnet", architecture="resnet18", weights="supervised", random=True, image_size=64),
    ]
    for config in configs:
        with pytest.warns(UserWarning, match="RANDOM WEIGHTS") if config.random else torch.no_grad():
            encoder = load_encoder(config)
        assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
        assert (encoder.input_space, encoder.in_channels) == ("pixel", 3)
        assert set(encoder.default_features) <= set(encoder.map_names)
        names, x = encoder.default_features[:2], torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
        maps = encoder.feature_maps(x, names=names)
        assert set(maps) == set(names)
        encoder.compile_repeated_blocks(backend="eager")  # what a trainer with compiled blocks calls
        assert all(torch.allclose(value, maps[name]) for name, value in encoder.feature_maps(x, names=names).items())


def test_missing_weights_are_never_random(tmp_path):
    for config, message in [
        (EncoderConfig(path=str(tmp_path)), "train one first"),
        (EncoderConfig(kind="convnextv2", path=str(tmp_path)), "hf download facebook/convnextv2-base-22k-224"),
        (EncoderConfig(kind="dinov2", path=str(tmp_path)), "hf download facebook/dinov2-base"),
        (EncoderConfig(**{**RESNET, "path": str(tmp_path / "none.pth")}), "moco_v2_800ep_pretrain.pth.tar"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            load_encoder(config)


def test_random_weights_are_announced_and_the_same_every_time(mae_folder):
    """Of a masked autoencoder the folder's configuration alone is used."""
    config = EncoderConfig(path=str(mae_folder), random=True)
    with pytest.warns(UserWarning, match=r"encoder encoder \(mae\) has RANDOM WEIGHTS.*mean nothing"):
        first = load_encoder(config)
    with pytest.warns(UserWarning, match="RANDOM WEIGHTS"):
        second = load_encoder(config)
    assert first.config.width == 8
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
