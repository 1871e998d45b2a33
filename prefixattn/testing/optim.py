"""What tests of the optimizers share: small networks, their twins trained by torch, and a step."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prefixattn.optim.lazy_grad import LazyGradient
from prefixattn.prefixes.geometry import Geometry
from prefixattn.prefixes.networks import DeepShare

GEOMETRY = Geometry("test", layers=2, kv_heads=2, head_dim=8, width=16)
NETWORKS: dict[str, dict[str, Any]] = {
    "language": {"layers": 3, "length": 5, "hidden": 12},
    "one_row": {"layers": 1, "length": 1, "hidden": 7},
    "three": {"layers": 2, "length": 4, "hidden": 9, "networks": 3, "activation": "relu"},
    "vision": {"layers": 1, "length": 6, "hidden": 20, "networks": 4, "interleaved": True, "activation": "gelu"},
}


def network(name: str = "language", seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> DeepShare:
    torch.manual_seed(seed)
    return DeepShare(**{**NETWORKS[name], **options}, geometry=GEOMETRY).to(dtype)


def twin(net: DeepShare, dtype: torch.dtype = torch.float32) -> DeepShare:
    """The same numbers in layers of torch, for an optimizer of torch."""
    form = net.form
    made = DeepShare(
        form.layers,
        net.embedding.weight.shape[-2],
        net.down.weight.shape[-2],
        GEOMETRY,
        networks=net.networks,
        interleaved=form.interleaved,
        activation=form.activation,
        fused=False,
    )
    made.load_state_dict(net.state_dict())
    return made.to(dtype)


def targets(net: DeepShare, count: int = 7, seed: int = 5) -> Tensor:
    """Keys and values for each sample, [count, N, 2, Hkv, P, D]."""
    with torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(count, *net().shape, generator=generator, device="cpu")
        return drawn.to(torch.get_default_device())


def loss(net: DeepShare, wanted: Tensor) -> Tensor:
    """Of a batch of targets; the mean over samples."""
    return (net() - wanted.to(net.up.weight.dtype)).square().flatten(1).sum(1).mean()


def train(
    net: DeepShare, optimizer: Any, wanted: Tensor, steps: int, before: Callable[[int], None] | None = None
) -> None:
    """Each step has a target of its own: at a minimum Adam divides noise by noise, and rounding is all that is left."""
    for i in range(steps):
        optimizer.zero_grad()
        loss(net, wanted[i % len(wanted)][None]).backward()
        if before is not None:
            before(i)
        optimizer.step()


def parameters(net: DeepShare) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_as_close(ours: DeepShare, theirs: DeepShare, exact: DeepShare, factor: float = 2.0) -> None:
    """Each parameter errs at most `factor` times as much as torch's optimizer in the same type, and one rounding."""
    for (name, a), b, c in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        error, allowed = ((t.double() - c).square().mean().sqrt().item() for t in (a, b))
        allowed = factor * allowed + torch.finfo(a.dtype).eps * c.square().mean().sqrt().item()
        assert error <= allowed, f"{name}: rms error {error:.2e} after training, allowed {allowed:.2e}"


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that operations inside allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.by = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(t, LazyGradient) for t in tree_leaves((args, kwargs))):
            return NotImplemented  # what it does to make its numbers comes here in turn
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if type(t) is Tensor and t.untyped_storage().data_ptr() not in given and t.numel() > self.numbers:
                self.numbers, self.by = t.numel(), str(func)
        return out


WORKER = """
import importlib, sys, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, folder, tests, name = int(sys.argv[1]), *sys.argv[2:]
sys.path.insert(0, tests)
scenarios = importlib.import_module(name)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
sent, found = [], {}
plain = dist.all_reduce
def counted(t, *args, **kwargs):
    sent.append(t.numel() * t.element_size())
    return plain(t, *args, **kwargs)
dist.all_reduce = counted
for name, (run, options) in scenarios.SCENARIOS.items():
    sent.clear()
    result = run(rank, **options)
    found[name] = result, list(sent)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def two_processes(file: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes on gloo found, by scenario: the result, and the bytes of each collective call.

    Args:
        file: Of the tests, which has SCENARIOS: name -> (function, options), called as function(rank, **options).
        folder: For what they leave.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    environment |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(folder), str(file.parent), file.stem],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, output in zip(running, outputs, strict=True):
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
