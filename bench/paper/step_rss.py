"""Memory that a training step of a language method needs beyond frozen weights and batch; times.py asks.

    echo '{"method": "deep", "settings": {...}}' | python bench/paper/step_rss.py

As bench/models/peak_rss.py: two steps are taken; then the growth of the resident set over one more. What is trained and
its moments are counted; the peak is the sum.
"""

import json
import os
import sys

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.peak_rss import ENVIRONMENT, grown_mib, without_huge_pages


def measure(method: str, settings: dict[str, object]) -> dict[str, float]:
    import torch

    from bench.paper.language.times import Steps
    from bench.paper.language.train import Settings

    step = Steps(Settings(**settings), method)
    for _ in range(2):
        step()
    grown = grown_mib(step)
    trained = sum(p.nbytes for _, p in step.run.tuned.parameters()) / 2**20
    state = step.loop.optimizer.state.values()
    moments = sum(t.nbytes for entry in state for t in entry.values() if isinstance(t, torch.Tensor)) / 2**20
    found = {"trained_mib": trained, "moments_mib": moments, "step_mib": grown, "peak_mib": trained + moments + grown}
    return {name: round(mib, 2) for name, mib in found.items()}


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, "-W", "ignore", __file__], {**os.environ, **ENVIRONMENT})
    without_huge_pages()
    asked = json.load(sys.stdin)
    print(json.dumps(measure(asked["method"], asked["settings"])))
