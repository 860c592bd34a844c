#!/usr/bin/env bash
# One consumer card of 24 GB, about two hours: the largest model that the hours allow, from the 26M class (DEPTH=6) up.
# Restartable: rerun it after a stop and it continues. Not yet run on a GPU: use DRY_RUN=1 to see plan and estimates.
# Knobs (environment):
#   HOURS=2         wall clock of all training    DEPTH=auto         layers; auto = chosen for card and hours
#   DATA=fineweb-edu-zh   pretraining text        MAX_BYTES=3000000000   text to fetch
#   SFT_DATA=builtin  conversations: builtin, presets (minimind-sft-mini) or files
#   RL_TASKS="builtin:arithmetic builtin:reversing"   problems for reinforcement learning; empty = none
#   EVAL=bpb,core,sample   of the base model; core fetches Chinese benchmarks from the hub
#   HARDWARE=4090     for the estimate            RUN=dummy          wandb run name; dummy = off
#   TAG=gpu         name of the model             DRY_RUN=0          1 = print the commands, check flags, estimate
#   VOCAB=8192      tokens of the vocabulary
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat       where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh

HOURS="${HOURS:-2}"
DEPTH="${DEPTH:-auto}"
MAX_BYTES="${MAX_BYTES:-3000000000}"
HARDWARE="${HARDWARE:-4090}"
RUN="${RUN:-dummy}"
TAG="${TAG:-gpu}"
VOCAB="${VOCAB:-8192}"
[[ "$HOURS" =~ ^[0-9]+([.][0-9]+)?$ ]] || die "HOURS=$HOURS is not a number of hours"
BASE_SECONDS="$(awk "BEGIN {print int($HOURS * 3600 * 0.75)}")"
SFT_SECONDS="$(awk "BEGIN {print int($HOURS * 3600 * 0.15)}")"
EVAL="${EVAL:-bpb,core,sample}"
RL_TASKS="${RL_TASKS-builtin:arithmetic builtin:reversing}"
RL_FLAGS=(--budget="$(awk "BEGIN {print int($HOURS * 360)}")s")
split_specs "${DATA:-fineweb-edu-zh}" "${SFT_DATA:-builtin}"

estimate --depth="$DEPTH" --vocab-size="$VOCAB" --budget="${BASE_SECONDS}s"
[ "$DRY_RUN" = 1 ] || require_free_gb $((5 + MAX_BYTES / 500000000))
dry_run_checks_flags
check_data
text_and_tokenizer
step "pretraining (${BASE_SECONDS} s)" launch scripts.base_train --depth="$DEPTH" --budget="${BASE_SECONDS}s" \
  --data "$TEXT" --tokenizer="$TAG" --model-tag="$TAG" --run="$RUN"
to_chat --budget="${SFT_SECONDS}s"
