"""The release's artifact folders, and EDM's and DMD2's files, as folders of our own, with a check that nothing was lost."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drift_accel.foundation.random_streams import integer_draws, normal_draws, uniform_draws
from drift_accel.foundation.storage import COMPLETE_NAME, atomic_write_json, committed_folder, sha256_file
from drift_accel.models.edm_checkpoint import find_edm_weights, load_edm_unet
from drift_accel.models.edm_unet import EdmUNet
from drift_accel.models.exports import load_export
from drift_accel.models.generator import Generator
from drift_accel.models.official import METADATA_NAME, load_official

FORWARD_LIMIT = 2e-5  # norm-wise; what the models themselves are held to against values recorded from the release
CHECK_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was converted: the class of the model, its number of weights, and |difference| / |value| of each checked output."""

    model_class: str
    num_parameters: int
    differences: dict[str, float]


def convert_official(
    folder: str | Path,
    target: str | Path,
    *,
    provenance: dict[str, Any],
    overwrite: bool = False,
    edm_config: Mapping[str, Any] | None = None,
) -> Conversion:
    """Write a published model to `target` as `save_pretrained` does, read back and checked.

    `folder` is a release's artifact folder, or a file of EDM's or DMD2's weights or a folder with one (`load_edm_unet`;
    `edm_config` are settings of EdmUNet other than ImageNet 64x64's).

    Every weight must come back bit for bit, and a forward pass on fixed inputs within FORWARD_LIMIT. provenance.json gets hashes
    of the published files, their metadata and `provenance`. Raises FileExistsError for a target that exists without
    `overwrite`, ValueError for one that is no converted or exported model, or holds the published files, and as `load_official`
    and `load_edm_unet` do; RuntimeError where the check fails, with nothing written.
    """
    folder, target = Path(folder), Path(target)
    _require_target(folder, target, overwrite)
    model, metadata, sources = _read_published(folder, edm_config)
    root = folder if folder.is_dir() else folder.parent
    identity = {"official_sha256": {path.relative_to(root).as_posix(): sha256_file(path) for path in sources}}
    with committed_folder(target, replace=overwrite) as written:
        model.save_pretrained(written)
        conversion = check_conversion(model, load_export(written, type(model), "converted folder"))
        check = {"bit_identical": True, "forward_differences": conversion.differences, "limit": FORWARD_LIMIT}
        record = {"identity": identity, "official_metadata": metadata, "check": check, "sessions": [provenance]}
        atomic_write_json(written / "provenance.json", record)
    return conversion


def _read_published(folder: Path, edm_config: Mapping[str, Any] | None) -> tuple[nn.Module, dict[str, Any], list[Path]]:
    """The model of a folder or file, what is known of it beside its weights, and the files it was read from."""
    weights = None if (folder / METADATA_NAME).is_file() else find_edm_weights(folder)
    if weights is not None:
        return load_edm_unet(weights, edm_config), {"layout": "EDM or DMD2"}, [weights]
    if edm_config:
        raise ValueError(f"{folder} holds no file of EDM's or DMD2's weights, to which the given configuration would belong")
    model = load_official(folder)
    metadata = json.loads((folder / METADATA_NAME).read_text(encoding="utf-8"))
    return model, metadata, sorted(path for path in folder.rglob("*") if path.name == METADATA_NAME or path.suffix == ".msgpack")


def check_conversion(model: nn.Module, again: nn.Module) -> Conversion:
    """Compare two models, weights bit by bit and outputs within FORWARD_LIMIT. Raises RuntimeError naming what differs."""
    ours, theirs = model.state_dict(), again.state_dict()
    different = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    different += [name for name in theirs if name not in ours]
    if different:
        raise RuntimeError(f"{len(different)} weights did not come back as they were written ({', '.join(different[:3])} ...)")
    wanted, got = check_outputs(model), check_outputs(again.eval())
    differences = {}
    for name, value in wanted.items():
        differences[name] = float((got[name] - value).double().norm() / value.double().norm().clamp_min(1e-30))
        if not differences[name] <= FORWARD_LIMIT:  # also where it is NaN
            raise RuntimeError(
                f"output {name} of the converted model is off by {differences[name]:.2e} (limit {FORWARD_LIMIT:.0e})"
            )
    return Conversion(
        model_class=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        differences=differences,
    )


@torch.no_grad()
def check_outputs(model: nn.Module) -> dict[str, Tensor]:
    """Outputs {name: tensor} for fixed inputs: a generator's samples; an autoencoder's losses, reconstruction and maps."""
    config, slots = model.config, range(CHECK_BATCH)
    images = torch.from_numpy(normal_draws(0, "conversion/images", 0, slots, (config.in_channels, *[config.input_size] * 2)))
    labels = torch.from_numpy(integer_draws(0, "conversion/labels", 0, slots, (), config.num_classes))
    if isinstance(model, EdmUNet):
        return {"sample": model.generate(images, labels)}
    if isinstance(model, Generator):
        scale = 1 + torch.from_numpy(uniform_draws(0, "conversion/guidance", 0, slots, ()))
        codes = integer_draws(0, "conversion/styles", 0, slots, (config.num_style_tokens,), max(1, config.style_codebook_size))
        return {"sample": model(images, labels, scale, torch.from_numpy(codes))}
    side = math.ceil(config.input_size / config.input_patch_size / config.mask_patch_size)
    mask = model.expand_mask(torch.from_numpy(uniform_draws(0, "conversion/mask", 0, slots, (1, side, side)) < 0.5))
    losses = model(images, labels, mask, lambda_cls=0.1)
    return {
        "loss": losses.loss,
        "classification": losses.classification,
        "reconstruction": model.reconstruct(images, mask),
        **model.feature_maps(images, model.default_features),
    }


def _require_target(folder: Path, target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists already: give another folder, or --overwrite")
    if folder.resolve() == target.resolve() or target.resolve() in folder.resolve().parents:
        raise ValueError(f"{target} holds the published files {folder}, which it would replace: give another folder")
    if not (target / COMPLETE_NAME).is_file() or not (target / "config.json").is_file():
        raise ValueError(f"{target} is no exported model, so it is not replaced: give another folder")
