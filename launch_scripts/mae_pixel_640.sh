#!/usr/bin/env bash
# The pixel encoder of width 640: 200,000 steps of 8,192 images, the last 3,000 with the classifier.
# The same command goes on after an interruption.
#   bash launch_scripts/mae_pixel_640.sh [--key value ...]   more options go to the trainer, for example --compile blocks
#   NUM_MACHINES=4 MACHINE_RANK=0 MAIN_ADDRESS=node0 bash launch_scripts/mae_pixel_640.sh   on each machine, with its own rank
# A classifier phase of its own, from a finished encoder into another folder (the result: its exports/encoder_cls):
#   INIT_FROM=runs/mae_pixel_640/exports/ema_0.9995 RUN=runs/mae_pixel_640_cls bash launch_scripts/mae_pixel_640.sh
set -euo pipefail
# You must set (here, or in the environment):
export IMAGES=${IMAGES:-data/imagenet/train}  # a folder of class folders; each crop is patchified 8x8
export HELD_OUT=${HELD_OUT-data/imagenet/val}  # the same of held-out pictures (a cache where CACHE is set); empty: no validation
export RUN=${RUN:-runs/mae_pixel_640}  # the run's folder; the encoder appears in its exports
# You may set:
export CACHE=${CACHE:-}  # train on a cache of pixels instead: export_latents.py --encoding jpeg
export NUM_GPUS=${NUM_GPUS:-}  # default: all of this machine; the step stays the same
export IMAGES_AT_ONCE=${IMAGES_AT_ONCE:-64}  # images of a GPU that pass through the network at once; memory and speed alone
export BATCH_SIZE=${BATCH_SIZE:-8192}  # images of a step on all GPUs, as published
export NUM_MACHINES=${NUM_MACHINES:-1}  # several: also MACHINE_RANK, MAIN_ADDRESS, MAIN_PORT, see multi_node.sh
export INIT_FROM=${INIT_FROM:-}  # a finished encoder: train a classifier phase from it
export CLASSIFIER_STEPS=${CLASSIFIER_STEPS:-3000}  # its steps
export CLASSIFIER_LR=${CLASSIFIER_LR:-1.0e-3}  # its learning rate, after a warm-up of a tenth of them
exec bash "$(dirname "${BASH_SOURCE[0]}")/mae_recipe.sh" train_configs/mae_pixel_640.yaml "$@"
