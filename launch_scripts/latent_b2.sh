#!/usr/bin/env bash
# The latent model B/2 (133 M parameters) on ImageNet 256x256: 200,000 steps of 128 labels.
# The same command goes on after an interruption.
#   bash launch_scripts/latent_b2.sh [--key value ...]   more options go to the trainer, for example --compile blocks
#   NUM_GPUS=1 bash launch_scripts/latent_b2.sh   the same steps on one GPU, eight times as long
#   python tools/estimate.py --config train_configs/latent_b2.yaml --encoder latent-640 --gpu h100 --num_gpus 8
set -euo pipefail
# You must set (here, or in the environment):
export CACHE=${CACHE:-data/imagenet256_latents}  # tools/export_latents.py wrote it
export ENCODER=${ENCODER:-runs/mae_latent_640/exports/ema_0.9995}  # train_mae's export, or the release's folder, width 640
export RUN=${RUN:-runs/latent_b2}  # the run's folder
# You may set:
export NUM_GPUS=${NUM_GPUS:-}  # default: all of this machine; the step stays the same
export NUM_MACHINES=${NUM_MACHINES:-1}  # several: also MACHINE_RANK, MAIN_ADDRESS, MAIN_PORT, see multi_node.sh
export SHARDING=${SHARDING:-ddp}  # ddp, or fsdp2: weights and optimiser split over the GPUs
export LABELS_PER_SLICE=${LABELS_PER_SLICE:-}  # default: the recipe's; fewer need less memory
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_recipe.sh" train_configs/latent_b2.yaml 640 "$@"
