#!/usr/bin/env bash
# The reference run on one node of 8 GPUs: real Chinese web text from the hub, all stages.
# Restartable: rerun it after a stop and it continues. Not yet run on GPUs: use DRY_RUN=1 to see plan and estimates.
# Knobs (environment):
#   DEPTH=20        layers                        NPROC=8            GPUs
#   DATA=fineweb-edu-zh   pretraining text        MAX_BYTES=60000000000  text to fetch
#   SFT_DATA=builtin  conversations: builtin, presets or files
#   RL_TASKS="builtin:arithmetic builtin:reversing"   problems for reinforcement learning; empty = none
#   EVAL=bpb,core,sample   of the base model; core fetches Chinese benchmarks from the hub
#   HARDWARE=8xH100   for the estimate            RUN=dummy          wandb run name; dummy = off
#   TAG=d$DEPTH     name of the model             DRY_RUN=0          1 = print the commands, check flags, estimate
#   VOCAB=32768     tokens of the vocabulary
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat       where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh

DEPTH="${DEPTH:-20}"
NPROC="${NPROC:-8}"
MAX_BYTES="${MAX_BYTES:-60000000000}"
HARDWARE="${HARDWARE:-8xH100}"
RUN="${RUN:-dummy}"
TAG="${TAG:-d$DEPTH}"
VOCAB="${VOCAB:-32768}"
EVAL="${EVAL:-bpb,core,sample}"
RL_TASKS="${RL_TASKS-builtin:arithmetic builtin:reversing}"
RL_FLAGS=(--num-steps=200)
split_specs "${DATA:-fineweb-edu-zh}" "${SFT_DATA:-builtin}"

estimate --depth="$DEPTH" --vocab-size="$VOCAB"
[ "$DRY_RUN" = 1 ] || require_free_gb $((MAX_BYTES / 500000000))
dry_run_checks_flags
check_data
text_and_tokenizer
step "pretraining" launch scripts.base_train --depth="$DEPTH" --data "$TEXT" --tokenizer="$TAG" --model-tag="$TAG" --run="$RUN"
to_chat --epochs=1
