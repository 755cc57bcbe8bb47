#!/usr/bin/env bash
# One run on a SLURM cluster: one task a node, each of which starts a process a GPU. Submit from the project's folder:
#   sbatch launch_scripts/slurm.sh train --config train_configs/latent_l2.yaml --output_dir /shared/runs/latent_l2 [--key value ...]
# Ten minutes before its time is over, the job gets SIGUSR1: the run writes a checkpoint and ends, and the job is put into the queue
# again, where it goes on. After a node failure SLURM does the same. Set below what your cluster wants (partition, account, time).
# --output_dir, data and encoder must lie on a file system that all nodes share. Each turn begins with tools/preflight.py on all
# processes (multi_node.sh says more); a job that it refuses ends without another turn.
#SBATCH --job-name=drift_accel
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=drift_accel_%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}" # SLURM runs a copy of this file from elsewhere
[ -f launch_scripts/multi_node.sh ] || { echo "slurm: submit from the project's folder" >&2; exit 2; }

# A signal interrupts `wait` before its process has ended.
wait_for() {
  local code=0
  while kill -0 "$1" 2>/dev/null; do
    code=0
    wait "$1" || code=$?
  done
  return "$code"
}

if [ "${1:-}" = node ]; then # what srun starts on each node
  shift
  export MACHINE_RANK=$SLURM_NODEID NUM_MACHINES=$SLURM_NNODES
  [ -z "${SLURM_GPUS_ON_NODE:-}" ] || export PROCESSES_PER_MACHINE=${PROCESSES_PER_MACHINE:-$SLURM_GPUS_ON_NODE}
  # Ignored signals are inherited: the launcher and trainers that are still starting survive one; running trainers catch it.
  (trap '' USR1; exec bash launch_scripts/multi_node.sh "$@") &
  launcher=$!
  # The launcher knows nothing of SIGUSR1; its children are the trainers, who do. During the check, and while they start, nobody
  # hears it: it is said again until the launcher has ended, and a trainer minds the first one alone.
  trap 'trap "" USR1; while kill -0 "$launcher" 2>/dev/null; do pkill -USR1 -P "$launcher" || true; sleep 5; done &' USR1
  wait_for "$launcher"
  exit
fi

[ $# -gt 0 ] || { sed -n '2,6p' launch_scripts/slurm.sh >&2; exit 2; }
run=
previous=
for argument in "$@"; do
  [ "$previous" != --output_dir ] || run=$argument
  previous=$argument
done
[ -n "$run" ] || { echo "slurm: --output_dir is missing: name the folder of the run" >&2; exit 2; }
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MAIN_PORT=${MAIN_PORT:-$((20000 + SLURM_JOB_ID % 10000 * 2))} # two jobs on one node must not meet; each takes two ports
export MAIN_ADDRESS MAIN_PORT

# srun does not take over sbatch's --cpus-per-task since SLURM 22.05.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
endings() { grep '^- closed ' "$run/RUN.md" 2>/dev/null || true; }
before=$(endings | wc -l)
srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=0 bash launch_scripts/slurm.sh node "$@" &
tasks=$!
trap 'echo "slurm: the time is nearly over, asking the run to stop"; kill -USR1 "$tasks" 2>/dev/null || true' USR1
code=0
wait_for "$tasks" || code=$?
# The launcher does not hand the trainer's exit code on; its diary does.
ending=$(endings | tail -n 1)
# A job that died without a word must not be taken for the one before it that stopped as asked.
if [ "$code" -ne 0 ] && [ "$(endings | wc -l)" -gt "$before" ] && [[ $ending == *'stopped on request'* ]]; then
  echo "slurm: the run has stopped with a checkpoint and goes on in a new job"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
