"""Runs Python that a model wrote, in a process of its own with limits, and says how well that is closed.

Level 1 (any POSIX system): a fresh isolated interpreter in its own session and an empty folder, no environment, no
open files; limits on CPU, memory, file size and open files; a wall-clock limit; output cut; the group killed at the
end. It stops accidents, NOT attackers: such code can read and change every file of the user, use the network, look
at other processes of the user and end them, start programs that leave the group and live on, and fill the disk.
Level 2 (Linux, no root needed): `sandbox_child` gives up files, network, processes and signals for good. What is left:
filling the disk with many small files within the time limit, and holes of the kernel.
Level 3: bubblewrap around it, where it is installed and allowed: own user, process, network, mount and IPC
namespaces, and a small file system in memory. What is left: holes of the kernel.
"""

import contextlib
import functools
import json
import os
import random
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from nanozhchat import sandbox_child

OUTPUT_BYTES = 64 * 1024  # of stdout and of stderr; more ends the run
MEMORY_BYTES = 512 * 2**20
JAIL_BYTES = 64 * 2**20  # of files at level 3
SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")


@dataclass(frozen=True)
class Result:
    """What became of a piece of code. status: ok, error, timeout, oom, output_limit or killed.

    "ok": it ran to its last line. "error": an exception, or it ended itself (`exit(0)` in the middle must not pass for
    success). "killed": a crash, or ended from outside.
    """

    status: str
    stdout: str
    stderr: str


def run_python(code: str, *, timeout_s: float) -> Result:
    """Run code as `__main__` with the standard library alone, no input, at the highest level this machine has."""
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        return _run(code, folder, timeout_s, _jail())


def _readable() -> list[str]:
    return [str(Path(sandbox_child.__file__)), sys.base_prefix, sys.prefix, *SYSTEM]


def _run(code: str, folder: str, timeout_s: float, jail: tuple[str, ...]) -> Result:
    ended, out_of_memory = random.SystemRandom().sample(range(64, 120), 2)  # nothing the code exits with by chance
    python = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", sandbox_child.__file__]
    numbers = [MEMORY_BYTES, max(1, round(timeout_s + 1)), ended, out_of_memory]
    inside = ("--bind", folder, folder, "--chdir", folder) if jail else ()
    with tempfile.TemporaryFile() as source:
        source.write(code.encode("utf-8", "surrogatepass"))
        source.seek(0)
        process = subprocess.Popen(
            [*jail, *inside, *python, *map(str, numbers), *_readable()], stdin=source, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd=folder, env={}, start_new_session=True,
        )  # fmt: skip
    with process:
        try:
            reason, out, err = _read(process, timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
    exit_code = process.returncode
    died_of = -exit_code if exit_code < 0 else exit_code - 128  # bubblewrap adds 128
    if not reason:
        known = {ended: "ok", out_of_memory: "oom", signal.SIGXCPU: "timeout"}
        reason = known.get(exit_code) or known.get(died_of) or ("killed" if died_of > 0 else "error")
    return Result(reason, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def _read(process: subprocess.Popen[bytes], timeout_s: float) -> tuple[str, bytes, bytes]:
    """Collect output until the process ends or must be ended: ("" or why, stdout, stderr)."""
    got = {pipe: bytearray() for pipe in (process.stdout, process.stderr) if pipe}
    deadline, reason = time.monotonic() + timeout_s, ""
    with selectors.DefaultSelector() as waiting:
        for pipe in got:
            os.set_blocking(pipe.fileno(), False)
            waiting.register(pipe, selectors.EVENT_READ)
        while waiting.get_map() and not reason:
            ended = process.poll() is not None  # asked before reading: then nothing that it wrote is missed
            left = deadline - time.monotonic()
            ready = waiting.select(0 if ended else max(0.0, min(left, 0.1)))
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                got[key.fileobj] += chunk  # type: ignore[index]
                if not chunk:
                    waiting.unregister(key.fileobj)
                elif len(got[key.fileobj]) > OUTPUT_BYTES:  # type: ignore[index]
                    reason = "output_limit"
            if ended and not ready:
                break  # a process that it left behind keeps the pipes open
            if left <= 0 and not ended:
                reason = reason or "timeout"
    if not reason:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        reason = "timeout" if process.poll() is None else ""
    out, err = (bytes(buffer[:OUTPUT_BYTES]) for buffer in got.values())
    return reason, out, err


@functools.cache
def _jail() -> tuple[str, ...]:
    """Return the bubblewrap command in front of Python, empty where it is not installed or does not work."""
    program = shutil.which("bwrap")
    if program is None:
        return ()
    binds = [part for path in dict.fromkeys(_readable()) for part in ("--ro-bind-try", path, path)]
    jail = (program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", *binds,
            "--dev", "/dev", "--size", str(JAIL_BYTES), "--tmpfs", "/tmp")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        works = _run("", folder, 10.0, jail).status == "ok"
    return jail if works else ()


PROBE = """
import ctypes, json, os, socket, time
secret, canary, port, parent = json.loads({facts!r})
libc = ctypes.CDLL(None, use_errno=True)
done = []
def attempt(name, act):
    try:
        if act() is not False:
            done.append(name)
    except Exception:
        pass
def fork():
    if os.fork() == 0:
        os._exit(0)
attempt("read a file", lambda: open(secret).read())
attempt("write a file", lambda: open(canary, "a").write("x"))
attempt("change a file's mode", lambda: os.chmod(canary, 0o644))
attempt("read the environment of another process", lambda: open(f"/proc/{{parent}}/environ").read())
attempt("connect", lambda: socket.create_connection(("127.0.0.1", port), 2))
attempt("signal another process", lambda: os.kill(parent, 0))
attempt("start a process", fork)
attempt("make a namespace", lambda: libc.unshare(0x20000) == 0)
print(json.dumps([done, os.getpid()]))
"""


@functools.cache
def probe() -> tuple[int, tuple[str, ...]]:
    """Try the forbidden acts from inside: (level, acts that succeeded). Level 0 = nothing can be run."""
    with tempfile.TemporaryDirectory() as outside, socket.create_server(("127.0.0.1", 0)) as server:
        secret, canary = Path(outside, "secret"), Path(outside, "canary")
        secret.write_text("s")
        canary.write_text("")
        server.settimeout(0)
        facts = json.dumps([str(secret), str(canary), server.getsockname()[1], os.getpid()])
        result = run_python(PROBE.format(facts=facts), timeout_s=10.0)
        if result.status != "ok":
            return 0, (f"the probe ended with {result.status}: {result.stderr.strip()[-200:]}",)
        found, pid = json.loads(result.stdout)
        done = set(found)
        if canary.read_text():
            done.add("write a file")
        with contextlib.suppress(BlockingIOError):
            server.accept()[0].close()
            done.add("connect")
    if done:
        return 1, tuple(sorted(done))
    return (3 if _jail() and pid < 10 else 2), ()


def level() -> int:
    """How well code is closed in on this machine, found out by trying (see the module's docstring)."""
    return probe()[0]


def require(wanted: int) -> None:
    """Raise ValueError with the acts that would be possible unless the level is at least `wanted`."""
    found, acts = probe()
    if found < wanted:
        raise ValueError(
            f"the sandbox is at level {found} on this machine, below {wanted}: code in it could {', '.join(acts)}; "
            "use a newer Linux kernel or install bubblewrap, or pass --unsafe-sandbox if the code may do all that"
        )
