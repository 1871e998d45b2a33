"""Counts what the Triton kernels issue on an H200: multiply-adds of their tiles, and bytes of device memory.

    python -m bench.static.triton_counts                 # prints two tables
    python -m bench.static.triton_counts --out bench/results/triton_counts.json

The launch code itself chooses kernels, tiles and grids: its launches, on tensors without memory, are intercepted, and
for each kernel a function here goes through the loops that the kernel goes through. Those functions are held to
what the kernels really do by tests/bench/static/test_triton_counts.py.

Counted: 2 M N K flops for each product of tiles, what is padded, masked or computed twice included; and compulsory
bytes: every element that a kernel reads or writes, once for each kernel (not what a cache holds from one kernel to the
next, and not the rereading of a tensor by many programs). Not counted: exponentials, masks, banks and lengths.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv
from triton.runtime.jit import KernelInterface

from bench.harness.command import NOTHING, command
from bench.harness.record import write
from bench.static.stand import Stand
from bench.static.triton_shapes import SHAPES, TargetShape
from bench.static.triton_windows import (
    bytes_of_keys,
    covered,
    fold_tiles,
    keys_of,
    prefix_queries,
    queries_of,
    query_tiles,
    short_tiles,
    windowed,
)
from prefixattn.attention.call import Given, Needs, Wants
from prefixattn.attention.layout import unpacked
from prefixattn.kernels import launch_bwd, launch_fwd, table
from prefixattn.kernels.call import PREFIX, Call
from prefixattn.kernels.launch_bwd import backward
from prefixattn.kernels.launch_fwd import forward

# ceilings of an H200, as the targets were set with: products of bf16, flops a second; device memory, bytes a second
FLOPS, BYTES = 790e12, 4.3e12
PROCESSORS = 132  # streaming multiprocessors of an H200
ALL = Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True)


class Launched(NamedTuple):
    kernel: str
    grid: tuple[int, ...]
    args: SimpleNamespace  # by the names of the kernel's parameters


class Count(NamedTuple):
    flops: int
    read: int  # bytes
    written: int  # bytes

    @property
    def seconds(self) -> float:
        """The least time at the ceilings."""
        return max(self.flops / FLOPS, (self.read + self.written) / BYTES)


def over_keys(a: SimpleNamespace, row0: int, M: int, rest: bool = True, everywhere: bool = False) -> int:
    """Columns that a tile of M queries from `row0` on goes over: prefix_attn_fwd, and over_keys of bwd_tiles.py.

    `rest` False: own keys only. `everywhere`: causality hides no tile, as where the mask's gradient is written.
    """
    if windowed(a):
        return sum(width for tiles in keys_of(a, (row0, M), rest) for _, width in tiles)
    open_end, own_end = a.S // a.BLOCK_N * a.BLOCK_N, a.S
    if a.CAUSAL:
        hidden = max(row0 + a.S - a.L + 1, 0)
        open_end = min(a.S, hidden) // a.BLOCK_N * a.BLOCK_N
        if not everywhere:
            own_end = min(a.S, max(row0 + M + a.S - a.L, 0))
    tiles = len(range(0, open_end, a.BLOCK_N))
    first_rest = open_end
    if a.CAUSAL:
        tiles += len(range(open_end, own_end, a.BLOCK_N))
        first_rest = a.S
    end = a.S + (a.P if rest else 0)
    tail = end
    if a.TAIL:
        tail = first_rest
        if a.REST_LOOP:
            tail += (end - first_rest) // a.BLOCK_N * a.BLOCK_N
    if a.REST_LOOP:
        tiles += len(range(first_rest, tail, a.BLOCK_N))
    return tiles * a.BLOCK_N + a.TAIL


def over_queries(a: SimpleNamespace, first: int, W: int, query_tail: int, causal: bool, prefix: bool = False) -> int:
    """Queries of one head that W keys from `first` on go over: over_queries of bwd_tiles.py."""
    if windowed(a):
        keys = (first - a.S if prefix else first, W)
        return sum(width for _, width in queries_of(a, keys, query_tail, prefix))
    end, start, tiles = a.L // a.BLOCK_M * a.BLOCK_M if query_tail else a.L, 0, 0
    if causal:
        start = max(first - (a.S - a.L), 0) // a.BLOCK_M * a.BLOCK_M
        seen = min(max(first + W - 1 - (a.S - a.L), start), a.L)
        all_seen = min(cdiv(seen, a.BLOCK_M) * a.BLOCK_M, end)
        tiles = len(range(start, all_seen, a.BLOCK_M))
        start = max(start, all_seen)
    return (tiles + len(range(start, end, a.BLOCK_M))) * a.BLOCK_M + query_tail


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def keys_read(a: SimpleNamespace, rest: bool = True) -> int:
    """Bytes of keys and values that blocks of queries read."""
    own, prefix = size(a.k, a.v), size(a.prefix_k, a.prefix_v) if rest else 0
    if not windowed(a):
        return own + prefix
    return bytes_of_keys(a, (keys_of(a, tile, rest) for tile in query_tiles(a, 0)), own, prefix)


def _seed(a: SimpleNamespace) -> int:
    return 8 if a.DROPOUT or getattr(a, "PREFIX_DROPOUT", False) else 0


def memory(a: SimpleNamespace, queries: int) -> Count:
    """What a memory adds to the tiles of so many queries: phi(q) @ memory, or dout @ memory^T; bytes of the memory."""
    if not a.PHI:
        return Count(0, 0, 0)
    kept = size(a.attended) if getattr(a, "KEEP", False) else 0
    return Count(queries * 2 * a.BLOCK_D * a.BLOCK_D, size(a.memory), kept)


def both(first: Count, second: Count) -> Count:
    return Count(*map(sum, zip(first, second, strict=True)))


def fwd(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    heads = grid[0] // cdiv(a.L, a.BLOCK_M)
    columns = sum(over_keys(a, row0, a.BLOCK_M, rest=not a.PARTS) for row0 in range(0, a.L, a.BLOCK_M))
    parts = (a.part_out, a.part_top, a.part_sum) if a.PARTS else ()
    written = size(a.out, a.lse) + (size(a.mass) if a.MASS else 0)
    read = size(a.q, *parts) + keys_read(a, rest=not a.PARTS) + _seed(a)
    softmax = Count(heads * columns * 4 * a.BLOCK_M * a.BLOCK_D, read, written)
    return both(softmax, memory(a, grid[0] * a.BLOCK_M))


def fwd_short(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    heads = grid[0] // cdiv(a.L, a.BLOCK_M)
    tiles, columns = (a.S + a.P) // a.BLOCK_N, 0
    keys = size(a.k, a.v, a.prefix_k, a.prefix_v)
    visited = [short_tiles(a, tile) for tile in query_tiles(a, 0)] if windowed(a) else []
    if visited:
        columns = sum(own + rows for tiles in visited for (_, own), (_, rows) in tiles)
        pairs = [([own], [rows]) for tiles in visited for own, rows in tiles]
        keys = bytes_of_keys(a, pairs, size(a.k, a.v), size(a.prefix_k, a.prefix_v))
    for row0 in range(0, 0 if visited else a.L, a.BLOCK_M):
        seen_end = row0 + a.BLOCK_M + a.S - a.L
        for i in range(tiles + (a.TAIL > 0)):
            own = (i + 1) * a.BLOCK_N <= a.S
            if not (a.CAUSAL and own) or seen_end > i * a.BLOCK_N:
                columns += a.BLOCK_N if i < tiles else a.TAIL
    written = size(a.out, a.lse) + (size(a.mass) if a.MASS else 0)
    read = size(a.q) + keys + _seed(a)
    softmax = Count(heads * columns * 4 * a.BLOCK_M * a.BLOCK_D, read, written)
    return both(softmax, memory(a, grid[0] * a.BLOCK_M))


def fwd_fold(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    parts = len(a.part_out)
    ends = [(part * a.part_width, min((part + 1) * a.part_width, a.P)) for part in range(parts)]
    tiles = sum(len(range(first, end, a.BLOCK_N)) for first, end in ends)
    keys, tiles = size(a.prefix_k, a.prefix_v), tiles * grid[0]
    if windowed(a):
        visited = [fold_tiles(a, block, *part) for block in range(grid[0]) for part in ends]
        tiles = sum(map(len, visited))
        keys = keys // a.P * covered({tile for of_block in visited for tile in of_block}, a.P)
    flops = grid[1] // parts * tiles * 4 * a.BLOCK_M * a.BLOCK_N * a.BLOCK_D
    return Count(flops, size(a.q) + keys + _seed(a), size(a.part_out, a.part_top, a.part_sum))


def bwd_delta(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    return Count(0, size(a.out, a.dout) + (size(a.dlse) if a.HAS_DLSE else 0), size(a.delta))


def bwd_keys(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    tiles = cdiv(a.S, a.BLOCK_N)
    rows = sum(over_queries(a, tile * a.BLOCK_N, a.BLOCK_N, 0, a.CAUSAL) for tile in range(tiles))
    products = 1 + a.NEED_V + 2 * a.NEED_K
    flops = grid[0] // tiles * a.GROUP * rows * products * 2 * a.BLOCK_N * a.BLOCK_D
    # causal queries ahead of the first key are not read, whole tiles of them
    ahead = max(a.L - a.S, 0) // a.BLOCK_M * a.BLOCK_M if a.CAUSAL else 0
    if windowed(a):
        seen = {q for tile in range(tiles) for q in queries_of(a, (tile * a.BLOCK_N, a.BLOCK_N), 0)}
        ahead = a.L - covered(seen, a.L)
    by_query = size(a.q, a.dout, a.lse) + (size(a.delta) if a.NEED_K else 0)
    read = by_query * (a.L - ahead) // a.L + size(a.k, a.v) + _seed(a)
    return Count(flops, read, (size(a.dk) if a.NEED_K else 0) + (size(a.dv) if a.NEED_V else 0))


def bwd_queries(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    heads = grid[0] // cdiv(a.L, a.BLOCK_M)
    columns = sum(over_keys(a, row0, a.BLOCK_M, everywhere=a.NEED_MASK) for row0 in range(0, a.L, a.BLOCK_M))
    flops = heads * columns * (2 + a.NEED_Q) * 2 * a.BLOCK_M * a.BLOCK_D
    read = size(a.q, a.dout, a.lse, a.delta) + keys_read(a) + _seed(a)
    softmax = Count(flops, read, (size(a.dq) if a.NEED_Q else 0) + (size(a.dmask) if a.NEED_MASK else 0))
    return both(softmax, memory(a, grid[0] * a.BLOCK_M)) if a.NEED_Q else softmax


def bwd_prefix(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    samples, shares = 1 if a.PER_SAMPLE else a.B, grid[-1]
    columns, queries = range(0, a.P, a.BLOCK_N), [a.L]
    if windowed(a):
        queries = [prefix_queries(a, (first, a.BLOCK_N)) for first in columns]
    done = 0
    for n in queries:
        tiles = samples * a.GROUP * cdiv(n, a.BLOCK_M) if a.PREFIX_DROPOUT else cdiv(samples * a.GROUP * n, a.BLOCK_M)
        each = cdiv(tiles, shares)
        done += sum(len(range(share * each, min((share + 1) * each, tiles))) for share in range(shares))
    products = 1 + a.NEED_V + 2 * a.NEED_K
    flops = prod(grid[:-1]) // len(queries) * done * products * 2 * a.BLOCK_M * a.BLOCK_N * a.BLOCK_D
    by_query = size(a.q, a.dout, a.lse) + (size(a.delta) if a.NEED_K and not a.DELTA else 0)
    read = by_query * max(queries) // a.L + size(a.prefix_k, a.prefix_v) + _seed(a)
    written = (size(a.dprefix_k) if a.NEED_K else 0) + (size(a.dprefix_v) if a.NEED_V else 0)
    if not a.DELTA:
        return Count(flops, read, written)
    return Count(flops, read + size(a.out) + (size(a.dlse) if a.HAS_DLSE else 0), written + size(a.delta))


def bwd_memory(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    blocks = cdiv((1 if a.PER_SAMPLE else a.B) * a.L, a.BLOCK_M)
    each = cdiv(blocks, grid[1])
    done = sum(len(range(share * each, min((share + 1) * each, blocks))) for share in range(grid[1]))
    flops = grid[0] * done * 2 * a.BLOCK_M * a.BLOCK_N * a.BLOCK_D
    return Count(flops, size(a.q, a.dout), size(a.dmemory))


def bwd_reduce(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    read = (size(a.partial_k) if a.NEED_K else 0) + (size(a.partial_v) if a.NEED_V else 0)
    return Count(0, read, (size(a.dprefix_k) if a.NEED_K else 0) + (size(a.dprefix_v) if a.NEED_V else 0))


def bwd_short(a: SimpleNamespace, grid: tuple[int, ...]) -> Count:
    own_end = a.S if a.CAUSAL or windowed(a) else a.S // a.BLOCK_N * a.BLOCK_N
    pairs = 0  # elements of the tiles of scores, for one head: in the pass over keys, then in that over queries
    if a.NEED_OWN:
        for first in range(0, own_end, a.BLOCK_N):
            pairs += a.BLOCK_N * over_queries(a, first, a.BLOCK_N, a.QUERY_TAIL, a.CAUSAL)
    if a.NEED_PREFIX or (a.NEED_OWN and a.REST != PREFIX):
        tail = a.S + a.P
        if a.TAIL:
            tail = own_end
            if a.REST_LOOP:
                tail += (a.S + a.P - own_end) // a.BLOCK_N * a.BLOCK_N
        if a.REST_LOOP:
            for first in range(own_end, tail, a.BLOCK_N):
                pairs += a.BLOCK_N * over_queries(a, first, a.BLOCK_N, a.QUERY_TAIL, False, prefix=True)
        pairs += a.TAIL * over_queries(a, tail, a.TAIL, a.QUERY_TAIL, False, prefix=True) if a.TAIL else 0
    whole = a.L // a.BLOCK_M * a.BLOCK_M
    again = sum(a.BLOCK_M * over_keys(a, row0, a.BLOCK_M) for row0 in range(0, whole, a.BLOCK_M))
    again += a.QUERY_TAIL * over_keys(a, whole, a.QUERY_TAIL) if a.QUERY_TAIL else 0
    read = size(a.q, a.k, a.v, a.prefix_k, a.prefix_v, a.out, a.dout, a.lse) + (size(a.dlse) if a.HAS_DLSE else 0)
    written = size(a.delta, a.dq) + (size(a.dk, a.dv) if a.NEED_OWN else 0)
    written += size(a.partial_k, a.partial_v) if a.NEED_PREFIX else 0
    softmax = Count(grid[0] * a.GROUP * (4 * pairs + 3 * again) * 2 * a.BLOCK_D, read + _seed(a), written)
    return both(softmax, memory(a, grid[0] * a.GROUP * (whole + a.QUERY_TAIL)))


COUNTS: dict[str, Callable[[SimpleNamespace, tuple[int, ...]], Count]] = {
    f"prefix_attn_{f.__name__}": f
    for f in (fwd, fwd_short, fwd_fold, bwd_delta, bwd_keys, bwd_queries, bwd_prefix, bwd_memory, bwd_reduce, bwd_short)
}


def count(launched: Launched) -> Count:
    """What one launch issues; refuses the features whose loops or bytes depend on what tensors hold."""
    a = launched.args
    refused = [name for name in ("MASK", "HAS_IDS", "HAS_LENGTHS", "packed") if getattr(a, name, 0)]
    if refused:
        raise ValueError(f"{launched.kernel} with {', '.join(refused)} is not counted")
    return COUNTS[launched.kernel](a, launched.grid)


@contextmanager
def intercepted(take: Callable[[Launched, Callable[[], Any]], None], processors: int) -> Iterator[None]:
    """`take` gets each launch, and what would make it, instead; the launch code sees a GPU of `processors`."""

    def looked_at(name: str, grid: tuple[int, ...], bound: SimpleNamespace, launch: Callable[[], Any]) -> None:
        take(Launched(name, grid, bound), launch)

    saved: list[tuple[Any, str, Any]] = []
    try:
        for module in (launch_fwd, launch_bwd):
            for name, value in list(vars(module).items()):
                if isinstance(value, KernelInterface) or name == "processors":
                    saved.append((module, name, value))
                    setattr(
                        module, name, Stand(value, looked_at) if name != "processors" else lambda device: processors
                    )
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def operands(shape: TargetShape, dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Call:
    B, H, KV, N, P, D = shape[1:7]
    if shape.packed:
        q, k, v = unpacked(torch.empty(B, N, 3, H, D, dtype=dtype, device=device))
    else:
        q, k, v = (torch.empty(B, N, heads, D, dtype=dtype, device=device).transpose(1, 2) for heads in (H, KV, KV))
    prefix_k, prefix_v = (torch.empty(1, KV, P, D, dtype=dtype, device=device) for _ in range(2))
    return Call(q, k, v, prefix_k, prefix_v, is_causal=shape.causal, scale=D**-0.5)


def launches(shape: TargetShape, grads: bool) -> list[Launched]:
    """The kernels of a forward, then if asked of a backward with all five gradients, in bf16 on an H200."""
    found: list[Launched] = []
    call = operands(shape)
    with intercepted(lambda launched, _: found.append(launched), PROCESSORS):
        out, lse, *_ = forward(call, Wants())
        if grads:
            into = unpacked(call.q.new_empty(shape.B, shape.N, 3, shape.H, shape.D)) if shape.packed else None
            backward(call, Given(torch.empty_like(out), None, out, lse), ALL, into)
    return found


def row(shape: TargetShape, grads: bool) -> dict[str, Any]:
    kernels: list[dict[str, Any]] = []
    for launched in launches(shape, grads):
        n, a = count(launched), launched.args
        tile = (a.BLOCK_M, a.BLOCK_N) if hasattr(a, "BLOCK_N") else ()
        kernels.append(
            {"kernel": launched.kernel.removeprefix("prefix_attn_"), "tile": tile, "programs": prod(launched.grid)}
            | {"gflop": n.flops / 1e9, "read_mb": n.read / 1e6, "written_mb": n.written / 1e6, "us": n.seconds * 1e6}
        )
    flops, mb = sum(k["gflop"] for k in kernels), sum(k["read_mb"] + k["written_mb"] for k in kernels)
    useful, floor_mb = shape.useful / 1e9 * (3.5 if grads else 1), shape.floor_bytes(grads) / 1e6
    us, target = sum(k["us"] for k in kernels), shape.targets[grads]
    return {
        "shape": shape.name,
        "pass": "fwd+bwd" if grads else "fwd",
        "useful_gflop": useful,
        "issued_gflop": flops,
        "flops_ratio": flops / useful,
        "floor_mb": floor_mb,
        "issued_mb": mb,
        "bytes_ratio": mb / floor_mb,
        "us": us,  # kernels run one after another: the sum of the longer of both times of each
        "floor_us": shape.floor[grads],
        "target_us": target,
        "share": us / target,  # of its ceiling, that each kernel must sustain
        "bound": "flops" if flops / FLOPS * 1e9 > mb / BYTES * 1e6 else "bytes",
        "kernels": kernels,
    }


def _kernel(kernel: dict[str, Any]) -> str:
    tile = "x".join(map(str, kernel["tile"]))
    return " ".join(filter(None, (kernel["kernel"], tile, f"({kernel['us']:.1f})")))


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| shape | kernels, queries x keys of a tile (floor, us) | flops issued/useful | bytes issued/floor | "
        "floor us | floor set | target us | share to sustain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        kernels, ceiling = ", ".join(map(_kernel, r["kernels"])), "790 T" if r["bound"] == "flops" else "4.3 TB/s"
        lines.append(
            f"| {r['shape']} | {kernels} | {r['flops_ratio']:.2f} | {r['bytes_ratio']:.2f} | {r['us']:.1f} | "
            f"{r['floor_us']:.1f} | {r['target_us']:.0f} | {r['share']:.0%} of {ceiling} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row(shape, grads) for grads in (False, True) for shape in SHAPES]
    for grads in ("fwd", "fwd+bwd"):
        print(f"\n{grads}\n\n{markdown([r for r in rows if r['pass'] == grads])}")
    if options.out:
        record = {"arch": "sm_90", "processors": PROCESSORS, "flops": FLOPS, "bytes": BYTES, "table": table.DATE}
        write(options.out, record | {"rows": rows})


if __name__ == "__main__":
    sys.exit(command("triton_counts.py", main, NOTHING))
