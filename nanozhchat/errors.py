"""Errors a user can meet, each with its exit code. A plain ValueError counts as bad input (2)."""


class RunError(Exception):
    """Base of the errors below; `exit_code` is what the process returns."""

    exit_code = 1


class DivergedError(RunError):
    """The loss became non-finite and rolling back did not help."""

    exit_code = 3


class OutOfMemoryError(RunError):
    """The smallest device batch does not fit."""

    exit_code = 4


class DamagedError(RunError):
    """A data file or checkpoint is torn, altered or missing parts."""

    exit_code = 5


class DiskError(RunError):
    """No space left, or an input/output error."""

    exit_code = 6


class LockedError(RunError):
    """Another process works on the same run directory."""

    exit_code = 7


class RankLostError(RunError):
    """Another rank died or stopped answering; torchrun ends or restarts the rest."""


class StoppedError(RunError):
    """A signal asked the run to stop; everything was saved first."""

    exit_code = 143
