"""setup.py's choices for the compiled op: CUDA or not, architectures, OpenMP, what a failed build leaves behind."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from drift_accel.drift.source_hash import hash_sources

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup():
    """The functions of setup.py."""
    patch = pytest.MonkeyPatch()
    patch.setattr(setuptools, "setup", lambda **arguments: None)
    patch.setattr(sys, "argv", ["setup.py", "egg_info"])
    try:
        return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))
    finally:
        patch.undo()


# CUDA


@pytest.mark.parametrize("wanted", [None, ""])
def test_cuda_is_built_where_nvcc_and_a_cuda_torch_are_there(setup, wanted):
    decide = setup.decide_cuda
    assert decide(wanted, nvcc="/usr/bin/nvcc", torch_cuda="13.2") == (True, "nvcc and torch with CUDA 13.2 are there")
    built, why = decide(wanted, nvcc=None, torch_cuda="13.2")
    assert not built and "nvcc" in why and "CUDA_HOME" in why
    built, why = decide(wanted, nvcc="/usr/bin/nvcc", torch_cuda=None)
    assert not built and "torch is built without CUDA" in why
    built, why = decide(wanted, nvcc=None, torch_cuda=None)
    assert not built and "torch" in why and "nvcc" in why


def test_cuda_can_be_forbidden(setup):
    assert setup.decide_cuda("0", nvcc="/usr/bin/nvcc", torch_cuda="13.2") == (False, "DRIFT_ACCEL_CUDA=0")


@pytest.mark.parametrize(("nvcc", "torch_cuda"), [(None, "13.2"), ("/usr/bin/nvcc", None), (None, None)])
def test_cuda_that_is_forced_and_impossible_is_an_error(setup, nvcc, torch_cuda):
    assert setup.decide_cuda("1", nvcc="/usr/bin/nvcc", torch_cuda="13.2")[0]
    with pytest.raises(SystemExit, match="DRIFT_ACCEL_CUDA=1 asks for the CUDA part, but"):
        setup.decide_cuda("1", nvcc=nvcc, torch_cuda=torch_cuda)


def test_another_value_is_refused(setup):
    with pytest.raises(SystemExit, match="DRIFT_ACCEL_CUDA is 'yes': wanted 0"):
        setup.decide_cuda("yes", nvcc=None, torch_cuda=None)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_nvcc_is_found_in_its_home_before_the_path(setup, tmp_path, variable):
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").write_text("#!/bin/sh\n")
        (tmp_path / folder / "nvcc").chmod(0o755)
    on_path = {"PATH": str(tmp_path / "path")}
    assert setup.find_nvcc(on_path) == str(tmp_path / "path/nvcc")
    assert setup.find_nvcc({**on_path, variable: str(tmp_path / "home")}) == str(tmp_path / "home/bin/nvcc")


def test_the_toolkit_of_an_nvcc_is_asked_of_it_or_lies_above_it(setup, tmp_path):
    for folder in ("toolkit/bin", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    real, script, link = tmp_path / "toolkit/bin/nvcc", tmp_path / "elsewhere/nvcc", tmp_path / "nvcc"
    real.write_text("#!/bin/sh\n")
    script.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2; echo '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    for path in (real, script):
        path.chmod(0o755)
    link.symlink_to(real)
    assert [setup.find_toolkit(str(path)) for path in (real, script, link)] == [str(tmp_path / "toolkit")] * 3


def test_architectures_are_those_asked_for_or_the_default_trimmed_to_what_nvcc_knows(setup, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n[ \"$1\" = --list-gpu-arch ] && printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_120\\n'\n")
    nvcc.chmod(0o755)
    known = setup.known_architectures(str(nvcc))
    assert known == ["7.5", "8.0", "9.0", "12.0"]
    assert setup.choose_architectures(None, known) == "8.0;9.0+PTX"
    assert setup.choose_architectures("", ["7.5", "8.0"]) == "8.0+PTX"
    assert setup.choose_architectures(None, ["9.0", "10.0"]) == "9.0+PTX"
    assert setup.choose_architectures("8.6", known) == "8.6"
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        setup.choose_architectures(None, ["12.0"])


# Processors


def test_openmp_is_the_one_that_torch_brings(setup, tmp_path):
    assert setup.openmp_flags("Linux", tmp_path) == (["-fopenmp"], ["-fopenmp"])
    assert setup.openmp_flags("Darwin", tmp_path) == ([], [])
    assert setup.openmp_flags("Windows", tmp_path) == ([], [])
    for name in ("include/omp.h", "lib/libomp.dylib"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    compiling, linking = setup.openmp_flags("Darwin", tmp_path)
    assert compiling == ["-Xclang", "-fopenmp"] and linking[-1] == "-lomp" and str(tmp_path / "lib") in linking[0]


def test_the_extension_without_cuda_holds_every_source_but_cuda(setup, monkeypatch, capsys):
    monkeypatch.setenv("DRIFT_ACCEL_CUDA", "0")
    module = setup.extension_module()
    wanted = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]}
    assert set(module.sources) == wanted and module.name == "drift_accel._C"
    macros = dict(module.define_macros)
    assert macros["DRIFT_ACCEL_SOURCE_HASH"] == f'"{hash_sources(ROOT / "csrc", cuda=False)}"'
    assert "DRIFT_ACCEL_WITH_CUDA" not in macros
    flags = " ".join(module.extra_compile_args)
    assert "fast-math" not in flags and "-march" not in flags  # exact, and for other processors than this one
    assert "without its CUDA part: DRIFT_ACCEL_CUDA=0" in capsys.readouterr().err


def test_without_torch_there_is_no_extension_and_one_line(setup, monkeypatch, capsys):
    monkeypatch.delenv("DRIFT_ACCEL_CUDA", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert setup.extension_module() is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "left out" in line and "--no-build-isolation" in line


BROKEN_BUILD = """
import runpy, sys
import torch.utils.cpp_extension as extension
class Broken(extension.BuildExtension):
    def run(self):
        raise RuntimeError("Error compiling objects for extension\\nwith much more")
extension.BuildExtension = Broken
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
runpy.run_path("setup.py")
"""


@pytest.mark.parametrize("forced", [False, True])
def test_a_failed_build_leaves_the_package_installable_unless_cuda_was_forced(forced, tmp_path, setup, monkeypatch):
    import torch

    if forced and not setup.decide_cuda(None, nvcc=setup.find_nvcc(dict(os.environ)), torch_cuda=torch.version.cuda)[0]:
        pytest.skip("CUDA cannot be asked for here")
    monkeypatch.setenv("DRIFT_ACCEL_CUDA", "1" if forced else "0")
    command = [sys.executable, "-c", BROKEN_BUILD, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in result.stderr.splitlines() if "could not be compiled" in line]
    if forced:
        assert result.returncode != 0 and lines == []
    else:
        assert result.returncode == 0, result.stderr
        (line,) = lines
        assert "plain PyTorch" in line and "(Error compiling objects for extension)" in line
    assert not list(tmp_path.rglob("*.so"))


# The hash


def test_the_hash_is_of_names_and_contents_of_what_is_built(tmp_path):
    for name in ("a.h", "cpu/b.cpp", "cuda/c.cu", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    with_cuda, without = hash_sources(tmp_path, cuda=True), hash_sources(tmp_path, cuda=False)
    assert len(with_cuda) == 16 and with_cuda != without

    def changes(name, text):
        path = tmp_path / name
        before = path.read_text() if path.exists() else None
        path.write_text(text)
        found = hash_sources(tmp_path, cuda=True) != with_cuda, hash_sources(tmp_path, cuda=False) != without
        path.unlink() if before is None else path.write_text(before)
        return found

    assert changes("a.h", "other") == (True, True)
    assert changes("cpu/d.h", "new") == (True, True)
    assert changes("cuda/c.cu", "other") == (True, False)
    assert changes("README.md", "other") == (False, False)
    assert (hash_sources(tmp_path, cuda=True), hash_sources(tmp_path, cuda=False)) == (with_cuda, without)
