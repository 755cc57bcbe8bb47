"""Package metadata.

Install with `pip install --no-build-isolation .`: the package is bound to the torch that is already there.
"""

import re
from importlib import metadata
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Return the one version of the project, which lives in drift_accel/__init__.py."""
    return re.search(r'^__version__ = "([^"]+)"', (ROOT / "drift_accel" / "__init__.py").read_text(), re.M).group(1)


def installed_version(package: str) -> str | None:
    """Return the installed version of `package`, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_requirements() -> list[str]:
    """Require the torch that is already installed, so that an installation never replaces it.

    A free `torchvision` requirement would: its newest release pins the newest torch. Where torch is a CPU-only build no
    registry release of torchvision matches it, and an unmatched one breaks diffusers at import, so it is left to the user.
    """
    torch = installed_version("torch")
    if torch is None:
        return ["torch>=2.11", "torchvision"]
    public, _, local = torch.partition("+")
    requirements = ["torch>=2.11", f"torch=={public}"]
    torchvision = installed_version("torchvision")
    if torchvision is not None:
        requirements.append(f"torchvision=={torchvision.partition('+')[0]}")
    elif local != "cpu":
        requirements.append("torchvision")
    return requirements


def evaluation_requirements() -> list[str]:
    """clean-fid itself requires torchvision, so it goes where torchvision can go."""
    return ["clean-fid"] if any(r.startswith("torchvision") for r in torch_requirements()) else []


setup(
    name="drift_accel",
    version=read_version(),
    description="One-step image generators by drifting: multi-process training with Accelerate",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["drift_accel", "drift_accel.*"]),
    package_data={"drift_accel.models": ["digits_vae/*"]},
    install_requires=[
        *torch_requirements(),
        *evaluation_requirements(),
        "accelerate>=1.10",
        "diffusers>=0.35",
        "transformers>=4.56",
        "datasets>=4.0",
        "pyarrow",
        "safetensors",
        "numpy",
        "scipy",
        "pillow",
        "tensorboard",
        "jsonargparse[signatures]>=4.40",
        "msgpack",
        "tqdm",
        "matplotlib",
    ],
    extras_require={
        "quickstart": ["scikit-learn"],
        "test": ["pytest", "ruff", "build", "scikit-learn"],
    },
)
