"""Training steps of whole models on a CPU, float32, each beside the same frozen model without a prefix.

    python -m bench.models.bench_models                            # then bench/results/models-<device>.json: some 15
                                                                   # minutes, and up to 30 more for batch 64
    python -m bench.models.bench_models --case "vit-b16 P10"       # one case anew, or several
    python -m bench.models.bench_models --tiny --out try.json      # every line of the code, in seconds

The file is written after each case. A command that is started again goes on where the last one ended, if the file is of
the same commit, device, threads and torch; --fresh starts anew.

"frozen" is the model with SDPA, trained down to a vector at its input embeddings. Every round runs every baseline
once, every other round backwards; `extra_ms` are quantiles of a step less the frozen model's of the same round, and may
be negative: our attention may be faster than SDPA, and a prefix on the first layer wants no gradient of that layer's
projections, which the frozen model's goes through; PEFT and the published ways save that too. Memory is measured in a
process of its own (peak_rss.py); `extra_mib` is the peak beyond the frozen model's. Before a case is timed, ours
and the others must agree on loss and gradient from the same prefixes; a case that fails ends the command with status 1
and is not written.
"""

import argparse
import gc
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.harness.command import command
from bench.harness.record import RESULTS, device_slug, header, kept, write_rows
from bench.harness.timing import interleave, quantiles
from bench.models import peak_rss, plot
from bench.models.baselines import Baseline, Received, assert_agree, probe
from bench.models.cases import BASELINES, CASES, Case
from bench.models.whole_step import Row, Step

SAME = 1e-4  # of the loss, and of the gradient's norm
WHAT_TELLS_RUNS_APART = ("device", "capability", "threads", "torch", "transformers", "peft", "commit", "tree", "tiny")


def check(name: str, case: Case, baselines: dict[str, Baseline]) -> dict[str, dict[str, float]]:
    """Raises where one computes something else than it should; returns how far apart they are, by baseline."""
    if case.P == 0:
        assert_first_layer(baselines["P 1, first layer"])
        return {"no prefix": {"frozen": assert_same(baselines["no prefix"], baselines["frozen"])}}
    frozen, ours = baselines["frozen"], baselines["ours"]
    takes = ("peft", "original") if ours.family.task != "SEQ_2_SEQ_LM" else ("original",)  # PEFT's is another function
    others = {other: baselines[other] for other in takes if other in baselines}
    found = {"ours": assert_agree(ours, others, frozen)}
    if (labelled := baselines.get("ours, labelled positions")) is not None:  # of the same seed
        found["ours, labelled positions"] = {"ours": assert_same(labelled, ours)}
    return found


def assert_same(baseline: Baseline, other: Baseline) -> float:
    """The same loss, and the same gradient at the embeddings; returns how far apart the gradients are."""
    (loss, gradient), (other_loss, expected) = probe(baseline), probe(other)
    error = float((gradient - expected).norm() / expected.norm())
    if not (abs(loss - other_loss) <= SAME * abs(other_loss) and error <= SAME):
        raise AssertionError(f"loss {loss:.6f}, expected {other_loss:.6f}; gradients apart by {error:.2e}")
    return error


def assert_first_layer(baseline: Baseline) -> None:
    """Of all calls those with the layers chosen have a prefix; its numbers are the tests' affair."""
    with Received() as received:
        probe(baseline)
    rows = [k.shape[1] for k, _ in received.prefixes]
    prefix: Any = baseline.trained
    expected = [1] * len(prefix.slots) + [0] * (len(baseline.family.attentions(baseline.model)) - len(prefix.slots))
    if sorted(rows, reverse=True) != expected:
        raise AssertionError(f"prefixes of {rows} rows were attended to, expected {len(prefix.slots)} of 1 row")


def measure(name: str, tiny: bool, seconds: float, rounds: tuple[int, int]) -> list[Row]:
    case = CASES[name]
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for baseline in case.baselines:
        steps[baseline] = Step(BASELINES[baseline](case.make(tiny), "cpu", torch.float32, case.P), "eager", dry=False)
        made = steps[baseline].baseline
        rows[baseline] = {"op": "model step", "case": name, "model": made.family.name, "library": made.family.library}
        rows[baseline] |= {"P": case.P, "batch": made.rows, "way": baseline} | (
            {"note": made.note} if made.note else {}
        )
    for baseline, apart in check(name, case, {baseline: step.baseline for baseline, step in steps.items()}).items():
        rows[baseline]["apart"] = {other: float(f"{error:.2g}") for other, error in apart.items()}
    for baseline, step in steps.items():
        rows[baseline] |= step.warm_up(0)
    print(f"{name}: agreed; ", end="", flush=True)
    samples = interleave(dict(steps), seconds * len(steps), rounds)
    print(f"timed, {len(samples['frozen'])} rounds; ", end="", flush=True)
    steps.clear()
    gc.collect()
    peaks = peak_rss.of(name, case.baselines, tiny)
    for baseline, row in rows.items():
        extra = [ms - floor for ms, floor in zip(samples[baseline], samples["frozen"], strict=True)]
        row |= {"ms": rounded(samples[baseline]), "min_ms": round(min(samples[baseline]), 3), "rounds": len(extra)}
        row |= {"extra_ms": rounded(extra), "extra_min_ms": round(row["min_ms"] - rows["frozen"]["min_ms"], 3)}
        row |= peaks[baseline]
        row["extra_mib"] = round(row["peak_mib"] - peaks["frozen"]["peak_mib"], 2)
        row["extra_step_mib"] = round(row["step_mib"] - peaks["frozen"]["step_mib"], 2)
    print("memory measured", flush=True)
    return list(rows.values())


def rounded(ms: list[float]) -> list[float]:
    return [round(t, 3) for t in quantiles(ms)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Training steps of whole models on a CPU; see the file's head.")
    parser.add_argument("--case", choices=CASES, action="append", help="measured anew; default: all that are missing")
    parser.add_argument("--seconds", type=float, default=16.0, help="of timing, for each baseline of a case")
    parser.add_argument("--rounds", type=int, default=5, help="at least, whatever the seconds")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/models-<device>.json")
    parser.add_argument("--fresh", action="store_true", help="start anew")
    parser.add_argument("--tiny", action="store_true", help="tiny models, three rounds; needs --out")
    args = parser.parse_args(arguments)
    if args.tiny and args.out is None:
        parser.error("--tiny needs --out: what it measures says nothing")
    warnings.filterwarnings("ignore", module=r"(?!prefixattn)")  # the libraries' own, one for each model made
    path: Path = args.out or RESULTS / f"models-{device_slug()}.json"
    head: Row = header() | {name: version(name) for name in ("transformers", "peft")} | {"tiny": args.tiny}
    rows = [] if args.fresh else kept(path, head, WHAT_TELLS_RUNS_APART)
    todo = args.case or [name for name in CASES if all(row["case"] != name for row in rows)]
    failed = False
    for name in todo:
        began = time.perf_counter()
        try:
            fresh = measure(name, args.tiny, args.seconds, (3, 3) if args.tiny else (args.rounds, 60))
        except (AssertionError, RuntimeError) as error:
            print(f"{name}: FAILED: {error}", flush=True)
            failed = True
            continue
        rows = [row for row in rows if row["case"] != name] + fresh
        rows.sort(key=lambda row: list(CASES).index(row["case"]))
        write_rows(path, head | {"op": "model step", "rows": rows})
        told = [f"{row['way']} {row['extra_ms'][1]:+.1f} ms {row['extra_mib']:+.1f} MiB" for row in fresh[1:]]
        print(f"{name}: {'; '.join(told)} ({time.perf_counter() - began:.0f} s)", flush=True)
    if rows:
        plot.main([str(path)])
    return int(failed)


if __name__ == "__main__":
    sys.exit(command("bench_models.py", main, "the same command goes on with the first case that is not measured"))
