"""Peak memory that a forward and backward needs beyond its inputs, in a process of its own.

    python bench/memory.py sdpa_concat < cases.json

What is measured: growth of the resident set (VmHWM after a reset, less VmRSS before) over one call, so that torch's
tensors and a kernel's own scratch count alike; outputs and gradients are held until it is read. Blocks from 64 KiB up
come fresh from the kernel and go back to it, huge pages are off, and thread pools are started by a small call before.
What it cannot see: reuse of smaller blocks, and counters that the kernel keeps for each thread (some 0.3 MiB).
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from peers import BANK_ROWS, OURS, PEERS, Shape, forward_backward, make_inputs

_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1"}
_PR_SET_THP_DISABLE = 41


def peak_mib(impl: str, cases: list[tuple[Shape, torch.dtype]], threads: int) -> list[float]:
    """MiB for each case; all of one process, which starts, and ends, for this."""
    asked = [{"shape": asdict(shape), "dtype": str(dtype).removeprefix("torch.")} for shape, dtype in cases]
    done = subprocess.run(
        [sys.executable, __file__, impl],
        input=json.dumps(asked),
        env=os.environ | _ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {impl} failed: {done.stderr.strip().splitlines()[-1:]}")
    mib: list[float] = json.loads(done.stdout)
    return mib


def necessary_mib(shape: Shape, dtype: torch.dtype) -> float:
    """out, its logsumexp and the five gradients: what no implementation can do without."""
    own = shape.B * shape.D * (2 * shape.H * shape.L + 2 * shape.kv_heads * shape.keys)
    prefix = 2 * shape.kv_heads * shape.P * shape.D * (BANK_ROWS if shape.form == "bank" else 1)
    return ((own + prefix) * dtype.itemsize + 4 * shape.B * shape.H * shape.L) / 2**20


def _status_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


def grown_mib(step: Callable[[], object]) -> float:
    """Growth of the resident set over one call, from what is resident when all that is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    before = _status_kib("VmRSS")
    held = step()
    peak = _status_kib("VmHWM")
    del held
    return (peak - before) / 1024


def _measure(impl: str, shape: Shape, dtype: torch.dtype) -> float:
    attention = OURS[impl] if impl in OURS else PEERS[impl].attention
    small = replace(shape, B=1, H=2, L=16, P=4)
    forward_backward(attention, *make_inputs(small, dtype), small)
    x, dout = make_inputs(shape, dtype)
    return grown_mib(lambda: forward_backward(attention, x, dout, shape))


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    cases = json.load(sys.stdin)
    print(json.dumps([_measure(sys.argv[1], Shape(**c["shape"]), getattr(torch, c["dtype"])) for c in cases]))
