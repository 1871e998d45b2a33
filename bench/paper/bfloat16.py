"""Whether bfloat16 is worth its name on this machine."""

import sys
from contextlib import suppress
from pathlib import Path

import torch


def is_fast() -> bool:
    """Whether this machine multiplies in bfloat16 faster than in float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with suppress(OSError):
        return bool({"amx_bf16", "avx512_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    return False


def warn_if_slow(wanted: bool) -> None:
    """A line on stderr where runs in bfloat16 would take many times as long as in float32."""
    if wanted and not is_fast():
        print(
            "bfloat16: this machine has no arithmetic for it, and torch emulates it. A step of SmolLM2 took minutes on "
            "a CPU with AVX2 alone, seconds on one with AVX512_BF16: run this grid there, or one with bf16 = false.",
            file=sys.stderr,
            flush=True,
        )
