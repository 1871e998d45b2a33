"""Memory that a training step of the network needs, in a process of its own.

    python -m bench.reparam.peak_rss "ours" "gpt2-medium P10"

Two steps are taken first, so that parameters and moments are there. Then the growth of the resident set over one step
is measured: gradients, activations, factors and scratch. Moments are counted.
"""

import json
import sys

import torch

from bench.harness.peak_rss import apart, grown_mib, without_huge_pages
from bench.reparam.cases import BASELINES, CASES, Step


def of(baseline: str, case: str) -> dict[str, float]:
    """MiB: `step_mib` and `moments_mib`."""
    found: dict[str, float] = apart(__name__, baseline, case, threads=torch.get_num_threads())
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


def measure(baseline: str, case: str) -> dict[str, float]:
    step = BASELINES[baseline](CASES[case], "cpu")
    for _ in range(2):
        step()
    step.optimizer.zero_grad()
    return {"step_mib": round(grown_mib(step), 1), "moments_mib": moments(step)}


if __name__ == "__main__":
    without_huge_pages()
    print(json.dumps(measure(*sys.argv[1:])))
