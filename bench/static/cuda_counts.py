"""Counts what the CUDA kernels issue: products of their fragments and bytes of device memory, beside Triton's counts.

    python -m bench.static.cuda_counts                 # prints two tables; minutes
    python -m bench.static.cuda_counts --out bench/results/cuda_counts.json
    python -m bench.static.cuda_counts --shape "ViT-B 224 B64 P10"

The kernels themselves run on the host machine (csrc/cuda/host), which counts each mma and each byte, for one key head
with its query heads and one sample: four of short axes, which one block takes one after another. Both counts are as
many times as large for more of them; a block that takes more samples reads the prefix once, which makes the bytes here
an upper bound. Kernels and grids are those of an H200.

Bytes are counted twice. Compulsory: each element that a kernel reads or writes, once for each kernel, as
triton_counts.py counts. Moved: all that kernels ask device memory and its caches for, tiles that many blocks read
included.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.harness.command import NOTHING, command
from bench.harness.record import RESULTS, ROOT, write_rows
from bench.static import kernel_sources
from bench.static.triton_shapes import SHAPES, TargetShape
from prefixattn.attention import cuda
from prefixattn.attention.call import Call, Given, Needs, Wants

H200 = 227 * 1024, 132  # shared memory of a block in bytes, processors
SHORT = 256  # keys that the kernels for short axes take
MMA = 2 * 16 * 8 * 16  # flops of one
ALL = Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True)
# what a kernel reads and writes; `rows` are of lse or delta, in float32
OPERANDS = {
    "fwd": ("q", "k", "v", "prefix", "out", "rows"),
    "bwd_short": ("q", "k", "v", "prefix", "out", "dout", "rows", "dq", "dk", "dv", "dprefix"),
    "bwd_prefix": ("q", "prefix", "out", "dout", "rows", "rows", "dprefix"),
    "bwd_keys": ("q", "k", "v", "dout", "rows", "rows", "dk", "dv"),
    "bwd_queries": ("q", "k", "v", "prefix", "dout", "rows", "rows", "dq"),
}


class Counted(NamedTuple):
    flops: int
    moved: int  # bytes


def library() -> str:
    """The host machine's file, built where it was not. RuntimeError with what the build said."""
    made = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_cuda_host"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if made.returncode or not made.stdout.strip():
        raise RuntimeError(f"the host machine does not build: {made.stdout[-2000:]}")
    return made.stdout.splitlines()[-1]


@contextmanager
def host_machine(module: Any) -> Iterator[None]:
    """backend="cuda" runs on `module`, as one processor with an H200's shared memory."""
    before = cuda._native, cuda._missing
    cuda._native, cuda._missing = module, ""
    module.set_device(H200[0], 1)
    try:
        yield
    finally:
        cuda._native, cuda._missing = before


def call_of(shape: TargetShape, samples: int, heads: int, filled: bool) -> Call:
    """`heads` key heads with their query heads; not `filled`: rows of one address, for calls that are not run."""
    group, D = shape.H // shape.Hkv, shape.D
    sizes = ((samples, group * heads, shape.N), *[(samples, heads, shape.N)] * 2, *[(1, heads, shape.P)] * 2)
    row = torch.zeros(D, dtype=torch.bfloat16)
    q, k, v, prefix_k, prefix_v = (
        torch.randn(*size, D, dtype=torch.bfloat16) if filled else row.expand(*size, D) for size in sizes
    )
    return Call(q, k, v, prefix_k, prefix_v, is_causal=shape.causal, scale=D**-0.5)


def plan(module: Any, call: Call, gpu: tuple[int, int] = H200, needs: Needs = ALL) -> list[list[dict[str, Any]]]:
    """The launches of a forward and of a backward pass, which are not made."""
    asked: list[list[dict[str, Any]]] = []

    class Asked:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def prefix_attn_fwd(self, fields: dict[str, Any], *_: Any) -> None:
            asked.append(module.fwd_plan(fields, *gpu)["launches"])

        def prefix_attn_bwd(self, fields: dict[str, Any], *_: Any) -> None:
            asked.append(module.bwd_plan(fields, *gpu)["launches"])

    with host_machine(module):
        cuda._native = Asked()
        results = cuda.fwd(call, Wants())
        cuda.bwd(call, Given(call.q, None, call.q, results.lse), needs)
    return asked


def passes(module: Any, shape: TargetShape) -> tuple[Counted, Counted]:
    """What a forward and a backward pass issue for all samples and heads of a shape."""
    torch.manual_seed(0)
    samples = 4 if shape.N + shape.P <= SHORT else 1
    call, times, found = call_of(shape, samples, 1, filled=True), shape.B * shape.Hkv // samples, []

    def counted() -> None:
        counts = module.counts()
        moved = counts["load_bytes"] + counts["store_bytes"] + counts["copy_bytes"]
        found.append(Counted(MMA * counts["mma"] * times, moved * times))
        module.reset_counts()

    with host_machine(module):
        module.reset_counts()
        results = cuda.fwd(call, Wants())
        counted()
        cuda.bwd(call, Given(torch.randn_like(results.out), None, results.out, results.lse), ALL)
        counted()
    return found[0], found[1]


def compulsory(shape: TargetShape, kernel: str) -> int:
    """Bytes of the operands of a kernel, by its name in a plan."""
    queries, keys = shape.B * shape.H * shape.N, shape.B * shape.Hkv * shape.N
    prefix = 2 * shape.Hkv * shape.P
    sizes = {name: 2 * queries * shape.D for name in ("q", "out", "dout", "dq")}
    sizes |= {name: 2 * keys * shape.D for name in ("k", "v", "dk", "dv")}
    sizes |= {"prefix": 2 * prefix * shape.D, "dprefix": 2 * prefix * shape.D, "rows": 4 * queries}
    base = next(name for name in sorted(OPERANDS, key=len, reverse=True) if kernel.startswith(name))
    return sum(sizes[name] for name in OPERANDS[base])


def rows(module: Any, shape: TargetShape) -> list[dict[str, Any]]:
    """Of the forward, and of both passes together."""
    counts, plans = passes(module, shape), plan(module, call_of(shape, shape.B, shape.Hkv, filled=False))
    made = []
    for grads in (False, True):
        launches = [launch for each in plans[: 1 + grads] for launch in each]
        flops, moved = (sum(values) for values in zip(*counts[: 1 + grads], strict=True))
        useful, floor = shape.useful * (3.5 if grads else 1), shape.floor_bytes(grads)
        needed = sum(compulsory(shape, launch["kernel"]) for launch in launches)
        made.append(
            {
                "shape": shape.name, "pass": "fwd+bwd" if grads else "fwd",
                "kernels": [launch["kernel"] for launch in launches],
                "useful_gflop": useful / 1e9, "issued_gflop": flops / 1e9, "flops_ratio": flops / useful,
                "floor_mb": floor / 1e6, "compulsory_mb": needed / 1e6, "bytes_ratio": needed / floor,
                "moved_mb": moved / 1e6, "moved_ratio": moved / floor,
            }
        )  # fmt: skip
    return made


def triton() -> dict[tuple[str, str], dict[str, Any]]:
    record = json.loads((RESULTS / "triton_counts.json").read_text(encoding="utf-8"))
    return {(row["shape"], row["pass"]): row for row in record["rows"]}


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | kernels | flops issued/useful | Triton's | bytes/floor | Triton's | bytes moved/floor |",
        "|---|---|---|---|---|---|---|",
    ]
    theirs = triton()
    for row in found:
        other = theirs[row["shape"], row["pass"]]
        lines.append(
            f"| {row['shape']} | {', '.join(row['kernels'])} | {row['flops_ratio']:.3f} | {other['flops_ratio']:.3f} | "
            f"{row['bytes_ratio']:.2f} | {other['bytes_ratio']:.2f} | {row['moved_ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[shape.name for shape in SHAPES], action="append", help="default: all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    module, reason = cuda.load(library())
    if module is None:
        raise RuntimeError(reason)
    found: list[dict[str, Any]] = []
    for shape in SHAPES:
        if options.shape is None or shape.name in options.shape:
            found += rows(module, shape)
            print(f"{shape.name}: done", file=sys.stderr, flush=True)
    for which in ("fwd", "fwd+bwd"):
        print(f"\n{which}\n\n{markdown([row for row in found if row['pass'] == which])}")
    if options.out:
        record = {"shared_bytes": H200[0], "processors": H200[1], "sources": kernel_sources.native_digest()}
        write_rows(options.out, record | {"rows": found})


if __name__ == "__main__":
    sys.exit(command("cuda_counts.py", main, NOTHING))
