"""Which device a command computes on: one rule and one set of messages for the trainers and the tools."""

import os
import re
from argparse import ArgumentParser

import torch

DEVICE_HELP = 'where to compute: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"'
_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")


def check_device_name(name: str) -> None:
    """Raise ValueError for what is no name of a device; whether it exists is not looked at."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"device is {name!r}: choose auto, cpu, cuda or cuda:N with N counted from 0")


def find_device(name: str = "auto") -> torch.device:
    """The device of a name: "auto", "cpu", "cuda" or "cuda:N".

    Raises ValueError for another name, and for a GPU that is not there, naming those that are and how CUDA_VISIBLE_DEVICES
    numbers them.
    """
    check_device_name(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available() or torch.cuda.device_count() == 0:
        raise ValueError(f"device is {name!r} but there is no GPU here{_renumbering()}: use cpu, or auto")
    if name == "auto":
        return torch.device("cuda")
    device = torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r} but there are only {_visible_devices()}{_renumbering()}")
    return device


def pin_device(name: str, num_processes: int) -> torch.device | None:
    """Check the device of a training process and bind it to a GPU that is named by its number; returns that GPU or None.

    To be called before Accelerator(), which gives each process its own GPU otherwise and reads this one from the environment.
    Raises ValueError as `find_device`, and for a number where several processes were launched, which would share that GPU.
    """
    device = find_device(name)
    if device.index is None:
        return None
    if num_processes > 1:
        raise ValueError(
            f"device is {name!r} but {num_processes} processes were launched, which would all use it: say cuda and choose the "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(device)
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    return device


def add_device_argument(parser: ArgumentParser, default: str = "auto") -> None:
    """Add `--device`, and `--cpu` for `--device cpu`, to a tool's command line; `find_device` turns its value into a device."""
    parser.add_argument("--device", default=default, help=f"{DEVICE_HELP} (default: {default})")
    parser.add_argument("--cpu", action="store_const", dest="device", const="cpu", help="the same as --device cpu")


def pin_launched_device(name: str) -> torch.device | None:
    """`pin_device` for as many processes as the launcher says there are."""
    return pin_device(name, int(os.environ.get("WORLD_SIZE", "1")))


def _visible_devices() -> str:
    return ", ".join(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count()))


def _renumbering() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return ""
    kept = [part.strip() for part in visible.split(",") if part.strip()]
    if not kept:
        return " (CUDA_VISIBLE_DEVICES is empty, which hides all of them)"
    meaning = ", ".join(f"cuda:{index} is GPU {part}" for index, part in enumerate(kept))
    return f" (CUDA_VISIBLE_DEVICES={visible} numbers them anew from 0: {meaning})"
