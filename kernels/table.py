"""Launch parameters by kernel, architecture, head size and type; bench/static/tune.py measures and prints such a table.

2026-11-21, not measured: chosen so that nothing spills and shared memory suffices, by bench/static/triton_resources.py.
"""

import os
from functools import cache
from typing import NamedTuple

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it when a kernel is defined, so once


class Launch(NamedTuple):
    block_m: int  # queries of a tile
    block_n: int  # keys of a tile
    warps: int
    stages: int


DATE = "2026-11-21"
SHORT_KEYS = 256  # S + P up to here: the forward takes all keys at once
HEAD_KEYS = 320  # S + P and L up to here: the backward takes a whole key head at once
MEDIUM_QUERIES = 512  # L up to here: tiles of fewer queries, so that there are more programs and less is padded
FOLD_QUERIES = 32  # at most so many queries of a key head,
FOLD_PREFIX = 256  # and at least so long a prefix: the batch is folded

SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227}  # what one program can have

# architecture: {(kernel, type): {head size up to: parameters}}. No row: the kernel is not for that size or type.
_SM_90: dict[tuple[str, str], dict[int, Launch]] = {
    ("fwd", "half"): {64: Launch(128, 64, 8, 2), 128: Launch(128, 64, 8, 3), 256: Launch(64, 64, 8, 2)},
    ("fwd_medium", "half"): {64: Launch(64, 64, 4, 3)},
    ("fwd_short", "half"): {64: Launch(64, 64, 4, 1), 128: Launch(32, 64, 8, 1)},
    ("fwd_fold", "half"): {64: Launch(64, 64, 4, 3), 128: Launch(64, 32, 4, 2), 256: Launch(64, 32, 8, 2)},
    ("bwd_short", "half"): {64: Launch(64, 32, 4, 1)},
    ("bwd_keys", "half"): {64: Launch(64, 128, 8, 2), 128: Launch(64, 32, 8, 1), 256: Launch(64, 32, 8, 1)},
    ("bwd_prefix", "half"): {64: Launch(64, 64, 4, 2), 128: Launch(32, 64, 4, 2), 256: Launch(64, 32, 8, 2)},
    ("bwd_queries", "half"): {64: Launch(128, 64, 8, 2), 128: Launch(128, 64, 8, 3), 256: Launch(16, 32, 8, 1)},
    ("fwd", "float"): {64: Launch(32, 32, 8, 1), 128: Launch(16, 16, 8, 1), 256: Launch(16, 16, 8, 1)},
    ("fwd_fold", "float"): {64: Launch(32, 32, 4, 1), 128: Launch(32, 16, 4, 1), 256: Launch(32, 32, 8, 1)},
    ("bwd_keys", "float"): {64: Launch(16, 32, 4, 1), 128: Launch(32, 32, 8, 1), 256: Launch(16, 16, 8, 1)},
    ("bwd_prefix", "float"): {64: Launch(32, 32, 8, 1), 128: Launch(16, 16, 8, 1), 256: Launch(16, 16, 8, 1)},
    ("bwd_queries", "float"): {64: Launch(32, 32, 8, 1), 128: Launch(16, 16, 8, 1), 256: Launch(16, 16, 8, 1)},
}
_SM_80 = _SM_90 | {
    ("fwd", "half"): {64: Launch(128, 64, 8, 2), 128: Launch(32, 64, 4, 2), 256: Launch(32, 32, 8, 1)},
    ("fwd_short", "half"): {64: Launch(64, 32, 4, 1), 128: Launch(32, 64, 8, 1)},
    ("bwd_keys", "half"): {64: Launch(64, 32, 4, 2), 128: Launch(32, 64, 8, 1), 256: Launch(64, 32, 8, 1)},
    ("bwd_prefix", "half"): {64: Launch(64, 32, 4, 2), 128: Launch(32, 64, 4, 2), 256: Launch(64, 32, 8, 2)},
    ("bwd_queries", "half"): {64: Launch(128, 64, 8, 2), 128: Launch(32, 64, 8, 1), 256: Launch(16, 32, 8, 1)},
    ("bwd_keys", "float"): {64: Launch(16, 16, 4, 1), 128: Launch(16, 64, 8, 1), 256: Launch(16, 16, 8, 1)},
    ("bwd_queries", "float"): {64: Launch(16, 32, 8, 1), 128: Launch(16, 16, 8, 1), 256: Launch(16, 16, 8, 1)},
}
_SM_86 = _SM_80 | {
    ("bwd_keys", "half"): _SM_80["bwd_keys", "half"] | {256: Launch(32, 32, 8, 1)},
    ("bwd_prefix", "half"): _SM_80["bwd_prefix", "half"] | {256: Launch(32, 32, 8, 1)},
}
_SM_100 = _SM_90 | {
    ("fwd_fold", "half"): {64: Launch(64, 32, 4, 2), 128: Launch(64, 32, 4, 1), 256: Launch(64, 32, 8, 1)},
    ("bwd_keys", "half"): _SM_90["bwd_keys", "half"] | {64: Launch(64, 128, 8, 1)},
}
TABLE = {"sm_80": _SM_80, "sm_86": _SM_86, "sm_90": _SM_90, "sm_100": _SM_100}
trial: dict[str, Launch] = {}  # bench/static/tune.py: a candidate, in place of the table's row


def row(kernel: str, arch: str, block_d: int, half: bool) -> Launch | None:
    """None: the kernel is not for this head size or type."""
    return TABLE[arch].get((kernel, "half" if half else "float"), {}).get(max(64, block_d))


def choose(kernel: str, device: torch.device, block_d: int, half: bool) -> Launch | None:
    return trial[kernel] if kernel in trial else row(kernel, architecture(device), block_d, half)


@cache
def architecture(device: torch.device) -> str:
    """The row of the table that fits the device; without one, that of Hopper."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10, 11):
        return "sm_90" if major == 9 else "sm_100"
    return "sm_80" if (major, minor) == (8, 0) else "sm_86"


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few where there is no GPU, so that the interpreter meets shared work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
