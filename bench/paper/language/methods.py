"""What is trained on a frozen language model: our prefixes, the published way, and the baselines of the tables."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

import prefixattn
from bench.models.original import OriginalPrefix
from bench.paper.language import ranks, shared_prompts
from bench.paper.language.backbones import Backbone
from bench.paper.runs import Refusal

WORD = "summarize"  # of the published No-share runs, whose number of tokens becomes P
# input_ids and labels, both [B, S]; of packed sequences the position_ids, of an encoder-decoder the attention_mask too
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Choices:
    """Of a method: what of them it takes, its row in METHODS says."""

    length: int = 5  # P
    hidden: int = 512  # of Deep-share's network (mid_dim)
    positions: str = "model"  # or "shifted", "unshifted": whether position ids start at P
    labelled: bool = True  # logits at labelled positions only
    last: int = 2  # blocks of Partial-k
    reduction: int = 8  # of an adapter: the model's width over its own
    rank: int = 8  # of LoRA
    moments: str = "float32"  # of a prefix of this library: what its optimizer keeps


class Tuned:
    """A model in which something is to be trained, `added` or of its own; in eval() throughout, as published.

    `whole`: the model's dropout is on in training (full fine-tuning). `checkpointing`: activations of the layers are
    computed again in the backward.
    """

    whole = checkpointing = False

    def __init__(self, backbone: Backbone, choices: Choices) -> None:
        self.backbone, self.choices = backbone, choices
        self.cached = not backbone.seq2seq  # a prompt's cache may stand for the prompt
        self.packs = not backbone.seq2seq  # a batch may be packed sequences
        self.model: Any = backbone.model.requires_grad_(False).eval()
        self.added = nn.ModuleDict()
        self.length = 0  # positions of the model that it takes

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by name."""
        inside = {id(p) for p in self.model.parameters()}
        yield from ((f"model.{name}", p) for name, p in self.model.named_parameters() if p.requires_grad)
        for name, p in self.added.named_parameters():
            if p.requires_grad and id(p) not in inside:
                yield f"added.{name}", p

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters():
                p.copy_(state[name])

    def numbers(self) -> dict[str, int]:
        """How many are trained, and how many are to be kept once they are."""
        trained = sum(p.numel() for _, p in self.parameters())
        return {"trained": trained, "kept": self.kept(trained)}

    def kept(self, trained: int) -> int:
        return trained

    def train(self, training: bool) -> None:
        self.model.train(training and self.whole)
        self.added.train(training)
        if self.checkpointing:  # which a layer does in training only; its dropout asks itself, and stays off
            for module in self.model.modules():
                if isinstance(module, GradientCheckpointingLayer):
                    module.training = training

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in self.parameters()], **options)

    def average(self) -> None:
        """Gradients over the processes that train together."""
        ranks.average([p.grad for _, p in self.parameters() if p.grad is not None])

    def loss(self, batch: Batch) -> Tensor:
        """The sum over labelled tokens of the cross entropy."""
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if not self.choices.labelled:
            caching = "past_key_values" in inputs
            return self.summed(self.model(**inputs, labels=labels, use_cache=caching), labels)
        caching = "past_key_values" in inputs
        return prefixattn.labelled_loss(self.model, labels, num_items_in_batch=1.0, use_cache=caching, **inputs)

    def summed(self, out: Any, labels: Tensor) -> Tensor:
        """The model's mean as a sum; of no label, whose mean is nan, 0."""
        predicted = labels if self.backbone.seq2seq else labels[:, 1:]
        count = (predicted != -100).sum()
        return out.loss * count if count else out.logits.sum() * 0.0

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """[B, S], padded on the left where the mask is 0, to [B, new]: what is written, without the prompt."""
        if self.cached and input_ids.shape[1] > 1:  # else transformers reads it once for each beam
            past = shared_prompts.read(self.model, input_ids[:, :-1], attention_mask[:, :-1])
            past.batch_repeat_interleave(options.get("num_beams", 1))
            options["past_key_values"] = past
        out = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
        return out if self.backbone.seq2seq else out[:, input_ids.shape[1] :]


class Prefixed(Tuned):
    """A prefix of this library; of share="deep" the optimizer never builds the large gradient."""

    def __init__(self, backbone: Backbone, choices: Choices, config: Any) -> None:
        super().__init__(backbone, choices)
        try:
            self.prefix = prefixattn.attach(self.model, config)
        except (NotImplementedError, ValueError) as error:
            raise Refusal(" ".join(str(error).split())) from None
        self.added["prefix"] = self.prefix
        self.length = getattr(self.prefix.config, "length", 0)

    def kept(self, trained: int) -> int:
        if isinstance(self.prefix, prefixattn.Prefix):
            return int(self.prefix.num_parameters(kept=True))
        return trained

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        return prefixattn.FactoredAdamW(self.prefix, moments=self.choices.moments, **options)

    def average(self) -> None:
        """Nothing: a prefix's gradients are those of all processes once `backward` returns."""


class Original(Tuned):
    """Deep-share as the published code computes it (original.py): logits at every position, as there."""

    def __init__(self, backbone: Backbone, choices: Choices) -> None:
        causal("original", backbone)
        super().__init__(backbone, choices)
        self.cached = self.packs = False
        self.model.set_attn_implementation("eager")
        self.added["prefix"] = self.prefix = OriginalPrefix(self.model, choices.length, choices.hidden)
        self.length = choices.length

    def kept(self, trained: int) -> int:
        return self.prefix.kept

    def loss(self, batch: Batch) -> Tensor:
        past = self.prefix.cache(len(batch["labels"]), self.model.config)
        out = self.model(input_ids=batch["input_ids"], labels=batch["labels"], past_key_values=past, use_cache=True)
        return self.summed(out, batch["labels"])

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        # P placeholder ids tell transformers 5 that the cache already holds P positions; they are never embedded
        ahead = input_ids.new_zeros(len(input_ids), self.length)
        past = self.prefix.cache(len(input_ids) * options.get("num_beams", 1), self.model.config)
        ids, mask = torch.cat([ahead, input_ids], 1), torch.cat([ahead + 1, attention_mask], 1)
        return super().generate(ids, mask, past_key_values=past, **options)


class Wrapped(Tuned):
    """A method of PEFT that wraps the model: its own prefix-tuning, prompt tuning."""

    def __init__(self, backbone: Backbone, choices: Choices, config: Any) -> None:
        from peft import get_peft_model

        causal("PEFT's prefix and prompt tuning", backbone)
        super().__init__(backbone, choices)
        self.cached = self.packs = False
        self.length = choices.length
        self.model = get_peft_model(self.model, config).eval()

    def kept(self, trained: int) -> int:
        """Of a network what it makes: P rows of every layer's keys and values."""
        [encoder] = self.model.prompt_encoder.values()
        return self.length * int(encoder.transform[-1].out_features) if hasattr(encoder, "transform") else trained

    def loss(self, batch: Batch) -> Tensor:
        mask = torch.ones_like(batch["input_ids"])
        out = self.model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"])
        return self.summed(out, batch["labels"])


class Adapted(Tuned):
    """Houlsby's adapters: a bottleneck with a residual behind each attention and each MLP, zero at first."""

    def __init__(self, backbone: Backbone, choices: Choices) -> None:
        causal("adapter", backbone)
        super().__init__(backbone, choices)
        width = self.model.config.hidden_size
        self.added["adapters"] = adapters = nn.ModuleList()
        for block in blocks(self.model):
            for part in (getattr(block, "self_attn", None) or block.attn, block.mlp):
                adapters.append(adapter := Adapter(width, max(1, width // choices.reduction)))
                part.register_forward_hook(adapter.behind)


class Adapter(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        nn.init.normal_(self.down.weight, std=0.02)
        for p in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(nn.functional.gelu(self.down(x)))

    def behind(self, part: nn.Module, args: Any, out: Any) -> Any:
        return (self(out[0]), *out[1:]) if isinstance(out, tuple) else self(out)


# --- the names of the tables ---


def causal(name: str, backbone: Backbone) -> None:
    if backbone.seq2seq:
        raise Refusal(f"{name}: for causal models; the tables have it for none with an encoder")


def blocks(model: Any) -> nn.ModuleList:
    """The layers of a causal model."""
    found = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    layers = next((each for each in found if len(each) == model.config.num_hidden_layers), None)
    if layers is None:
        raise Refusal(f"{type(model).__name__}: its {model.config.num_hidden_layers} layers are in no list of them")
    return layers


def _prefix(share: str, **more: Any) -> Callable[[Backbone, Choices], Tuned]:
    def make(backbone: Backbone, choices: Choices) -> Tuned:
        own = dict(more)
        if share == "deep":
            own["hidden"] = choices.hidden
        if choices.positions != "model":
            own["positions"] = choices.positions
        return Prefixed(backbone, choices, prefixattn.PrefixConfig(share=share, length=choices.length, **own))

    return make


def _word(backbone: Backbone, choices: Choices) -> Tuned:
    """No-share as the published commands run: started from a real word's keys and values, with its length."""
    word = backbone.tokenizer(f" {WORD}", add_special_tokens=False)["input_ids"]
    config = prefixattn.PrefixConfig(share="none", length=len(word), init=tuple(word))
    return Prefixed(backbone, choices, config)


def _plus(backbone: Backbone, choices: Choices) -> Tuned:
    return Prefixed(backbone, choices, prefixattn.PrefixPlusConfig())


def _peft(backbone: Backbone, choices: Choices) -> Tuned:
    from peft import PrefixTuningConfig

    return Wrapped(backbone, choices, PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=choices.length, prefix_projection=True,
        encoder_hidden_size=choices.hidden,
    ))  # fmt: skip


def _prompt(backbone: Backbone, choices: Choices) -> Tuned:
    from peft import PromptTuningConfig

    return Wrapped(backbone, choices, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=choices.length))


def _lora(backbone: Backbone, choices: Choices) -> Tuned:
    from peft import LoraConfig, inject_adapter_in_model

    tuned = Tuned(backbone, choices)
    # PEFT knows which layers of a family it takes; GPT-2's hold their matrices transposed
    transposed = tuned.model.config.model_type == "gpt2"
    config = LoraConfig(r=choices.rank, lora_alpha=2 * choices.rank, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, tuned.model)
    return tuned


def _partial(backbone: Backbone, choices: Choices) -> Tuned:
    """The last blocks, and the norm behind them."""
    causal("partial", backbone)
    tuned = Tuned(backbone, choices)
    layers = blocks(tuned.model)
    if not 1 <= choices.last <= len(layers):
        raise Refusal(f"partial: last is {choices.last}, expected 1 to {len(layers)} of the model's layers")
    for block in layers[len(layers) - choices.last :]:
        block.requires_grad_(True)
    base = tuned.model.base_model
    (getattr(base, "ln_f", None) or base.norm).requires_grad_(True)
    return tuned


def _finetune(backbone: Backbone, choices: Choices) -> Tuned:
    tuned = Tuned(backbone, choices)
    tuned.model.requires_grad_(True)
    tuned.whole = True
    return tuned


METHODS: dict[str, Callable[[Backbone, Choices], Tuned]] = {
    "frozen": Tuned,
    "deep": _prefix("deep"),
    "simple": _prefix("simple"),
    "none": _prefix("none"),
    "none-word": _word,
    "original": Original,
    "peft": _peft,
    "prompt": _prompt,
    "plus": _plus,
    "lora": _lora,
    "adapter": Adapted,
    "partial": _partial,
    "finetune": _finetune,
}


def tune(name: str, backbone: Backbone, seed: int, choices: Choices) -> Tuned:
    """The method `name` on a fresh backbone, its numbers drawn from the seed: `deep` and `original` from the same."""
    if name not in METHODS:
        raise Refusal(f"no method {name!r}; there are {', '.join(METHODS)}")
    torch.manual_seed(seed)
    return METHODS[name](backbone, choices)
