#!/usr/bin/env bash
# The reference run on one node of 8 GPUs: real Chinese web text from the hub, pretraining, fine-tuning, evaluation.
# Restartable: rerun it after a stop and it continues. Not yet run on GPUs: use DRY_RUN=1 to see plan and estimates.
# Knobs (environment):
#   DEPTH=20        layers                        NPROC=8            GPUs
#   DATA=hf:opencsg/chinese-fineweb-edu-v2        pretraining text   MAX_BYTES=60000000000  text to fetch
#   SFT_DATA=builtin  conversations: builtin or files
#   HARDWARE=8xH100   for the estimate            RUN=dummy          wandb run name; dummy = off
#   TAG=d$DEPTH     name of the model             DRY_RUN=0          1 = print the commands, check flags, estimate
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat       where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh

DEPTH="${DEPTH:-20}"
NPROC="${NPROC:-8}"
DATA="${DATA:-hf:opencsg/chinese-fineweb-edu-v2}"
MAX_BYTES="${MAX_BYTES:-60000000000}"
SFT_DATA="${SFT_DATA:-builtin}"
HARDWARE="${HARDWARE:-8xH100}"
RUN="${RUN:-dummy}"
TAG="${TAG:-d$DEPTH}"
VOCAB=32768
CORPUS="$TAG-text"
TEXT="$NANOZHCHAT_BASE_DIR/corpus/$CORPUS"

say "recipe for depth $DEPTH on $HARDWARE"
python -m scripts.recipe --depth="$DEPTH" --vocab-size="$VOCAB" --hardware="$HARDWARE"
[ "$DRY_RUN" = 1 ] || require_free_gb $((MAX_BYTES / 500000000))

dry_run_checks_flags
step "text" python -m scripts.data_fetch --data "$DATA" --name="$CORPUS" --max-bytes="$MAX_BYTES"
step "tokenizer" python -m scripts.tok_train --data "$TEXT" --vocab-size="$VOCAB" --name="$TAG" --max-bytes=2000000000
step "pretraining" launch scripts.base_train --depth="$DEPTH" --data "$TEXT" --tokenizer="$TAG" --model-tag="$TAG" --run="$RUN"
step "held-out text" launch scripts.base_eval --data "$TEXT" --model-tag="$TAG"
step "fine-tuning" launch scripts.chat_sft --data "$SFT_DATA" --model-tag="$TAG" --run="$RUN"
step "questions" launch scripts.chat_eval --tasks builtin --model-tag="$TAG" --source=sft
step "report" python -m scripts.report --model-tag="$TAG"
