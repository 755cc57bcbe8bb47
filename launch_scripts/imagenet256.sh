#!/usr/bin/env bash
# ImageNet 256x256 from its three archives to a FID and a page about the run: one stage after the other, each checked at its end.
#   bash launch_scripts/imagenet256.sh all                 every stage that is left; the same command goes on after a kill
#   bash launch_scripts/imagenet256.sh STAGE               one of them: archives verify_images reference export verify_cache mae
#                                                          train sample evaluate report
#   bash launch_scripts/imagenet256.sh all --smoke         the whole in minutes on a processor: digits in the archives' layout,
#                                                          the bundled VAE, the smallest recipes, a network of random weights
#   bash launch_scripts/imagenet256.sh all|STAGE --print   the commands alone (for a job script, or for other machines)
#   bash launch_scripts/imagenet256.sh all --list          which stages have passed, what to type next
# WORK/gates.json says what was checked. What the stages take on the disk is said, and refused where it does not fit, first.
# Several machines, for mae and train: NUM_MACHINES=4 MAIN_ADDRESS=node0 in front of `imagenet256.sh train` on machine 0, and in front
# of the command that `train --print` shows, with MACHINE_RANK=1, 2, ..., on the others. The other stages need one machine.
set -euo pipefail

usage() { sed -n '3,9p' "${BASH_SOURCE[0]}" >&2; exit 2; }
smoke='' only_print='' list='' wanted=''
for argument in "$@"; do
  case "$argument" in
    --smoke) smoke=" --smoke" ;;
    --print) only_print=yes ;;
    --list) list=yes ;;
    -*) echo "imagenet256: unknown option $argument" >&2; usage ;;
    *) [ -z "$wanted" ] || usage; wanted=$argument ;;
  esac
done
stages=(archives verify_images reference export verify_cache mae train sample evaluate report)
[ -n "$wanted" ] || usage
case " all ${stages[*]} " in *" $wanted "*) ;; *) echo "imagenet256: there is no stage $wanted" >&2; usage ;; esac

# Settings: here, or in the environment. Folders are taken from the project's folder on.
if [ -n "$smoke" ]; then
  WORK=${WORK:-runs/imagenet256_smoke}
  ARCHIVES=${ARCHIVES:-$WORK/inputs/archives} IMAGES=${IMAGES:-$WORK/images} CACHE=${CACHE:-$WORK/cache}
  VAE=${VAE:-digits} IMAGE_SIZE=${IMAGE_SIZE:-64} PROTOCOL=${PROTOCOL:-encoder} NETWORK=${NETWORK:-$WORK/inputs/network}
  MAE_RECIPE=${MAE_RECIPE:-train_configs/mae_digits_latent.yaml} RECIPE=${RECIPE:-train_configs/digits_latent.yaml}
  ENCODER=${ENCODER:-$WORK/mae/exports/ema_0.99} ENCODER_WIDTH=${ENCODER_WIDTH:-16} NUM_SAMPLES=${NUM_SAMPLES:-200}
  MAE_OPTIONS=${MAE_OPTIONS:---steps 40 --classifier.steps 10 --classifier.warmup_steps 5 --checkpoint.every 10 --log.every 2 --optimizer.warmup_steps 5 --data.source images --data.images.image_size $IMAGE_SIZE --validation.every 20}
  OPTIONS=${OPTIONS:---steps 20 --checkpoint.every 5 --log.every 1 --log.sample_every 10 --optimizer.warmup_steps 5 --batch.labels 5 --batch.generated 8 --batch.positives 16 --evaluation.every 10 --evaluation.num_samples 64}
  export BATCH_SIZE=${BATCH_SIZE:-32} NUM_GPUS=${NUM_GPUS:-1}
fi
WORK=${WORK:-runs/imagenet256}  # the runs, samples, results and gates.json
ARCHIVES=${ARCHIVES:-data/archives}  # ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz
IMAGES=${IMAGES:-data/imagenet}  # class folders, made from them
CACHE=${CACHE:-data/imagenet256_latents}  # latents, made from these
VAE=${VAE:-stabilityai/sd-vae-ft-mse}  # or a folder, for machines without a network
IMAGE_SIZE=${IMAGE_SIZE:-256}
MAE_RECIPE=${MAE_RECIPE:-train_configs/mae_latent_640.yaml}
RECIPE=${RECIPE:-train_configs/latent_l2.yaml}
ENCODER=${ENCODER:-$WORK/mae/exports/ema_0.9995}  # another folder (the release's, say): it is taken, and none is trained
ENCODER_WIDTH=${ENCODER_WIDTH:-640}
PROTOCOL=${PROTOCOL:-clean}  # clean, legacy_tensorflow, legacy_pytorch, release, ... (README, "Sampling and evaluation")
NETWORK=${NETWORK:-}  # its network; empty: looked for in $DRIFT_ACCEL_NETWORKS
REFERENCE=${REFERENCE:-$WORK/reference_$PROTOCOL.npz}  # another file (published statistics): it is taken, and none is made
REFERENCE_IMAGES=${REFERENCE_IMAGES:-}  # real pictures for precision and recall where REFERENCE is a published file
NUM_SAMPLES=${NUM_SAMPLES:-50000}
GUIDANCE=${GUIDANCE:-1.0}
MAE_OPTIONS=${MAE_OPTIONS:-}  # more keys for the trainers, such as --compile blocks
OPTIONS=${OPTIONS:-}
# NUM_GPUS (default: all of this machine), SHARDING (ddp or fsdp2), LABELS_PER_SLICE, IMAGES_AT_ONCE: as in latent_l2.sh and
# mae_latent_640.sh. ACCELERATE_CONFIG names a file for accelerate launch instead, such as launch_scripts/accelerate/one_gpu.yaml.
# The Inception in TorchScript is a program: set RUN_TORCHSCRIPT=1 where you trust the file.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "imagenet256: no $python; run launch_scripts/setup_environment.sh or set PYTHON" >&2; exit 1; }
gpus=${NUM_GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)}
[ "$gpus" -gt 0 ] || [ -n "$only_print$list" ] || { echo "imagenet256: no GPU found; set NUM_GPUS" >&2; exit 1; }
[ "$gpus" -gt 0 ] || gpus=8
launch=("$python")
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
  launch=("$python" -m accelerate.commands.launch --config_file "$ACCELERATE_CONFIG")
elif [ "$gpus" -gt 1 ]; then
  launch=("$python" -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$gpus" --mixed_precision no
    --dynamo_backend no --main_process_port "${MAIN_PORT:-0}")
fi

samples=$WORK/samples.npz
result=$WORK/generator/evaluation/${PROTOCOL}_final.json
gate=("$python" tools/check_stage.py)
gate_options=(--work "$WORK" --archives "$ARCHIVES" --images "$IMAGES" --cache "$CACHE" --reference "$REFERENCE" --mae "$WORK/mae"
  --encoder "$ENCODER" --generator "$WORK/generator" --samples "$samples" --result "$result" --mae_recipe "$MAE_RECIPE"
  --recipe "$RECIPE" --protocol "$PROTOCOL" --num_samples "$NUM_SAMPLES" --image_size "$IMAGE_SIZE"
  "--options=$OPTIONS" "--mae_options=$MAE_OPTIONS" --command "bash launch_scripts/imagenet256.sh$smoke")
measure=(--protocol "$PROTOCOL")
archives=(--archives "$ARCHIVES" --output_dir "$IMAGES")
quantizer=round
[ "$PROTOCOL" != release ] || quantizer=truncate
if [ -n "$NETWORK" ]; then
  gate_options+=(--network "$NETWORK")
  measure+=(--network "$NETWORK")
fi
if [ -n "$smoke" ]; then
  gate_options+=(--other_archives)
  archives+=(--skip_md5 --expect none)
fi
case "$PROTOCOL" in
  clean | legacy_tensorflow | release)
    [ -n "${RUN_TORCHSCRIPT:-}" ] || [ -n "$only_print$list" ] ||
      { echo "imagenet256: protocol $PROTOCOL runs the TorchScript of its network: set RUN_TORCHSCRIPT=1 if you trust the file" >&2; exit 2; }
    measure+=(--run_torchscript) ;;
esac

# Fills `command` with what a stage runs; nothing where its output is given.
choose_command() {
  command=()
  case "$1" in
    archives) command=("$python" tools/prepare_imagenet.py "${archives[@]}") ;;
    verify_images) command=("$python" tools/prepare_imagenet.py --output_dir "$IMAGES" --verify --report "$WORK/verify_images.json") ;;
    reference)
      case "$REFERENCE" in
        "$WORK"/*) command=("${launch[@]}" tools/reference_stats.py "$IMAGES/train" --image_size "$IMAGE_SIZE" "${measure[@]}" --output "$REFERENCE") ;;
      esac ;;
    export)
      command=("${launch[@]}" tools/export_latents.py --source "$IMAGES/train" --output_dir "$CACHE" --vae "$VAE" --image_size "$IMAGE_SIZE") ;;
    verify_cache) command=("$python" tools/verify_cache.py "$CACHE" --mode full --vae "$VAE" --report "$WORK/verify_cache.json") ;;
    mae)
      case "$ENCODER" in
        "$WORK"/mae/*)
          # shellcheck disable=SC2206
          command=(env RUN="$WORK/mae" IMAGES="$IMAGES/train" HELD_OUT="$IMAGES/val" CACHE= IMAGES_AT_ONCE="${IMAGES_AT_ONCE:-64}"
            bash launch_scripts/mae_recipe.sh "$MAE_RECIPE" --data.images.vae "$VAE" $MAE_OPTIONS) ;;
      esac ;;
    train)
      # shellcheck disable=SC2206
      command=(env CACHE="$CACHE" ENCODER="$ENCODER" RUN="$WORK/generator" bash launch_scripts/train_recipe.sh "$RECIPE" "$ENCODER_WIDTH"
        --sample.vae "$VAE" $OPTIONS) ;;
    sample)
      command=("${launch[@]}" tools/sample.py "$WORK/generator" --output "$samples" --num_samples "$NUM_SAMPLES" --vae "$VAE"
        --guidance_scale "$GUIDANCE" --quantizer "$quantizer") ;;
    evaluate)
      command=("${launch[@]}" tools/evaluate.py "$samples" --reference "$REFERENCE" "${measure[@]}" --output "$result" --overwrite)
      [ -z "$REFERENCE_IMAGES" ] || command+=(--reference_images "$REFERENCE_IMAGES") ;;
    report) command=("$python" tools/report.py "$WORK/generator") ;;
  esac
}

# Signals reach the command that runs: a trainer writes a checkpoint, the other commands go on at the next call.
child=''
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' INT TERM
trap '[ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || true' USR1
run_command() {
  local code=0 again=0
  "$@" &
  child=$!
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal has interrupted `wait` before the command has ended
    code=0
    wait "$child" || code=$?
  done
  wait "$child" 2>/dev/null || again=$? # where it ended while the signal was being handled; 127: its code is known already
  [ "$again" -eq 127 ] || code=$again
  child=''
  return "$code"
}

run_stage() {
  local code=0
  "${gate[@]}" "$1" "${gate_options[@]}" --look || code=$?
  case "$code" in
    0) return ;;
    3) ;;
    *) exit "$code" ;;
  esac
  choose_command "$1"
  if [ "${#command[@]}" -gt 0 ]; then
    printf '== %s:' "$1"
    printf ' %q' "${command[@]}"
    printf '\n'
    code=0
    run_command "${command[@]}" || code=$?
    if [ "$code" -ne 0 ]; then
      "${gate[@]}" "$1" "${gate_options[@]}" --failed "$code" || true
      exit "$code"
    fi
  fi
  "${gate[@]}" "$1" "${gate_options[@]}" || exit 1
}

[ "$wanted" = all ] || stages=("$wanted")
if [ -n "$only_print" ]; then
  for stage in "${stages[@]}"; do
    choose_command "$stage"
    [ "${#command[@]}" -eq 0 ] || { printf '%q ' "${command[@]}"; printf '\n'; }
  done
  exit
fi
if [ -n "$list" ]; then
  exec "${gate[@]}" all "${gate_options[@]}" --list
fi
mkdir -p "$WORK"
if command -v flock >/dev/null; then
  exec 9>"$WORK/.lock" # handed on to the commands: what a killed script left running keeps it
  flock -n 9 || { echo "imagenet256: another imagenet256.sh, or what a killed one left behind, still works in $WORK: wait for it or end it" >&2; exit 1; }
fi
[ -z "$smoke" ] || "$python" tools/write_trial_inputs.py "$WORK/inputs"
if [ "$wanted" = all ]; then
  "${gate[@]}" all "${gate_options[@]}"
fi
for stage in "${stages[@]}"; do
  run_stage "$stage"
done
[ "$wanted" != all ] || echo "done: $result, $WORK/generator/report.html"
