#!/usr/bin/env bash
# Set-up that the other scripts share: uv, a C compiler, Rust, then the Python environment in .venv.
# Run it (`bash runs/setup.sh`) or source it; either way it is quick when nothing is left to do.
# SETUP=0: nothing is installed, the Python in PATH is used as it is (in a container, a notebook, a Slurm job).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${SETUP:-1}" = 0 ]; then
  # shellcheck disable=SC2317
  return 0 2>/dev/null || exit 0
fi

setup_fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

find_python() {
  local name
  for name in python3 python python3.13 python3.12 python3.11 python3.10; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
}

find_uv() {
  local path
  for path in "$(command -v uv || true)" "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" "$PWD/.uv/bin/uv"; do
    if [ -n "$path" ] && [ -x "$path" ]; then
      echo "$path"
      return
    fi
  done
}

install_uv() {
  local python
  python="$(find_python)"
  echo "setup: uv is missing, installing it" >&2
  if [ -n "$python" ] && "$python" -m venv .uv 2>/dev/null && .uv/bin/python -m pip install --quiet uv; then
    return
  fi
  if [ -n "$python" ] && "$python" -m pip install --quiet --user uv; then
    return
  fi
  curl -LsSf https://astral.sh/uv/install.sh | sh
}

UV="$(find_uv)"
if [ -z "$UV" ]; then
  install_uv || setup_fail "uv could not be installed; run: python3 -m pip install uv"
  UV="$(find_uv)"
  [ -n "$UV" ] || setup_fail "uv was not found after installing it; run: python3 -m pip install uv"
fi

if ! command -v cc >/dev/null && ! command -v gcc >/dev/null && ! command -v clang >/dev/null; then
  setup_fail "no C compiler; run: sudo apt-get install build-essential (Debian, Ubuntu), sudo dnf install gcc (Fedora) or xcode-select --install (macOS)"
fi

export PATH="$HOME/.cargo/bin:$PATH"
if ! cargo --version >/dev/null 2>&1 && command -v rustup >/dev/null; then
  echo "setup: rustup has no toolchain, installing the stable one" >&2
  rustup default stable >/dev/null || setup_fail "Rust could not be installed; run: rustup default stable"
fi
if ! cargo --version >/dev/null 2>&1; then
  echo "setup: Rust is missing, installing it with rustup" >&2
  { curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal --no-modify-path; } ||
    setup_fail "Rust could not be installed; run: curl https://sh.rustup.rs -sSf | sh"
fi

echo "setup: Python packages and the Rust tokenizer (some minutes the first time, seconds afterwards)" >&2
while sleep 30 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do echo "setup: still at it ($SECONDS s)" >&2; done &
SIGN_OF_LIFE=$!
if ! "$UV" sync --frozen --quiet; then
  setup_fail "\`uv sync --frozen\` failed (its message is above); run it again by hand: $UV sync --frozen"
fi
kill "$SIGN_OF_LIFE" 2>/dev/null || true

# An NVIDIA driver older than the locked CUDA build of torch leaves torch without the GPU: say how to mend it.
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
  if ! .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "setup: torch cannot use this GPU, its driver is probably older than the CUDA build. For the build that fits:" >&2
    echo "  $UV pip install --torch-backend=auto --reinstall-package torch torch" >&2
  fi
fi

command -v uv >/dev/null || ln -sf "$UV" .venv/bin/uv # for the commands of the README, once .venv is active
# shellcheck disable=SC1091
source .venv/bin/activate
echo "setup: ready ($(python --version 2>&1), $("$UV" --version))" >&2
