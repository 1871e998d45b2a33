"""A small real GPT-2 (4.3M parameters, its own BPE of 4096), for machines that have neither weights nor a GPU.

    python bench/paper/backbone.py --data FOLDER --out bench/paper/backbone

20 to 50 minutes on two cores with AVX512_BF16. Reads text/english.jsonl.gz and webnlg/ (backbone_data.py says what
of them), never E2E. Writes the model (fp16, loads as float32), the tokenizer, training.json and loss.png.
Interrupted, the same command goes on from the last checkpoint to the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

if not __package__:  # run as a file
    import as_file  # noqa: F401

from bench.harness import record as records
from bench.harness.command import command
from bench.paper.backbone_data import DataError, load_texts, train_tokenizer, training_blocks
from bench.paper.backbone_score import held_out_scores, quick_score, samples
from bench.paper.runs import move_in, save_tensors


@dataclass(frozen=True)
class Config:
    """Everything the weights depend on, beside the data and the number of threads."""

    vocab_size: int = 4096
    n_embd: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_positions: int = 512
    tokens: float = 3900 * 8 * 512
    batch: int = 8  # blocks of n_positions tokens a step
    lr: float = 2e-3
    warmup: int = 150  # steps
    decay: float = 0.2  # share of all steps, at the end, over which lr falls to 0
    weight_decay: float = 0.1  # matrices only
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 101
    bf16: bool = True
    compiled: bool = True

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.n_positions)))

    @property
    def decay_start(self) -> int:
        return self.steps - round(self.decay * self.steps)

    def lr_at(self, step: int) -> float:
        """Warm-up, constant, straight to 0. Until the decay it does not depend on `tokens`, so a run whose machine
        turns out slower or faster can be resumed with another budget and equals a run that had it from the start."""
        left = (self.steps - step) / max(1, self.steps - self.decay_start)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


def build_model(config: Config) -> GPT2LMHeadModel:
    torch.manual_seed(config.seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_positions=config.n_positions,
            activation_function="gelu_pytorch_tanh",  # gelu_new's formula as one kernel
            resid_pdrop=0.0,  # fewer than two passes over the texts: nothing to regularise
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def build_optimizer(model: GPT2LMHeadModel, config: Config) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def batch_at(blocks: np.ndarray, config: Config, step: int) -> Tensor:
    """[batch, n_positions + 1]: a function of the step alone, so resuming needs no generator state."""
    per_epoch = max(1, len(blocks) // config.batch)
    epoch, i = divmod(step, per_epoch)
    order = np.random.default_rng([config.seed, epoch]).permutation(len(blocks))
    return torch.from_numpy(blocks[order[i * config.batch : (i + 1) * config.batch]].astype(np.int64))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    save_tensors(path, state)


def load_checkpoint(path: Path, config: Config, data: dict[str, Any]) -> dict[str, Any]:
    """The state of an interrupted run, if it is this run's."""
    try:
        state = torch.load(path, weights_only=True)
        saved, step = dict(state["config"]), state["step"]
    except Exception as e:
        raise DataError(f"{path}: not a checkpoint of this script ({type(e).__name__}); --restart ignores it") from None
    asked = json.loads(json.dumps(asdict(config)))
    differing = [name for name in asked if saved.get(name) != asked[name]]
    if state["data"] != data["files"]:
        differing.append("data")
    if step <= min(config.decay_start, state["decay_start"]):  # so far the schedule's end has had no effect
        differing = [name for name in differing if name not in ("tokens", "decay")]
    if differing:
        raise DataError(f"{path}: from a run with other settings ({', '.join(differing)}); --restart ignores it")
    return state


def train(model: GPT2LMHeadModel, tokenizer: Tokenizer, texts: Any, config: Config, out: Path, state: Any, every: int):
    """Trains to the end from `state` (None: from the start); returns (curve, held-out curve, seconds, blocks)."""
    blocks = training_blocks(texts, tokenizer, config.n_positions, config.seed)
    optimizer = build_optimizer(model, config)
    curve: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    first, seconds = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds, curve, held_out = state["step"], state["seconds"], state["curve"], state["held_out"]

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            logits = model(batch[:, :-1], use_cache=False).logits  # [batch, n_positions, vocab]
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    step_loss = torch.compile(loss_of) if config.compiled else loss_of
    began, recent = time.perf_counter() - seconds, []
    bar = tqdm(total=config.steps, initial=first, unit="step", mininterval=2.0)
    for step in range(first, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)
        loss = step_loss(batch_at(blocks, config, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        bar.update()
        done = step + 1
        if done % every == 0 or done == config.steps:
            curve.append((done, sum(recent) / len(recent)))
            held_out.append((done, quick_score(model, tokenizer, texts)))
            recent, elapsed = [], time.perf_counter() - began
            rate = (done - first) * config.batch * config.n_positions / (elapsed - seconds)
            bar.set_postfix_str(f"loss {curve[-1][1]:.3f}, held out {held_out[-1][1]:.3f}, {rate:.0f} tokens/s")
            save_checkpoint(
                out / "checkpoint.pt",
                {
                    **{"step": done, "seconds": elapsed, "curve": curve, "held_out": held_out},
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "tokenizer": tokenizer.to_str(),
                    "config": json.loads(json.dumps(asdict(config))),
                    "decay_start": config.decay_start,
                    "data": texts.record["files"],
                },
            )
    bar.close()
    return curve, held_out, time.perf_counter() - began, len(blocks)


def save_model(model: GPT2LMHeadModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights rounded to fp16 on disk, the tied embedding once; config.json asks for float32 when loaded."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=model.config.n_positions,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def plot(folder: Path) -> None:
    """loss.png from training.json."""
    from matplotlib.figure import Figure

    record = json.loads((folder / "training.json").read_text())
    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    for name in ("train", "held_out"):
        steps, losses = zip(*record["loss_curve"][name], strict=True)
        tokens = [s * record["tokens_per_step"] / 1e6 for s in steps]
        axes.plot(tokens, losses, label=name.replace("_", " "))
    axes.set(xlabel="million tokens", ylabel="nats per token", ylim=(None, min(7.0, max(losses))))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=90)


def run(data: Path, out: Path, config: Config, every: int, restart: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, new = out / "checkpoint.pt", out / "new"
    if restart:
        checkpoint.unlink(missing_ok=True)
    elif (out / "training.json").exists() and not checkpoint.exists():
        print(f"{out / 'training.json'} is there: trained already; --restart trains anew")
        return
    texts = load_texts(data)
    state = load_checkpoint(checkpoint, config, texts.record) if checkpoint.exists() else None
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else train_tokenizer(texts, config.vocab_size)
    model = build_model(config)
    curve, held_out, seconds, blocks = train(model, tokenizer, texts, config, out, state, every)

    shutil.rmtree(new, ignore_errors=True)
    save_model(model, tokenizer, new)
    model = GPT2LMHeadModel.from_pretrained(new)  # what is scored is what is shipped: rounded to fp16
    trained = config.steps * config.batch * config.n_positions
    record = {
        "config": asdict(config),
        "parameters": model.num_parameters(),
        "steps": config.steps,
        "tokens_per_step": config.batch * config.n_positions,
        "tokens": trained,
        "epochs": round(trained / (blocks * config.n_positions), 3),
        "tokens_in_texts": blocks * config.n_positions,
        "optimizer": "AdamW; lr: linear warm-up, constant, linear to 0 over the last share `decay`",
        "data": texts.record,
        "held_out": held_out_scores(model, tokenizer, texts),
        "samples": samples(model, tokenizer, texts, config.seed),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(trained / seconds),
        "device": f"{records.cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "loss_curve": {"columns": ["step", "nats per token"], "train": curve, "held_out": held_out},
    }
    (new / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    plot(new)
    move_in(new, out, "training.json")
    checkpoint.unlink(missing_ok=True)
    for name, score in record["held_out"].items():
        print(f"{name}: perplexity {score['per_token']:.2f} per token, {score['per_word']:.1f} per word")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("PREFIXATTN_DATA"), help="or PREFIXATTN_DATA")
    parser.add_argument("--out", type=Path, default=Path("build/backbone"))
    parser.add_argument("--tokens", type=float, default=Config.tokens)
    parser.add_argument("--seed", type=int, default=Config.seed)
    parser.add_argument("--no-compile", action="store_true", help="half the speed, but needs no C++ compiler")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints and points of the curve")
    parser.add_argument("--restart", action="store_true", help="ignore a checkpoint or a finished run in --out")
    args = parser.parse_args(argv)
    config = Config(tokens=args.tokens, seed=args.seed, compiled=not args.no_compile)

    def work() -> None:
        if args.data is None:
            raise DataError("no data folder: give --data or set PREFIXATTN_DATA")
        if not math.isfinite(args.tokens) or args.tokens <= 0 or args.every < 1:
            raise DataError(f"--tokens and --every must be positive, got {args.tokens} and {args.every}")
        run(Path(args.data), args.out, config, args.every, args.restart)

    return command("backbone.py", work, f"the same command goes on from {args.out / 'checkpoint.pt'}")


if __name__ == "__main__":
    sys.exit(main())
