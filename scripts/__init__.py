"""Entry points, one per step: `python -m scripts.<name> --help`."""

import importlib.util
import sys

if importlib.util.find_spec("tiktoken") is None:  # the shell's own Python
    sys.exit(f"error: {sys.executable} lacks the packages of this project; run: bash runs/setup.sh, then in each "
             "terminal: source .venv/bin/activate")  # fmt: skip
