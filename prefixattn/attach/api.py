"""`attach` and `load`: a prefix into a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from prefixattn.attach.adapter import making
from prefixattn.attach.bank import PrefixBank, read
from prefixattn.attach.find import make_adapter
from prefixattn.attach.init import initialise
from prefixattn.attach.plus import PrefixPlus
from prefixattn.attach.prefix import Prefix
from prefixattn.prefixes.config import INITS, PrefixConfig
from prefixattn.prefixes.networks import make_encoder
from prefixattn.prefixes.plus import Memories, PrefixPlusConfig


@overload
def attach(model: nn.Module, config: PrefixConfig, tokenizer: Any = None) -> Prefix: ...


@overload
def attach(model: nn.Module, config: PrefixPlusConfig, tokenizer: Any = None) -> PrefixPlus: ...


@making()
def attach(model: nn.Module, config: PrefixConfig | PrefixPlusConfig, tokenizer: Any = None) -> Prefix | PrefixPlus:
    """Puts a trainable prefix into `model` and freezes the model.

    Some tokens, an image or a silence are run to see that the prefix reaches the output; otherwise the model is left as
    it was and NotImplementedError says why.

    Args:
        model: A model of transformers whose layers call its attention interface (GPT-2, BART, T5, LLaMA, Mistral,
            Qwen, Gemma, BERT, ViT, Whisper and others), with or without a head, or a vision transformer of timm. It
            stays in the mode, training or evaluation, it is in. One that has prefixes gets another, which becomes the
            active one.
        config: The prefix, see `PrefixConfig`; or Prefix-Tuning+, see `PrefixPlusConfig`.
        tokenizer: Turns `config.init` into token ids, if that is a text.

    Returns:
        The prefix; with `config.count` a `PrefixBank`. Its `parameters()` are what an optimizer takes; its `config`
        says also what was left to the model, and its `config.length` is the number of tokens of `config.init`, if that
        is a text or token ids.
    """
    if not isinstance(config, (PrefixConfig, PrefixPlusConfig)):
        raise ValueError(f"config is a {type(config).__name__}, expected a PrefixConfig or a PrefixPlusConfig")
    adapter = make_adapter(model)
    if isinstance(config, PrefixPlusConfig):
        config = adapter.resolve(config)
        plus = PrefixPlus(config, adapter, Memories(config, adapter.geometry)).to(adapter.device)
        adapter.install(plus)
        return plus
    config = adapter.resolve(config)
    activations = None
    if config.init not in INITS:
        ids = _token_ids(config.init, tokenizer)
        config = replace(config, length=len(ids), init=tuple(ids))
        activations = adapter.activations(ids)[list(config.slots(adapter.geometry.kinds))].contiguous()
    encoder = make_encoder(config, adapter.geometry).to(adapter.device)
    initialise(encoder, config, adapter.defaults.bound, activations)
    prefix = Prefix(config, adapter, encoder) if config.count is None else PrefixBank(config, adapter, encoder)
    prefix.to(adapter.device)
    adapter.install(prefix)
    return prefix


@making()
def load(model: nn.Module, folder: str | Path) -> Any:
    """Attaches what is saved in `folder` to `model`: a prefix or bank of `save_pretrained`'s, or a PEFT adapter.

    An unfolded prefix can be trained further, and so can a PEFT adapter (PREFIX_TUNING, CARTRIDGE), whose network PEFT
    does not save: it becomes share="none", and rows that a CARTRIDGE freezes are trained like the others. In layers
    with a sliding window it slides out of sight as it does in PEFT: its config has prefix_in_window=True. The model is
    left as it is if anything is wrong with the files or they do not fit it; nothing is ever unpickled.
    """
    adapter = make_adapter(model)
    prefix = read(adapter, folder)
    adapter.install(prefix.to(adapter.device))
    return prefix


def _token_ids(init: Any, tokenizer: Any) -> list[int]:
    if not isinstance(init, str):
        return list(init)
    if tokenizer is None:
        raise ValueError(
            f"init is the text {init!r}: attach needs the tokenizer too, or token ids in place of the text"
        )
    # A leading space, as for a word inside a sentence.
    ids = tokenizer(" " + init.strip(), add_special_tokens=False)["input_ids"]
    return [int(i) for i in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)]
