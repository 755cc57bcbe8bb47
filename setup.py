"""Package metadata, and the build of the fused drift op (csrc/ -> drift_accel/_C).

Install with `pip install --no-build-isolation .`: the package is bound to the torch that is already there. Without torch or a
compiler it is installed all the same and the drift runs in plain PyTorch. Environment:
  DRIFT_ACCEL_CUDA=0|1       never build the CUDA part, or fail where it cannot be built; by default it is built where nvcc and
                             a CUDA torch are there, whether or not this machine has a GPU
  TORCH_CUDA_ARCH_LIST       architectures, "8.0;9.0+PTX" by default
  MAX_JOBS                   compilers at once
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
BUILDING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
DEFAULT_ARCHITECTURES = ("8.0", "9.0")  # the last one also as PTX, for what comes after it


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


# The compiled drift op


def find_nvcc(environment: dict[str, str]) -> str | None:
    """The CUDA compiler: of CUDA_HOME or CUDA_PATH, on the PATH, or in its usual place."""
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH")]
    places = [os.path.join(home, "bin") for home in homes if home]
    places += [environment.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(places))


def find_toolkit(nvcc: str) -> str:
    """The folder of headers and libraries of this nvcc, which may be a link or a script that calls the real one: it says."""
    with tempfile.NamedTemporaryFile(suffix=".cu") as empty:
        said = subprocess.run([nvcc, "--dryrun", "-c", empty.name], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1])


def decide_cuda(wanted: str | None, *, nvcc: str | None, torch_cuda: str | None, has_sources: bool = True) -> tuple[bool, str]:
    """Whether the CUDA part is built, and why. `torch_cuda` is torch.version.cuda.

    Raises SystemExit where DRIFT_ACCEL_CUDA=1 asks for what cannot be built, or holds anything but 0 or 1.
    """
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"DRIFT_ACCEL_CUDA is {wanted!r}: wanted 0 (never), 1 (or fail) or nothing (where it can be built)")
    if wanted == "0":
        return False, "DRIFT_ACCEL_CUDA=0"
    missing = []
    if torch_cuda is None:
        missing.append("this torch is built without CUDA")
    if nvcc is None:
        missing.append("no nvcc was found (set CUDA_HOME)")
    if not has_sources:
        missing.append("csrc/cuda has no sources")
    if missing and wanted == "1":
        raise SystemExit(f"DRIFT_ACCEL_CUDA=1 asks for the CUDA part, but {' and '.join(missing)}")
    return not missing, " and ".join(missing) or f"nvcc and torch with CUDA {torch_cuda} are there"


def known_architectures(nvcc: str) -> list[str]:
    """What this nvcc compiles for, as "8.0"."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return [f"{digits[:-1]}.{digits[-1]}" for digits in re.findall(r"compute_(\d+)\b", listed)]


def choose_architectures(asked: str | None, known: list[str]) -> str:
    """TORCH_CUDA_ARCH_LIST as it was asked for, or the default without what nvcc does not know."""
    if asked:
        return asked
    chosen = [architecture for architecture in DEFAULT_ARCHITECTURES if architecture in known]
    if not chosen:
        raise SystemExit(f"this nvcc knows none of {', '.join(DEFAULT_ARCHITECTURES)}: set TORCH_CUDA_ARCH_LIST")
    return ";".join(chosen) + "+PTX"


def openmp_flags(system: str, torch_folder: Path) -> tuple[list[str], list[str]]:
    """(compile, link) flags for the OpenMP that torch itself brings; none where it has none: the op then uses one core."""
    if system == "Linux":
        return ["-fopenmp"], ["-fopenmp"]
    if system == "Darwin" and (torch_folder / "include/omp.h").exists() and (torch_folder / "lib/libomp.dylib").exists():
        library = str(torch_folder / "lib")
        return ["-Xclang", "-fopenmp"], [f"-L{library}", f"-Wl,-rpath,{library}", "-lomp"]
    return [], []


def extension_module():
    """The extension, or None where torch is not there to build it with."""
    nvcc = find_nvcc(dict(os.environ))
    if nvcc is not None:  # before torch looks for it, which takes the folder above nvcc, whatever lies there
        os.environ.setdefault("CUDA_HOME", find_toolkit(nvcc))
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension, CUDAExtension
    except ImportError as error:
        say(f"the fused drift op is left out: torch cannot be imported here ({error}); use --no-build-isolation")
        decide_cuda(os.environ.get("DRIFT_ACCEL_CUDA"), nvcc=None, torch_cuda=None)
        return None
    cuda, reason = decide_cuda(
        os.environ.get("DRIFT_ACCEL_CUDA"),
        nvcc=nvcc,
        torch_cuda=torch.version.cuda,
        has_sources=(SOURCES / "cuda/drift_cuda.cpp").exists(),
    )
    say(f"the fused drift op is built {'with' if cuda else 'without'} its CUDA part: {reason}")
    architectures = ""
    if cuda:
        architectures = choose_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), known_architectures(nvcc))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    sources = [*SOURCES.glob("*.cpp"), *SOURCES.glob("cpu/*.cpp")]
    sources += [SOURCES / "cuda/drift_cuda.cpp", *SOURCES.glob("cuda/*.cu")] if cuda else []
    hash_sources = runpy.run_path(str(ROOT / "drift_accel/drift/source_hash.py"))["hash_sources"]
    facts = {
        "DRIFT_ACCEL_VERSION": read_version(),
        "DRIFT_ACCEL_SOURCE_HASH": hash_sources(SOURCES, cuda=cuda),
        "DRIFT_ACCEL_CUDA_ARCHITECTURES": architectures,
        "DRIFT_ACCEL_TORCH_VERSION": torch.__version__,
    }
    openmp_compile, openmp_link = openmp_flags(platform.system(), Path(torch.__file__).parent)
    # Square roots in vectors and fused multiply-add; nothing that changes what a NaN or an infinity does.
    cxx = ["-O3", "-g0", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi", *openmp_compile]
    return (CUDAExtension if cuda else CppExtension)(
        name="drift_accel._C",
        sources=[str(path.relative_to(ROOT)) for path in sorted(sources)],
        include_dirs=[str(SOURCES)],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()] + [("DRIFT_ACCEL_WITH_CUDA", None)] * cuda,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]} if cuda else cxx,
        extra_link_args=openmp_link,
    )


def build_command():
    """A build_ext that leaves the extension out, with one clear line, where it cannot be compiled."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildOrLeaveOut(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if os.environ.get("DRIFT_ACCEL_CUDA") == "1":
                    raise
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"the fused drift op could not be compiled and is left out: the drift will run in plain PyTorch ({first})")
                self.extensions = []

    return BuildOrLeaveOut


def say(line: str) -> None:
    """One line for whoever installs; pip shows it with --verbose."""
    print(f"drift_accel: {line}", file=sys.stderr, flush=True)


class SourceDistribution(sdist):
    """A source distribution that also holds csrc."""

    def make_distribution(self):
        self.filelist.extend(path.relative_to(ROOT).as_posix() for path in sorted(SOURCES.rglob("*")) if path.is_file())
        super().make_distribution()


def build_arguments() -> dict:
    """What setup() needs for the extension; nothing of it where only metadata or sources are asked for."""
    module = None
    if BUILDING & set(sys.argv):
        module = extension_module()
    if module is None:
        return {"cmdclass": {"sdist": SourceDistribution}}
    return {"ext_modules": [module], "cmdclass": {"sdist": SourceDistribution, "build_ext": build_command()}}


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
    package_data={"drift_accel.models": ["digits_vae/*"], "drift_accel.analysis.comparison": ["*.css", "*.js"]},
    **build_arguments(),
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
        "analysis": ["umap-learn", "scikit-learn"],
        "test": ["pytest", "ruff", "build", "scikit-learn", "umap-learn"],
    },
)
