# Shared by the scripts in runs/: environment, messages, restartable steps. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail

export NANOZHCHAT_BASE_DIR="${NANOZHCHAT_BASE_DIR:-$HOME/.cache/nanozhchat}"
DRY_RUN="${DRY_RUN:-0}"

say() { printf '\n== %s\n' "$*" >&2; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Print a command and run it.
run() {
  printf '+ %s\n' "$*" >&2
  "$@"
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
  mkdir -p "$NANOZHCHAT_BASE_DIR"
  local free
  free=$(df -Pk "$NANOZHCHAT_BASE_DIR" | awk 'NR==2 {print int($4 / 1048576)}')
  [ "$free" -ge "$1" ] || die "$NANOZHCHAT_BASE_DIR has $free GB free, $1 GB are needed; set NANOZHCHAT_BASE_DIR elsewhere"
}

count_cores() {
  getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1
}

# launch MODULE FLAGS...: one process, or NPROC ranks under torchrun.
launch() {
  local module="$1"
  shift
  if [ -n "${NANOZHCHAT_CHECK_FLAGS:-}" ]; then
    printf '+ torchrun --standalone --nproc_per_node=%s -m %s -- %s\n' "${NPROC:-1}" "$module" "$*" >&2
    python -m "$module" "$@"
  elif [ "${NPROC:-1}" -gt 1 ]; then
    run torchrun --standalone --nproc_per_node="$NPROC" -m "$module" -- "$@"
  else
    run python -m "$module" "$@"
  fi
}

# fastest_ranks CORES: 1, 2 or 4 processes, the rest of the cores as threads: whichever trains fastest here. Measured
# once and kept, since a run must be continued with the ranks it was begun with.
fastest_ranks() {
  local kept="$NANOZHCHAT_BASE_DIR/ranks-$1.txt" best=0 chosen=1 ranks speed
  if [ -s "$kept" ]; then
    cat "$kept"
    return
  fi
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
