#!/usr/bin/env bash
# From a fresh clone to digits drawn by your own one-step generator: set-up, feature encoder, generator, evaluation.
# Runs on a processor in minutes; run it again after an interruption and it goes on where it stopped.
#   bash launch_scripts/quickstart.sh [FOLDER]          FOLDER defaults to runs/quickstart
set -euo pipefail
run=${1:-runs/quickstart}
case "$run" in
  /*) ;;
  *) [ $# -eq 0 ] || run="$PWD/$run" ;; # a folder given by name is the caller's, the default one the project's
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch_scripts/setup_environment.sh
launch=(.venv/bin/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

echo "== 1/3 feature encoder: a masked autoencoder on 1,197 handwritten digits"
"${launch[@]}" -m drift_accel.train_mae --config train_configs/mae_digits.yaml --output_dir "$run/mae"
echo "== 2/3 one-step generator, trained by drifting in that encoder's features"
"${launch[@]}" -m drift_accel.train --config train_configs/digits.yaml --encoder.path "$run/mae/exports/ema_0.99" --output_dir "$run/generator"
echo "== 3/3 a thousand digits, judged"
.venv/bin/python tools/evaluate_digits.py "$run/generator"
