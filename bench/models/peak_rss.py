"""Memory that training steps of whole models need beyond frozen weights and batch, in a process of its own.

    python bench/model_memory.py "gpt2-small P20" frozen ours

What is trained and its moments are counted. Two steps are taken; then the growth of the resident set over one more,
as bench/memory.py measures it: activations, gradients, prefixes, scratch. The peak is the sum.
"""

import ctypes
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent / "paper"))

from memory import _ENVIRONMENT, _PR_SET_THP_DISABLE, grown_mib
from model_cases import CASES, WAYS
from whole_step import Step

Found = dict[str, float]


def of(case: str, ways: tuple[str, ...], tiny: bool = False) -> dict[str, Found]:
    """MiB by way: `trained_mib`, `moments_mib`, `step_mib`, and their sum `peak_mib`."""
    environment = os.environ | _ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, __file__, case, *ways, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case} failed: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Found] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(case: str, way: str, tiny: bool) -> Found:
    chosen = CASES[case]
    step = Step(WAYS[way](chosen.make(tiny), "cpu", torch.float32, chosen.P), "eager", dry=False)
    for _ in range(2):
        step()
    step.optimizer.zero_grad()
    grown = grown_mib(step)
    trained = sum(p.nbytes for p in step.arm.trained.parameters()) / 2**20
    state = step.optimizer.state.values()
    moments = sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor)) / 2**20
    found = {"trained_mib": trained, "moments_mib": moments, "step_mib": grown, "peak_mib": trained + moments + grown}
    return {name: round(mib, 2) for name, mib in found.items()}


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    warnings.simplefilter("ignore")
    case, *ways = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    print(json.dumps({way: measure(case, way, "--tiny" in sys.argv) for way in ways}))
