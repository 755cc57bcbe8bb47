"""Where a result came from: code, versions, machine and command, collected once a run."""

import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from drift_accel import __version__
from drift_accel.foundation.storage import plain_value

_PACKAGE_DIR = Path(__file__).resolve().parent.parent
_SOURCE_SUFFIXES = {".py", ".cpp", ".cu", ".cuh", ".h"}
_RECORDED_PACKAGES = (
    "torch", "torchvision", "accelerate", "diffusers", "transformers", "datasets", "numpy", "scipy", "pyarrow",
    "safetensors", "pillow", "clean-fid",
)  # fmt: skip
_GIT_SECONDS = 10


def collect_provenance(*, command: Sequence[str], configuration_hash: str | None = None) -> dict[str, Any]:
    """Everything that is needed to say later what made a result, as a dict that JSON can hold.

    `command` is the command line (argv), `configuration_hash` the hash of the resolved configuration or None.
    The working directory is left out: it says who ran it, not what ran. What cannot be found out is None.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [str(argument) for argument in command],
        "configuration_hash": configuration_hash,
        "package_version": __version__,
        "package_hash": package_hash(),
        "git": git_state(_PACKAGE_DIR),
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        **_devices(),
    }


def package_hash(package_dir: str | os.PathLike = _PACKAGE_DIR) -> str:
    """The SHA-256 over names and contents of the package's source files in sorted order, 64 hexadecimal digits.

    The same for a checkout and for what was installed from it. Raises OSError.
    """
    package_dir = Path(package_dir)
    digest = hashlib.sha256()
    files = {
        path.relative_to(package_dir).as_posix(): path
        for path in package_dir.rglob("*")
        if path.suffix in _SOURCE_SUFFIXES and path.is_file()
    }
    for name in sorted(files):
        content = files[name].read_bytes()
        # The length keeps two different sets of files from running together into the same bytes.
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def hash_configuration(configuration: Mapping[str, Any]) -> str:
    """The SHA-256 of a configuration, 64 hexadecimal digits; the order of keys does not matter, tuples equal lists.

    Raises TypeError for a value that is no plain one (see `plain_value`).
    """
    text = json.dumps(plain_value(configuration, "configuration"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def git_state(folder: str | os.PathLike) -> dict[str, Any] | None:
    """{"commit": str, "dirty": bool} of the checkout that `folder` belongs to; None where there is none, or no git.

    Untracked files do not make a checkout dirty: run folders often lie in it, and `package_hash` covers new code.
    """
    # A package installed into a virtual environment may lie inside of some other checkout: that one does not track it.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def package_versions(names: Sequence[str] = _RECORDED_PACKAGES) -> dict[str, str | None]:
    """The installed version of each package without importing it, None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git(folder: str | os.PathLike, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", os.fspath(folder), *arguments],
            capture_output=True, text=True, timeout=_GIT_SECONDS, stdin=subprocess.DEVNULL,
            # A status that only looks must not take the lock of a checkout where somebody works.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout if result.returncode == 0 else None


def _devices() -> dict[str, Any]:
    # A command that works without torch (a check of a cache) is not made to load it for its record.
    torch = sys.modules.get("torch")
    devices, torch_build = [], None
    num_processes = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if torch is not None:
        torch_build = str(torch.__version__)  # unlike the package's version it names the CUDA it was built for
        if torch.cuda.is_available():
            devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            num_processes = torch.distributed.get_world_size()
    return {"devices": devices, "torch_build": torch_build, "num_cpus": os.cpu_count(), "num_processes": num_processes}
