"""What this installation can do: `python -m drift_accel.doctor`.

Prints versions, the compiled drift op, the backend that would run and why, devices and the environment variables that matter.
Exit code 0 where the package is usable; one line on what to do for every problem.
"""

import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass, field
from importlib import metadata

import torch

import drift_accel
from drift_accel.drift.configuration import BackendError, DriftConfig
from drift_accel.drift.ops import BACKEND_VARIABLE, BUILD_COMMAND, choose_backend, fused_obstacle, load_extension

OLDEST_TORCH = (2, 11)
# What the package needs beside torch, in the order of setup.py.
PACKAGES = ("torch", "torchvision", "accelerate", "diffusers", "transformers", "datasets", "pyarrow", "safetensors", "numpy")
VARIABLES = (
    BACKEND_VARIABLE,
    "DRIFT_ACCEL_CPU_INSTRUCTIONS",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "ACCELERATE_USE_CPU",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
)


@dataclass
class Report:
    """Lines to print, and the problems among them: `fatal` ones make the package unusable."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    fatal: bool = False

    def say(self, name: str, value: object) -> None:
        self.lines.append(f"{name:<30}{value}")

    def problem(self, what: str, do: str, *, fatal: bool = False) -> None:
        self.problems.append(f"{what}: {do}")
        self.fatal = self.fatal or fatal


def examine() -> Report:
    """Look at everything; never raises for what it finds."""
    report = Report()
    _examine_versions(report)
    _examine_extension(report)
    _examine_backend(report)
    _examine_devices(report)
    for name in VARIABLES:
        if name in os.environ:
            report.say(name, os.environ[name] or "(empty)")
    return report


def _examine_versions(report: Report) -> None:
    report.say("drift_accel", f"{drift_accel.__version__} in {os.path.dirname(drift_accel.__file__)}")
    report.say("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            report.say(package, metadata.version(package))
        except metadata.PackageNotFoundError:
            report.say(package, "not installed")
            report.problem(f"{package} is not installed", "pip install --no-build-isolation .", fatal=package != "torchvision")
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        report.problem(f"torch {torch.__version__} is too old", f"install torch {wanted} or newer", fatal=True)


def _examine_extension(report: Report) -> None:
    extension = load_extension()
    if extension.info is not None:
        info = extension.info
        report.say("fused op", f"version {info['version']}, sources {info['source_hash']}, torch {info['torch']}")
        report.say("  processor", f"{info['cpu_instructions']}, {'OpenMP' if info['openmp'] else 'one core'}")
        report.say("  CUDA", info["cuda_architectures"] if info["cuda"] else "not built")
        report.say("  compiler", info["compiler"])
        if not info["openmp"]:
            report.problem("the fused op uses one core", "build it with a compiler that has OpenMP")
    else:
        report.say("fused op", "none")
    if extension.problem is not None:
        report.problem("the fused op is not used", extension.problem)
        if extension.info is None and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
            report.problem("there is no C++ compiler", f"install one (g++ or clang++), then {BUILD_COMMAND}")


def _examine_backend(report: Report) -> None:
    count = len(DriftConfig().temperatures)
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        try:
            chosen = choose_backend("auto", count, torch.float32, device)
        except (ValueError, BackendError) as error:
            report.say(f"drift on {device}", "none")
            report.problem(f"no backend for the drift on {device}", str(error), fatal=True)
            continue
        if chosen == "fused":
            reason = "it is built"
        else:
            obstacle = fused_obstacle(count, torch.float32, device)
            reason = obstacle or f"{BACKEND_VARIABLE} asks for it"
            if obstacle is not None and load_extension().problem is None:
                report.problem(f"the fused op is not used on {device}", obstacle)
        report.say(f"drift on {device}", f"{chosen}, because {reason}")


def _examine_devices(report: Report) -> None:
    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    report.say("processor", f"{os.cpu_count()} cores, torch uses {threads} ({capability})")
    report.say("torch's CUDA", torch.version.cuda or "none: this torch is built without it")
    if not torch.cuda.is_available():
        report.say("GPU", "none that torch can use")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        report.say(f"GPU {index}", f"{properties.name}, compute {properties.major}.{properties.minor}, {memory}")


def main() -> int:
    """Print the report; 0 where the package can be used, 1 where it cannot."""
    report = examine()
    print("\n".join(report.lines))
    print()
    for problem in report.problems:
        print(f"problem: {problem}")
    print("drift_accel cannot be used like this" if report.fatal else "drift_accel can be used")
    return 1 if report.fatal else 0


if __name__ == "__main__":
    sys.exit(main())
