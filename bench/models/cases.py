"""The cases of bench_models.py: models of base size at a CPU's batches, and the baselines that ours is compared with.

Sizes and lengths are not the papers' (families.py has those) but what two cores step through in seconds: batch 8;
128 tokens, the first half a record without labels; sources of 128 and targets of 32 tokens; images of 224 pixels.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import prefixattn
from bench.models import baselines
from bench.models.baselines import Baseline, Frozen, OursLabelled
from bench.models.families import GPT2, IGNORED, Bart, Family, TimmViT, ViT
from prefixattn.attach.hf.interface import PrefixCall


class GPT2Small(GPT2):
    name = "gpt2-small"

    def __init__(self, tiny: bool) -> None:
        super().__init__(tiny)
        self.batch, self.tokens = (2, 12) if tiny else (8, 128)

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes if self.tiny else {"layers": 12, "heads": 12, "width": 768}

    @property
    def vocabulary(self) -> int:
        return 50 if self.tiny else 50257

    def inputs(self) -> dict[str, Tensor]:
        """ids, labels [B, S]."""
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(1, self.vocabulary, (self.batch, self.tokens), generator=generator)
        record = torch.arange(self.tokens) < self.tokens * 29.5 / 56.3  # the share of E2E's means
        return {"ids": ids, "labels": ids.masked_fill(record, IGNORED)}


class Llama(GPT2Small):
    name, KV_HEADS = "llama-gqa", 4

    @property
    def sizes(self) -> dict[str, int]:
        return {"layers": 2, "heads": 8, "width": 64} if self.tiny else super().sizes

    def build(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        layers, heads, width = self.sizes.values()
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=width,
            intermediate_size=8 * width // 3,  # three matrices, as many numbers as GPT-2's two
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=self.KV_HEADS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    def embeddings(self, model: Any) -> list[nn.Module]:
        return [model.model.embed_tokens]

    def attentions(self, model: Any) -> list[nn.Module]:
        return [layer.self_attn for layer in model.model.layers]


class BartBase(Bart):
    name = "bart-base"

    def __init__(self, tiny: bool) -> None:
        super().__init__(tiny, source=512 if tiny else 128)
        self.batch, self.target = (2, 7) if tiny else (8, 32)

    @property
    def sizes(self) -> dict[str, int]:
        return super().sizes if self.tiny else {"layers": 6, "heads": 12, "width": 768}


class SmallBatchBart(Bart):
    def __init__(self, tiny: bool) -> None:
        super().__init__(tiny, source=512)
        self.batch = 2  # the paper's 16 would take minutes a step


class SmallBatchViT(ViT):
    def __init__(self, tiny: bool) -> None:
        super().__init__(tiny)
        self.batch = 2 if tiny else 8


class SmallBatchTimmViT(TimmViT):
    def __init__(self, tiny: bool) -> None:
        super().__init__(tiny)
        self.batch = 2 if tiny else 16  # the paper's 64 would take half a minute a step


class Empty(Frozen):
    """Attached, but no layer gets a prefix: all of attach's way through the model, and our attention over own keys."""

    def add(self) -> nn.Module:
        prefix = prefixattn.attach(self.model, prefixattn.PrefixConfig(length=1, share="none"))
        adapter: Any = prefix._adapter
        # of this thread's passes, as attach's own are told
        thread = adapter.thread if hasattr(adapter, "thread") else adapter.passes
        thread.override = PrefixCall({}, 0.0)
        return super().add()


class FirstLayer(Baseline):
    """A prefix of one row on the first layer alone (of each kind of attention), free keys and values."""

    def add(self) -> nn.Module:
        return prefixattn.attach(self.model, prefixattn.PrefixConfig(length=1, share="none", layers="first"))


BASELINES: dict[str, Callable[[Family, str, torch.dtype, int], Baseline]] = {
    **baselines.BASELINES,
    "ours, labelled positions": OursLabelled,
    "no prefix": Empty,
    "P 1, first layer": FirstLayer,
}
LANGUAGE = ("frozen", "ours", "ours, labelled positions", "peft")
ATTACHED = ("frozen", "no prefix", "P 1, first layer")


@dataclass(frozen=True)
class Case:
    """What is timed together; P = 0: what attach costs without a prefix."""

    make: Callable[[bool], Family]
    P: int
    baselines: tuple[str, ...]


CASES = {
    "gpt2-small P20": Case(GPT2Small, 20, LANGUAGE),
    "llama-gqa P20": Case(Llama, 20, LANGUAGE),
    "bart-base P20": Case(BartBase, 20, ("frozen", "ours", "original", "peft")),
    "vit-b16 P10": Case(SmallBatchViT, 10, ("frozen", "ours", "original")),
    "vit-b16 P200": Case(SmallBatchViT, 200, ("frozen", "ours", "original")),
    "gpt2-small P0": Case(GPT2Small, 0, ATTACHED),
    "llama-gqa P0": Case(Llama, 0, ATTACHED),
    "bart-base P0": Case(BartBase, 0, ATTACHED),
    "vit-b16 P0": Case(SmallBatchViT, 0, ATTACHED),
}
# the papers' language models and lengths; GPT-2 with E2E's batch
CASES |= {
    "gpt2-medium P5": Case(GPT2, 5, (*LANGUAGE, "original")),
    "bart-large P200": Case(SmallBatchBart, 200, ("frozen", "ours", "original")),
}
if importlib.util.find_spec("timm"):
    CASES |= {f"vit-b16, timm, P{P}": Case(SmallBatchTimmViT, P, ("frozen", "ours", "original")) for P in (10, 50, 200)}
    CASES["vit-b16, timm, batch 64, P50"] = Case(TimmViT, 50, ("frozen", "ours", "original"))  # the paper's batch; 9 GB
