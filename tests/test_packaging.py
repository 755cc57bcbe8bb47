"""Packaging and set-up: one version, what is packaged, the torch that is required, the scripts."""

import ast
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement

import drift_accel

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("launch_scripts/**/*.sh"), ROOT / ".ci/run"])
TOP_LEVEL = {
    *("README.md", "setup.py", "csrc", "drift_accel", "train_configs", "launch_scripts", "tools", "tests"),
    *("pyproject.toml", "LICENSE", "CITATION.cff", "CHANGELOG.md", "docs", ".ci", ".gitignore"),
}
SETUP_SCRIPT = "launch_scripts/setup_environment.sh"


def copy_repository(target: Path) -> Path:
    """A copy without what git ignores, so that building leaves nothing behind here."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so", ".*_cache")
    return Path(shutil.copytree(ROOT, target, ignore=ignored))


# One version, one set of files.


def test_there_is_one_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == drift_accel.__version__
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0].split()[0] == drift_accel.__version__
    assert load_setup()["version"] == drift_accel.__version__


def test_the_installed_version_is_this_one():
    try:
        installed = metadata.version("drift_accel")
    except metadata.PackageNotFoundError:
        pytest.skip("drift_accel is not installed here")
    assert installed == drift_accel.__version__, f"run {SETUP_SCRIPT} again"


def test_the_top_level_is_the_fixed_set():
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no git")
    if listed.returncode or not listed.stdout:
        pytest.skip("no checkout")
    entries = {name.split("/")[0] for name in listed.stdout.split("\0") if name}
    assert entries <= TOP_LEVEL, f"move {sorted(entries - TOP_LEVEL)}"
    assert {"README.md", "setup.py", "drift_accel", "train_configs", "launch_scripts", "tools", "tests"} <= entries


def test_only_the_package_is_packaged():
    packages = set(load_setup()["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "drift_accel").rglob("*.py")}
    assert packages == {".".join(folder.parts) for folder in folders}, "a folder with modules has no __init__.py"
    assert all(name.split(".")[0] == "drift_accel" for name in packages)


def test_sources_are_valid_in_the_oldest_python():
    assert load_setup()["python_requires"] == ">=3.10"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("drift_accel/**/*.py"), *ROOT.glob("tools/**/*.py")]:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))


# The torch that is required is the one that is there.


def load_setup() -> dict:
    """What setup.py passes to setuptools, and its functions."""
    passed = {}
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **arguments: passed.update(arguments))
    patch.chdir(ROOT)
    try:
        return {**runpy.run_path(str(ROOT / "setup.py")), **passed}
    finally:
        patch.undo()


@pytest.fixture
def installed(monkeypatch):
    """Lets setup.py see exactly these packages."""
    versions = {}

    def version(package):
        if package not in versions:
            raise metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(metadata, "version", version)
    return versions


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ({}, ["torch>=2.11", "torchvision", "clean-fid"]),
        (
            {"torch": "2.15.0+cu132", "torchvision": "0.29.2+cu132"},
            ["torch>=2.11", "torch==2.15.0", "torchvision==0.29.2", "clean-fid"],
        ),
        ({"torch": "2.15.0", "torchvision": "0.29.2"}, ["torch>=2.11", "torch==2.15.0", "torchvision==0.29.2", "clean-fid"]),
        # As on a Mac, where the registry's torch has no local part in its version and a torchvision that matches.
        ({"torch": "2.15.0"}, ["torch>=2.11", "torch==2.15.0", "torchvision", "clean-fid"]),
        ({"torch": "2.15.0+cu132"}, ["torch>=2.11", "torch==2.15.0", "torchvision", "clean-fid"]),
        # A CPU-only build: no torchvision of the registry fits, and clean-fid would bring one.
        ({"torch": "2.13.0+cpu"}, ["torch>=2.11", "torch==2.13.0"]),
        (
            {"torch": "2.13.0+cpu", "torchvision": "0.28.0+cpu"},
            ["torch>=2.11", "torch==2.13.0", "torchvision==0.28.0", "clean-fid"],
        ),
        (
            {"torch": "2.16.0.dev20261101+cu132", "torchvision": "0.30.0.dev20261101+cu132"},
            ["torch>=2.11", "torch==2.16.0.dev20261101", "torchvision==0.30.0.dev20261101", "clean-fid"],
        ),
    ],
    ids=str,
)
def test_the_installed_torch_is_required_and_never_another_one(there, wanted, installed):
    installed.update(there)
    requirements = load_setup()["install_requires"]
    parsed = [Requirement(text) for text in requirements]
    bound = [text for text, r in zip(requirements, parsed, strict=True) if r.name in ("torch", "torchvision", "clean-fid")]
    assert bound == wanted
    for requirement in parsed:
        if requirement.name in there:
            assert requirement.specifier.contains(there[requirement.name], prereleases=True)


def test_a_torch_that_is_too_old_is_a_conflict_and_no_silent_upgrade(installed):
    installed.update({"torch": "2.10.1+cu128", "torchvision": "0.25.1+cu128"})
    torch = [Requirement(text).specifier for text in load_setup()["install_requires"] if Requirement(text).name == "torch"]
    for version in ("2.10.1", "2.11.0", "2.15.0"):
        assert not all(specifier.contains(version) for specifier in torch)


def test_the_set_up_asks_for_the_same_oldest_torch():
    assert '"torch>=2.11"' in (ROOT / SETUP_SCRIPT).read_text()
    assert '"torch>=2.11"' in (ROOT / "setup.py").read_text()


# The scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_shell(script):
    result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -euo pipefail$", text, re.M)


PYTHON = os.path.realpath(sys.executable)
# Plays the interpreter of .venv: writes down what it was asked for and installs nothing.
FAKE_VENV_PYTHON = f"""#!/bin/sh
[ "$*" = --version ] && echo "${{VENV_VERSION:-Python {platform.python_version()}}}" && exit
echo "$@" >> "$0.log"
case "$*" in *"import torch, torchvision"*) [ -z "$WITHOUT_TORCH" ];; esac
"""


def write_program(path: Path, text: str = "#!/bin/sh\nexit 1\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """What the set-up reads of a clone, with a pretended .venv."""
    clone = tmp_path / "clone"
    for name in (SETUP_SCRIPT, "setup.py", "pyproject.toml", "drift_accel/__init__.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    write_program(clone / ".venv/bin/python", FAKE_VENV_PYTHON)
    return clone


@pytest.fixture
def programs(tmp_path):
    """The only folder of PATH: what the script needs of the system, a compiler and no Python."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("bash", "cat", "dirname", "grep"):
        (folder / name).symlink_to(shutil.which(name))
    write_program(folder / "c++")
    return folder


def run_set_up(clone: Path, programs: Path, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The result, and what the pretended .venv was asked to do meanwhile."""
    command = [str(programs / "bash"), str(clone / SETUP_SCRIPT)]
    environment = {"PATH": str(programs), "HOME": str(clone), **environment}
    result = subprocess.run(command, env=environment, cwd=clone.parent, capture_output=True, text=True, timeout=60)
    log = clone / ".venv/bin/python.log"
    asked = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return result, asked


def test_without_a_python_the_set_up_says_so(clone, programs):
    write_program(programs / "python3")  # an old one: the question for its version fails
    result, asked = run_set_up(clone, programs)
    assert result.returncode == 1
    assert "no Python >= 3.10 found (tried: python3 python3.13" in result.stderr
    assert "PYTHON=/path/to/python" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    result, _ = run_set_up(clone, programs, PYTHON="python3.9")
    assert result.returncode == 1
    assert "(tried: python3.9)" in result.stderr
    assert asked == []
    assert not (clone / ".venv/.setup_stamp").exists()


@pytest.mark.skipif(not importlib.util.find_spec("ensurepip"), reason="this Python cannot make virtual environments")
class TestSetUp:
    def test_it_installs_once_and_again_only_after_a_change(self, clone, programs):
        (programs / "python3").symlink_to(PYTHON)
        result, asked = run_set_up(clone, programs)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.splitlines()[-1] == "setup: done"
        assert [line.split()[2] for line in asked if line.startswith("-m pip")] == ["install", "install"]
        assert asked[-1].endswith("--no-build-isolation --editable .[quickstart,test]")

        result, asked = run_set_up(clone, programs)
        assert (result.returncode, result.stdout, result.stderr, asked) == (0, "", "", [])
        package = clone / "drift_accel/__init__.py"
        package.write_text(package.read_text() + "# a comment\n")
        assert run_set_up(clone, programs)[1] == []
        package.write_text(package.read_text().replace(drift_accel.__version__, "99.0"))
        assert run_set_up(clone, programs)[1] != []
        (clone / "setup.py").write_text((clone / "setup.py").read_text() + "# a comment\n")
        assert run_set_up(clone, programs)[1] != []
        assert run_set_up(clone, programs)[1] == []

    def test_it_builds_again_after_a_change_in_the_compiled_sources_and_says_when_nothing_came_of_it(self, clone, programs):
        (programs / "python3").symlink_to(PYTHON)
        run_set_up(clone, programs)
        for name in ("csrc/problem.h", "csrc/cpu/kernels.cpp", "csrc/cuda/kernels.cu"):
            (clone / name).parent.mkdir(exist_ok=True)
            (clone / name).write_text("// new")
            result, asked = run_set_up(clone, programs)
            assert asked and "could not be compiled" in result.stderr and "drift_accel.doctor" in result.stderr
            assert run_set_up(clone, programs)[1] == []
        (clone / "drift_accel/_C.cpython-310-x86_64-linux-gnu.so").touch()
        (clone / name).write_text("// newer")
        result, asked = run_set_up(clone, programs)
        assert asked and result.stderr == ""

    def test_it_installs_torch_and_torchvision_together_and_only_where_missing(self, clone, programs):
        (programs / "python3").symlink_to(PYTHON)
        _, asked = run_set_up(clone, programs)
        assert not any("torchvision" in line for line in asked if "pip" in line)
        (clone / ".venv/.setup_stamp").unlink()
        _, asked = run_set_up(clone, programs, WITHOUT_TORCH="1")
        (line,) = (line for line in asked if "pip" in line and "torchvision" in line)
        assert line.endswith("torch>=2.11 torchvision")

    def test_another_python_than_the_one_of_venv_is_refused(self, clone, programs):
        (programs / "python3").symlink_to(PYTHON)
        result, asked = run_set_up(clone, programs, VENV_VERSION="Python 3.9.1")
        assert result.returncode == 1 and asked == []
        assert ".venv was made with Python 3.9.1" in result.stderr and "Delete .venv" in result.stderr

    def test_a_failed_installation_is_an_error_and_tried_again(self, clone, programs):
        (programs / "python3").symlink_to(PYTHON)
        write_program(clone / ".venv/bin/python")
        result, _ = run_set_up(clone, programs)
        assert result.returncode == 1
        assert "done" not in result.stdout
        assert not (clone / ".venv/.setup_stamp").exists()

    def test_without_a_compiler_it_says_what_that_means_and_goes_on(self, clone, programs):
        (programs / "python3").symlink_to(PYTHON)
        run_set_up(clone, programs)
        (programs / "c++").unlink()
        result, asked = run_set_up(clone, programs)
        assert (result.returncode, asked) == (0, [])
        assert "no C++ compiler found" in result.stderr
        assert "build-essential" in result.stderr

    def test_a_chosen_python_may_lie_in_a_folder_with_a_space(self, clone, programs, tmp_path):
        (tmp_path / "my programs").mkdir()
        (tmp_path / "my programs/python").symlink_to(PYTHON)
        result, asked = run_set_up(clone, programs, PYTHON=str(tmp_path / "my programs/python"))
        assert result.returncode == 0, result.stderr
        assert asked


# Building and installing.


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(source distribution, wheel built from it)."""
    folder = tmp_path_factory.mktemp("distributions")
    clone = copy_repository(folder / "clone")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(clone)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.mark.slow
def test_the_source_distribution_holds_what_a_build_needs(distributions):
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "drift_accel").rglob("*.py")}
    needed |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert needed - names == set()


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_requires_this_torch(distributions):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
        (info,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(info).decode()
    assert {name.split("/")[0] for name in names} == {"drift_accel", info.split("/")[0]}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "drift_accel").rglob("*.py")}
    assert modules - set(names) == set()
    if shutil.which("c++"):
        assert any(re.fullmatch(r"drift_accel/_C\..*so", name) for name in names), "the compiled op is not in the wheel"
    assert f"Requires-Dist: torch=={metadata.version('torch').partition('+')[0]}\n" in text
    assert f"Version: {drift_accel.__version__}\n" in text


@pytest.mark.slow
def test_an_installed_wheel_works_from_anywhere(distributions, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(target), str(distributions[1])], check=True, capture_output=True)

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    code = (
        "import torch, drift_accel; from drift_accel import drift_loss; x = torch.linspace(0, 1, 12).reshape(1, 4, 3);"
        "print(drift_accel.__file__, drift_loss(x, x + 1, x - 1).loss.isfinite().all().item())"
    )
    assert run("-c", code).split() == [str(target / "drift_accel/__init__.py"), "True"]
    help_text = run("-m", "drift_accel.train", "--help")
    assert "Learning rate after the warm-up" in help_text
    assert "--output_dir" in run("-m", "drift_accel.train_mae", "--help")
