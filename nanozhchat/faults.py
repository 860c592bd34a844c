"""Faults on demand, to prove that a run survives them: NANOZHCHAT_FAULTS, read only when set.

    nan@step=7,rank=0; oom@device_batch>2; kill@step=5,restart=0; io:write#12=ENOSPC; io:fsync#3=kill

Kinds: nan, oom, kill, stop (as kill -STOP) at a micro-batch that meets every condition (step, row, rank, device_batch,
restart: torchrun's count), and the k-th operation of `files.Backend` in this process.
"""

import errno
import functools
import os
import re
import signal

VARIABLE = "NANOZHCHAT_FAULTS"
OPERATIONS = ("open", "write", "fsync", "replace", "fsync_dir")
COMPARE = {"=": int.__eq__, "<": int.__lt__, ">": int.__gt__}


class Faults:
    """The faults that were asked for. Raises ValueError for what it does not understand."""

    def __init__(self, text: str) -> None:
        self.io: dict[tuple[str, int], str] = {}
        self.at: list[tuple[str, list[tuple[str, str, int]]]] = []
        self.counts = dict.fromkeys(OPERATIONS, 0)
        for part in filter(None, (p.strip() for p in text.split(";"))):
            if (m := re.fullmatch(r"io:(\w+)#(\d+)=(\w+)", part)) and m[1] in OPERATIONS:
                if m[3] != "kill" and not hasattr(errno, m[3]):
                    raise ValueError(f"{VARIABLE}: {m[3]!r} is neither an errno name nor kill")
                self.io[m[1], int(m[2])] = m[3]
            elif re.fullmatch(r"(nan|oom|kill|stop)@\w+[=<>]\d+(,\w+[=<>]\d+)*", part):
                found = re.findall(r"(\w+)([=<>])(\d+)", part)
                self.at.append((part.partition("@")[0], [(name, how, int(value)) for name, how, value in found]))
            else:
                raise ValueError(f"{VARIABLE}: {part!r} is not understood; see nanozhchat/faults.py")

    def hit(self, kind: str, **facts: int) -> bool:
        """Whether a fault of this kind is due; raises ValueError if a condition names no fact."""
        facts["restart"] = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        for name, conditions in self.at:
            if odd := {fact for fact, _, _ in conditions} - facts.keys():
                raise ValueError(f"{VARIABLE}: unknown {', '.join(odd)}; there are {', '.join(sorted(facts))}")
            if name == kind and all(COMPARE[how](facts[fact], value) for fact, how, value in conditions):
                return True
        return False

    def operation(self, name: str) -> None:
        """Count an operation on files; raises OSError or kills the process where that was asked for."""
        self.counts[name] += 1
        how = self.io.get((name, self.counts[name]))
        if how == "kill":
            kill()
        if how is not None:
            number = getattr(errno, how)
            raise OSError(number, os.strerror(number))


def kill(number: int = signal.SIGKILL) -> None:
    """End this process as `kill -9` does, or stop it."""
    os.kill(os.getpid(), number)


def current() -> Faults:
    """Return the faults of the environment; counts go on while it stays the same."""
    return _parse(os.environ.get(VARIABLE, ""))


_parse = functools.cache(Faults)
