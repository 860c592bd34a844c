#!/usr/bin/env bash
#SBATCH --job-name=nanozhchat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=nanozhchat-%j.log
# The reference run on several nodes of a Slurm cluster; submit it from the repository: sbatch runs/slurm.sh
# Run `bash runs/setup.sh` once on the login node before. Nodes must share the repository and NANOZHCHAT_BASE_DIR.
# Two minutes before the time is up everything is saved; a job submitted after it continues. Several at once:
#   for i in 1 2 3; do sbatch --dependency=singleton runs/slurm.sh; done
# Not yet run on a cluster: DRY_RUN=1 bash runs/slurm.sh shows plan and estimates. Knobs (environment):
#   DEPTH=26        layers                        NPROC=8            GPUs per node
#   DATA=fineweb-edu-zh   pretraining text        MAX_BYTES=120000000000  text to fetch
#   SFT_DATA=builtin  conversations: builtin, presets or files
#   RL_TASKS="builtin:arithmetic builtin:reversing"   problems for reinforcement learning; empty = none
#   EVAL=bpb,core,sample   of the base model; core fetches Chinese benchmarks from the hub
#   HARDWARE=16xH100  for the estimate            RUN=dummy          wandb run name; dummy = off
#   TAG=d$DEPTH     name of the model             PORT=29500         of the rendezvous on the first node
#   VOCAB=32768     tokens of the vocabulary
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat       where everything is kept, on a shared disk
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}" && source runs/lib.sh # Slurm runs a copy of this file
if [ -n "${SLURM_JOB_ID:-}" ]; then
  # shellcheck disable=SC1091
  source .venv/bin/activate
else
  source runs/setup.sh
fi

DEPTH="${DEPTH:-26}"
NNODES="${SLURM_JOB_NUM_NODES:-2}"
NPROC="${NPROC:-8}"
MAX_BYTES="${MAX_BYTES:-120000000000}"
HARDWARE="${HARDWARE:-$((NNODES * NPROC))xH100}"
RUN="${RUN:-dummy}"
TAG="${TAG:-d$DEPTH}"
VOCAB="${VOCAB:-32768}"
RDZV_ID="${SLURM_JOB_ID:-0}"
RDZV_ENDPOINT="$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | sed -n 1p || true)"
RDZV_ENDPOINT="${RDZV_ENDPOINT:-first-node}:${PORT:-29500}"
EVAL="${EVAL:-bpb,core,sample}"
RL_TASKS="${RL_TASKS-builtin:arithmetic builtin:reversing}"
RL_FLAGS=(--num-steps=200)
split_specs "${DATA:-fineweb-edu-zh}" "${SFT_DATA:-builtin}"

estimate --depth="$DEPTH" --vocab-size="$VOCAB"
dry_run_checks_flags
check_data
[ "$DRY_RUN" = 1 ] || [ -n "${SLURM_JOB_ID:-}" ] || die "not in a Slurm job; run: sbatch runs/slurm.sh"
text_and_tokenizer
step "pretraining" launch scripts.base_train --depth="$DEPTH" --data "$TEXT" --tokenizer="$TAG" --model-tag="$TAG" --run="$RUN"
to_chat --epochs=1
