#!/usr/bin/env bash
# A small model of one book, by characters or by BPE: tokenizer, training, held-out bits per character, a continuation.
# The report shows training against held-out loss: on one book the two part soon. Restartable. Knobs (environment):
#   BOOK=book.txt   UTF-8 text, blank lines between chapters    KIND=char   char or bpe
#   MINUTES=15      wall clock of training                      DEPTH=auto  layers; auto = chosen for the minutes
#   VOCAB=          tokens; empty = 2048 for bpe, enough for nearly all characters for char, 4096 at most
#   PROMPT=却说     what the model continues                    MAX_TOKENS=300  how far
#   TAG=            name of the model; empty = after book, kind and minutes
#   RUN=dummy       wandb run name; dummy = off                 DRY_RUN=0   1 = print the commands, check flags
#   NANOZHCHAT_BASE_DIR=~/.cache/nanozhchat                     where everything is kept
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh

BOOK="$(from_caller "${BOOK:-book.txt}")"
KIND="${KIND:-char}"
MINUTES="${MINUTES:-15}"
DEPTH="${DEPTH:-auto}"
PROMPT="${PROMPT:-却说}"
RUN="${RUN:-dummy}"
case "$KIND" in char | bpe) ;; *) die "KIND=$KIND is neither char nor bpe" ;; esac
[ "$DRY_RUN" = 1 ] || [ -r "$BOOK" ] || die "BOOK=$BOOK cannot be read; name a UTF-8 text, such as BOOK=texts/novel.txt"
require_minutes "$MINUTES"
# Bytes, control tokens, the characters and what two of their three bytes make: a tenth less, since some characters may
# stand in the held-out part alone. The rarest stay in bytes.
tokens_of_characters() { python -c '
import sys
found = {c.encode() for c in set(open(sys.argv[1], encoding="utf-8", errors="ignore").read()) if c > "\x7f"}
print(263 + (len(found) + len({c[:2] for c in found})) * 9 // 10)' "$BOOK"; }
if [ "$KIND" = char ] && [ -z "${VOCAB:-}" ] && [ -r "$BOOK" ]; then
  VOCAB=$(tokens_of_characters)
  [ "$VOCAB" -lt 4096 ] || VOCAB=4096
fi
[ "$KIND" = bpe ] && VOCAB="${VOCAB:-2048}" || VOCAB="${VOCAB:-4096}"
NAME="$(basename "$BOOK" .txt | tr -cd 'A-Za-z0-9')"
TAG="${TAG:-book-${NAME:-x}-$KIND-${MINUTES}m-$(printf '%s' "$BOOK" | cksum | cut -d' ' -f1)}"
SECONDS_LEFT="$(awk "BEGIN {print int($MINUTES * 60)}")"
NPROC="${NPROC:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(count_cores) / NPROC))}"

dry_run_checks_flags
explain_flags BOOK
step "tokenizer" python -m scripts.tok_train --data "$BOOK" --kind="$KIND" --vocab-size="$VOCAB" --name="$TAG"
step "training (${SECONDS_LEFT} s)" launch scripts.base_train --data "$BOOK" --tokenizer="$TAG" --model-tag="$TAG" \
  --depth="$DEPTH" --budget="${SECONDS_LEFT}s" --prompts "$PROMPT" "次日，" "话说" "二人" --run="$RUN"
step "held-out text" python -m scripts.base_eval --data "$BOOK" --model-tag="$TAG"
step "report" python -m scripts.report --model-tag="$TAG"
step "continuation" python -m scripts.chat_cli --source=base --model-tag="$TAG" --temperature=0.8 --top-p=0.95 --seed=1 \
  --max-tokens="${MAX_TOKENS:-300}" -p "$PROMPT"
end="report: $NANOZHCHAT_BASE_DIR/report/$TAG/report.html"
[ "$DRY_RUN" = 0 ] || end="dry run: the flags above were checked, no data was looked for"
say "$end"
