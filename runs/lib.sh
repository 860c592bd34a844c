# Shared by the scripts in runs/: environment, messages, restartable steps. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail

CALLER="${OLDPWD:-$PWD}" # where the command was given: the checkout is entered before this file is read
SCRIPT="$0"
[ -r "$SCRIPT" ] || SCRIPT="runs/${0##*/}" # every script has changed to the checkout by now, where a relative $0 is no file

export NANOZHCHAT_BASE_DIR="${NANOZHCHAT_BASE_DIR:-$HOME/.cache/nanozhchat}"
DRY_RUN="${DRY_RUN:-0}"
unset PYTHONDONTWRITEBYTECODE # container images set it, and every start would compile torch again: 5 to 10 seconds each

say() { printf '\n== %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# A variable whose name is nearly that of a knob explained at the top of the script is a slip that would go unnoticed:
# MINUTE=4 would train for ten. What the script reads besides is the system's own, such as Slurm's.
refuse_misspelt_knobs() {
  local python
  python="$(command -v python3 || command -v python)" || return 0
  "$python" - "$SCRIPT" <<'END' || exit 2
import difflib, os, re, sys

text = open(sys.argv[1], encoding="utf-8").read()
knobs = sorted(set(re.findall(r"\b([A-Z_]+)=", text.split("\ncd ")[0])) | {"DRY_RUN", "NANOZHCHAT_BASE_DIR"})
for name in sorted(os.environ.keys() - {*knobs, *re.findall(r"\$\{([A-Z_]+):?-", text)}):
    if close := difflib.get_close_matches(name.upper(), knobs, 1, 0.8):
        sys.exit(f"error: {name}={os.environ[name]} is not a knob of {sys.argv[1]}, {close[0]} is; "
                 f"if {name} is meant for something else, begin the command with: env -u {name}")
END
}
refuse_misspelt_knobs

# Only test.sh takes arguments, for pytest; elsewhere MINUTES=5 behind the script's name would go unnoticed.
refuse_arguments() {
  if [ "$1" = -h ] || [ "$1" = --help ]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$SCRIPT"
    exit 0
  fi
  die "$0 takes no arguments ($*); knobs stand before the command, as in: MINUTES=5 bash $0"
}
[ $# = 0 ] || [ "${0##*/}" = test.sh ] || refuse_arguments "$@"

stopped() {
  printf '\nstopped; the same command continues\n' >&2
  exit 143
}
trap stopped INT TERM HUP

# Print a command and run it.
run() {
  printf '+ %s\n' "$*" >&2
  "$@"
}

require_minutes() {
  if ! [[ "$1" =~ ^[0-9]+([.][0-9]+)?$ ]] || ! awk "BEGIN {exit $1 < 0.1}"; then
    die "MINUTES=$1 is not a number of minutes from 0.1"
  fi
}

# explain_flags DATA: commands name their flags in errors; for who runs a script they are knobs, DATA that for --data.
explain_flags() {
  trap '[ $? != 2 ] || echo "in $0 VOCAB= stands for --vocab-size, '"$1"'= for --data, DEPTH= for --depth" >&2' EXIT
}

# With DRY_RUN=1, from here on: every command is printed and checks its flags for real, and stops there.
dry_run_checks_flags() {
  [ "$DRY_RUN" = 0 ] || export NANOZHCHAT_CHECK_FLAGS=1
}

# step NAME COMMAND...: run with a heading and the time it took.
step() {
  local name="$1" begin=$SECONDS
  shift
  say "$name"
  if [ "$1" = launch ]; then "$@"; else run "$@"; fi
  printf '== %s: %d s\n' "$name" "$((SECONDS - begin))" >&2
}

require_free_gb() {
  mkdir -p "$NANOZHCHAT_BASE_DIR" || die "NANOZHCHAT_BASE_DIR=$NANOZHCHAT_BASE_DIR is no folder that can be written to"
  local free
  free=$(df -Pk "$NANOZHCHAT_BASE_DIR" | awk 'NR==2 {print int($4 / 1048576)}')
  [ "$free" -ge "$1" ] && return
  printf 'error: %s\n' "$NANOZHCHAT_BASE_DIR has $free GB free, $1 GB are needed; set NANOZHCHAT_BASE_DIR elsewhere" >&2
  exit 6
}

count_cores() {
  nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1
}

# Without the traceback that torchrun prints when a signal or an error ends it, and with the exit code of the rank: the
# ranks have said what it was.
torchrun() {
  python -c '
import logging, signal, sys
before = signal.getsignal(signal.SIGINT)
if callable(before):  # not ignored: Ctrl-C amid the imports ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
signal.signal(signal.SIGINT, before)
logging.disable(logging.ERROR)
try:
    main(sys.argv[1:])
except SignalException:
    sys.exit(143)
except ChildFailedError as error:
    code = error.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else f"error: a rank was ended by signal {-code}; the same command continues")
' "$@"
}

# launch MODULE FLAGS...: one process, NPROC ranks under torchrun, or NPROC on each of NNODES nodes of a Slurm job.
launch() {
  local module="$1" how=(python -m)
  shift
  if [ "${NNODES:-1}" -gt 1 ]; then
    how=(srun --nodes="$NNODES" --ntasks="$NNODES" --ntasks-per-node=1 torchrun --nnodes="$NNODES"
      --nproc_per_node="$NPROC" --rdzv_id="$RDZV_ID" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" -m)
  elif [ "${NPROC:-1}" -gt 1 ]; then
    how=(torchrun --standalone --nproc_per_node="$NPROC" -m)
  fi
  [ "${how[0]}" = python ] || set -- -- "$@"
  if [ -n "${NANOZHCHAT_CHECK_FLAGS:-}" ]; then
    printf '+ %s\n' "${how[*]} $module $*" >&2
    python -m "$module" "$@"
  else
    run "${how[@]}" "$module" "$@"
  fi
}

# estimate FLAGS...: the resolved recipe, with time, memory and cost on $HARDWARE.
estimate() {
  say "recipe, time, memory and cost on $HARDWARE (estimate)"
  run python -m scripts.recipe --hardware="$HARDWARE" "$@"
}

# from_caller SPEC: a relative path or glob that names something where the command was given, absolute, and what looks like
# a path and is not here either, for the error to say where it was looked for; else as it is.
from_caller() {
  local path="${1%@*}" from=""
  case "$1" in /* | *:* | builtin*) path="" ;; esac # absolute, or no path
  if [ -n "$path" ] && [ "$CALLER" != "$PWD" ]; then
    if found "$CALLER/$path" || { [[ "$path" = *[./]* ]] && ! found "$path"; }; then from="$CALLER/"; fi
  fi
  printf '%s\n' "$from$1"
}

# found PATH: whether a path or glob names something.
found() { compgen -G "$1" >/dev/null; }

# split_specs DATA SFT_DATA: specs into SPECS and SFT_SPECS. They stand between spaces; each in a line of its own if there
# are lines; or the whole is one path or glob with spaces in it. Globs are the program's business.
split_specs() {
  local spec
  SPECS=() SFT_SPECS=()
  while read -r spec; do [ -z "$spec" ] || SPECS+=("$(from_caller "$spec")"); done < <(one_a_line "$1")
  while read -r spec; do [ -z "$spec" ] || SFT_SPECS+=("$(from_caller "$spec")"); done < <(one_a_line "$2")
}

one_a_line() {
  case "$1" in *$'\n'*) printf '%s\n' "$1" && return ;; esac
  if found "$1" || found "$CALLER/$1"; then
    printf '%s\n' "$1"
  else
    printf '%s\n' "$1" | tr -s ' \t' '\n'
  fi
}

# check_data: stops if SPECS or SFT_SPECS name what is not there, or files without conversations for SFT_SPECS: before
# anything is trained for hours.
check_data() {
  [ "$DRY_RUN" = 0 ] || return 0
  python -c '
import sys
from nanozhchat import cli, sources
from nanozhchat.conversation_files import conversations
n = int(sys.argv[1]) + 2
def check():
    sources.inputs(sys.argv[2:])
    for spec in sys.argv[n:]:
        if sources.parse(spec).kind == "files":
            next(conversations([spec], "train"), None)
cli.run(check)' "${#SPECS[@]}" "${SPECS[@]}" "${SFT_SPECS[@]}"
}

# text_and_tokenizer: fetch SPECS into the corpus $TAG-text (TEXT), and train its tokenizer $TAG.
text_and_tokenizer() {
  TEXT="$NANOZHCHAT_BASE_DIR/corpus/$TAG-text"
  step "text" python -m scripts.data_fetch --data "${SPECS[@]}" --name="$TAG-text" --max-bytes="$MAX_BYTES"
  step "tokenizer" python -m scripts.tok_train --data "$TEXT" --vocab-size="$VOCAB" --name="$TAG" --max-bytes=2000000000
}

# trained STAGE TAG: whether that run came to its end.
trained() { grep -qs '"event": "done"' "$NANOZHCHAT_BASE_DIR/$1/$2/events.jsonl"; }

# to_chat FLAGS...: what follows pretraining of $TAG: scores, fine-tuning (with FLAGS), reinforcement learning on
# $RL_TASKS (with the array RL_FLAGS; no tasks = none), questions, report. What is done is skipped.
to_chat() {
  local base="$NANOZHCHAT_BASE_DIR/base/$TAG" stage folder
  if ! newer "$base/base_eval.json" "$base/latest.json"; then
    step "held-out text, benchmarks" launch scripts.base_eval --data "$TEXT" --model-tag="$TAG" --eval="$EVAL"
  fi
  step "fine-tuning" launch scripts.chat_sft --data "${SFT_SPECS[@]}" --model-tag="$TAG" --run="$RUN" "$@"
  if [ -n "$RL_TASKS" ]; then
    # shellcheck disable=SC2086
    step "reinforcement learning" launch scripts.chat_rl --tasks $RL_TASKS --model-tag="$TAG" --run="$RUN" "${RL_FLAGS[@]}"
  fi
  for stage in sft ${RL_TASKS:+rl}; do
    folder="$NANOZHCHAT_BASE_DIR/$stage/$TAG"
    if ! newer "$folder/chat_eval.json" "$folder/latest.json"; then
      step "questions to $stage" launch scripts.chat_eval --tasks builtin --model-tag="$TAG" --source="$stage"
    fi
  done
  step "report" python -m scripts.report --model-tag="$TAG"
}

# fastest_ranks CORES: 1, 2 or 4 processes, the rest of the cores as threads: whichever trains fastest here. Measured
# once and kept, since a run must be continued with the ranks it was begun with.
fastest_ranks() {
  local kept="$NANOZHCHAT_BASE_DIR/ranks-$1.txt" best=0 chosen=1 ranks speed
  if [ -s "$kept" ]; then
    cat "$kept"
    return
  fi
  [ "$1" -lt 2 ] || say "processes or threads: each measured, half a minute in all"
  for ranks in 1 2 4; do
    [ "$ranks" -le "$1" ] && [ "$1" -gt 1 ] || continue
    speed="$(OMP_NUM_THREADS=$(($1 / ranks)) torchrun --standalone --nproc_per_node="$ranks" -m scripts.recipe \
      -- --depth=4 --measure | awk '/^measured/ {print int($2 * 10)}')" || speed=0
    printf '%s process(es) x %s thread(s): %s.%s GFLOP/s in training\n' "$ranks" "$(($1 / ranks))" \
      "${speed%?}" "${speed#"${speed%?}"}" >&2
    [ "$speed" -le "$best" ] || best="$speed" chosen="$ranks"
  done
  mkdir -p "$NANOZHCHAT_BASE_DIR"
  echo "$chosen" | tee "$kept"
}

# newer A B: whether A exists and is not older than B.
newer() { [ -e "$1" ] && [ ! "$2" -nt "$1" ]; }
