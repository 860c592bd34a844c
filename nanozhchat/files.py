"""The one module that writes durable files: a reader sees the old content or the new, never half of it.

Protocol of `atomic_write`: write `.<name>.<pid>.tmp` beside the target, flush, fsync, rename over the target,
fsync the directory. Operations go through `Backend`, where tests and NANOZHCHAT_FAULTS make the k-th one fail.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nanozhchat import faults
from nanozhchat.errors import DamagedError, DiskError, LockedError

CHUNK_BYTES = 1 << 20


class Backend:
    """The operating-system calls that durable writes need; each tells `tick` its name first."""

    def tick(self, operation: str) -> None:
        """Fail here if a fault is due; tests replace it."""
        faults.current().operation(operation)

    def open(self, path: Path) -> BinaryIO:
        """Open a temporary file for writing."""
        self.tick("open")
        return open(path, "wb")

    def write(self, handle: BinaryIO, content: bytes | Callable[[BinaryIO], None]) -> None:
        """Write the content; a fault leaves half of it."""
        try:
            self.tick("write")
        except BaseException:
            handle.write(content[: len(content) // 2] if isinstance(content, bytes) else b"half")
            raise
        if isinstance(content, bytes):
            handle.write(content)
        else:
            content(handle)

    def fsync(self, handle: BinaryIO) -> None:
        """Flush Python's buffer and the kernel's to the disk."""
        self.tick("fsync")
        handle.flush()
        os.fsync(handle.fileno())

    def replace(self, source: Path, target: Path) -> None:
        """Rename atomically."""
        self.tick("replace")
        os.replace(source, target)

    def fsync_dir(self, path: Path) -> None:
        """Make renames inside `path` durable."""
        self.tick("fsync_dir")
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


backend = Backend()


def atomic_write(path: Path, content: bytes | Callable[[BinaryIO], None]) -> None:
    """Write a file so that it is whole or absent, whatever happens.

    content: the bytes, or a function that writes to the open binary handle.
    Raises DiskError naming path and free space when the disk is full or failing; the old file is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with backend.open(temporary) as handle:
                backend.write(handle, content)
                backend.fsync(handle)
            backend.replace(temporary, path)
            backend.fsync_dir(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_with(path: Path, write: Callable[[Path], None]) -> str:
    """Let a library write a file of a folder that is committed later; returns its SHA-256, raises DiskError."""
    with disk_errors(path):
        backend.tick("write")
        write(path)
        with open(path, "rb+") as handle:
            backend.fsync(handle)
        return sha256(path)


def disk_error(path: Path, error: OSError) -> DiskError:
    """Describe a failed write: path, reason, free space, what to do."""
    parent = next(p for p in [path.parent, *path.parents] if p.exists())
    free = shutil.disk_usage(parent).free / 2**30
    remedy = "set NANOZHCHAT_BASE_DIR elsewhere" if error.errno in (errno.ENOSPC, errno.EROFS) else "check the disk"
    return DiskError(f"cannot write {path}: {error.strerror or error} ({free:.1f} GiB free); {remedy}")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn any failure of the operating system inside into a DiskError about `path`."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, UTF-8, indented, one trailing newline."""
    text = json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False)
    atomic_write(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; raises DamagedError naming the file if it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged ({error}); delete it and run the step that makes it again") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON lines; a torn last line (killed while writing) is dropped, a missing file is empty."""
    if not Path(path).exists():
        return []
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):  # U+2028 may stand in a row
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one object as a JSON line, on a line of its own even after a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as handle:
        torn = handle.seek(0, os.SEEK_END) > 0 and handle.seek(-1, os.SEEK_END) >= 0 and handle.read(1) != b"\n"
        handle.write(("\n" * torn + json.dumps(row, ensure_ascii=False) + "\n").encode())


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def remove_temporaries(directory: Path) -> None:
    """Delete `.tmp` leftovers of dead processes under `directory` (call while holding its lock)."""
    for path in directory.glob("**/*.tmp*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold the advisory lock of a run directory; raises LockedError (exit 7) if another process has it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise LockedError(f"{directory} is in use by {holder}; wait for it or stop it") from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            handle.truncate(0)
