#!/usr/bin/env bash
# The whole pipeline on a CPU: set-up, tokenizer, pretraining, fine-tuning, evaluation, report, one question answered.
# Offline on built-in data; rerunning continues where it was cut off and skips what is done. Knobs (environment):
#   MINUTES=10      wall clock of all training together
#   DEPTH=auto      layers; auto = chosen for the machine and the minutes
#   VOCAB=          tokens of the vocabulary; empty = 3072 for built-in text, 4096 for other; little variety allows fewer
#   DATA=builtin    pretraining data, space-separated specs: builtin, files, 'globs/*.jsonl.gz' (in quotes), hf:...
#                   several whose paths have spaces in them: one a line
#   SFT_DATA=builtin  conversations to fine-tune on
#   RUN=dummy       wandb run name; dummy = off
#   NPROC=          training processes; empty = 1, 2 or 4, whichever is measured to be fastest
#   TAG=            name of the model; empty = made from the knobs, so that different settings never mix
#   QUESTION=...    asked at the end; a story by default
#   FRESH=0         1 = start over (the earlier run is kept aside)
#   DRY_RUN=0       1 = print the commands and let each check its flags, no more
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat   where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh

MINUTES="${MINUTES:-10}"
DEPTH="${DEPTH:-auto}"
DATA="${DATA:-builtin}"
# All characters of built-in text come first, so that names and places are cut alike wherever they stand (dev/LOG.md).
if [ "$DATA" = builtin ]; then USUAL_VOCAB=3072 COVERAGE=0.9995; else USUAL_VOCAB=4096 COVERAGE=0; fi
VOCAB="${VOCAB:-$USUAL_VOCAB}"
require_minutes "$MINUTES"
[[ "$DEPTH" =~ ^(auto|[1-9][0-9]*)$ ]] || die "DEPTH=$DEPTH is neither a whole number from 1 nor auto"
[[ "$VOCAB" =~ ^[1-9][0-9]*$ ]] || die "VOCAB=$VOCAB is not a number of tokens"
source runs/setup.sh

SFT_DATA="${SFT_DATA:-builtin}"
split_specs "$DATA" "$SFT_DATA"
RUN="${RUN:-dummy}"
CORES="$(count_cores)"
NPROC="${NPROC:-}"
FRESH="${FRESH:-0}"

default_tag() {
  local tag="cpu"
  [ "$DEPTH" = auto ] || tag="$tag-d$DEPTH"
  [ "$VOCAB" = "$USUAL_VOCAB" ] || tag="$tag-v$VOCAB"
  [ "$MINUTES" = 10 ] || tag="$tag-${MINUTES}m"
  [ "$DATA $SFT_DATA" = "builtin builtin" ] || tag="$tag-$(printf '%s|%s' "${SPECS[*]}" "${SFT_SPECS[*]}" | cksum | cut -d' ' -f1)"
  echo "$tag"
}

TAG="${TAG:-$(default_tag)}"
SFT_SHARE=0.4 # built-in questions are learnt best by practising them; other text is read in pretraining alone (dev/LOG.md)
[ "$DATA" = builtin ] || SFT_SHARE=0.25
SFT_SECONDS="$(awk "BEGIN {print int($MINUTES * 60 * $SFT_SHARE)}")"
BASE_SECONDS="$(awk "BEGIN {print int($MINUTES * 60 - $SFT_SECONDS)}")"
FORCE=()
RESUME="--resume"
if [ "$FRESH" = 1 ]; then
  FORCE=(--force)
  RESUME="--no-resume"
fi
BASE="$NANOZHCHAT_BASE_DIR/base/$TAG" SFT="$NANOZHCHAT_BASE_DIR/sft/$TAG"

require_free_gb 2
dry_run_checks_flags
explain_flags "DATA= and SFT_DATA"
check_data
if [ -z "$NPROC" ]; then
  [ "$DRY_RUN" = 0 ] && NPROC="$(fastest_ranks "$CORES")" || NPROC=1
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES / NPROC > 0 ? CORES / NPROC : 1))}"
step "tokenizer" python -m scripts.tok_train --data "${SPECS[@]}" --name="$TAG" --vocab-size="$VOCAB" \
  --char-coverage="$COVERAGE" --max-bytes=50000000 ${FORCE[@]+"${FORCE[@]}"}
step "pretraining (${BASE_SECONDS} s)" launch scripts.base_train --depth="$DEPTH" --budget="${BASE_SECONDS}s" \
  --data "${SPECS[@]}" --tokenizer="$TAG" --model-tag="$TAG" --run="$RUN" --device-type=cpu "$RESUME"
step "fine-tuning (${SFT_SECONDS} s)" launch scripts.chat_sft --budget="${SFT_SECONDS}s" --data "${SFT_SPECS[@]}" \
  --model-tag="$TAG" --run="$RUN" --device-type=cpu "$RESUME"
if ! newer "$BASE/base_eval.json" "$BASE/latest.json"; then
  step "held-out text" launch scripts.base_eval --data "${SPECS[@]}" --model-tag="$TAG" --device-type=cpu
fi
if ! newer "$SFT/chat_eval.json" "$SFT/latest.json"; then
  step "questions" launch scripts.chat_eval --tasks builtin --num-questions=200 --model-tag="$TAG" --source=sft --device-type=cpu
fi
step "report" python -m scripts.report --model-tag="$TAG"

if [ "$DRY_RUN" = 1 ]; then
  say "dry run: the flags above were checked, no data was looked for"
  exit 0
fi

QUESTION="${QUESTION:-给我讲一个小猫的故事}"
say "one question: $QUESTION"
run python -m scripts.chat_cli --model-tag="$TAG" --device-type=cpu --temperature=0 -p "$QUESTION"
cat >&2 <<END

Talk to it:    source .venv/bin/activate
               python -m scripts.chat_cli --model-tag=$TAG
               python -m scripts.chat_web --model-tag=$TAG    then open http://localhost:8000
Report:        $NANOZHCHAT_BASE_DIR/report/$TAG/report.html
END
