"""Counts the bytes of device memory of an optimizer step of the reparameterization.

    python -m bench.static.reparam_counts                # prints a table
    python -m bench.static.reparam_counts --out bench/results/reparam_counts.json

The floor is 7 W, W being the bytes of the large matrices: the forward reads the matrix, AdamW reads and writes it and
two moments; 4 W where these have 8 bits. Beside it stands the floor of both matrices, 7 W1 more, to which the whole
step is compared: where networks are small, w1 is a third of the parameters.

The code's own step runs on tensors without memory, from the forward to the last update, kv's gradient being what
a backward pass of one micro-batch left: forward, look for what is not finite, fused step, small gradients, small
parameters. Launches are counted twice: each element that a kernel reads or writes once for each kernel, as in
triton_counts.py; and once for each program that asks for it, most of which a cache answers. An operation of torch
between them counts its operands and its results, views apart. What is before the step is not in it: the backward pass
of attention, and autograd's putting together of the layers' gradients into kv's. Both counts of the launches are held
to what the kernels really do by tests/bench/static/test_reparam_resources.py.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import cdiv
from triton.runtime.jit import KernelInterface

from bench.harness.command import NOTHING, command
from bench.harness.record import write
from bench.static.stand import Stand
from prefixattn.kernels import launch_reparam
from prefixattn.optim.network_grad import Source
from prefixattn.prefixes.networks import hidden_of
from prefixattn.reparam import triton as backend
from prefixattn.reparam.call import Call, Form
from prefixattn.reparam.moments8 import BLOCK, Moment8

Launched = tuple[str, SimpleNamespace]  # the kernel's name, its arguments by theirs


class Case(NamedTuple):
    G: int
    P: int
    E: int
    M: int
    n: int
    Hkv: int
    D: int
    interleaved: bool = False
    eight: bool = False  # both moments of 8 bits
    # written down before anything was counted: forward and fused step over 7 W; the whole step over 7 W1 + 7 W
    predicted: tuple[float, float] = (0.0, 0.0)

    @property
    def outputs(self) -> int:
        return self.n * 2 * self.Hkv * self.D

    @property
    def floor(self) -> int:
        return (4 if self.eight else 7) * 4 * self.G * self.outputs * self.M

    @property
    def floor_of_both(self) -> int:
        return self.floor + 7 * 4 * self.G * self.M * self.E


CASES = {
    "GPT-2m P5": Case(1, 5, 1024, 512, 24, 16, 64, predicted=(1.01, 1.02)),
    "GPT-2m P10": Case(1, 10, 1024, 512, 24, 16, 64, predicted=(1.02, 1.02)),
    "GPT-2m P50": Case(1, 50, 1024, 512, 24, 16, 64, predicted=(1.06, 1.06)),
    "GPT-2m P100": Case(1, 100, 1024, 512, 24, 16, 64, predicted=(1.1, 1.09)),
    "GPT-2m P200": Case(1, 200, 1024, 512, 24, 16, 64, predicted=(1.13, 1.14)),
    "BART-large P200": Case(3, 200, 1024, 800, 12, 16, 64, predicted=(1.11, 1.11)),
    "LLaMA-7B P30": Case(1, 30, 4096, 512, 32, 32, 128, predicted=(1.04, 1.05)),
    "LLaMA-7B P30, M 4096": Case(1, 30, 4096, 4096, 32, 32, 128, predicted=(1.02, 1.02)),
    "GPT-2m P500": Case(1, 500, 1024, 512, 24, 16, 64, predicted=(1.6, 1.6)),
    "GPT-2m P10, 8 bits": Case(1, 10, 1024, 512, 24, 16, 64, eight=True, predicted=(1.03, 1.04)),
    "GPT-2m P200, 8 bits": Case(1, 200, 1024, 512, 24, 16, 64, eight=True, predicted=(1.55, 1.55)),
    "ViT-B P10": Case(12, 10, 768, 48, 1, 12, 64, True, False, predicted=(1.25, 1.2)),
    "ViT-B P100": Case(12, 100, 768, 48, 1, 12, 64, True, False, predicted=(3.0, 2.0)),
}


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moved(kernel: str, a: SimpleNamespace) -> tuple[int, int]:
    """Bytes that a launch reads and writes: each element once, and as often as programs ask for it."""
    if kernel == "reparam_hidden":
        p_tiles, m_tiles, bias = cdiv(a.P, a.BLOCK_P), cdiv(a.M, a.BLOCK_M), size(a.b1) if a.HAS_BIAS else 0
        once = size(a.x, a.w1, a.z, a.h) + bias
        return once, size(a.x) * m_tiles + (size(a.w1) + bias) * p_tiles + size(a.z, a.h)
    if kernel == "reparam_kv":
        p_tiles, o_tiles, bias = cdiv(a.P, a.BLOCK_P), cdiv(a.O, a.BLOCK_O), size(a.b2) if a.HAS_BIAS else 0
        once = size(a.h, a.w2, a.kv) + bias
        return once, size(a.h) * o_tiles + (size(a.w2) + bias) * p_tiles + size(a.kv)
    if kernel == "factored_adamw":
        scales = [t for t in (a.exp_avg_scale, a.exp_avg_sq_scale) if t is not a.w2]
        state = 2 * size(a.w2, a.exp_avg, a.exp_avg_sq, *scales) + size(a.part)
        o_tiles = sum(cdiv(min(a.rows, a.O - first), a.BLOCK_O) for first in range(0, a.O, a.rows))
        again = cdiv(a.M, a.BLOCK_M) * (1 if a.ONCE or not a.WANT_DH else 2)  # dy in steps, then whole
        return state + size(a.h, a.dy), state + size(a.h) * o_tiles + size(a.dy) * again
    if kernel == "reparam_dh":
        p_tiles, m_tiles = cdiv(a.P, a.BLOCK_P), cdiv(a.M, a.BLOCK_M)
        return size(a.dy, a.w2, a.part), size(a.dy) * m_tiles + size(a.w2) * p_tiles + size(a.part)
    raise ValueError(f"{kernel} is not counted")


@contextmanager
def intercepted(take: Callable[[Launched, Callable[[], Any]], None]) -> Iterator[None]:
    """`take` gets each launch, and what would make it, instead."""

    def looked_at(name: str, grid: tuple[int, ...], bound: SimpleNamespace, launch: Callable[[], Any]) -> None:
        take((name, bound), launch)

    kernels = {name: k for name, k in vars(launch_reparam).items() if isinstance(k, KernelInterface)}
    try:
        vars(launch_reparam).update({name: Stand(kernel, looked_at) for name, kernel in kernels.items()})
        yield
    finally:
        vars(launch_reparam).update(kernels)


def moment(w: Tensor, signed: bool) -> Moment8:
    """Of 8 bits."""
    scales = *w.shape[:2], cdiv(w.shape[2], BLOCK)
    return Moment8(torch.zeros_like(w, dtype=torch.uint8), torch.zeros(scales, device=w.device), signed)


class Operations(TorchDispatchMode):
    """Bytes of the operands and results of torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += size(*{id(t): t for t in tensors}.values())
        return out


Phase = Callable[[str], AbstractContextManager[Any]]


def step(
    case: Case, device: str = "meta", dtype: torch.dtype = torch.bfloat16, phase: Phase = lambda name: nullcontext()
) -> None:
    """What FactoredAdamW does from the forward to the update of the small parameters, but for that."""
    G, P, E, M, n, Hkv, D, interleaved, eight, _ = case
    form = Form(n, Hkv, D, interleaved, "tanh")
    sizes = [(G, P, E), (G, M, E), (G, M), (G, case.outputs, M), (G, case.outputs)]
    parameters = tuple(torch.zeros(size, device=device) for size in sizes)
    w2 = parameters[3]
    dkv = torch.zeros(G * n, 2, Hkv, P, D, device=device, dtype=dtype)
    moments = [moment(w2, signed) if eight else torch.zeros_like(w2) for signed in (True, False)]
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    with phase("forward"):
        z = backend.fwd(Call(*parameters, form, dtype)).z
    with phase("finite"):
        made = hidden_of(z, form)
        source = Source(parameters, made, dkv, lambda: None)
        source.averaged = True
        source.finite()
    with phase("sweep"):  # the fused step, by the word in the record
        dh = backend.fused_adamw(w2, *moments, source.h, source.dkv, form=form, step=1, **numbers)
    assert dh is not None
    # torch has no autocast for tensors without memory
    without = patch.object(torch, "autocast", lambda *_, **__: nullcontext()) if device == "meta" else nullcontext()
    with phase("small gradients"), without:
        source.dh = dh
        source.small(0)


def row(name: str, case: Case) -> dict[str, Any]:
    counts: dict[str, tuple[int, int]] = {}

    def count(launched: Launched, _: Callable[[], Any]) -> None:
        counts[launched[0]] = moved(*launched)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with Operations() as operations:
            yield
        counts[f"torch: {name}"] = (operations.bytes,) * 2

    with intercepted(count):
        step(case, phase=phase)
    rest = dict(counts)
    G, P, E, M = case[:4]
    # a fused kernel reads the parameter, its gradient and moments, and writes all but the gradient
    counts["torch: small parameters"] = (7 * 4 * G * (P * E + M * E + M + case.outputs),) * 2
    large, asked = (sum(c[i] for k, c in rest.items() if k != "torch: small gradients") for i in range(2))
    return {
        "case": name,
        "floor_mb": case.floor / 1e6,
        "predicted": case.predicted,
        "bytes_ratio": round(large / case.floor, 4),
        "asked_ratio": round(asked / case.floor, 4),
        "whole_ratio": round(sum(once for once, _ in counts.values()) / case.floor_of_both, 4),
        "kernels": [
            {"kernel": kernel, "mb": n / 1e6, "asked_mb": again / 1e6} for kernel, (n, again) in counts.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row(name, case) for name, case in CASES.items()]
    print("| case | floor 7 W, MB | predicted | bytes over the floor | asked for | whole step over that of both |")
    print("|---|---|---|---|---|---|")
    for r in rows:
        found = "{bytes_ratio:.3f} | {asked_ratio:.2f} | {whole_ratio:.3f}".format(**r)
        print(f"| {r['case']} | {r['floor_mb']:.1f} | {r['predicted'][0]}, {r['predicted'][1]} | {found} |")
    if options.out:
        write(options.out, {"table": launch_reparam.DATE, "rows": rows})


if __name__ == "__main__":
    sys.exit(command("reparam_counts.py", main, NOTHING))
