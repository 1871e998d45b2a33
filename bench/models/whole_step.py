"""Whole training steps on frozen models: forward, loss, backward and the optimizer's step, ours against the others.

    python -m bench.models.whole_step --device cuda            # all models, 8 minutes, most telling cases first
    python -m bench.models.whole_step --device cuda --model vit-b16 --minutes 3 --out vit.json
    python -m bench.models.whole_step --device cpu --dry-run   # tiny models, every line of the code

Milliseconds by the host's clock around a step and a synchronization, which is what a loop waits for; `issue_ms` is the
part until the host had launched everything, so where the two are equal the GPU waits for the host. Every round runs
each baseline once, every other round backwards. Peak memory is what tensors need above frozen weights and batch:
prefix, network, moments, gradients, activations; of CUDA graphs, whose pools no counter of tensors sees, what was
reserved. On a CPU no memory is measured. "frozen" is the model without a prefix, trained down to a vector at its
embeddings.

Before anything is timed, ours and each baseline must agree on loss and gradient from the same prefixes; if they do
not, ours gets no time and the command ends with status 1. A baseline that fails is a row that says why.
"""

import argparse
import contextlib
import importlib
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness.command import command
from bench.harness.record import RESULTS, device_slug, header, write_rows
from bench.harness.timing import interleave, quantiles
from bench.models.baselines import BASELINES, Baseline, OursLabelled, assert_agree, collect
from bench.models.families import GPT2, Bart, Family, TimmViT, ViT
from prefixattn.attention import guard

MODELS = ("gpt2-medium", "bart-large", "vit-b16")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
EAGER = (("frozen", "eager"), ("ours", "eager"), ("peft", "eager"), ("original", "eager"))
LABELLED = (("ours", "eager, loss at labels only"),)
COMPILED = ("compile", "compile reduce-overhead")
COMPILING_TAKES = 60.0  # seconds that must be left for a way that compiles, at least

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is timed together: one model, prefix length and type, in several ways."""

    family: Family
    P: int
    dtype: torch.dtype
    ways: tuple[tuple[str, str], ...]  # a baseline, and how it runs

    def row(self, baseline: str, how: str) -> Row:
        more = {"source": self.family.source} if isinstance(self.family, Bart) else {}
        return {
            "model": self.family.name,
            "library": self.family.library,
            "who": baseline,
            "how": f"{NAMES[self.dtype]} {how}",
            "P": self.P,
            "batch": self.family.batch,
            **more,
        }

    @property
    def key(self) -> str:
        return " ".join(str(v) for v in self.row("", "").values())

    def __str__(self) -> str:
        row = self.row("", self.ways[0][1])
        source = f" source {row['source']}" if "source" in row else ""
        return f"{row['model']} ({row['library']}) P {self.P}{source} {row['how']}"


def _has_timm() -> bool:
    try:
        importlib.import_module("timm.models.vision_transformer")
    except Exception:  # broken counts as absent; its rows come last, and say what it said
        return False
    return True


def cases(tiny: bool, models: tuple[str, ...]) -> list[Case]:
    """In the order in which they are run: eager GPT-2 and ViT before BART, compiled steps after them."""
    gpt2, short, long = GPT2(tiny), Bart(tiny, 512), Bart(tiny, 1024)
    vit, other = (TimmViT(tiny), ViT(tiny)) if _has_timm() else (ViT(tiny), TimmViT(tiny))
    bf16, fp32 = torch.bfloat16, torch.float32
    found = [Case(gpt2, 5, dtype, EAGER + LABELLED) for dtype in (bf16, fp32)]
    found += [Case(vit, P, dtype, EAGER) for P in (10, 200, 50) for dtype in (bf16, fp32)]
    found += [Case(bart, 200, dtype, EAGER) for bart in (short, long) for dtype in (bf16, fp32)]
    first = [(gpt2, 5), (vit, 10)]
    compiled = [(bf16, first)]
    if not tiny:  # compiling takes its time
        first.append((short, 200))
        compiled += [(bf16, [(vit, 200), (vit, 50), (long, 200)]), (fp32, first)]
    for dtype, families in compiled:
        found += [Case(f, P, dtype, (("frozen", how), ("ours", how))) for f, P in families for how in COMPILED]
    found += [Case(other, P, dtype, EAGER) for P in (10, 200, 50) for dtype in (bf16, fp32)]
    return [case for case in found if case.family.name in models]


class Step:
    """One training step of a baseline."""

    def __init__(self, baseline: Baseline, how: str, dry: bool) -> None:
        self.baseline, self.graphs = baseline, how == COMPILED[1]
        self.call: Callable[[], torch.Tensor] = baseline.loss
        self.options: dict[str, Any] = {}  # of the compiler
        if how in COMPILED:
            self.options = (
                {"backend": "aot_eager"} if dry else {"mode": "reduce-overhead" if self.graphs else "default"}
            )
            self.call = torch.compile(baseline.loss, fullgraph=True, **self.options)
        self.optimizer = baseline.family.optimizer(baseline.trained)
        self.issued: list[float] = []

    def __call__(self) -> torch.Tensor:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.call()
        loss.backward()
        self.optimizer.step()
        self.baseline.held.clear()
        self.issued.append((time.perf_counter() - start) * 1e3)
        if self.baseline.device == "cuda":
            torch.cuda.synchronize()
        return loss

    def warm_up(self, steps: int) -> Row:
        """Compiles, allocates, and measures: trained numbers, the first loss and, on a GPU, peak memory."""
        row: Row = {}
        try:
            first = float(self().detach())
        except torch._dynamo.exc.Unsupported as error:
            row["note"] = f"several graphs: {words(error)}"
            self.call = torch.compile(self.baseline.loss, **self.options)
            first = float(self().detach())
        if not torch.isfinite(torch.tensor(first)):
            raise AssertionError(f"the loss of the first step is {first}")
        trained = list(self.baseline.trained.parameters())
        # norms, which a factored gradient knows without being made
        norms = {
            name: 0.0 if p.grad is None else float(torch.linalg.vector_norm(p.grad))
            for name, p in self.baseline.trained.named_parameters()
        }
        if missing := [name for name, found in norms.items() if not found]:
            raise AssertionError(f"no gradient reached {', '.join(missing)}")
        norm = math.hypot(*norms.values())
        row |= {"trained": sum(p.numel() for p in trained)}
        row |= {"first_loss": rounded(first), "first_gradient": rounded(norm)}
        for _ in range(steps):
            self()
        if self.baseline.device != "cuda":
            return row
        allocated, reserved = self.baseline.before
        if self.graphs:
            torch.cuda.empty_cache()
            return row | {"peak_mib": round((torch.cuda.memory_reserved() - reserved) / 2**20, 1), "by": "reserved"}
        torch.cuda.reset_peak_memory_stats()
        self()
        return row | {"peak_mib": round((torch.cuda.max_memory_allocated() - allocated) / 2**20, 1)}


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def words(error: Exception) -> str:
    first = (str(error).strip() or "no words").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"


class Budget:
    """The time there is, and what is left of it."""

    def __init__(self, minutes: float, dry: bool) -> None:
        self.minutes, self.dry, self._end = minutes, dry, time.perf_counter() + 60 * minutes

    def left(self) -> float:
        return self._end - time.perf_counter()

    def seconds_for_a_way(self, ways: int) -> float:
        """Of timing; as much again goes into building and warming up."""
        return 0.0 if self.dry else min(1.5, 0.5 * self.left() / ways)


def measure(case: Case, device: str, budget: Budget, seconds: float, eager: dict[str, Row]) -> list[Row]:
    """A row for each way; what fails on the way says so in its row and is not timed.

    `eager` holds the rows of eager steps, by case and baseline: against these others of the same are held.
    """
    dry = budget.dry
    rows = {way: case.row(*way) for way in case.ways}
    steps: dict[tuple[str, str], Step] = {}

    @contextlib.contextmanager
    def kept(way: tuple[str, str]) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library objects to; its words are the row
            rows[way]["absent"] = words(error)
            steps.pop(way, None)

    for way in case.ways:
        name, how = way
        with kept(way):
            if how in COMPILED and not dry:
                if device != "cuda":
                    raise NotImplementedError("compiled steps are timed on a GPU only")
                if budget.left() < COMPILING_TAKES:
                    raise TimeoutError(f"{budget.left():.0f} seconds are left, and compiling may take longer")
            make = OursLabelled if way in LABELLED else BASELINES[name]
            steps[way] = Step(make(case.family, device, case.dtype, case.P), how, dry)
            if steps[way].baseline.note:
                rows[way]["note"] = steps[way].baseline.note
            # before the next is made, whose weights would be counted as memory of this one
            rows[way] |= steps[way].warm_up(1 if dry else 3)
            assert_same_start(case, rows[way], eager.setdefault(f"{case.key} {name}", rows[way]))
            steps[way].issued.clear()
        collect(device)
    check(rows, steps)
    try:
        time_together(rows, steps, seconds, (1, 1) if dry else (5, 60))
    except Exception as error:
        for way in steps:
            rows[way]["absent"] = words(error)
    frozen = rows[case.ways[0]]
    for row in rows.values():
        for unit, value in (("ms", lambda r: r["ms"][1]), ("mib", lambda r: r["peak_mib"])):
            with contextlib.suppress(KeyError):
                row[f"extra_{unit}"] = round(value(row) - value(frozen), 3)
    steps.clear()
    torch.compiler.reset()
    collect(device)
    return list(rows.values())


def assert_same_start(case: Case, row: Row, eager: Row) -> None:
    """A compiled step begins as the eager one does: by its loss and the norm of the gradient of all that is trained."""
    noisy = case.family.training or case.family.prefix_dropout > 0  # dropout draws differently
    for name, bound in (("first_loss", 0.02), ("first_gradient", 0.3 if noisy else 0.05)):
        if not abs(row[name] - eager[name]) <= bound * abs(eager[name]):
            raise AssertionError(f"{name} is {row[name]:.5g}, of the eager step {eager[name]:.5g}")


def check(rows: dict[tuple[str, str], Row], steps: dict[tuple[str, str], Step]) -> None:
    """Holds ours against the others, all eager; what disagrees is not timed."""
    ours, frozen = ("ours", "eager"), ("frozen", "eager")
    others = {name: steps[name, "eager"].baseline for name in ("original", "peft") if (name, "eager") in steps}
    if others.get("peft") is not None and others["peft"].family.task != "CAUSAL_LM":
        del others["peft"]  # another function there
    if ours not in steps or frozen not in steps:
        return
    if not others:
        rows[ours]["note"] = "not compared: no other way is there"
        return
    try:
        errors = assert_agree(steps[ours].baseline, others, steps[frozen].baseline)
        rows[ours]["apart"] = {name: float(f"{error:.2g}") for name, error in errors.items()}
    except Exception as error:
        for way in [way for way in rows if way[0] == "ours"]:
            rows[way]["absent"] = words(error)
            rows[way]["failed"] = True
            steps.pop(way, None)


def time_together(
    rows: dict[tuple[str, str], Row], steps: dict[tuple[str, str], Step], seconds: float, rounds: tuple[int, int]
) -> None:
    if not steps:
        return
    by_name = {" ".join(way): way for way in steps}
    samples = interleave({name: steps[way] for name, way in by_name.items()}, seconds * len(steps), rounds)
    for name, ms in samples.items():
        way = by_name[name]
        rows[way] |= {"ms": [round(t, 3) for t in quantiles(ms)], "min_ms": round(min(ms), 3), "steps": len(ms)}
        if steps[way].baseline.device == "cuda":
            rows[way]["issue_ms"] = round(quantiles(steps[way].issued)[1], 3)


def write(path: Path, head: dict[str, Any], rows: list[Row]) -> None:
    """`distrusted`: kernels of ours in whose place "auto" took the reference, and why; empty if all is well."""
    distrusted = {" ".join(map(str, case)): words for case, words in guard.trials.verdicts.items() if words}
    write_rows(path, head | {"distrusted": distrusted, "rows": rows})


def table(rows: list[Row]) -> str:
    """Markdown. Extra is over frozen run the same way; the shares are ours of the original's, milliseconds and MiB."""
    lines = [
        "| model | P | how | who | ms | peak MiB | extra ms | extra MiB | share of its extra, same type, eager "
        "| share of its step, fp32, eager |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    case = ("model", "library", "P", "source")
    published = {(*(r.get(k) for k in case), r["how"]): r for r in rows if r["who"] == "original" and "ms" in r}

    def share(row: Row, how: str, ms: Callable[[Row], float], mib: str) -> str:
        other: Row = published.get((*(row.get(k) for k in case), how), {})
        if row["who"] != "ours" or not other:
            return ""
        parts = [ms(row) / ms(other) if ms(other) > 0 else None]
        parts += [row[mib] / other[mib] if mib in row and other.get(mib, 0) > 0 else None]
        return ", ".join("-" if part is None else f"{part:.2f}" for part in parts)

    absent: dict[str, dict[str, None]] = {}
    for row in rows:
        model = f"{row['model']} {row.get('source', '')}".strip() + (", timm" if row["library"] == "timm" else "")
        if "absent" in row:
            absent.setdefault(row["absent"], {})[f"{row['who']} on {model}, P {row['P']}, {row['how']}"] = None
            continue
        cells = [model, row["P"], row["how"], row["who"], row["ms"][1]]
        cells += [row.get(key, "-") for key in ("peak_mib", "extra_ms", "extra_mib")]
        same = row["how"] if row["how"].endswith(" eager") else ""
        cells.append(share(row, same, lambda r: r.get("extra_ms", 0.0), "extra_mib"))
        cells.append(share(row, "fp32 eager", lambda r: r["ms"][1], "peak_mib"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if absent:
        lines += ["", "Absent:", ""]
    return "\n".join(lines + [f"- {reason}: {'; '.join(where)}" for reason, where in absent.items()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole training steps, ours against the others; see the file's head.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=MODELS, action="append", help="may be given several times; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is started after this time")
    parser.add_argument("--out", type=Path, help="JSON; default bench/results/whole_step/<device>.json, dry: none")
    parser.add_argument("--dry-run", action="store_true", help="tiny models, one round; compiles with aot_eager")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu --dry-run tries the code")
    warnings.filterwarnings("ignore", module=r"(?!prefixattn)")  # the libraries' own, one for each model made
    out = args.out or (None if args.dry_run else RESULTS / "whole_step" / f"{device_slug(args.device)}.json")
    peak = "peak of the tensors above frozen weights and batch" if args.device == "cuda" else "not measured on a CPU"
    head = header(args.device) | {"memory": peak, "dry": args.dry_run}
    budget, todo = Budget(args.minutes, args.dry_run), cases(args.dry_run, tuple(args.model or MODELS))
    rows: list[Row] = []
    eager: dict[str, Row] = {}
    for done, case in enumerate(todo):
        if budget.left() <= 0:
            late = f"not run: the {args.minutes:g} minutes were over"
            rows += [case.row(*way) | {"absent": late} for case in todo[done:] for way in case.ways]
            break
        try:
            fresh = measure(
                case, args.device, budget, budget.seconds_for_a_way(sum(len(c.ways) for c in todo[done:])), eager
            )
        except Exception as error:  # a GPU that no longer answers fails everywhere
            fresh = [case.row(*way) | {"absent": words(error)} for way in case.ways]
        rows += fresh
        told = [f"{r['who']} {r['ms'][1]:.2f} ms" if "ms" in r else f"{r['who']} absent" for r in fresh]
        print(f"{case}: {', '.join(told)}", flush=True)
        if out is not None:
            write(out, head, rows)
    if out is not None:
        write(out, head, rows)
        print(f"wrote {out}")
    print(table(rows))
    return int(any(row.get("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(command("whole_step.py", main, "the JSON has the cases that were measured; the same command starts anew"))
