#!/usr/bin/env bash
# Sets up .venv where needed and runs the test suite; arguments go to pytest (for example: -m slow, -m gpu, -k drift).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch_scripts/setup_environment.sh
# One thread a process: the suite starts several processes, and results are promised for a fixed number of threads.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "$@"
