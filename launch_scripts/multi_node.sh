#!/usr/bin/env bash
# One run on several machines: start this on each of them with the same arguments, within a few minutes.
#   MACHINE_RANK=0 bash launch_scripts/multi_node.sh train     --config train_configs/X.yaml     --output_dir /shared/runs/x
#   MACHINE_RANK=1 bash launch_scripts/multi_node.sh train     ... (the same)
#   MACHINE_RANK=0 bash launch_scripts/multi_node.sh train_mae --config train_configs/mae_X.yaml --output_dir /shared/runs/mae
# You must set (here, or in the environment):
MACHINE_RANK=${MACHINE_RANK:-0}              # 0, 1, 2, ...: another number on each machine
NUM_MACHINES=${NUM_MACHINES:-2}              # how many machines
MAIN_ADDRESS=${MAIN_ADDRESS:-127.0.0.1}      # a name or address of machine 0 that all others reach
MAIN_PORT=${MAIN_PORT:-29500}                # this port and the next one are free there and open to the others
PROCESSES_PER_MACHINE=${PROCESSES_PER_MACHINE:-$(nvidia-smi --list-gpus 2>/dev/null | grep -c . || true)} # one a GPU
# You may set:
WAIT_SECONDS=${WAIT_SECONDS:-600}            # how long the others wait for machine 0
# --output_dir, the data and the encoder must be the same folders on all machines (a shared file system). Code and package versions
# must be equal too; the trainer compares what it can and refuses the rest. Where machines have several networks, name the fast one:
#   export NCCL_SOCKET_IFNAME=ib0
# More for accelerate, for example FSDP2: LAUNCH_OPTIONS="--use_fsdp --fsdp_version 2"
# First tools/preflight.py runs on all processes: a map of who is where, sums over all of them with a time limit, data, encoder,
# disk. PREFLIGHT_OPTIONS="--timeout 300" are options of it, SKIP_PREFLIGHT=1 leaves it out.
# The same command on all machines goes on after an interruption; another number of machines may go on too.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,5p' "$0" >&2; exit 2; }
module=$1
shift
case "$module" in train | train_mae) ;; *) echo "multi_node: the first argument is train or train_mae, got $module" >&2; exit 2 ;; esac
[ "$PROCESSES_PER_MACHINE" -gt 0 ] || { echo "multi_node: no GPU found here; set PROCESSES_PER_MACHINE" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."
accelerate=${ACCELERATE:-.venv/bin/accelerate}
command -v "$accelerate" >/dev/null || accelerate=accelerate
total=$((NUM_MACHINES * PROCESSES_PER_MACHINE))

# Machine 0 serves the port where the machines meet once it has started, which may be minutes later than here.
wait_for_machine_0() {
  [ "$MACHINE_RANK" -gt 0 ] || return 0
  local end=$((SECONDS + WAIT_SECONDS))
  until timeout 5 bash -c ": <'/dev/tcp/$MAIN_ADDRESS/$1'" 2>/dev/null; do
    [ "$SECONDS" -lt "$end" ] || {
      echo "multi_node: machine 0 did not serve $MAIN_ADDRESS:$1 within $WAIT_SECONDS s: did it start, is this its address, is the" \
        "port open? WAIT_SECONDS waits longer" >&2
      exit 1
    }
    sleep 1
  done
}

# c10d: the machines meet at MAIN_ADDRESS and agree on their ranks; --num_processes after the module makes the trainer check that
# all of them came.
case " ${LAUNCH_OPTIONS:-} " in *" --use_fsdp "*) kind=() ;; *) kind=(--multi_gpu) ;; esac # accelerate takes one of the two
# shellcheck disable=SC2206
launch=("$accelerate" launch ${kind[@]+"${kind[@]}"} --num_machines "$NUM_MACHINES" --num_processes "$total"
  --machine_rank "$MACHINE_RANK" --main_process_ip "$MAIN_ADDRESS" --rdzv_backend c10d --mixed_precision no --dynamo_backend no
  ${LAUNCH_OPTIONS:-})
case " $* " in *" --dry_run "*) SKIP_PREFLIGHT=1 ;; esac
if [ -z "${SKIP_PREFLIGHT:-}" ]; then
  # A port of its own: that of the check may still be served while another machine starts to train.
  wait_for_machine_0 $((MAIN_PORT + 1))
  # shellcheck disable=SC2086
  "${launch[@]}" --main_process_port $((MAIN_PORT + 1)) tools/preflight.py ${PREFLIGHT_OPTIONS:-} "$@" --num_processes "$total" || {
    echo "multi_node: machine $MACHINE_RANK is not ready, or another one: see the lines above that begin with 'problem', also those" \
      "of machine 0; SKIP_PREFLIGHT=1 trains all the same" >&2
    exit 1
  }
fi
wait_for_machine_0 "$MAIN_PORT"
exec "${launch[@]}" --main_process_port "$MAIN_PORT" -m "drift_accel.$module" "$@" --num_processes "$total"
