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
from typing import Any

import torch

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness.command import command
from bench.paper import e2e_data
from bench.paper import table_to_text as t2t
from bench.paper.methods import load_model, make_method
from bench.paper.runs import digest, load_state, provenance, read_json, save_state, thinned, write_json

HERE = Path(__file__).resolve().parent
AGAIN = "the same command goes on with the first way that is not finished"
WAYS: dict[str, str | tuple[str, str]] = {
    "torch.optim.AdamW": "torch",
    "float32": "float32",
    "bfloat16, float32": ("bfloat16", "float32"),
    "bfloat16": "bfloat16",
    "8bit": "8bit",
}
LENGTH, HIDDEN, SEED, LR, BATCH = 5, 512, 101, 1e-3, 10  # e2e.py's preset "small"


def run(way: str, data: e2e_data.Data, options: argparse.Namespace) -> tuple[dict[str, Any], torch.Tensor]:
    """Trains; the row, and the bank before and after, [2, N, 2, H, P, D]."""
    model, tokenizer = load_model(str(options.model))
    method = make_method("deep", model, tokenizer, LENGTH, HIDDEN, SEED)
    limit = model.config.n_positions - LENGTH
    samples = t2t.encode(tokenizer, data.train[: options.steps * BATCH], limit)
    dev = t2t.encode(tokenizer, data.dev[: options.dev], limit)
    schedule = t2t.Schedule(lr=LR, batch=BATCH, seed=SEED, moments=WAYS[way])
    pad, device = tokenizer.eos_token_id, torch.device("cpu")
    with torch.no_grad():
        before = method.prefix().detach().clone()
    with tempfile.TemporaryDirectory() as folder:  # a way is short: what is resumed is the list of ways
        done = t2t.train(method, samples, schedule, pad, Path(folder) / "state.pt", way, label=way)
    with torch.no_grad():
        after = method.prefix().detach().clone()
    row = {
        "way": way,
        "dev_loss": t2t.mean_token_loss(method, dev, BATCH, pad, device),
        "steps": len(done.losses),
        "last_100_loss": sum(done.losses[-100:]) / len(done.losses[-100:]),
        "seconds_per_step": done.seconds_per_step,
        "losses": thinned(done.losses),
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
    parser.add_argument("--data", default=os.environ.get("PREFIXATTN_DATA"), help="or PREFIXATTN_DATA, as of e2e.py")
    parser.add_argument("--model", type=Path, default=HERE / "backbone")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "moments.json")
    options = parser.parse_args()
    for name in ("steps", "dev"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected 1 or more")
    torch.set_num_threads(1)
    data = e2e_data.load(options.data)
    setting = {"steps": options.steps, "dev": options.dev, "data": data.where, "lr": LR, "length": LENGTH}
    unfinished, fingerprint = options.out.with_suffix(".part.pt"), digest(setting)
    state = load_state(unfinished, fingerprint, {"rows", "banks"}) or {"rows": [], "banks": {}}
    for way in WAYS:
        if way in state["banks"]:
            continue
        row, state["banks"][way] = run(way, data, options)
        start, right = state["banks"]["torch.optim.AdamW"]
        end = state["banks"][way][1]
        row["distance"] = float((end - right).norm() / (right - start).norm())
        state["rows"].append(row)
        save_state(unfinished, fingerprint, state)
        print(f"{way}: dev loss {row['dev_loss']:.4f}, distance {row['distance']:.1%}", flush=True)
    write_json(options.out, {"setting": setting, "provenance": provenance(), "rows": state["rows"]})
    unfinished.unlink()
    print(table(read_json(options.out)))


if __name__ == "__main__":
    sys.exit(command("moments.py", main, AGAIN))
