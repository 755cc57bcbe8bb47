#!/usr/bin/env bash
# Makes .venv with every dependency and the package in it; called by quickstart.sh and test.sh, safe to call by hand.
# A second call installs nothing unless setup.py, pyproject.toml, csrc/, the package's version or the Python version changed.
#   PYTHON=python3.12 bash launch_scripts/setup_environment.sh     to choose the interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $*" >&2; exit 1; }

find_python() {
  local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.10)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"; return
    fi
  done
  fail "no Python >= 3.10 found (tried: ${candidates[*]}). Install one, or name it: PYTHON=/path/to/python bash $0"
}

python=$(find_python)
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
  fail "$python cannot make virtual environments (no venv or ensurepip module). On Debian or Ubuntu: apt-get install python3-venv"
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
  echo "setup: no C++ compiler found (c++, g++ or clang++). Everything runs without one, in plain PyTorch; compiled parts are left out." >&2
  echo "setup: on Debian or Ubuntu: apt-get install build-essential; then delete .venv/.setup_stamp and run this again." >&2
fi

shopt -s nullglob
sources=(csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
stamp=$( { "$python" --version; cat setup.py pyproject.toml "${sources[@]}"; grep '^__version__' drift_accel/__init__.py; } | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ -f .venv/.setup_stamp ] && [ "$(cat .venv/.setup_stamp)" = "$stamp" ]; then
  exit 0
fi

echo "setup: installing into .venv (PyTorch alone is several GB; a few minutes the first time), compiling the drift op (a minute or two)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ "$(.venv/bin/python --version)" = "$("$python" --version)" ] ||
  fail ".venv was made with $(.venv/bin/python --version) but $python is $("$python" --version). Delete .venv, or choose with PYTHON=..."
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "setuptools>=70" wheel pybind11 ninja
# torch and torchvision together, so that the resolver picks a pair that matches.
.venv/bin/python -c 'import torch, torchvision' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "torch>=2.11" torchvision
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[quickstart,test]"
libraries=(drift_accel/_C*)
[ "${#libraries[@]}" -gt 0 ] || [ "${#sources[@]}" -eq 0 ] ||
  echo "setup: the drift op could not be compiled, so the drift runs in plain PyTorch; python -m drift_accel.doctor says more." >&2
echo "$stamp" > .venv/.setup_stamp
echo "setup: done"
