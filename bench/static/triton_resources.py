"""Compiles the Triton kernels for GPUs that are not here, as their own launches would, and records what they need.

    python -m bench.static.triton_resources               # prints registers, spills and shared memory
    python -m bench.static.triton_resources --out bench/results/triton_resources.json
    python -m bench.static.triton_resources --arch sm_90 --only short

A stand-in for Triton's driver names the target; everything else, from the table of launch parameters to the alignment
that Triton reads off the tensors, is what a call on that GPU would do.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel does not compile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.harness.command import NOTHING, command
from bench.harness.record import write
from bench.static import kernel_sources
from prefixattn.attention.call import Given, Needs, Wants
from prefixattn.kernels import table
from prefixattn.kernels.call import Call
from prefixattn.kernels.launch_bwd import backward
from prefixattn.kernels.launch_fwd import forward

TARGETS = {"sm_80": 80, "sm_86": 86, "sm_90": 90, "sm_100": 100}
SOURCES = kernel_sources.digest("launch_fwd.py", "launch_bwd.py")
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ALL = Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True)


class Case(NamedTuple):
    L: int
    S: int
    P: int
    is_causal: bool
    heads: int = 1  # query heads for a key head
    backward: bool = True
    memory: str = ""  # its phi
    softcap: float | None = None
    window: tuple[int, int] = (-1, -1)  # left, right
    prefix_in_window: bool = False
    packed: bool = False  # sequences of L queries and S keys, one behind the other
    features: bool = False  # a float mask that wants a gradient, or packed none; a bank, ragged prefixes, both dropouts


# every kernel in every regime of launch_fwd.py and launch_bwd.py, at the shapes of the papers
CASES = {
    "short": Case(197, 197, 10, False),
    "short_causal": Case(128, 128, 20, True),
    "long": Case(577, 577, 50, False),
    "long_causal": Case(1024, 1024, 200, True),
    "grouped": Case(512, 512, 30, True, heads=4),
    "fold": Case(1, 512, 2048, True, backward=False),
    "memory_short": Case(197, 197, 0, False, memory="elu"),
    "memory": Case(512, 512, 0, True, heads=4, memory="gelu"),
    "features_short": Case(100, 100, 30, False, memory="elu", features=True),
    "features": Case(300, 300, 300, True, heads=2, memory="gelu", features=True),
    "softcap_short": Case(128, 128, 20, True, heads=2, softcap=50.0),  # Gemma 2's cap and groups
    "softcap": Case(512, 512, 30, True, heads=2, softcap=50.0),
    "softcap_fold": Case(1, 512, 2048, True, heads=2, backward=False, softcap=50.0),
    "window_short": Case(128, 128, 20, True, window=(31, -1), prefix_in_window=True),
    "window": Case(1024, 1024, 200, True, heads=2, window=(255, -1)),  # Mistral's
    "window_both": Case(577, 577, 50, False, window=(64, 64)),
    "window_prefix": Case(1024, 1024, 200, True, window=(255, -1), prefix_in_window=True),  # PEFT's prefix in a cache
    "window_fold": Case(1, 512, 2048, True, backward=False, window=(1024, -1), prefix_in_window=True),
    "packed": Case(64, 64, 10, False, packed=True),
    "packed_causal": Case(512, 512, 30, True, heads=4, packed=True),
    "packed_window": Case(1024, 1024, 200, True, window=(255, -1), prefix_in_window=True, packed=True),
    "features_packed": Case(300, 300, 300, True, heads=2, memory="gelu", packed=True, features=True),
}
_WINDOWS = "window", "window_both", "window_prefix", "window_fold"
_PACKED = "packed", "packed_causal"
_CAPPED = "softcap_short", "softcap", "softcap_fold"
# (type, head size): which of them. float32 past 128 is not here: on FMA units alone nothing keeps that in registers
COMPILED = {
    ("bf16", 64): tuple(CASES),
    ("bf16", 80): ("features",),
    ("bf16", 128): ("short", "long_causal", "grouped", "fold", "memory_short", "memory", *_CAPPED, *_WINDOWS, *_PACKED),
    ("bf16", 256): ("long", "long_causal", "grouped", "fold", "memory", "softcap", "softcap_fold", *_WINDOWS),
    ("fp32", 64): ("short", "long_causal", "grouped", "fold", "memory", "softcap", "softcap_fold", *_WINDOWS, *_PACKED),
    ("fp32", 128): ("short", "long_causal", "grouped", "fold"),
}


class Target:
    """What Triton asks of a driver before it launches, which here it never does."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, _: int) -> int:
        return 0

    def activate(self, arch: str) -> None:
        driver.set_active(self)
        table.architecture = lambda device: arch


class Compiled(NamedTuple):
    kernel: str
    seconds: float
    result: Any  # triton.compiler.CompiledKernel


def operands(case: Case, D: int, dtype: torch.dtype, batch: int = 8, device: str = "cpu") -> Call:
    """A call with a packed projection of two key heads, as models have it."""
    KV, H = 2, 2 * case.heads
    qkv = torch.randn(batch, max(case.L, case.S), H + 2 * KV, D, device=device).to(dtype)
    q, k, v = (t.transpose(1, 2) for t in qkv.split([H, KV, KV], 2))
    prefix = torch.randn(1, KV, case.P, D, device=device).to(dtype)
    features: dict[str, Any] = {}
    if case.features:
        index = torch.zeros(batch, dtype=torch.int64, device=device)
        prefix = prefix.expand(3, -1, -1, -1).contiguous()
        features = {
            "attn_mask": None if case.packed else q.new_zeros(batch, H, case.L, case.S), "prefix_ids": index,
            "prefix_lengths": index + case.P // 2, "seed": index[:1], "dropout_p": 0.1, "prefix_dropout_p": 0.1,
        }  # fmt: skip
    if case.packed:
        q, k, v = (t.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for t in (q, k, v))
        for x, n in (("q", case.L), ("k", case.S)):
            features[f"cu_seqlens_{x}"] = torch.arange(batch + 1, device=device) * n
            features[f"max_seqlen_{x}"] = n
    else:
        q = q[:, :, : case.L]
    memory = torch.randn(1, H, D, D, device=device).to(dtype) if case.memory else None
    return Call(
        q, k, v, prefix, prefix, memory=memory, is_causal=case.is_causal, scale=D**-0.5,
        phi=case.memory or "none", softcap=case.softcap or 0.0, window_left=case.window[0], window_right=case.window[1],
        prefix_in_window=case.prefix_in_window, **features,
    )  # fmt: skip


def launched(case: Case, D: int, dtype: torch.dtype, only: str = "", device: str = "cpu") -> Iterator[Compiled]:
    """The kernels of one call, or the one named, compiled for the active target in the order of their launches."""
    found: list[Compiled] = []

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if only not in ("", self.__name__):
            return
        start = time.perf_counter()
        found.append(Compiled(self.__name__, 0.0, run(self, *args, grid=grid, warmup=True, **kwargs)))
        found[-1] = found[-1]._replace(seconds=time.perf_counter() - start)

    call = operands(case, D, dtype, device=device)
    run, JITFunction.run = JITFunction.run, compile_only
    try:
        out, lse, *_ = forward(call, Wants(attended=case.memory != ""))
        if case.backward:
            # the gradient of a mask keeps a head from the short kernel
            mask = call.attn_mask is not None and case.is_causal
            needs = ALL._replace(attn_mask=mask, memory=case.memory != "")
            backward(call, Given(out, lse if case.features else None, out, lse), needs, None)
    finally:
        JITFunction.run = run
    yield from found


def resources(compiled: Any) -> dict[str, int]:
    """Registers a thread, bytes of its stack (what spilled) and KiB of shared memory, as the assembler reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True)
    use = dict(re.findall(r"(REG|STACK):(\d+)", done.stdout))
    if "REG" not in use:
        raise RuntimeError(f"cuobjdump said nothing of registers: {done.stdout}{done.stderr}")
    shared = -(-compiled.metadata.shared // 1024)
    return {"registers": int(use["REG"]), "stack": int(use["STACK"]), "shared_kib": shared}


def measure(arch: str, only: str = "") -> Iterator[dict[str, Any]]:
    Target(TARGETS[arch]).activate(arch)
    seen = set()
    for (dtype, D), names in COMPILED.items():
        for name in names:
            if only and not re.search(only, f"{name}-{dtype}-{D}"):
                continue
            for compiled in launched(CASES[name], D, TYPES[dtype]):
                if compiled.result.hash in seen:
                    continue
                seen.add(compiled.result.hash)
                meta = compiled.result.metadata
                row = {"arch": arch, "case": name, "dtype": dtype, "head_dim": D, "kernel": compiled.kernel}
                row |= {"warps": meta.num_warps, "stages": meta.num_stages, **resources(compiled.result)}
                print(*row.values(), f"{compiled.seconds:.1f}s", file=sys.stderr, flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--only", default="", help="a pattern to search for in CASE-TYPE-HEAD_DIM")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for arch in options.arch or TARGETS for row in measure(arch, options.only)]
    record = {"triton": triton.__version__, "table": table.DATE, "sources": SOURCES, "rows": rows}
    if options.out:
        write(options.out, record)


if __name__ == "__main__":
    sys.exit(command("triton_resources.py", main, NOTHING))
