"""What runs inside the sandbox: gives up its rights, then runs the Python code on its standard input.

Started by `sandbox.run_python` as a script, with: memory in bytes, CPU seconds, exit code for "ran to its end", exit
code for "out of memory", paths that may be read. On Linux it gives up, for good and without being root: new
privileges (prctl), every file but those paths and its own folder (Landlock), and by a seccomp filter: sockets, new
processes and programs, signals, looking into other processes, mounts, namespaces, and changing files' owners or modes.
Where the kernel lacks one of these, it goes on without: `sandbox.level` finds out by trying.
"""

import contextlib
import os
import platform
import resource
import struct
import sys
import traceback

FILE_BYTES, OPEN_FILES = 16 * 2**20, 64
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on every architecture
FILE_RIGHTS, READ_FILE, READ_DIR, WRITE_FILE = 0b1100000000000111, 1 << 2, 1 << 3, 1 << 1
ERRNO, ALLOW, KILL, EPERM, ENOSYS = 0x00050000, 0x7FFF0000, 0x80000000, 1, 38
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH
CLONE, CLONE3, CLONE_THREAD = (56, 220), (435, 435), 0x10000
# Numbers of the system calls that are refused, on x86_64 / aarch64; - = there is none.
DENIED = """
socket 41/198 socketpair 53/199 ptrace 101/117 process_vm_readv 310/270
process_vm_writev 311/271 process_madvise 440/440 kcmp 312/272 pidfd_open 434/434 pidfd_getfd 438/438
pidfd_send_signal 424/424 kill 62/129 tkill 200/130 tgkill 234/131 rt_sigqueueinfo 129/138 rt_tgsigqueueinfo 297/240
fork 57/- vfork 58/- execve 59/221 execveat 322/281 unshare 272/97 setns 308/268 mount 165/40 umount2 166/39
pivot_root 155/41 chroot 161/51 open_tree 428/428 move_mount 429/429 fsopen 430/430 mount_setattr 442/442
bpf 321/280 perf_event_open 298/241 userfaultfd 323/282 io_uring_setup 425/425 io_uring_enter 426/426
io_uring_register 427/427 add_key 248/217 request_key 249/218 keyctl 250/219 init_module 175/105 finit_module 313/273
delete_module 176/106 kexec_load 246/104 reboot 169/142 swapon 167/224 settimeofday 164/170 clock_settime 227/112
sethostname 170/161 name_to_handle_at 303/264 open_by_handle_at 304/265 truncate 76/45 chmod 90/- fchmod 91/52
fchmodat 268/53 fchmodat2 452/452 chown 92/- lchown 94/- fchown 93/55 fchownat 260/54 utime 132/- utimes 235/-
futimesat 261/- utimensat 280/88 setxattr 188/5 lsetxattr 189/6 fsetxattr 190/7 removexattr 197/14 lremovexattr 198/15
fremovexattr 199/16 shmget 29/194 msgget 68/186 semget 64/190 mq_open 240/180 prlimit64 302/261 setpriority 141/140
sched_setaffinity 203/122 sched_setscheduler 144/119 sched_setattr 314/274 migrate_pages 256/238 move_pages 279/239
"""


def limit(memory: int, cpu_s: int) -> None:
    """Set the resource limits; those that a system does not have are left out."""
    limits = {"CPU": cpu_s, "AS": memory, "FSIZE": FILE_BYTES, "NOFILE": OPEN_FILES, "CORE": 0}
    for name, most in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def confine(readable: list[str], own: str) -> None:
    """Give up on Linux what the module's docstring lists. own: the folder that may be written."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: die with the thread that started this
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    abi = libc.syscall(CREATE_RULESET, None, 0, 1)
    if abi >= 1:
        rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
        sizes = 8 if abi < 4 else 16 if abi < 6 else 24
        handled = struct.pack("QQQ", rights, 0b11, 0b11)[:sizes]  # files, TCP, signals and abstract sockets
        ruleset = libc.syscall(CREATE_RULESET, handled, sizes, 0)
        for path, allowed in [*((p, READ_FILE | READ_DIR) for p in readable), ("/dev/null", READ_FILE | WRITE_FILE),
                              ("/dev/urandom", READ_FILE), (own, rights & ~1)]:  # fmt: skip
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                allowed &= rights if os.path.isdir(path) else rights & FILE_RIGHTS
                libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
                os.close(fd)
        libc.syscall(RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
    if platform.machine() in MACHINES:
        code = ctypes.create_string_buffer(seccomp_program(*MACHINES[platform.machine()]))
        program = struct.pack("HxxxxxxQ", (len(code) - 1) // 8, ctypes.addressof(code))
        libc.prctl(22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def seccomp_program(column: int, architecture: int) -> bytes:
    """Return the filter: classic BPF over {nr, arch, ip, args}, 8 bytes an instruction."""

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    numbers = [pair.split("/")[column] for pair in DENIED.split()[1::2]]
    parts = [op(load, 4), op(equal, architecture, 1, 0), op(answer, KILL), op(load, 0)]
    parts += [op(at_least, 0x40000000, 0, 1), op(answer, ERRNO | EPERM)]  # x32: the same calls by other numbers
    for number in numbers:
        if number != "-":
            parts += [op(equal, int(number), 0, 1), op(answer, ERRNO | EPERM)]
    parts += [op(equal, CLONE3[column], 0, 1), op(answer, ERRNO | ENOSYS)]  # its flags can't be seen; clone is used
    parts += [op(equal, CLONE[column], 0, 3), op(load, 16), op(any_bit, CLONE_THREAD, 1, 0), op(answer, ERRNO | EPERM)]
    return b"".join([*parts, op(answer, ALLOW)])


def main() -> None:
    """Limit, confine, run."""
    memory, cpu_s, ended, out_of_memory = map(int, sys.argv[1:5])
    readable = sys.argv[5:]
    code = sys.stdin.buffer.read().decode("utf-8", "surrogatepass")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.argv[:] = [""]
    limit(memory, cpu_s)
    if sys.platform == "linux":
        confine(readable, os.getcwd())
    status = 1
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        status = ended
    except MemoryError:
        status = out_of_memory
    except SystemExit as error:
        sys.stderr.write(f"the code ended itself early: exit({error.code!r})\n")
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
