"""What a step of each method takes on the same batches: times in alternation, memory in a process of its own.

"floor" is the frozen model, trained down to a vector at its input embeddings: what a step costs without any prefix. It
computes logits at every position, as PEFT and the published way do, and "deep-logits"; "deep" at labelled ones only.
"deep-packed" is "deep" with the sequences of a batch behind one another, not padded.
Every round takes the next batch with each method, every other round backwards, so that what the machine does besides
falls on all alike; ratios are of one round. Memory is what step_rss.py measures.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.harness.timing import interleave, quantiles
from bench.paper.language.methods import METHODS, Choices, Tuned
from bench.paper.language.train import Loop, Run, Settings, drawn
from bench.paper.runs import Refusal, provenance
from bench.paper.sweeps.tables import Entry, Table, measure, words

FLOOR, EVERYWHERE, PACKED = "floor", "deep-logits", "deep-packed"
USUAL = ("deep", PACKED, EVERYWHERE, "peft", "original")  # of a causal model
BATCHES = 16  # that are drawn; a round more begins again
TYPES = {False: "float32", True: "bfloat16"}
Found = dict[str, Any]


class Floor(Tuned):
    def __init__(self, run: Run) -> None:
        super().__init__(run.backbone, Choices(labelled=False))
        self.checkpointing = run.settings.checkpointing
        parts = (self.model.get_encoder(), self.model.get_decoder()) if run.backbone.seq2seq else (self.model,)
        embeddings: list[Any] = [part.get_input_embeddings() for part in parts]
        self.added["floor"] = nn.Module()
        delta = nn.Parameter(torch.zeros(embeddings[0].weight.shape[1], device=run.device))
        self.added["floor"].register_parameter("delta", delta)
        for module in embeddings:
            module.register_forward_hook(lambda module, args, out: out + delta)


class Steps:
    """Training steps of a method over the same batches, whichever the method."""

    def __init__(self, settings: Settings, method: str) -> None:
        floor = method == FLOOR
        own = {FLOOR: "frozen", EVERYWHERE: "deep", PACKED: "deep"}.get(method, method)
        labelled, packed = method in (own, PACKED), method == PACKED
        self.run = Run(replace(settings, method=own, labelled=labelled, packed=packed))
        if floor:
            self.run.tuned = Floor(self.run)
        pairs = drawn(self.run.task.train.pairs(), BATCHES * settings.batch * settings.accumulation)
        with TemporaryDirectory() as folder:
            self.loop = Loop(self.run, self.run.samples(pairs), Path(folder) / "none.pt", "")
        self.run.tuned.train(True)
        self.done, self.losses = 0, []

    def __call__(self) -> Tensor:
        rows, at = self.loop.rows, self.done % self.loop.per_epoch
        samples = self.loop.samples[at * rows : (at + 1) * rows]
        self.losses.append(self.loop.step(0, samples))
        self.done += 1
        if self.run.device.type == "cuda":
            torch.cuda.synchronize()
        return torch.tensor(self.losses[-1])


def compare(settings: Settings, methods: Sequence[str], rounds: int, types: Sequence[bool] = (False, True)) -> Found:
    """By type, float32 or with bfloat16 autocast: milliseconds of each round and MiB of each method, on this device.

    Raises:
        Refusal: a loss that is not finite, or whatever a method says of the model.
    """
    known = [*(name for name in METHODS if name != "frozen"), EVERYWHERE, PACKED]
    for name in methods:
        if name not in known:
            raise Refusal(f"no steps of {name!r}; there are {', '.join(known)}")
    found: Found = {"settings": _told(settings), "rounds": rounds, "types": {}}
    for bf16 in types:
        own = replace(settings, bf16=bf16)
        steps = {name: Steps(own, name) for name in (FLOOR, *methods)}
        with tqdm(total=(rounds + 1) * len(steps), desc=f"steps in {TYPES[bf16]}", unit="step") as bar:
            samples = interleave({name: _shown(step, bar) for name, step in steps.items()}, 0.0, (rounds, rounds))
        for name, each in steps.items():
            if not np.isfinite(each.losses).all():
                raise Refusal(f"{name}: a loss of its steps is not finite; lower the first rate of the grid")
        first = {name: each.losses[0] for name, each in steps.items()}
        steps.clear()
        found["types"][TYPES[bf16]] = {
            name: {"ms": list(times), "first_loss": first[name], **step_peak(own, name)}
            for name, times in samples.items()
        }
    return {**found, "threads": torch.get_num_threads(), "provenance": provenance()}


def _shown(step: Steps, bar: Any) -> Callable[[], None]:
    def run() -> None:
        step()
        bar.update()

    return run


def _told(settings: Settings) -> dict[str, Any]:
    names = ("task", "backbone", "weights", "length", "hidden", "batch", "accumulation", "objective", "checkpointing")
    told = {name: value for name, value in asdict(settings).items() if name in names}
    return {**told, "backbone": Path(settings.backbone).name if Path(settings.backbone).is_dir() else settings.backbone}


def step_peak(settings: Settings, method: str) -> dict[str, float]:
    """MiB of a step, by step_rss.py; nothing on a GPU, where resident memory says nothing."""
    if torch.cuda.is_available():
        return {}
    script = Path(__file__).resolve().parents[1] / "step_rss.py"
    asked = json.dumps({"method": method, "settings": asdict(settings)})
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = (sys.executable, "-W", "ignore", str(script))
    done = subprocess.run(command, input=asked, env=environment, capture_output=True, text=True)
    if done.returncode:  # no Linux, no memory left: the times are worth keeping
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        print(f"the memory of {method} was not measured: {why}", file=sys.stderr)
        return {}
    mib: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return mib


# --- as a table ---


def tables(found: Found) -> list[Table]:
    """One for each type: times, and what a method adds to the floor as a share of what others add."""
    return [_table(name, ways, found) for name, ways in found["types"].items()]


def _table(name: str, ways: dict[str, Any], found: Found) -> Table:
    others = [method for method in ("original", "peft") if method in ways]
    head = ["method", "ms a step (p20 to p80)", "over the floor, ms", *(f"time over {other}'s" for other in others)]
    head += ["MiB of a step", *(f"extra MiB over {other}'s" for other in others)]
    floor, rows = ways[FLOOR], []
    for method, way in ways.items():
        extra = _rounds(way, floor, np.subtract)
        row = [words(method), _spread(quantiles(way["ms"]), ".0f"), _spread(extra, "+.0f")]
        row += [_spread(_rounds(way, ways[other], np.divide), ".2f") for other in others]
        row.append(measure(way.get("peak_mib"), ",.0f"))
        row += [_share(way, ways[other], floor) for other in others]
        rows.append(row)
    settings = ", ".join(f"{key} {value}" for key, value in found["settings"].items() if value not in ("", False))
    where = found["provenance"]["device"]
    return Table(f"A step in {name}, {settings}; {found['rounds']} rounds on {where}", head, rows, NOTES)


NOTES = (
    "Ratios are medians over rounds, with their p20 and p80. `floor` is the frozen model, trained at its embeddings; "
    "of extra memory the floor's is taken off both.",
)


def _rounds(way: dict[str, Any], other: dict[str, Any], by: Any) -> tuple[float, float, float]:
    return quantiles(by(way["ms"], other["ms"]).tolist())


def _spread(found: tuple[float, float, float], form: str) -> Entry:
    p20, p50, p80 = found
    return Entry(f"{p50:{form}} ({p20:{form}} to {p80:{form}})", p50)


def _share(way: dict[str, Any], other: dict[str, Any], floor: dict[str, Any]) -> Entry:
    """Of the memory that the other adds to the floor."""
    if not all("peak_mib" in each for each in (way, other, floor)) or other["peak_mib"] <= floor["peak_mib"]:
        return Entry("-")
    return measure((way["peak_mib"] - floor["peak_mib"]) / (other["peak_mib"] - floor["peak_mib"]), ".2f")
