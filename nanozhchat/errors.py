"""Errors a user can meet, each with its exit code. A plain ValueError counts as bad input (2)."""


class RunError(Exception):
    """Base of the errors below; `exit_code` is what the process returns."""

    exit_code = 1

    def __init_subclass__(cls, code: int = 1) -> None:
        cls.exit_code = code


class DivergedError(RunError, code=3):
    """The loss became non-finite and rolling back did not help."""


class OutOfMemoryError(RunError, code=4):
    """The smallest device batch does not fit."""


class DamagedError(RunError, code=5):
    """A data file or checkpoint is torn, altered or missing parts."""


class DiskError(RunError, code=6):
    """No space left, or an input/output error."""


class LockedError(RunError, code=7):
    """Another process works on the same run directory."""


class RankLostError(RunError):
    """Another rank died or stopped answering; torchrun ends or restarts the rest."""


class StoppedError(RunError, code=143):
    """A signal asked the run to stop; everything was saved first."""
