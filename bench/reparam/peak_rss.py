"""Memory that a training step of the network needs, in a process of its own.

    python bench/reparam_memory.py "ours" "gpt2-medium P10"

Two steps are taken first, so that parameters and moments are there. Then the growth of the resident set over one step,
as bench/memory.py measures it: gradients, activations, factors and scratch. Moments are counted.
"""

import ctypes
import json
import os
import subprocess
import sys

import torch

from memory import _ENVIRONMENT, _PR_SET_THP_DISABLE, grown_mib
from reparam_cases import CASES, WAYS, Step


def of(way: str, case: str) -> dict[str, float]:
    """MiB: `step_mib` and `moments_mib`."""
    environment = os.environ | _ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, __file__, way, case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {way}, {case} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def on_gpu(step: Step) -> dict[str, float]:
    """The same by the allocator's own count, in this process."""
    for _ in range(2):
        step()
    step.optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return {"step_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1), "moments_mib": moments(step)}


def moments(step: Step) -> float:
    state = step.optimizer.state.values()
    tensors = [t for entry in state for t in entry.values() if isinstance(t, torch.Tensor)]
    return round(sum(t.nbytes for t in tensors) / 2**20, 1)


def measure(way: str, case: str) -> dict[str, float]:
    step = WAYS[way](CASES[case], "cpu")
    for _ in range(2):
        step()
    step.optimizer.zero_grad()
    return {"step_mib": round(grown_mib(step), 1), "moments_mib": moments(step)}


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    print(json.dumps(measure(*sys.argv[1:])))
