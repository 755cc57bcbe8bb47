"""Loading a model from a folder that `save_pretrained` wrote, strictly.

By itself `from_pretrained` fills missing weights with random ones, ignores unknown settings and unpickles old formats.
"""

import json
from pathlib import Path
from typing import TypeVar

from diffusers import ModelMixin

from drift_accel.models.checks import complete_config

Model = TypeVar("Model", bound=ModelMixin)


def load_export(folder: str | Path, model_class: type[Model], name: str = "folder") -> Model:
    """Load a `model_class` whose every weight comes from `folder` (config.json and safetensors).

    Raises FileNotFoundError for a folder without config.json, OSError for weights that cannot be read, ValueError for a model
    of another class, unknown settings, or missing or unknown weights; `name` says in the message which setting gave the folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"{name} {folder} has no config.json: give the folder of an exported {model_class.__name__}")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} {folder}: config.json describes no model ({error!r}): export it again") from None
    if kind != model_class.__name__:
        raise ValueError(f"{name} {folder} holds a {kind}: give the folder of a {model_class.__name__}")
    try:
        complete_config(model_class, settings)
    except ValueError as error:
        raise ValueError(f"{name} {folder}: {error}") from None
    model, report = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise ValueError(
            f"{name} {folder}: {len(wrong)} weights are missing or unknown ({', '.join(wrong[:3])} ...): export it again"
        )
    return model
