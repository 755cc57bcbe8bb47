"""A trained masked autoencoder from wherever it lies: a run, one of its checkpoints or exports, or the release's folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import verify_folder
from drift_accel.models.configuration import MaskedAutoencoderConfig
from drift_accel.models.exports import load_export
from drift_accel.models.masked_autoencoder import MaskedAutoencoder
from drift_accel.models.official import METADATA_NAME, load_official
from drift_accel.training.averages import average_name, export_names
from drift_accel.training.exports import DATA_DESCRIPTION
from drift_accel.training.mae_task import is_classifier_phase
from drift_accel.training.snapshot import MODEL_FILE

RAW_WEIGHTS = "none"  # the trained weights themselves, not one of their averages


@dataclass(frozen=True, kw_only=True)
class TrainedMae:
    """A masked autoencoder in evaluation mode on the CPU, without gradients, and what is known of it."""

    model: MaskedAutoencoder
    origin: str
    """Where the weights came from, for people."""
    configuration: Mapping[str, Any]
    """The run's configuration; empty where there is none."""
    data: Mapping[str, Any]
    """What it was trained on, as `describe_source` says it; empty where the folder does not say."""


def load_trained_mae(path: str | Path, *, ema: str | None = None) -> TrainedMae:
    """Load a masked autoencoder from a run of drift_accel.train_mae, a checkpoint or export of one, or the release's folder.

    Of a run, `ema` ("0.9995", "ema_0.9995") chooses the export of that average, "none" the raw weights of the newest checkpoint,
    None the export of the first average, and before there is one the newest checkpoint's. Of a checkpoint it chooses likewise.
    Raises FileNotFoundError and ValueError saying what the folder holds instead, and for a damaged checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: give a run of drift_accel.train_mae, an export or a checkpoint")
    if path.parent.name == "checkpoints":
        return _from_checkpoint(RunFolder(path.parent.parent), path, ema)
    run = RunFolder(path)
    if run.config_path.is_file():
        return _from_run(run, ema)
    if ema is not None:
        raise ValueError(f"{path} is no run, so --ema chooses nothing: leave it out, or give the run's folder")
    if (path / METADATA_NAME).is_file():
        model = load_official(path)
        if not isinstance(model, MaskedAutoencoder):
            raise ValueError(f"{path} holds a {type(model).__name__}: give the folder of a masked autoencoder")
        return _trained(model, str(path), {}, {})
    above = RunFolder(path.parent.parent)
    configuration = above.read_configuration() if path.parent.name == "exports" and above.config_path.is_file() else {}
    return _trained(load_export(path, MaskedAutoencoder), str(path), configuration, _read_json(path / DATA_DESCRIPTION))


def _from_run(run: RunFolder, ema: str | None) -> TrainedMae:
    configuration = _mae_configuration(run)
    names = _export_names(configuration)  # of the run's end: one of a step on the way is named by its own folder
    wanted = next(iter(names.values())) if ema is None else names.get(_average(ema))
    if wanted is not None and (run.export_dir(wanted) / "config.json").is_file():
        folder = run.export_dir(wanted)
        model = load_export(folder, MaskedAutoencoder)
        return _trained(model, str(folder), configuration, _read_json(folder / DATA_DESCRIPTION))
    latest = run.latest_complete_checkpoint()
    if latest is None:
        raise FileNotFoundError(f"{run.path} has no such export and no complete checkpoint yet: wait for its first one")
    return _from_checkpoint(run, latest[1], ema)


def _from_checkpoint(run: RunFolder, folder: Path, ema: str | None) -> TrainedMae:
    configuration = _mae_configuration(run)
    problems = verify_folder(folder)
    if problems:
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems)}")
    averages = [average_name(decay) for decay in _read_json(folder / "state.json").get("decays", [])]
    name = ema if ema == RAW_WEIGHTS else (averages[0] if ema is None and averages else _average(ema or RAW_WEIGHTS))
    if name not in (*averages, RAW_WEIGHTS):
        raise ValueError(f"{folder} has no average {ema}: it has {', '.join(averages) or 'none'}, or {RAW_WEIGHTS!r}")
    model = MaskedAutoencoder(**MaskedAutoencoderConfig(**configuration["mae"]).arguments())
    file = folder / (MODEL_FILE if name == RAW_WEIGHTS else f"{name}.safetensors")
    try:
        model.load_state_dict(load_file(file))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the run's configuration: {error}") from None
    label = "raw weights" if name == RAW_WEIGHTS else name
    return _trained(model, f"{folder} ({label})", configuration, {})


def _export_names(configuration: Mapping[str, Any]) -> dict[str, str]:
    """{average: its export's name}, in the order in which the run's configuration lists the averages."""
    classifier_steps = configuration["classifier"]["steps"]
    phase = is_classifier_phase(configuration.get("init_from"), classifier_steps, configuration["steps"])
    names = export_names(configuration["ema"]["decays"], classifier_phase=phase)
    return {average_name(decay): name for decay, name in names.items()}


def _mae_configuration(run: RunFolder) -> dict[str, Any]:
    configuration = run.read_configuration()
    if "mae" not in configuration:
        raise ValueError(f"{run.path} is a run of another trainer: give one of drift_accel.train_mae")
    return configuration


def _trained(model: MaskedAutoencoder, origin: str, configuration: Mapping[str, Any], data: Mapping[str, Any]) -> TrainedMae:
    return TrainedMae(model=model.eval().requires_grad_(False), origin=origin, configuration=configuration, data=data)


def _average(ema: str) -> str:
    try:
        return ema if ema == RAW_WEIGHTS else average_name(float(ema.removeprefix("ema_")))
    except ValueError:
        raise ValueError(f"--ema is {ema!r}: give a decay such as 0.9995, or {RAW_WEIGHTS!r} for the raw weights") from None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
