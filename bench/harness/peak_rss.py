"""Memory that a call needs beyond what is there: growth of the resident set (on a GPU, of what torch has allocated).

Measured is the peak (VmHWM after a reset) less what was resident before (VmRSS), so that torch's tensors and a kernel's
own scratch count alike. Numbers that are to be compared come from a process of their own (`apart`): there blocks from
64 KiB up come fresh from the kernel and go back to it, and huge pages are off; its thread pools are to be started by a
small call before. What it cannot see: reuse of smaller blocks, and counters that the kernel keeps for each thread (some
0.3 MiB).
"""

import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness.record import ROOT

# read when a process starts
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
_PR_SET_THP_DISABLE = 41
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8  # of glibc's malloc.h


def apart(module: str, *words: str, threads: int, asked: str = "") -> Any:
    """What `python -m module words` prints last, read as JSON: a process that starts, and ends, for this.

    `asked` is what it reads from its standard input.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        input=asked,
        env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(
            f"measuring the memory of {', '.join(words)} failed: {done.stderr.strip().splitlines()[-1:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def without_huge_pages() -> None:
    """For this process: a block would count as 2 MiB."""
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


def keep_memory() -> None:
    """Has this process keep what it frees, where its allocator is glibc's; to be called before it starts threads.

    By default large blocks go back to the kernel and come back as pages of zeros, a fault for each; what that costs is
    in bench/NOTES.md.
    """
    if (mallopt := _of_glibc("mallopt")) is not None:
        for option, value in (
            (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20), (M_ARENA_MAX, 1)
        ):  # fmt: skip
            mallopt(option, value)


def give_back_memory() -> None:
    """Returns to the kernel what is free, all the same."""
    if (malloc_trim := _of_glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if platform.libc_ver()[0] == "glibc" else None


class PeakMemory:
    """Peak memory above what was in use when the meter was made, in MiB.

    On a GPU, torch's allocator. On Linux the peak resident set (VmHWM), reset at the start so that loading does not
    count; where the kernel refuses the reset, ru_maxrss less its value at the start, which can only understate.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            self.how = "torch.cuda.max_memory_allocated above the value after loading model and data"
            return
        give_back_memory()  # or what is taken from there would not count
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self.start, self.field = self._status("VmRSS"), "VmHWM"
            self.how = "peak resident set during training above the resident set after loading model and data"
        except OSError:
            self.start, self.field = self._maxrss(), ""
            self.how = "ru_maxrss after training less ru_maxrss after loading model and data"

    def mib(self) -> float:
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated() / 2**20 - self.start
        return (self._status(self.field) if self.field else self._maxrss()) - self.start

    @staticmethod
    def _status(field: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        raise OSError(f"{field} is not in /proc/self/status")

    @staticmethod
    def _maxrss() -> float:
        kibibytes = 1 if sys.platform != "darwin" else 1 / 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kibibytes / 1024


def grown_mib(call: Callable[[], object]) -> float:
    """Growth of the resident set over one call; what it returns is held until it is read."""
    gc.collect()
    meter = PeakMemory("cpu")
    if not meter.field:  # what only understates is no measure to compare
        raise OSError("/proc/self/clear_refs: this kernel resets no peak")
    held = call()
    peak = meter.mib()
    del held
    return peak
