"""Untrained generators and what lies beside them, small enough for the suite."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_runs import load_tool

from drift_accel.foundation.storage import committed_folder
from drift_accel.models import Generator, MaskedAutoencoder
from drift_accel.sampling import load_trained
from drift_accel.sampling.trained import TrainedGenerator

CLASSES = (("n01440764", "tench, Tinca tinca"), ("n01443537", "goldfish"), ("n02012849", "crane"), ("n03126707", "crane"))


def fill(model: torch.nn.Module, scale: float = 0.15) -> torch.nn.Module:
    """Weights that do something: the initial output layer of a generator is zero."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=random))
    return model.eval()


def tiny_generator(channels: int = 1, side: int = 8, num_classes: int = 4) -> Generator:
    """A generator of images or latents [channels, side, side]."""
    return fill(
        Generator(
            input_size=side, in_channels=channels, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=num_classes,
            num_style_tokens=2, style_codebook_size=5, num_context_tokens=1,
        )
    )  # fmt: skip


def tiny_vae() -> AutoencoderKL:
    """Latents [4, h, w] to images [3, h, w]."""
    return fill(AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, scaling_factor=0.5))


def write_export(folder: Path, channels: int = 1, side: int = 8, classes=CLASSES, **data) -> Path:
    """An export of a tiny generator with a class table."""
    tiny_generator(channels, side, len(classes)).save_pretrained(folder)
    entries = [{"index": index, "id": key, "name": name} for index, (key, name) in enumerate(classes)]
    kind = "pixels" if channels in (1, 3) else "latents"
    (folder / "data.json").write_text(json.dumps({"kind": kind, "classes": entries, **data}))
    return folder


def write_encoder(folder: Path, channels: int = 1) -> Path:
    """An export of a tiny masked autoencoder of 8x8 images."""
    encoder = MaskedAutoencoder(input_size=8, in_channels=channels, num_classes=4, width=8, blocks=(1, 1, 1, 1))
    fill(encoder).save_pretrained(folder)
    return folder


def trained(folder: Path, **options) -> TrainedGenerator:
    """`write_export`, loaded."""
    return load_trained(write_export(folder, **options))


RUN_SIZES = {
    "input_size": 8, "in_channels": 1, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 4,
    "num_style_tokens": 2, "style_codebook_size": 5, "num_context_tokens": 1,
}  # fmt: skip


def write_run(folder: Path, steps=(10, 20), last_step: int = 20) -> Path:
    """A run folder with checkpoints of two averages, as drift_accel.train leaves it; weights grow a little with the step."""
    folder.mkdir(parents=True)
    configuration = {"steps": last_step, "seed": 0, "generator": RUN_SIZES, "data": {"source": "digits"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))
    session = {"time": "2026-01-01T00:00:00+00:00", "command": ["train.py"], "num_processes": 1, "devices": []}
    (folder / "provenance.json").write_text(json.dumps({"identity": {"data": "abc"}, "sessions": [session]}))
    for step in steps:
        write_checkpoint(folder, step)
    return folder


def write_checkpoint(run: Path, step: int) -> None:
    """One more checkpoint: parameters are those of `tiny_generator` + step / 1000, averages + 0.1 and + 0.2 on top."""
    model = tiny_generator()
    parameters = {name for name, _ in model.named_parameters()}
    weights = {name: tensor + step / 1000 * (name in parameters) for name, tensor in model.state_dict().items()}
    with committed_folder(run / f"checkpoints/step_{step:08d}") as folder:
        save_file(weights, folder / "model.safetensors")
        for number, decay in enumerate(("0.9", "0.99"), start=1):
            average = {name: tensor + number / 10 for name, tensor in weights.items() if name in parameters}
            save_file(average, folder / f"ema_{decay}.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, "decays": [0.9, 0.99]}))


def call_tool(name: str, *arguments: object, status: int = 0) -> str:
    """Call a command of tools/ in this process, require its exit status, return everything that it printed."""
    tool, printed = load_tool(name), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
        try:
            tool.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    assert code == status, printed.getvalue()
    return printed.getvalue()
