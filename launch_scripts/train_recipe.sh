#!/usr/bin/env bash
# What the recipes' scripts share: checks this machine, then trains or goes on. Call one of them (ablation_b2.sh, latent_b2.sh,
# latent_l2.sh, pixel_b16.sh, pixel_l16.sh), which says what to set.
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

launch=("$python" -m accelerate.commands.launch --num_machines 1 --num_processes "$gpus" --mixed_precision no --dynamo_backend no)
case "${SHARDING:-ddp}" in
  ddp) [ "$gpus" -eq 1 ] || launch+=(--multi_gpu --main_process_port "${MAIN_PORT:-0}") ;;
  fsdp2) launch+=(--use_fsdp --fsdp_version 2 --main_process_port "${MAIN_PORT:-0}") ;;
  *) echo "train_recipe: SHARDING is $SHARDING: choose ddp or fsdp2" >&2; exit 2 ;;
esac
options=(--config "$recipe" --data.path "$CACHE" --encoder.path "$ENCODER" --output_dir "$RUN" --num_processes "$gpus")
[ -z "${LABELS_PER_SLICE:-}" ] || options+=(--batch.labels_per_slice "$LABELS_PER_SLICE")
options+=("$@")

[ -n "${SKIP_PREFLIGHT:-}" ] || "${launch[@]}" tools/preflight.py --encoder_width "$width" "${options[@]}"
# One process needs no launcher, which would keep SIGTERM to itself.
[ "$gpus" -gt 1 ] || [ "${SHARDING:-ddp}" != ddp ] || exec "$python" -m drift_accel.train "${options[@]}"
exec "${launch[@]}" -m drift_accel.train "${options[@]}"
