"""A training step on completions of one prompt: the prompt run once (`SharedPrompt`), beside the repeated batch.

    python -m bench.models.shared_prompts --out bench/results/shared-prompts.json    # P of 1k, 4k and 16k
    python -m bench.models.shared_prompts --prompt 1024 --group 8 --new 128 --out bench/results/shared-prompts-8.json
    python -m bench.models.shared_prompts --model smollm2 --prompt 1024 --group 8 --new 128 --out FILE.json
    python -m bench.models.shared_prompts --prompt 64 128 --rounds 1       # a try, which writes nothing

A random LLaMA of 2 layers, or of SmolLM2's sizes, all of whose weights get gradients; float32; forward, loss and
backward, with logits at the completions only in both ways. Both ways must give one loss and one gradient before they
are timed. Times are of the process's processors, in alternation in one process; memory is the growth of the resident
set over a step, in a process for each way. On the same commit the command goes on with the lengths that its JSON lacks.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import prefixattn
from bench.harness.command import Refusal, command
from bench.harness.peak_rss import apart, grown_mib, without_huge_pages
from bench.harness.record import header, kept, write_rows
from bench.harness.timing import interleave, quantiles

LENGTHS = (1024, 4096, 16384)
GROUP, NEW = 4, 64  # completions of a prompt, and their tokens, unless others are asked for
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        **{"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 1 << 15},
    },
    "smollm2": {  # SmolLM2-135M
        **{"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"num_hidden_layers": 30, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True},
    },
}
WAYS = ("shared", "repeated")

Step = Callable[[], Tensor]
Row = dict[str, Any]


class Case(NamedTuple):
    group: int = GROUP
    new: int = NEW
    model: str = "small"


SMALL = Case()


def made(P: int, case: Case) -> tuple[Any, Tensor, Tensor]:
    """The model, a prompt [1, P] and its completions [group, new]."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODELS[case.model])).eval()
    return model, torch.randint(1, 512, (1, P)), torch.randint(1, 512, (case.group, case.new))


def step(way: str, model: Any, prompt: Tensor, completions: Tensor) -> Step:
    """Loss and gradients, as often as it is called; it returns the loss."""
    group, new = completions.shape
    if way == "shared":
        sharing = prefixattn.SharedPrompt(model)
        before, ids = prompt[:, :-1], torch.cat([prompt[:, -1:].expand(group, 1), completions], 1)
    else:
        ids = torch.cat([prompt.expand(group, -1), completions], 1)
    labels = ids.clone()
    labels[:, :-new] = -100

    def repeated() -> Tensor:
        loss = prefixattn.labelled_loss(model, labels, input_ids=ids)
        model.zero_grad()
        loss.backward()
        return loss.detach()

    def shared() -> Tensor:
        with sharing(before):
            return repeated()

    return shared if way == "shared" else repeated


def check(P: int, dtype: torch.dtype, most: float, case: Case = SMALL) -> float:
    """How far the gradients of the two ways are apart, of their size; Refusal if that, or the loss, is too far."""
    model, prompt, completions = made(P, case)
    model.to(dtype)
    found = []
    for way in WAYS:
        twin = copy.deepcopy(model)
        loss = step(way, twin, prompt, completions)()
        found.append((float(loss), torch.cat([p.grad.flatten() for p in twin.parameters()])))
    (ours, mine), (theirs, other) = found
    apart_by = float((mine - other).norm() / other.norm())
    if abs(ours - theirs) > most * abs(theirs) or not apart_by <= most:
        raise Refusal(f"P {P}, {dtype}: losses {ours} and {theirs}, gradients {apart_by:.1e} apart; nothing is timed")
    return apart_by


def memory_mib(way: str, P: int, case: Case) -> float:
    """In this process, whose thread pools a small step starts."""
    step(way, *made(64, case))()
    taken = step(way, *made(P, case))
    return grown_mib(taken)


def measured(P: int, rounds: int, case: Case) -> list[Row]:
    print(f"P {P}: checking", flush=True)
    apart_by = check(P, torch.float32, 1e-3, case)
    print(f"P {P}: timing", flush=True)
    calls = {way: step(way, *made(P, case)) for way in WAYS}
    samples = interleave(calls, 0.0, (rounds, rounds), time.process_time)
    rows = []
    for way in WAYS:
        print(f"P {P}: memory, {way}", flush=True)
        asked = ["--memory", way, str(P)] + [str(word) for n, x in case._asdict().items() for word in (f"--{n}", x)]
        grown = apart("bench.models.shared_prompts", *asked, threads=torch.get_num_threads())
        ms = [round(t, 1) for t in quantiles(samples[way])]
        rows.append({"P": P, "way": way, "cpu_ms": ms, "steps": rounds, "step_mib": round(grown, 1), "apart": apart_by})
    return rows


def table(rows: list[Row]) -> list[str]:
    """Markdown: processor seconds and MiB of a step, and what sharing takes of the repeated batch's."""
    lines = ["| P | repeated | shared | time | repeated | shared | memory |", "|---|---|---|---|---|---|---|"]
    found = {(row["P"], row["way"]): row for row in rows}
    for P in sorted({row["P"] for row in rows}):
        ours, theirs = (found[P, way] for way in WAYS)
        seconds = [row["cpu_ms"][1] / 1e3 for row in (theirs, ours)]
        mib = [row["step_mib"] for row in (theirs, ours)]
        cells = [f"{t:.2f} s" for t in seconds] + [f"{seconds[1] / seconds[0]:.2f}"]
        cells += [f"{m:.0f} MiB" for m in mib] + [f"{mib[1] / mib[0]:.2f}"]
        lines.append(f"| {P:,} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Steps on completions of one prompt; see the file's head.")
    parser.add_argument("--model", choices=MODELS, default="small", help="sizes of the random LLaMA")
    parser.add_argument("--prompt", type=int, nargs="+", default=LENGTHS, help="P, the prompt's tokens")
    parser.add_argument("--group", type=int, default=GROUP, help="completions of the prompt")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each way that are timed")
    parser.add_argument("--out", type=Path, help="JSON; default: none")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "P"), help=argparse.SUPPRESS)  # of a process for it
    args = parser.parse_args(arguments)
    case = Case(args.group, args.new, args.model)
    if args.memory:
        without_huge_pages()
        print(json.dumps(memory_mib(args.memory[0], int(args.memory[1]), case)))
        return 0
    if min(args.prompt) < 2:
        raise Refusal(f"--prompt {min(args.prompt)}: a prompt needs two tokens, of which its completions get the last")
    if min(args.group, args.new, args.rounds) < 1:
        raise Refusal("--group, --new and --rounds: expected numbers from 1 up")
    head = header() | {
        "group": case.group,
        "new": case.new,
        "model": MODELS[case.model],
        "float64_apart": check(64, torch.float64, 1e-5, case),
    }
    told_by = "device", "threads", "torch", "commit", "tree", "group", "new", "model"
    rows = [] if args.out is None else kept(args.out, head, told_by)
    for P in args.prompt:
        if any(row["P"] == P for row in rows):
            continue
        rows += measured(P, args.rounds, case)
        if args.out is not None:
            write_rows(args.out, head | {"rows": rows})
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(command("shared_prompts.py", main, "the same command goes on with the lengths that are missing"))
