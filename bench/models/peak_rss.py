"""Memory that training steps of whole models need beyond frozen weights and batch, in a process of its own.

    python -m bench.models.peak_rss "gpt2-small P20" frozen ours

What is trained and its moments are counted. Two steps are taken; then the growth of the resident set over one more is
measured: activations, gradients, prefixes, scratch. The peak is the sum.
"""

import json
import sys
import warnings

import torch

from bench.harness.peak_rss import apart, grown_mib, without_huge_pages
from bench.models.cases import BASELINES, CASES
from bench.models.whole_step import Step

Found = dict[str, float]


def of(case: str, names: tuple[str, ...], tiny: bool = False) -> dict[str, Found]:
    """MiB by baseline: `trained_mib`, `moments_mib`, `step_mib`, and their sum `peak_mib`."""
    words = (case, *names, *(["--tiny"] if tiny else []))
    found: dict[str, Found] = apart(__name__, *words, threads=torch.get_num_threads())
    return found


def measure(case: str, name: str, tiny: bool) -> Found:
    chosen = CASES[case]
    step = Step(BASELINES[name](chosen.make(tiny), "cpu", torch.float32, chosen.P), "eager", dry=False)
    for _ in range(2):
        step()
    step.optimizer.zero_grad()
    grown = grown_mib(step)
    trained = sum(p.nbytes for p in step.baseline.trained.parameters()) / 2**20
    state = step.optimizer.state.values()
    moments = sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor)) / 2**20
    found = {"trained_mib": trained, "moments_mib": moments, "step_mib": grown, "peak_mib": trained + moments + grown}
    return {name: round(mib, 2) for name, mib in found.items()}


if __name__ == "__main__":
    without_huge_pages()
    warnings.simplefilter("ignore")
    case, *names = [argument for argument in sys.argv[1:] if argument != "--tiny"]
    print(json.dumps({name: measure(case, name, "--tiny" in sys.argv) for name in names}))
