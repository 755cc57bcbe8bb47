#!/usr/bin/env bash
# Everything that needs a GPU, once, in under eight minutes: builds the drift op for this GPU, runs the GPU tests, the memory
# checker on small problems and the benchmark. The numbers go to csrc/gpu_results.json.
#   PYTHON=/path/to/python bash launch_scripts/test_gpu.sh     for an environment of your own (default: .venv, else python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3) || { echo "test_gpu: no Python found; give one with PYTHON=..." >&2; exit 1; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "test_gpu: $python sees no GPU (torch.cuda.is_available() is false)" >&2; exit 1; }

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # an environment without the package installed is enough

echo "== build"
DRIFT_ACCEL_CUDA=1 TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}" \
  "$python" setup.py --quiet build_ext --inplace

echo "== tests"
"$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml "$results/tests.xml" tests || echo "failed" > "$results/failed"

echo "== memory checker"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 9 "$python" tools/benchmark_drift.py --backends fused --rounds 1 \
    --shape 3 5 4 2 7 --shape 2 17 9 3 130 --shape 1 1 1 1 1 > "$results/sanitizer.log" 2>&1 \
    && echo "clean" > "$results/sanitizer" || echo "errors" > "$results/sanitizer"
  tail -n 3 "$results/sanitizer.log"
else
  echo "not installed" | tee "$results/sanitizer"
fi

echo "== benchmark"
"$python" tools/benchmark_drift.py --dtype float32 --rounds 9 --report "$results/shapes_float32.json"
"$python" tools/benchmark_drift.py --dtype bfloat16 --rounds 9 --report "$results/shapes_bfloat16.json"
"$python" tools/benchmark_drift.py --dtype bfloat16 --rounds 9 --shape 4096 64 64 32 640 --report "$results/layer1_bfloat16.json"
"$python" tools/benchmark_drift.py --dtype bfloat16 --rounds 3 --recipe latent_l2 --labels 4 --report "$results/latent_l2.json"

"$python" - "$results" <<'PY'
import json
import sys
import xml.etree.ElementTree as tree
from pathlib import Path

import torch

from drift_accel.drift.ops import build_info
from drift_accel.foundation.storage import atomic_write_json

results = Path(sys.argv[1])
suite = tree.parse(results / "tests.xml").getroot().find("testsuite").attrib
record = {
    "device": torch.cuda.get_device_name(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "build": build_info(),
    "tests": {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")},
    "compute_sanitizer": (results / "sanitizer").read_text().strip(),
    "benchmarks": {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))},
}
atomic_write_json(Path("csrc/gpu_results.json"), record)
print("wrote csrc/gpu_results.json:", record["tests"], "| compute-sanitizer:", record["compute_sanitizer"])
PY
[ ! -e "$results/failed" ] && [ "$(cat "$results/sanitizer")" != errors ]
