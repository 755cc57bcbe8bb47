"""Averages as folders that `from_pretrained` reads: exports/ema_DECAY at the end, exports/ema_DECAY_step_N on the way.

An encoder's classifier phase that is a run of its own exports `encoder_cls` in their place, so that its encoder is not taken for
the one that it started from.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from drift_accel.foundation.collectives import run_on_main
from drift_accel.foundation.run_folder import RunFolder
from drift_accel.foundation.storage import atomic_write_json, committed_folder, verify_folder
from drift_accel.training.averages import WeightAverages
from drift_accel.training.sharding import model_of, whole_tensors
from drift_accel.training.snapshot import Snapshot, average_file
from drift_accel.training.state import TrainingState

DATA_DESCRIPTION = "data.json"
STEP_KEY = "trained_steps"


def finish_run(
    run: RunFolder, state: TrainingState, first_step: int, data: Mapping[str, Any], names: Mapping[float, str]
) -> None:
    """Export the averages where something was trained or an export is missing, cut or of another step.

    Every process must call this. `names` are those of `averages.export_names`; `data` describes what the model was trained on
    (`describe_source`); it lies beside the weights as data.json, with the step.
    """
    data = {**data, STEP_KEY: state.step}
    folders = [run.export_dir(names[decay]) for decay in state.averages.averages]
    whole = run_on_main(lambda: all(is_whole_export(folder, state.step) for folder in folders), state.group)
    if state.step == first_step and whole:
        return
    for decay, average in state.averages.averages.items():
        kept = {}
        for name, tensor in whole_tensors(average):
            if state.accelerator.is_main_process:
                kept[name] = tensor.cpu()

        def write(name: str = names[decay], kept: dict[str, Tensor] = kept) -> None:
            print(f"exported {_export(run, name, model_of(state.averages.bones, kept), data)}")

        run_on_main(write, state.group)


def export_snapshot(
    run: RunFolder, snapshot: Snapshot, averages: WeightAverages, data: Mapping[str, Any], names: Mapping[float, str]
) -> None:
    """Export every average of a snapshot under a name with its step. For the main process alone, on any thread."""
    for decay in averages.averages:
        model = model_of(averages.bones, snapshot.tensors[average_file(decay)])
        _export(run, f"{names[decay]}_step_{snapshot.step:08d}", model, {**data, STEP_KEY: snapshot.step})


def is_whole_export(folder: Path, step: int) -> bool:
    """Whether an export is there, whole and of this step.

    A run that was lengthened and killed before its last export still has the one of its former end.
    """
    if verify_folder(folder, full=False) or not (folder / DATA_DESCRIPTION).exists():
        return False
    return json.loads((folder / DATA_DESCRIPTION).read_text(encoding="utf-8")).get(STEP_KEY) == step


def _export(run: RunFolder, name: str, model: nn.Module, data: Mapping[str, Any]) -> Path:
    target = run.export_dir(name)
    with committed_folder(target, replace=True) as folder:
        model.save_pretrained(folder)
        (folder / "provenance.json").write_bytes(run.provenance_path.read_bytes())
        atomic_write_json(folder / DATA_DESCRIPTION, data)
    return target
