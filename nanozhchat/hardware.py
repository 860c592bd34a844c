"""What a machine has, asked without torch; peak speeds of known accelerators, from datasheets (dense, not sparse)."""

import glob
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

ACCELERATORS = ("/dev/nvidia*", "/dev/dxg", "/dev/kfd")  # CUDA, in WSL, ROCm; XPUs need a torch of their own


@dataclass(frozen=True)
class Device:
    """One accelerator. flops: peak bf16 FLOP/s; memory_bytes: capacity.

    usd_per_hour: a typical on-demand price, for estimates only. watts: the board's rated power.
    """

    name: str
    flops: float
    memory_bytes: float
    usd_per_hour: float
    watts: float


GIB = 2**30
LONGEST_START_S = 600.0  # a process older than that when its script begins: the system's clocks disagree
DEVICES: dict[str, Device] = {device.name: device for device in (
    Device("H200", 989e12, 141 * GIB, 3.5, 700),
    Device("H100", 989e12, 80 * GIB, 3.0, 700),
    Device("H800", 989e12, 80 * GIB, 3.0, 700),
    Device("H20", 148e12, 96 * GIB, 1.5, 400),
    Device("A100", 312e12, 80 * GIB, 1.8, 400),
    Device("A800", 312e12, 80 * GIB, 1.8, 400),
    Device("L40S", 362e12, 48 * GIB, 1.2, 350),
    Device("5090", 209e12, 32 * GIB, 0.6, 575),
    Device("4090", 165e12, 24 * GIB, 0.4, 450),
    Device("3090", 71e12, 24 * GIB, 0.25, 350),
    Device("V100", 125e12, 32 * GIB, 0.6, 300),
    Device("T4", 65e12, 16 * GIB, 0.2, 70),
)}  # fmt: skip


def cpu_only() -> bool:
    """Whether there is surely no accelerator; asked before torch, which takes seconds to say so."""
    return sys.platform == "linux" and not any(map(glob.glob, ACCELERATORS)) and "xpu" not in version("torch")


def command_start(argv: Sequence[str] | None) -> float:
    """`time.monotonic()` when a command began: None = a process of its own, so its imports count; else called just now.

    Where the system does not say when the process began (no Linux), now.
    """
    now = time.monotonic()
    if argv is not None:
        return now
    try:
        with open("/proc/self/stat", encoding="utf-8") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])  # since the machine was started
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return now
    return now - age if 0 < age < LONGEST_START_S else now


def physical_cores() -> int:
    """Cores for one computation: $OMP_NUM_THREADS, else those this process may use, two threads of a core as one."""
    if (asked := os.environ.get("OMP_NUM_THREADS", "")).isdecimal() and int(asked):
        return int(asked)
    if sys.platform != "linux":
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as file:
                cores.add(file.read())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def parse_hardware(spec: str) -> tuple[int, Device]:
    """Read "8xH100" or "4090" as (how many, which); raises ValueError listing the known names."""
    match = re.fullmatch(r"(?:(\d+)\s*[x×*]\s*)?(.+)", spec.strip(), re.IGNORECASE)
    name = match.group(2).upper() if match else ""
    if not match or name not in DEVICES or int(match.group(1) or 1) == 0:
        raise ValueError(f"--hardware={spec!r} is unknown; use COUNTxNAME with one of: {', '.join(DEVICES)}")
    return int(match.group(1) or 1), DEVICES[name]


def find_device(marketing_name: str) -> Device | None:
    """Match a driver's device name ("NVIDIA H100 80GB HBM3") with the table; None if it isn't there."""
    words = re.findall(r"[A-Z0-9]+", marketing_name.upper())
    return next((device for name, device in DEVICES.items() if name in words), None)
