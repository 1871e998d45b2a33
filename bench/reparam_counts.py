"""Counts the bytes of device memory of an optimizer step of the reparameterization: the forward and AdamW's sweep.

    python bench/reparam_counts.py                       # prints a table
    python bench/reparam_counts.py --out bench/results/reparam_counts.json

The floor is 7 W, W being the bytes of the large matrices: the forward reads the matrix, AdamW reads and writes it and
two moments. The launches are the code's own, on tensors without memory, counted twice: each element that a kernel reads
or writes once for each kernel, as in triton_counts.py; and once for each program that asks for it, most of which a
cache answers. Turning the gradient of a bank into rows is not among them. tests/test_reparam_resources.py holds both
counts to what the kernels really do.
"""

import argparse
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv
from triton.runtime.jit import KernelInterface

from prefixattn.kernels import launch_reparam
from prefixattn.reparam import triton as backend
from prefixattn.reparam.reference import Form

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
    predicted: float = 0.0  # bytes of a step over the floor, written down before anything was counted

    @property
    def outputs(self) -> int:
        return self.n * 2 * self.Hkv * self.D

    @property
    def floor(self) -> int:
        return 7 * 4 * self.G * self.outputs * self.M


CASES = {
    "GPT-2m P5": Case(1, 5, 1024, 512, 24, 16, 64, predicted=1.01),
    "GPT-2m P10": Case(1, 10, 1024, 512, 24, 16, 64, predicted=1.02),
    "GPT-2m P50": Case(1, 50, 1024, 512, 24, 16, 64, predicted=1.06),
    "GPT-2m P100": Case(1, 100, 1024, 512, 24, 16, 64, predicted=1.1),
    "GPT-2m P200": Case(1, 200, 1024, 512, 24, 16, 64, predicted=1.13),
    "BART-large P200": Case(3, 200, 1024, 800, 12, 16, 64, predicted=1.11),
    "LLaMA-7B P30": Case(1, 30, 4096, 512, 32, 32, 128, predicted=1.04),
    "GPT-2m P500": Case(1, 500, 1024, 512, 24, 16, 64, predicted=1.6),
    "ViT-B P10": Case(12, 10, 768, 48, 1, 12, 64, True, predicted=1.25),
    "ViT-B P100": Case(12, 100, 768, 48, 1, 12, 64, True, predicted=3.0),
}


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moved(kernel: str, a: SimpleNamespace) -> tuple[int, int]:
    """Bytes that a launch reads and writes: each element once, and as often as programs ask for it."""
    if kernel == "reparam_hidden":
        p_tiles, m_tiles, bias = cdiv(a.P, a.BLOCK_P), cdiv(a.M, a.BLOCK_M), size(a.b1) if a.HAS_BIAS else 0
        once = size(a.x, a.w1, a.z, a.h) + bias
        return once, size(a.x) * m_tiles + (size(a.w1) + bias) * p_tiles + size(a.z, a.h)
    if kernel == "reparam_bank":
        p_tiles, o_tiles, bias = cdiv(a.P, a.BLOCK_P), cdiv(a.O, a.BLOCK_O), size(a.b2) if a.HAS_BIAS else 0
        once = size(a.h, a.w2, a.bank) + bias
        return once, size(a.h) * o_tiles + (size(a.w2) + bias) * p_tiles + size(a.bank)
    if kernel == "factored_adamw":
        state = 2 * size(a.w2, a.exp_avg, a.exp_avg_sq) + size(a.part)
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

    class Stand:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.signature = kernel, inspect.signature(kernel.fn)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                own = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
                bound = SimpleNamespace(**self.signature.bind(*args, **own).arguments)
                take((self.kernel.fn.__name__, bound), partial(self.kernel[grid], *args, **kwargs))

            return launch

    kernels = {name: k for name, k in vars(launch_reparam).items() if isinstance(k, KernelInterface)}
    try:
        vars(launch_reparam).update({name: Stand(kernel) for name, kernel in kernels.items()})
        yield
    finally:
        vars(launch_reparam).update(kernels)


def step(case: Case, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> None:
    """The forward and AdamW's sweep."""
    G, P, E, M, n, Hkv, D, interleaved, _ = case
    sizes = [(G, P, E), (G, M, E), (G, M), (G, case.outputs, M), (G, case.outputs)]
    x, w1, b1, w2, b2 = (torch.zeros(size, device=device) for size in sizes)
    _, z = backend.fwd(x, w1, b1, w2, b2, Form(n, Hkv, D, interleaved, "tanh"), dtype)
    dy, moments = torch.zeros(G, P, case.outputs, device=device), [torch.zeros_like(w2) for _ in range(2)]
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    backend.adamw_sweep(w2, *moments, z, dy, step=1, **numbers)


def row(name: str, case: Case) -> dict[str, Any]:
    found: list[Launched] = []
    with intercepted(lambda launched, _: found.append(launched)):
        step(case)
    kernels: dict[str, tuple[int, int]] = {}
    for kernel, a in found:
        kernels[kernel] = moved(kernel, a)
        if kernel in ("factored_adamw", "reparam_dh") and a.part.numel():
            kernels["sum of parts"] = (size(a.part, a.part[0]),) * 2
    once, asked = (sum(column) / case.floor for column in zip(*kernels.values(), strict=True))
    return {
        "case": name,
        "floor_mb": case.floor / 1e6,
        "predicted": case.predicted,
        "bytes_ratio": round(once, 4),
        "asked_ratio": round(asked, 4),
        "kernels": [
            {"kernel": kernel, "mb": n / 1e6, "asked_mb": again / 1e6} for kernel, (n, again) in kernels.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row(name, case) for name, case in CASES.items()]
    print("| case | floor 7 W, MB | predicted | bytes over the floor | asked for |\n|---|---|---|---|---|")
    for r in rows:
        print("| {case} | {floor_mb:.1f} | {predicted} | {bytes_ratio:.3f} | {asked_ratio:.2f} |".format(**r))
    if options.out:
        fresh = options.out.with_suffix(".new")
        fresh.write_text(json.dumps({"table": launch_reparam.DATE, "rows": rows}, indent=1) + "\n")
        fresh.replace(options.out)


if __name__ == "__main__":
    main()
