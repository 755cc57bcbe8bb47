"""Starting a new run from the weights of another one, or from published ones."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import sha256_file, verify_folder
from drift_accel.models import load_official
from drift_accel.models.checks import complete_config
from drift_accel.models.exports import load_export
from drift_accel.training.checkpoint import STATE_FILE, load_weights, read_record
from drift_accel.training.snapshot import MODEL_FILE

OFFICIAL_FILE = "metadata.json"
EXPORT_FILE = "config.json"


@dataclass(frozen=True)
class InitialWeights:
    """Weights {name: whole tensor} for a new run; `sha256` is over the files that they came from."""

    path: Path
    weights: dict[str, Tensor]
    sha256: str

    def put_into(self, model: nn.Module) -> None:
        """Give the model these weights. Raises ValueError where they do not fit."""
        load_weights(model, self.weights, f"init_from {self.path} does not fit the configured model")


def find_initial_weights(
    path: str | None, model_class: type[ModelMixin], settings: Mapping[str, Any], output_dir: Path
) -> InitialWeights | None:
    """The weights that `path` holds for a `model_class` with `settings`; None where the run has a checkpoint of its own.

    `path` is a run (its newest complete checkpoint), a checkpoint (its plain weights), an exported model, or a folder of the
    official release. Raises ValueError naming the settings that differ, or a damaged checkpoint; FileNotFoundError for a folder
    that is none of these.
    """
    if path is None or RunFolder(output_dir).checkpoint_steps():
        return None
    folder = Path(path)
    run = RunFolder(folder)
    if run.config_path.is_file():
        found = run.latest_complete_checkpoint()
        if found is None:
            raise ValueError(f"init_from {folder} is a run without a complete checkpoint: train it, or give another folder")
        return _from_checkpoint(found[1], model_class, settings)
    if (folder / STATE_FILE).is_file():
        return _from_checkpoint(folder, model_class, settings)
    if (folder / OFFICIAL_FILE).is_file():
        return _from_model(folder, load_official(folder), model_class, settings)
    if (folder / EXPORT_FILE).is_file():
        class_name, config = _export_settings(folder)
        _require_architecture(folder, class_name, config, model_class, settings)
        return _from_model(folder, load_export(folder, model_class, "init_from"), model_class, settings)
    raise FileNotFoundError(
        f"init_from {folder} holds no weights: give a run, one of its checkpoints/step_N or exports/ema_DECAY, "
        f"or a folder of the official release ({OFFICIAL_FILE} and ema_params.msgpack)"
    )


def hash_weight_files(folder: str | Path) -> str:
    """One SHA-256 over the weight files of a model folder, safetensors or the release's msgpack, by name."""
    files = sorted(path for pattern in ("*.safetensors", "**/*.msgpack") for path in Path(folder).glob(pattern))
    return hashlib.sha256("".join(f"{path.name}:{sha256_file(path)}" for path in files).encode()).hexdigest()


def _from_checkpoint(folder: Path, model_class: type, settings: Mapping[str, Any]) -> InitialWeights:
    problems = verify_folder(folder)
    if problems:
        raise ValueError(f"init_from: checkpoint {folder} is damaged: {'; '.join(problems)}")
    model = read_record(folder)["model"]
    _require_architecture(folder, model["class"], model["config"], model_class, settings)
    return InitialWeights(folder, load_file(folder / MODEL_FILE), sha256_file(folder / MODEL_FILE))


def _from_model(folder: Path, model: ModelMixin, model_class: type, settings: Mapping[str, Any]) -> InitialWeights:
    _require_architecture(folder, type(model).__name__, model.config, model_class, settings)
    return InitialWeights(folder, model.state_dict(), hash_weight_files(folder))


def _export_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    try:
        config = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
        return config["_class_name"], config
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"init_from {folder}: {EXPORT_FILE} describes no model ({error!r})") from None


def _require_architecture(
    folder: Path, class_name: str, config: Mapping[str, Any], model_class: type, settings: Mapping[str, Any]
) -> None:
    if class_name != model_class.__name__:
        raise ValueError(f"init_from {folder} holds a {class_name}, but this trains a {model_class.__name__}")
    theirs, ours = complete_config(model_class, config), complete_config(model_class, settings)
    different = {name: (theirs[name], ours[name]) for name in ours if _plain(theirs[name]) != _plain(ours[name])}
    if different:
        lines = "\n".join(f"  {name}: {saved} -> {asked}" for name, (saved, asked) in different.items())
        raise ValueError(
            f"init_from {folder} has another architecture than is configured (there -> here):\n{lines}\n"
            "Configure the model as it is there, or leave init_from out"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
