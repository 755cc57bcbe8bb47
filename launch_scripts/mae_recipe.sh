#!/usr/bin/env bash
# What the encoders' scripts share: checks, then trains or goes on, on this machine or on several. Call one of them
# (mae_latent_256.sh, mae_latent_640.sh, mae_pixel_640.sh), which says what to set.
#   bash launch_scripts/mae_recipe.sh RECIPE [--key value ...]
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
recipe=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -f "$recipe" ] || { echo "mae_recipe: there is no $recipe" >&2; exit 2; }
[ -n "${RUN:-}" ] || { echo "mae_recipe: RUN is not set; call the recipe's own script" >&2; exit 2; }
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "mae_recipe: no $python; run launch_scripts/setup_environment.sh or set PYTHON" >&2; exit 1; }
gpus=${NUM_GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)}
[ "$gpus" -gt 0 ] || { echo "mae_recipe: no GPU found; set NUM_GPUS" >&2; exit 1; }
machines=${NUM_MACHINES:-1}
if [ -n "${ACCELERATE_CONFIG:-}" ] && [ "$machines" -gt 1 ]; then
  echo "mae_recipe: ACCELERATE_CONFIG is for one machine: leave it out where NUM_MACHINES is more than 1" >&2
  exit 2
fi
total=$((gpus * machines))
batch=${BATCH_SIZE:-8192}
at_once=${IMAGES_AT_ONCE:-128}
[ $((batch % total)) -eq 0 ] || { echo "mae_recipe: $total GPUs cannot share $batch images evenly; set NUM_GPUS" >&2; exit 2; }
# The smallest number of equal parts that has at most IMAGES_AT_ONCE images in each.
here=$((batch / total))
parts=$(((here + at_once - 1) / at_once))
while [ $((here % parts)) -ne 0 ]; do parts=$((parts + 1)); done

options=(--config "$recipe" --output_dir "$RUN" --batch_size "$batch" --accumulate "$parts")
if [ -n "${CACHE:-}" ]; then
  options+=(--data.source cache --data.path "$CACHE")
elif [ -n "${IMAGES:-}" ]; then
  options+=(--data.path "$IMAGES")
fi
if [ -n "${HELD_OUT:-}" ]; then
  options+=(--validation.path "$HELD_OUT")
else
  options+=(--validation.every null --validation.path null)
fi
if [ -n "${INIT_FROM:-}" ]; then
  options+=(--init_from "$INIT_FROM" --steps "$CLASSIFIER_STEPS" --classifier.steps "$CLASSIFIER_STEPS")
  options+=(--optimizer.lr "$CLASSIFIER_LR" --optimizer.warmup_steps $((CLASSIFIER_STEPS / 10)))
fi
options+=("$@")
echo "mae_recipe: $batch images a step on $total GPU(s), $here each in $parts part(s)"
if [ "$machines" -gt 1 ]; then
  exec env PROCESSES_PER_MACHINE="$gpus" bash launch_scripts/multi_node.sh train_mae "${options[@]}"
fi
options+=(--num_processes "$total")
launch=("$python" -m accelerate.commands.launch --num_machines 1 --num_processes "$gpus" --mixed_precision no --dynamo_backend no)
[ "$gpus" -eq 1 ] || launch+=(--multi_gpu --main_process_port "${MAIN_PORT:-0}")
[ -z "${ACCELERATE_CONFIG:-}" ] || launch=("$python" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" --num_processes "$gpus")
case " $* " in *" --dry_run "*) SKIP_PREFLIGHT=1 ;; esac
[ -n "${SKIP_PREFLIGHT:-}" ] || "${launch[@]}" tools/preflight.py "${options[@]}"
# One process needs no launcher, which would keep SIGTERM to itself.
[ "$gpus" -gt 1 ] || [ -n "${ACCELERATE_CONFIG:-}" ] || exec "$python" -m drift_accel.train_mae "${options[@]}"
exec "${launch[@]}" -m drift_accel.train_mae "${options[@]}"
