"""What moments of few bits cost: Deep-share on E2E, the same run with each, beside torch.optim.AdamW.

    python bench/paper/moments.py                     # 400 steps each, some minutes on a core
    python bench/paper/moments.py --steps 40 --dev 50 --out moments.json

Every way starts from the same numbers and meets the same batches. Reported are the loss on dev, the losses of training,
and how far the prefix that comes out is from torch's, as a share of the way it moved. An interrupted run goes on with
the first way that is not finished.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

if not __package__:  # run as a file
    import as_file  # noqa: F401

import prefixattn
from bench.harness.command import command
from bench.paper.language import tasks
from bench.paper.language.train import WARMED, Loop, Run, Settings, drawn
from bench.paper.runs import Refusal, digest, load_state, provenance, read_json, save_state, thinned, write_json

HERE = Path(__file__).resolve().parent
AGAIN = "the same command goes on with the first way that is not finished"
TORCH = "torch.optim.AdamW"
WAYS: dict[str, str | tuple[str, str]] = {
    TORCH: "torch",
    "float32": "float32",
    "bfloat16, float32": ("bfloat16", "float32"),
    "bfloat16": "bfloat16",
    "8bit": "8bit",
}
LENGTH, HIDDEN, SEED, LR, BATCH = 5, 512, 101, 1e-3, 10


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        "e2e", "deep", LR, 0.0, SEED, backbone="small", length=LENGTH, hidden=HIDDEN, epochs=1, batch=BATCH,
        subset=options.steps * BATCH, dev=options.dev,
    )  # fmt: skip


def run(way: str, options: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """Trains; the row, and the prefix before and after, [2, N, 2, H, P, D]."""
    trained = Run(settings_of(options))
    prefix = trained.tuned.prefix

    def optimizer(**choices: Any) -> torch.optim.Optimizer:
        if way == TORCH:
            return torch.optim.AdamW(prefix.parameters(), **choices)
        return prefixattn.FactoredAdamW(prefix, moments=WAYS[way], **choices)

    trained.tuned.optimizer = optimizer
    with torch.no_grad():
        before = prefix().detach().clone()
    samples = trained.samples(drawn(trained.task.train.pairs(), trained.settings.subset))
    with tempfile.TemporaryDirectory() as folder:  # a way is short: what is resumed is the list of ways
        loop = Loop(trained, samples, Path(folder) / "state.pt", way)
        if not loop.train():
            raise Refusal(f"{way}: loss {loop.losses[-1]} at step {len(loop.losses)}")
    with torch.no_grad():
        after = prefix().detach().clone()
    row = {
        "way": way,
        "dev_loss": trained.dev_loss(trained.samples(drawn(trained.task.dev.pairs(), options.dev))),
        "steps": len(loop.losses),
        "last_100_loss": sum(loop.losses[-100:]) / len(loop.losses[-100:]),
        "seconds_per_step": median(loop.seconds[WARMED:] or loop.seconds),
        "losses": thinned(loop.losses),
    }
    return row, torch.stack([before, after])


def table(result: dict[str, Any]) -> str:
    lines = [
        "| moments | dev loss | mean loss of the last 100 steps | distance to torch's prefix |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        numbers = f"{row['dev_loss']:.4f} | {row['last_100_loss']:.4f} | {row['distance']:.1%}"
        lines.append(f"| {row['way']} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="at most: an epoch of the data may be shorter")
    parser.add_argument("--dev", type=int, default=500, help="dev rows for the dev loss")
    parser.add_argument("--data", help='default: PREFIXATTN_DATA; "generated": records made up here')
    parser.add_argument("--out", type=Path, default=HERE / "results" / "moments.json")
    options = parser.parse_args()
    for name in ("steps", "dev"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    torch.set_num_threads(1)
    if options.data is not None:
        os.environ["PREFIXATTN_DATA"] = options.data
    where = tasks.load("e2e").where
    setting = {"steps": options.steps, "dev": options.dev, "data": where, "lr": LR, "length": LENGTH}
    unfinished, fingerprint = options.out.with_suffix(".part.pt"), digest(setting)
    state = load_state(unfinished, fingerprint, {"rows", "kv"}) or {"rows": [], "kv": {}}
    for way in WAYS:
        if way in state["kv"]:
            continue
        row, state["kv"][way] = run(way, options)
        start, right = state["kv"][TORCH]
        end = state["kv"][way][1]
        row["distance"] = float((end - right).norm() / (right - start).norm())
        state["rows"].append(row)
        save_state(unfinished, fingerprint, state)
        print(f"{way}: dev loss {row['dev_loss']:.4f}, distance {row['distance']:.1%}", flush=True)
    write_json(options.out, {"setting": setting, "provenance": provenance(), "rows": state["rows"]})
    unfinished.unlink()
    print(table(read_json(options.out)))


if __name__ == "__main__":
    sys.exit(command("moments.py", main, AGAIN))
