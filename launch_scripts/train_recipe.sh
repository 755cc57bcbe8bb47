#!/usr/bin/env bash
# What the recipes' scripts share: checks, then trains or goes on, on this machine or on several. Call one of them
# (ablation_b2.sh, latent_b2.sh, latent_l2.sh, pixel_b16.sh, pixel_l16.sh), which says what to set.
#   bash launch_scripts/train_recipe.sh RECIPE ENCODER_WIDTH [--key value ...]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
recipe=$1
width=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "train_recipe: $python is not there; run launch_scripts/setup_environment.sh or set PYTHON" >&2; exit 1; }
for name in CACHE ENCODER RUN; do
  [ -n "${!name:-}" ] || { echo "train_recipe: $name is not set; call the recipe's own script" >&2; exit 2; }
done
gpus=${NUM_GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)}
[ "$gpus" -gt 0 ] || { echo "train_recipe: no GPU found; set NUM_GPUS" >&2; exit 1; }

machines=${NUM_MACHINES:-1}
if [ -n "${ACCELERATE_CONFIG:-}" ] && { [ "$machines" -gt 1 ] || [ "${SHARDING:-ddp}" != ddp ]; }; then
  echo "train_recipe: ACCELERATE_CONFIG is for one machine and says how weights are split: leave out NUM_MACHINES and SHARDING, or it" >&2
  exit 2
fi
total=$((gpus * machines))

launch=("$python" -m accelerate.commands.launch --num_machines 1 --num_processes "$gpus" --mixed_precision no --dynamo_backend no)
case "${SHARDING:-ddp}" in
  ddp)
    sharding=
    [ "$gpus" -eq 1 ] || launch+=(--multi_gpu --main_process_port "${MAIN_PORT:-0}") ;;
  fsdp2)
    sharding="--use_fsdp --fsdp_version 2"
    launch+=(--use_fsdp --fsdp_version 2 --main_process_port "${MAIN_PORT:-0}") ;;
  *) echo "train_recipe: SHARDING is $SHARDING: choose ddp or fsdp2" >&2; exit 2 ;;
esac
[ -z "${ACCELERATE_CONFIG:-}" ] || launch=("$python" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG" --num_processes "$gpus")
options=(--config "$recipe" --data.path "$CACHE" --encoder.path "$ENCODER" --output_dir "$RUN" --num_processes "$total")
[ -z "${LABELS_PER_SLICE:-}" ] || options+=(--batch.labels_per_slice "$LABELS_PER_SLICE")
options+=("$@")
if [ "$machines" -gt 1 ]; then
  exec env PROCESSES_PER_MACHINE="$gpus" LAUNCH_OPTIONS="$sharding ${LAUNCH_OPTIONS:-}" \
    PREFLIGHT_OPTIONS="--encoder_width $width ${PREFLIGHT_OPTIONS:-}" bash launch_scripts/multi_node.sh train "${options[@]}"
fi

case " $* " in *" --dry_run "*) SKIP_PREFLIGHT=1 ;; esac
[ -n "${SKIP_PREFLIGHT:-}" ] || "${launch[@]}" tools/preflight.py --encoder_width "$width" "${options[@]}"
# One process needs no launcher, which would keep SIGTERM to itself.
[ "$gpus" -gt 1 ] || [ "${SHARDING:-ddp}" != ddp ] || [ -n "${ACCELERATE_CONFIG:-}" ] || exec "$python" -m drift_accel.train "${options[@]}"
exec "${launch[@]}" -m drift_accel.train "${options[@]}"
