#!/usr/bin/env bash
# Everything that must pass: set-up, Rust tests and linters, Python linters and tests, shell linters, browser tests.
# Arguments go to pytest, for example: bash runs/test.sh -k tokenizer
cd "$(dirname "${BASH_SOURCE[0]}")/.." && source runs/lib.sh
source runs/setup.sh
step "packages only tests need" "$UV" sync --frozen --quiet --group harness

apt_install() {
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

find_chromium() {
  local name
  for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" && return
  done
  return 0
}

if [ -z "${CHROMIUM:-$(find_chromium)}" ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    step "chromium for the browser tests" apt_install chromium fonts-noto-cjk
  else
    die "the browser tests need Chromium; run: sudo apt-get install chromium (macOS: brew install --cask google-chrome), or set CHROMIUM=/path/to/it"
  fi
fi

export OMP_NUM_THREADS=1 WANDB_MODE=offline
for crate in rustbpe rustinfer; do
  step "$crate: format" cargo fmt --manifest-path $crate/Cargo.toml --check
  step "$crate: clippy" cargo clippy --quiet --manifest-path $crate/Cargo.toml --all-targets -- -D warnings
  step "$crate: tests" cargo test --quiet --manifest-path $crate/Cargo.toml
done
step "python: lint" ruff check .
step "python: format" ruff format --check .
step "python: types" pyrefly check
step "shell: lint" shellcheck -x runs/*.sh .ci/run
step "python: tests" python -m pytest -q "$@"
