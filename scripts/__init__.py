"""Entry points, one per step: `python -m scripts.<name> --help`."""
