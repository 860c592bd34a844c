#!/usr/bin/env bash
# Budget x depth sweep: how large should a model be, and how long should it read, for a given number of FLOPs?
# Ends with report/$NAME/: runs.csv, iso-FLOP parabolas, the laws and their uncertainty. Restartable: runs that are
# done are skipped, a new budget or depth is added to the old. On a CPU:
#   BUDGETS="5e11 1e12 2e12" DEPTHS="1 2 3 4" BATCH=2048 VOCAB=1024 DATA=builtin MAX_BYTES=20000000 bash runs/scaling_laws.sh
# Knobs (environment):
#   BUDGETS="1e18 2.15e18 4.64e18 1e19"   training FLOPs    DEPTHS="8 10 12 14 16 18 20"
#   BATCH=          tokens per step; empty = by the recipe (too many for budgets of a few steps)
#   NPROC=1         processes or GPUs             VOCAB=32768        tokens of the one tokenizer
#   DATA=fineweb-edu-zh   text                    MAX_BYTES=60000000000  text to fetch
#   HARDWARE=NPROCxH100   for the estimate        RUN=dummy          wandb run name; dummy = off
#   NAME=laws       beginning of the models' tags   EVAL_TOKENS=524288  held-out tokens scored at the end of each
#   DRY_RUN=0       1 = print the commands, check flags, estimate
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat       where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh

BUDGETS="${BUDGETS:-1e18 2.15e18 4.64e18 1e19}"
DEPTHS="${DEPTHS:-8 10 12 14 16 18 20}"
BATCH="${BATCH:-}"
NPROC="${NPROC:-1}"
MAX_BYTES="${MAX_BYTES:-60000000000}"
HARDWARE="${HARDWARE:-${NPROC}xH100}"
RUN="${RUN:-dummy}"
NAME="${NAME:-laws}"
EVAL_TOKENS="${EVAL_TOKENS:-524288}"
VOCAB="${VOCAB:-32768}"
TAG="$NAME"
split_specs "${DATA:-fineweb-edu-zh}" builtin

for budget in $BUDGETS; do
  estimate --depth="${DEPTHS##* }" --vocab-size="$VOCAB" --target-flops="$budget" ${BATCH:+"--total-batch-size=$BATCH"} # the deepest needs most memory
done
[ "$DRY_RUN" = 1 ] || require_free_gb $((5 + MAX_BYTES / 500000000))
dry_run_checks_flags
text_and_tokenizer
for budget in $BUDGETS; do
  for depth in $DEPTHS; do
    tag="$NAME-$budget-d$depth"
    trained base "$tag" || step "$budget FLOPs, depth $depth" launch scripts.base_train --depth="$depth" --data "$TEXT" \
      --target-flops="$budget" ${BATCH:+"--total-batch-size=$BATCH"} --tokenizer="$TAG" --model-tag="$tag" --run="$RUN" --no-ngrams --keep-last=2 \
      --eval-every=1000000000 --eval-tokens="$EVAL_TOKENS"
  done
done
step "laws" python -m scripts.fit_scaling --name="$NAME"
