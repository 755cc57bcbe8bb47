"""A trained generator from wherever it lies: a run, one of its checkpoints or exports, a pipeline, an official folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from drift_accel.data.cache_format import read_description
from drift_accel.data.class_table import ClassTable
from drift_accel.data.row_encoders import weights_hash
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import verify_folder
from drift_accel.models.configuration import GeneratorConfig
from drift_accel.models.exports import load_export
from drift_accel.models.generator import Generator
from drift_accel.models.official import load_official
from drift_accel.sampling.class_choice import table_of_classes
from drift_accel.training.averages import average_name
from drift_accel.training.checkpoint import MODEL_FILE

DATA_DESCRIPTION = "data.json"  # beside an export's weights
RAW_WEIGHTS = "none"  # the trained weights themselves, not one of their averages
LATEST = "latest"
_EXPORT_NAME = re.compile(r"(ema_[\d.]+)(?:_step_(\d+))?")
MEMORY_ALIGNMENT = 64  # bytes, torch's on CPU


@dataclass(frozen=True, kw_only=True)
class TrainedGenerator:
    """A generator in evaluation mode on the CPU, and what is known of it."""

    generator: Generator
    table: ClassTable
    """Its classes."""
    data: Mapping[str, Any]
    """Of the images it makes: kind ("pixels" or "latents"), scale, shift, vae; empty where the folder does not say."""
    origin: Mapping[str, Any]
    """For records: kind of the folder, path, step and ema where known, weights_sha256."""
    provenance: Mapping[str, Any]
    """What the training recorded; empty where nothing is known."""

    @property
    def makes_latents(self) -> bool:
        """Whether a VAE is needed to see what it makes."""
        if "kind" in self.data:
            return self.data["kind"] == "latents"
        return self.generator.config.in_channels not in (1, 3)


def load_trained(path: str | Path, *, export: str | None = None, ema: str | None = None, step: str | int | None = None):
    """Load a `TrainedGenerator` from `path`.

    `path` is a run of drift_accel.train, a checkpoint folder of one, an export (`save_pretrained`), a saved DriftPipeline, or
    an artifact folder of the official release. Of a run: `export` names one of its exports; `step` (a number or "latest") takes
    a checkpoint instead, with the average `ema` ("0.999" or "ema_0.999"; "none" for the raw weights; None: the first). Without
    both, the export of `ema`, or the newest checkpoint of a run that has none yet.
    Raises FileNotFoundError and ValueError saying what the folder holds instead, and for a damaged checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder: give a run, an export, a checkpoint or an official artifact folder")
    choices = {"export": export, "ema": ema, "step": step}
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        _refuse_choices(path, "a checkpoint", {"export": export, "step": step})
        return _from_checkpoint(RunFolder(path.parent.parent), path, ema)
    if (path / "config.yaml").is_file() or any(path.glob("exports/*/config.json")):
        return _from_run(RunFolder(path), export, ema, step)
    _refuse_choices(path, "no run", choices)
    if (path / "metadata.json").is_file():
        return _from_official(path)
    if (path / "model_index.json").is_file():
        return _from_export(path / "generator", "pipeline", _pipeline_data(path))
    if (path / "config.json").is_file():
        return _from_export(path, "export")
    raise FileNotFoundError(
        f"{path} holds no model: a run has config.yaml, an export config.json, an official artifact folder metadata.json"
    )


def _refuse_choices(path: Path, what: str, choices: Mapping[str, Any]) -> None:
    given = [name for name, value in choices.items() if value is not None]
    if given:
        raise ValueError(f"{path} is {what}, so --{given[0]} chooses nothing: leave it out, or give the run's folder")


def _from_official(path: Path) -> TrainedGenerator:
    model = load_official(path)
    if not isinstance(model, Generator):
        raise ValueError(f"{path} holds a {type(model).__name__}: give the folder of a generator")
    return _trained(model, {"kind": "official", "path": str(path)}, {}, {})


def _from_export(path: Path, kind: str, data: Mapping[str, Any] | None = None) -> TrainedGenerator:
    model = load_export(path, Generator, kind)
    data = _read_json(path / DATA_DESCRIPTION) if data is None else data
    provenance = _read_json(path / "provenance.json")
    return _trained(model, {"kind": kind, "path": str(path), **_place_in_run(path.name)}, data, provenance)


def _from_run(run: RunFolder, export: str | None, ema: str | None, step: str | int | None) -> TrainedGenerator:
    if run.config_path.is_file():
        _require_generator_run(run)
    if export is not None and (step is not None or ema is not None):
        raise ValueError("--export names the weights already: leave out --step and --ema")
    name = export if export is not None or step is not None else _final_export(run, ema)
    if name is not None:
        trained = _from_export(run.find_export(name), "export")
        steps = run.checkpoint_steps()
        origin = {**trained.origin, "run": str(run.path)}
        origin.setdefault("step", steps[-1] if steps else None)  # the final exports are those of the last step
        data = trained.data or describe_run(run)
        return _trained(trained.generator, origin, data, trained.provenance)
    if step is None or step == LATEST:
        latest = run.latest_complete_checkpoint()
        if latest is None:
            raise FileNotFoundError(f"{run.path} has no export and no complete checkpoint yet: wait for its first one")
        return _from_checkpoint(run, latest[1], ema)
    try:
        number = int(step)
    except ValueError:
        raise ValueError(f"--step is {step!r}: give a number of steps or {LATEST!r}") from None
    if number not in run.checkpoint_steps():
        there = ", ".join(map(str, run.checkpoint_steps())) or "none"
        raise ValueError(f"{run.path} has no checkpoint of step {number}: it has {there}")
    return _from_checkpoint(run, run.checkpoint_dir(number), ema)


def _final_export(run: RunFolder, ema: str | None) -> str | None:
    """The export that a finished run made of its last weights; None where there is none, and its checkpoints have to do."""
    if ema == RAW_WEIGHTS:
        return None
    names = sorted(path.parent.name for path in run.exports_dir.glob("*/config.json"))
    if not run.checkpoint_steps():  # copied without them: whatever exports there are
        return names[0] if names and ema is None else (average_name(_decay(ema)) if ema is not None else None)
    final = [name for name in names if "step" not in _place_in_run(name)]
    wanted = final[:1] if ema is None else [name for name in final if name == average_name(_decay(ema))]
    return wanted[0] if wanted else None


def _require_generator_run(run: RunFolder) -> dict[str, Any]:
    configuration = run.read_configuration()
    if "generator" not in configuration:
        raise ValueError(
            f"{run.path} is a run of another trainer: its configuration has no generator; give one of drift_accel.train"
        )
    return configuration


def _from_checkpoint(run: RunFolder, folder: Path, ema: str | None) -> TrainedGenerator:
    configuration = _require_generator_run(run)
    problems = verify_folder(folder)
    if problems:
        raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(problems)}")
    averages = checkpoint_averages(folder)
    name = RAW_WEIGHTS if ema == RAW_WEIGHTS else (averages[0] if ema is None and averages else average_name(_decay(ema or "")))
    if name not in (*averages, RAW_WEIGHTS):
        raise ValueError(f"checkpoint {folder} has no average {ema}: it has {', '.join(averages) or 'none'}, or {RAW_WEIGHTS!r}")
    file = folder / (MODEL_FILE if name == RAW_WEIGHTS else f"{name}.safetensors")
    model = Generator(**GeneratorConfig(**configuration["generator"]).arguments())
    weights = load_file(file)
    # An average covers parameters alone; buffers are functions of the configuration.
    missing, unknown = model.load_state_dict(weights, strict=False)
    missing = sorted(set(missing) & {name for name, _ in model.named_parameters()})
    if missing or unknown:
        raise ValueError(f"{file} does not fit the run's configuration: {[*missing, *unknown][:3]} ... are missing or unknown")
    step = int(folder.name.removeprefix("step_"))
    origin = {"kind": "checkpoint", "path": str(folder), "run": str(run.path), "step": step, "ema": name}
    return _trained(model, origin, describe_run(run), _read_json(run.provenance_path))


def checkpoint_averages(folder: Path) -> list[str]:
    """The names of the averages in a checkpoint folder, the first configured one first."""
    decays = _read_json(folder / "state.json").get("decays", [])
    return [average_name(decay) for decay in decays]


def describe_run(run: RunFolder) -> dict[str, Any]:
    """What a run's images are, from an export, from its cache's header, or from the digits; empty where none can be read."""
    for path in sorted(run.exports_dir.glob(f"*/{DATA_DESCRIPTION}")):
        return _read_json(path)
    data = (run.read_configuration() if run.config_path.is_file() else {}).get("data") or {}
    if data.get("source") == "cache" and data.get("path"):
        try:
            header, _ = read_description(data["path"])
        except (OSError, ValueError):
            return {}  # the cache may lie on the machine that trains; the model is as good without its names
        classes = [{"index": entry.index, "id": entry.id, "name": entry.name} for entry in header.classes]
        return {"kind": header.kind, "scale": header.scale, "shift": header.shift, "vae": header.vae, "classes": classes}
    return {"kind": "pixels"} if data.get("source") == "digits" else {}


def _trained(model: nn.Module, origin: Mapping[str, Any], data: Mapping[str, Any], provenance: Mapping[str, Any]):
    table = table_of_classes(data.get("classes"), model.config.num_classes)
    origin = {**origin, "weights_sha256": origin.get("weights_sha256") or weights_hash(model)}
    align_memory(model.eval().requires_grad_(False))
    return TrainedGenerator(generator=model, table=table, data=data, origin=origin, provenance=provenance)


def _pipeline_data(path: Path) -> dict[str, Any]:
    index = _read_json(path / "model_index.json")
    names = sorted((index.get("id2label") or {}).items(), key=lambda item: int(item[0]))
    named = [label for label, _ in names] == [str(place) for place in range(len(names))]
    classes = [{"index": int(label), "id": label, "name": name} for label, name in names] if named else []
    vae = path / "vae" if (path / "vae").is_dir() else None
    return {"classes": classes, **({"kind": "latents", "vae": {"name": str(vae)}} if vae else {})}


def align_memory(module: nn.Module) -> None:
    """Move CPU weights to where torch itself would have put them.

    In a memory-mapped file they lie at any multiple of their size, and CPU kernels then round differently: the loaded model
    would not give the bits of the saved one.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % MEMORY_ALIGNMENT:
            tensor.data = tensor.data.clone()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): export the model again") from None
    return content if isinstance(content, dict) else {}


def _decay(ema: str) -> float:
    try:
        return float(str(ema).removeprefix("ema_"))
    except ValueError:
        raise ValueError(f"--ema is {ema!r}: give a decay such as 0.999, or {RAW_WEIGHTS!r} for the raw weights") from None


def _place_in_run(name: str) -> dict[str, Any]:
    """What an export's folder name says: ema_0.999, or ema_0.999_step_1000 for one made during training."""
    match = _EXPORT_NAME.fullmatch(name)
    if match is None:
        return {"ema": None}
    return {"ema": match[1], **({"step": int(match[2])} if match[2] else {})}


def is_model(path: str | Path) -> bool:
    """Whether `load_trained` would take this folder for a model, by the files in it."""
    path = Path(path)
    names = ("config.yaml", "config.json", "metadata.json", "model_index.json")
    if path.parent.name == "checkpoints" and (path.parent.parent / "config.yaml").is_file():
        return True
    return any((path / name).is_file() for name in names) or any(path.glob("exports/*/config.json"))
