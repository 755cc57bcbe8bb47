"""Networks from folders in the format of transformers: config.json and safetensors, every weight from the file.

By itself `from_pretrained` draws missing weights at random, drops unknown ones with a warning and unpickles old formats.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .initialization import default_generator
from .pixel_encoder import draw_weights

# Of ForImageClassification folders: the head behind the features.
HEAD_WEIGHTS = {"classifier.weight", "classifier.bias"}


def load_transformers_network(folder: str | Path, model_class: type[nn.Module], advice: str, *, random: bool = False):
    """Build `model_class` from a folder, in float32 on the CPU; the folder may hold the model with a classifier on top.

    Args:
        advice: what to get and how, for the message about missing files.
        random: take the architecture of config.json with random weights.

    Raises:
        FileNotFoundError: no config.json or no weights in the folder.
        ValueError: a folder of another model, a damaged config.json, or weights that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"encoder.path {folder} has no config.json: {advice}")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = settings["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"encoder.path {folder}: config.json describes no model ({error!r}): {advice}") from None
    wanted = model_class.config_class.model_type
    if kind != wanted:
        raise ValueError(f"encoder.path {folder} holds a {kind}, wanted a {wanted}: {advice}")
    if random:
        network = undrawn_network(model_class, model_class.config_class.from_dict(settings))
        draw_weights(network, default_generator())
        return network
    _require_weights(folder, advice)
    try:
        with _quiet():
            network, report = model_class.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except RuntimeError as error:
        raise ValueError(f"encoder.path {folder}: the weights do not fit config.json ({error}): {advice}") from None
    missing, unknown = sorted(report["missing_keys"]), sorted(set(report["unexpected_keys"]) - HEAD_WEIGHTS)
    if missing or unknown:
        raise ValueError(
            f"encoder.path {folder} does not fit its config.json: missing tensors {missing[:5]} ({len(missing)}), "
            f"unknown tensors {unknown[:5]} ({len(unknown)}): {advice}"
        )
    return network


def undrawn_network(model_class: type[nn.Module], config) -> nn.Module:
    """The network of a configuration in float32 on the CPU, its weights not set.

    Under FakeTensorMode, where the constructors of transformers fail because they read numbers, the weights have no contents.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        network = model_class(config)

    def empty(weight: torch.Tensor) -> torch.Tensor:
        return torch.empty(weight.shape, dtype=torch.float32 if weight.is_floating_point() else weight.dtype)

    return network._apply(empty)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no table of unused weights from transformers: this module judges them itself."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _require_weights(folder: Path, advice: str) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise FileNotFoundError(
            f"encoder.path {folder} has {pickled[0]} but no safetensors, and pickled weights are not read: load the folder once "
            "with transformers and save it with save_pretrained(FOLDER), which writes safetensors"
        )
    raise FileNotFoundError(f"encoder.path {folder} has no *.safetensors: {advice}")
