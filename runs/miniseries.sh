#!/usr/bin/env bash
# One model per depth by the same recipe, on the same text: does everything get better as the dial is turned?
# Ends with report/$NAME/: runs.csv and a plot. Restartable: models that are done are skipped. On a CPU:
#   DEPTHS="2 3 4" VOCAB=2048 DATA=builtin TARGET_RATIO=1 MAX_BYTES=20000000 bash runs/miniseries.sh
# Knobs (environment):
#   DEPTHS="6 8 10 12 16 20"                      NPROC=1            processes or GPUs
#   TARGET_RATIO=12   tokens per scaling parameter  VOCAB=32768      tokens of the one tokenizer
#   DATA=fineweb-edu-zh   text                    MAX_BYTES=30000000000  text to fetch
#   HARDWARE=NPROCxH100   for the estimate        RUN=dummy          wandb run name; dummy = off
#   NAME=series     beginning of the models' tags   EVAL_TOKENS=524288  held-out tokens scored at the end of each
#   DRY_RUN=0       1 = print the commands, check flags, estimate
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat       where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh

DEPTHS="${DEPTHS:-6 8 10 12 16 20}"
NPROC="${NPROC:-1}"
TARGET_RATIO="${TARGET_RATIO:-12}"
MAX_BYTES="${MAX_BYTES:-30000000000}"
HARDWARE="${HARDWARE:-${NPROC}xH100}"
RUN="${RUN:-dummy}"
NAME="${NAME:-series}"
EVAL_TOKENS="${EVAL_TOKENS:-524288}"
VOCAB="${VOCAB:-32768}"
TAG="$NAME"
split_specs "${DATA:-fineweb-edu-zh}" builtin

for depth in $DEPTHS; do
  estimate --depth="$depth" --vocab-size="$VOCAB" --target-ratio="$TARGET_RATIO"
done
[ "$DRY_RUN" = 1 ] || require_free_gb $((5 + MAX_BYTES / 500000000))
dry_run_checks_flags
text_and_tokenizer
for depth in $DEPTHS; do
  trained base "$NAME-d$depth" || step "depth $depth" launch scripts.base_train --depth="$depth" --data "$TEXT" \
    --target-ratio="$TARGET_RATIO" --tokenizer="$TAG" --model-tag="$NAME-d$depth" --run="$RUN" --no-ngrams \
    --keep-last=2 --eval-every=1000000000 --eval-tokens="$EVAL_TOKENS"
done
step "table and plot" python -m scripts.fit_scaling --name="$NAME"
