"""E2E table-to-text: prefixes that share a network between key and value (Deep-share) against those that do not.

    python bench/paper/e2e.py --preset demo                       # a subset, about 6 min on two cores
    python bench/paper/e2e.py --preset small --data FOLDER        # all of E2E, a 4M GPT-2, an hour on two cores
    python bench/paper/e2e.py --preset paper --model gpt2-medium  # the paper's run, hours on one GPU

Paper (gpt2-medium, 5 epochs), BLEU/NIST/METEOR/ROUGE-L/CIDEr: Deep-share 69.9/8.78/46.3/71.5/2.45, No-share
68.0/8.61/45.8/71.0/2.41. The small GPT-2 cannot reach them; its own numbers are in results/e2e-small.json.

Methods: deep (Deep-share), simple (one vector through the frozen projections), none (free keys and values, random),
none-word (free, from the activations of a real word, as the published No-share runs in fact were), original (Deep-share
as the published code computes it, original.py), deep-all (deep with logits at every position, as original has them:
these two compare like for like), frozen (no prefix). Each runs in a process of its own, on the same batches. Kill it
whenever you like: the same command goes on to the same numbers.

Differs from the authors' code: table_to_text.py and original.py say where they do; here: the learning rates of the
small GPT-2 (LEARNING_RATES), the tokeniser of the targets (e2e_data.py), no evaluation on dev while training (there
every 5,000 steps; the last state is used, as here). The published No-share runs have the length of their word, 1;
`none` has the P of the others.
"""

import argparse
import json
import math
import os
import random
import shlex
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import e2e_data
from bench.harness.command import command, environment, leave_signals_to_the_parent, together
from plot_runs import METRICS, figure, table
from runs import (
    Refusal,
    digest,
    finished,
    locked,
    parent_alive,
    provenance,
    read_json,
    room,
    thinned,
    write_json,
    write_text,
)

HERE = Path(__file__).resolve().parent
MODEL_FILES = ("config", "tokenizer", "tokenizer_config", "vocab", "merges")  # beside the weights
WEIGHTS = (".safetensors", ".bin")
CHECK = "check"
METHODS = ("frozen", "deep", "simple", "none", "none-word", "deep-all", "original")
PAPER = {
    "paper: Deep-share": {"BLEU": 0.699, "NIST": 8.78, "METEOR": 0.463, "ROUGE_L": 0.715, "CIDEr": 2.45},
    "paper: No-share": {"BLEU": 0.680, "NIST": 8.61, "METEOR": 0.458, "ROUGE_L": 0.710, "CIDEr": 2.41},
}
LEARNING_RATES = {
    # paper: published for gpt2-medium; simple share has none for language and takes No-share's, both being free vectors
    "paper": {"deep": 1e-4, "deep-all": 1e-4, "original": 1e-4, "none": 1e-2, "none-word": 1e-2, "simple": 1e-2},
    # the 4M GPT-2, searched on dev: 4,000 rows, 400 steps, nats per token of 300 rows; deep 1e-3 2.656, 2e-3 2.668,
    # 4e-3 2.867; none 1e-1 2.691, 3e-1 2.672, 1 3.320; simple 1e-2 4.235, 3e-2 3.973, 1e-1 4.070, 3e-1 4.368
    "small": {"deep": 1e-3, "deep-all": 1e-3, "original": 1e-3, "none": 3e-1, "none-word": 3e-1, "simple": 3e-2},
}


@dataclass(frozen=True)
class Config:
    preset: str
    model: str = str(HERE / "backbone")
    rates: str = "small"  # row of LEARNING_RATES
    methods: tuple[str, ...] = ("frozen", "deep", "simple", "none", "original")
    lr: dict[str, float] = field(default_factory=dict)  # over LEARNING_RATES
    data: str | None = None
    subset: int | None = None  # training rows
    epochs: int = 1
    prompts: int | None = None  # test records to decode
    dev: int = 1_000  # rows for the dev loss
    logits: str = "labelled"  # "all": at positions without a label too, as `original` and `deep-all` always do
    length: int = 5  # P, the papers'
    hidden: int = 512  # mid_dim, the papers'
    batch: int = 10
    seed: int = 101
    beams: int = 5
    max_new: int = 100
    threads: int = 2
    parallel: int = 1  # methods at a time; from 2 their times tell nothing of them, and the table leaves them out
    checkpoint_every: int = 200

    def rate(self, method: str) -> float:
        return self.lr.get(method, LEARNING_RATES[self.rates].get(method, 0.0))


PRESETS = {
    "demo": {"subset": 4_000, "prompts": 60, "dev": 300, "parallel": 2},
    "small": {"methods": ("frozen", "deep", "simple", "none", "deep-all", "original"), "parallel": 2},
    "paper": {"model": "gpt2-medium", "rates": "paper", "epochs": 5, "checkpoint_every": 1_000,
              "methods": ("deep", "none", "none-word", "original")},
}  # fmt: skip
MOST = 2**31 - 1
BOUNDS = {  # least and most of a number on the command line
    "subset": (1, MOST), "epochs": (1, MOST), "prompts": (0, MOST), "dev": (1, MOST), "length": (1, MOST),
    "hidden": (1, MOST), "batch": (1, MOST), "seed": (0, 2**32 - 1), "beams": (1, MOST), "max_new": (1, MOST),
    "threads": (1, 1_024), "parallel": (1, 1_024), "checkpoint_every": (1, MOST),
}  # fmt: skip


# --- one method, in a process of its own ---


def work(method: str, config: Config, run: Path, parent: int | None = None) -> None:
    """Trains and decodes one method and leaves run/<method>.json; CHECK only loads the model."""
    import time

    import torch

    import table_to_text as t2t
    from methods import load_model, make_method

    alive = parent_alive(parent)
    torch.set_num_threads(config.threads)
    data = e2e_data.load(config.data)
    model, tokenizer = load_model(config.model)
    if method == CHECK:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = digest(*(memoryview(t.numpy()).cast("B") for t in model.state_dict().values()))
    model.to(device)
    fingerprint = digest(run_key(config, data), method, weights)
    train, sources, _ = selected(data, config)
    made = make_method(method, model, tokenizer, config.length, config.hidden, config.seed, config.logits == "labelled")
    limit = room(model.config.n_positions, max(config.length, made.length), config.max_new)
    samples = t2t.encode(tokenizer, train, limit) if method != "frozen" else []
    dev = t2t.encode(tokenizer, data.dev[: config.dev], limit)
    del train
    schedule = t2t.Schedule(lr=config.rate(method), epochs=config.epochs, batch=config.batch, seed=config.seed,
                            checkpoint_every=config.checkpoint_every)  # fmt: skip
    pad, done, trained = tokenizer.eos_token_id, t2t.Training(), sum(p.numel() for p in made.prefix.parameters())
    if method != "frozen":
        state = run / f"{method}.pt"
        done = t2t.train(made, samples, schedule, pad, state, fingerprint, f"{method:>9} train", alive)
    dev_loss = t2t.mean_token_loss(made, dev, config.batch, pad, device)
    start, texts = time.perf_counter(), []
    if sources:
        progress = run / f"{method}.decoded.json"
        texts = t2t.decode(made, tokenizer, sources, progress, fingerprint, device, limit, config.beams,
                           config.max_new, label=f"{method:>9} decode", alive=alive)  # fmt: skip
    result = {
        "method": method,
        "lr": schedule.lr or None,
        "trained": trained,
        "kept": made.kept,
        "steps": len(done.losses),
        "final_loss": done.losses[-1] if done.losses else None,
        "last_100_loss": sum(done.losses[-100:]) / len(done.losses[-100:]) if done.losses else None,
        "dev_loss": dev_loss,
        "seconds_per_step": done.seconds_per_step if done.losses else None,
        "seconds_training": sum(done.seconds),
        "seconds_decoding": time.perf_counter() - start,  # of this process: less after a resumption
        "peak_mib": done.peak_mib if done.losses else None,
        "memory": done.memory,
        "weights_sha256": weights,
        "losses": thinned(done.losses),
        "texts": texts,
    }
    write_json(run / f"{method}.json", {"fingerprint": fingerprint, **result})


# --- all of them ---


def selected(data: e2e_data.Data, config: Config) -> tuple[list[e2e_data.Pair], list[str], list[list[str]]]:
    """Training rows, test sources and their references, the subsets being functions of the seed."""
    train = data.train
    sources, references = e2e_data.grouped(data.test)
    if config.subset is not None and config.subset < len(train):
        train = [train[i] for i in sorted(random.Random(config.seed).sample(range(len(train)), config.subset))]
    if config.prompts is not None and config.prompts < len(sources):
        kept = sorted(random.Random(config.seed).sample(range(len(sources)), config.prompts))
        sources, references = [sources[i] for i in kept], [references[i] for i in kept]
    return train, sources, references


def run_key(config: Config, data: e2e_data.Data) -> str:
    """Names all that the numbers of one method depend on; not which methods were asked for."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("methods", "data", "preset", "model")}
    folder = Path(config.model)
    files = [path for path in sorted(folder.glob("*")) if path.suffix in WEIGHTS or path.stem in MODEL_FILES]
    return digest(settings, data.sha256, *(files or [config.model]))


def job(method: str, run: Path) -> list[str]:
    """The command of the process that does `method`."""
    return [sys.executable, str(Path(__file__).resolve()), "--worker", method, "--run", str(run),
            "--parent", str(os.getpid())]  # fmt: skip


def score_all(runs: list[dict[str, Any]], references: list[list[str]]) -> list[str]:
    """Adds scores to each run that has texts; returns notes for the reader."""
    if not any(run["texts"] for run in runs):
        return ["nothing was decoded, so there are no scores"]
    try:
        from e2e_metrics import score
    except ImportError as error:
        return [f"no scores: {error}"]
    notes: list[str] = []
    for run in runs:
        scores = score(references, run["texts"])
        run["scores"] = {metric: scores.get(metric) for metric in METRICS}
        found = scores.get("notes") or []
        notes += [note for note in ([found] if isinstance(found, str) else found) if note not in notes]
    return notes


def model_name(name: str) -> str:
    """A folder by its last part: where it lies on this machine is nobody's business."""
    folder = Path(os.path.expanduser(name))
    return folder.resolve().name if folder.is_dir() else name


def shown_command(arguments: list[str]) -> str:
    """The command to paste, with DATA and OUT for the places on this machine."""
    shown: list[str] = []
    for word in arguments:
        shown += word.split("=", 1) if word.startswith("--") else [word]
    for at, option in enumerate(shown[:-1]):
        if option in ("--data", "--out") and shown[at + 1] != e2e_data.GENERATED:
            shown[at + 1] = option[2:].upper()
        elif option == "--model":
            shown[at + 1] = model_name(shown[at + 1])
    return f"python bench/paper/e2e.py {shlex.join(shown)}".rstrip()


def run_all(config: Config, out: Path, data: e2e_data.Data, shown: str) -> dict[str, Any]:
    key = run_key(config, data)
    run = out.with_name(f"{out.stem}.{key[:10]}.run")
    with locked(run):
        results = run_locked(config, out, data, shown, run, key)
        shutil.rmtree(run)
    return results


def run_locked(config: Config, out: Path, data: e2e_data.Data, shown: str, run: Path, key: str) -> dict[str, Any]:
    write_json(run / "config.json", asdict(config))
    begun_with = provenance()  # before results, which may be tracked, make the tree dirty
    train, sources, references = selected(data, config)
    files = {method: run / f"{method}.json" for method in config.methods}
    todo = [method for method, path in files.items() if not path.exists()]
    for method in set(files) - set(todo):  # before the hours that the others take
        finished(files[method], key, method, len(sources))
    if todo:  # so that a bad model is refused once, and not by each method
        together({CHECK: job(CHECK, run)}, 1, environment(config.threads))
    together({method: job(method, run) for method in todo}, config.parallel, environment(config.threads))
    runs = [finished(path, key, method, len(sources)) for method, path in files.items()]
    if len({found["weights_sha256"] for found in runs}) > 1:
        raise Refusal(f"{run}: its methods ran on different weights of {config.model}; delete it and start again")
    notes = score_all(runs, references)
    for found in runs:
        texts = found.pop("texts")
        every = max(1, len(texts) // 5)
        found["samples"] = [
            {"source": sources[i], "output": texts[i], "reference": references[i][0]}
            for i in range(0, len(texts), every)
        ][:5]
        if texts:
            write_text(out.with_name(f"{out.stem}.{found['method']}.txt"), "\n".join(texts) + "\n")
    results = {
        "name": out.stem,
        "command": shown,
        "config": {**asdict(config), "model": model_name(config.model), "data": data.source},
        "data": {"where": data.where, "sha256": data.sha256, "trained_on": len(train), "decoded": len(sources)},
        "provenance": begun_with,
        "methods": runs,
        "paper": PAPER if config.rates == "paper" else None,
        "notes": notes,
    }
    write_json(out, results)
    figure(results, out.with_suffix(".png"))
    return results


def parse(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument(
        "--data", help="folder with e2e/ or the CSVs (default: PREFIXATTN_DATA); 'generated' for our own records"
    )
    parser.add_argument("--model", help="folder or hub name of a GPT-2 (default: bench/paper/backbone)")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--subset", type=int, help="training rows")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--prompts", type=int, help="test records to decode; 0 decodes none")
    parser.add_argument("--dev", type=int, help="dev rows for the dev loss")
    parser.add_argument("--logits", choices=("labelled", "all"), help="positions whose logits our methods compute")
    parser.add_argument("--length", type=int, help="prefix length P")
    parser.add_argument("--hidden", type=int, help="width of the network of deep")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--beams", type=int)
    parser.add_argument("--max-new", type=int, help="tokens to decode at most")
    parser.add_argument("--threads", type=int, help="CPU threads of a method (default: its share of all)")
    parser.add_argument("--parallel", type=int, help="methods at a time (default: the preset's)")
    parser.add_argument("--checkpoint-every", type=int, help="steps between checkpoints")
    parser.add_argument("--lr", nargs="+", default=[], metavar="METHOD=LR", help="over the preset's learning rates")
    parser.add_argument("--out", type=Path, help="results JSON (default: bench/paper/results/e2e-PRESET.json)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    config = replace(Config(given.preset), **PRESETS[given.preset])
    for name, (least, most) in BOUNDS.items():
        value = getattr(given, name)
        if value is not None and not least <= value <= most:
            raise Refusal(f"--{name.replace('_', '-')} is {value}, expected {least} to {most}")
    names = ("model", "logits", *BOUNDS)
    config = replace(config, **{name: getattr(given, name) for name in names if getattr(given, name) is not None})
    methods = tuple(dict.fromkeys(given.methods)) if given.methods else config.methods
    threads = given.threads or max(1, len(os.sched_getaffinity(0)) // config.parallel)
    data = given.data or os.environ.get("PREFIXATTN_DATA") or None
    rates = parse_rates(given.lr, methods)
    return given, replace(config, lr=rates, threads=threads, methods=methods, data=data)


def parse_rates(entries: list[str], methods: tuple[str, ...]) -> dict[str, float]:
    rates = {}
    for entry in entries:
        method, _, number = entry.partition("=")
        try:
            rate = float(number)
        except ValueError:
            raise Refusal(f"--lr {entry}: expected METHOD=NUMBER, as in deep=1e-3") from None
        if method not in METHODS:
            raise Refusal(f"--lr {entry}: no method {method!r}; there are {', '.join(METHODS)}")
        if method not in methods or method == "frozen":
            raise Refusal(f"--lr {entry}: {method} is not trained in this run of {', '.join(methods)}")
        if not (math.isfinite(rate) and rate > 0):
            raise Refusal(f"--lr {entry}: expected a finite number above 0")
        rates[method] = rate
    return rates


def checked_model(config: Config) -> str:
    """The model with ~ expanded; refused where a look at the folder already tells that it cannot do."""
    name = os.path.expanduser(config.model)
    if (name.startswith((os.sep, ".", "~")) or name.count("/") > 1) and not Path(name).is_dir():
        raise Refusal(f"--model {name}: no such folder; bench/paper/backbone.py trains one, or give a hub name")
    positions = None
    with suppress(OSError, ValueError, AttributeError):  # of a hub's model, or damaged: the worker will say
        positions = json.loads((Path(name) / "config.json").read_text(encoding="utf-8")).get("n_positions")
    if isinstance(positions, int):
        room(positions, config.length, config.max_new)
    return name


def checked_out(given: Path | None, preset: str) -> Path:
    out = (given or HERE / "results" / f"e2e-{preset}.json").resolve()
    if out.suffix != ".json" or out.is_dir():  # the figure takes the name with .png
        raise Refusal(f"--out {given}: expected the name of a file that ends in .json")
    return out


def main(arguments: list[str] | None = None) -> int:
    return command("e2e.py", lambda: run_command(sys.argv[1:] if arguments is None else arguments))


def run_command(arguments: list[str]) -> None:
    given, config = parse(arguments)
    if given.worker:
        leave_signals_to_the_parent()
        saved = read_json(given.run / "config.json")
        return work(given.worker, Config(**{**saved, "methods": tuple(saved["methods"])}), given.run, given.parent)
    config, out = replace(config, model=checked_model(config)), checked_out(given.out, config.preset)
    data = e2e_data.load(config.data)
    print(data.where, flush=True)
    # the workers must not look for the data again, and may find other than these
    config = replace(config, data=str(data.root) if data.root else data.source)
    print("\n" + table(run_all(config, out, data, shown_command(arguments))))
    print(f"results: {out.name} and {out.stem}.png{remark_on(data)}")


def remark_on(data: e2e_data.Data) -> str:
    return "; of generated records, not of E2E" if data.source == e2e_data.GENERATED else ""


if __name__ == "__main__":
    sys.exit(main())
