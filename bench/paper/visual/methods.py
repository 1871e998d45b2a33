"""The ways of the papers' tables to train a vision transformer of timm for a task, behind one interface.

"deep", "simple" and "none" are prefixes of this library, "original" is Deep-share as the published code computes it,
"plus" is Prefix-Tuning+. "vpt" puts prompts into the sequence (VPT, arXiv 2203.12119; its code, KMnP/vpt, also has
"adapter", "bias" and "partial"), "lora" is PEFT's, "linear" trains the head alone, "finetune" all.

Differs from VPT's code: AdamW has torch's eps and the grid's weight decay on all but biases (there 0.01 whatever the
grid, and SGD where the grid says 0); fine-tuning drops nothing out (there 0.1). A method refuses, by name, a model that
it would not train as it says.

`layers`: "all" is DEEP in the paper, "first" is SHALLOW. Every method has a head of its own: kaiming normal over its
fan out, its bias at -log(99), without weight decay on that bias.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.paper.runs import Refusal

HEAD_BIAS = -math.log(99)  # a prior of 0.01 for each class
PREFIXES = ("deep", "simple", "none")
BY_LAYERS = (*PREFIXES, "original", "plus", "vpt", "lora")  # methods that `layers` tells something


@dataclass(frozen=True)
class Choices:
    """What a method can be told: P and its dropout, the bottleneck, k of Partial-k, an adapter's reduction, a rank."""

    layers: str = "all"
    length: int = 10
    dropout: float = 0.0
    hidden: int = 48
    last: int = 1
    reduction: int = 8
    rank: int = 8


def plain_vit(method: str, model: nn.Module) -> None:
    """Refuses what is not timm's VisionTransformer of ordinary blocks: hooks and blocks would mean something else."""
    from timm.layers import Attention
    from timm.models import VisionTransformer

    blocks = getattr(model, "blocks", ())
    if type(model) is not VisionTransformer or not all(type(getattr(b, "attn", None)) is Attention for b in blocks):
        raise Refusal(f"{method}: knows timm's VisionTransformer of plain blocks, and not this {type(model).__name__}")


class Tuned:
    """A model in which `method` is to be trained: frozen and in eval() but for what the method trains.

    `added` holds modules outside the model's own parameters (a prefix, prompts), `first` the first block that a
    gradient must reach (len(blocks): none but the head).
    """

    def __init__(self, model: nn.Module, classes: int, seed: int) -> None:
        self.model: Any = model
        self.added = nn.ModuleDict()
        self.first = 0
        self.whole = False  # all of the model is trained, and in train()
        self.adamw = False
        torch.manual_seed(seed)
        model.requires_grad_(False).eval()
        if not hasattr(model, "reset_classifier"):
            raise Refusal(f"{type(model).__name__}: no model of timm with a head to replace")
        self.model.reset_classifier(classes)
        head = self.model.get_classifier()
        if not isinstance(head, nn.Linear):
            raise Refusal(f"{type(model).__name__}: its head is a {type(head).__name__}, expected a Linear")
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        nn.init.constant_(head.bias, HEAD_BIAS)
        head.requires_grad_(True)
        self.head = head

    def train(self, training: bool) -> None:
        self.model.train(training and self.whole)
        self.added.train(training)

    def __call__(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> logits [B, classes]."""
        logits: Tensor = self.model(x)
        return logits

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained, by name; a parameter once."""
        inside = dict.fromkeys(self.model.parameters())
        yield from ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        yield from ((name, p) for name, p in self.added.named_parameters() if p.requires_grad and p not in inside)

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.parameters()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.parameters():
                p.copy_(state[name])

    def numbers(self) -> dict[str, int]:
        """`trained` without the head; `kept` once trained, `head`."""
        head = sum(p.numel() for p in self.head.parameters())
        trained = sum(p.numel() for _, p in self.parameters()) - head
        return {"trained": trained, "kept": self.kept(trained), "head": head}

    def kept(self, trained: int) -> int:
        return trained

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """SGD with momentum 0.9, or AdamW where VPT's runs have it."""
        free = [p for name, p in self.parameters() if p is self.head.bias or (self.adamw and name.endswith("bias"))]
        rest = [p for _, p in self.parameters() if all(p is not other for other in free)]
        groups = [{"params": rest, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
        if self.adamw:
            return torch.optim.AdamW(groups, lr=lr)
        return torch.optim.SGD(groups, lr=lr, momentum=0.9)


class Prefixed(Tuned):
    """A prefix of this library; of share="deep" the optimizer never builds the large gradient."""

    def __init__(self, model: nn.Module, classes: int, seed: int, config: Any) -> None:
        import prefixattn

        super().__init__(model, classes, seed)
        try:
            self.prefix = prefixattn.attach(model, config)
        except NotImplementedError as error:
            raise Refusal(" ".join(str(error).split())) from None
        self.head.requires_grad_(True)  # attach freezes all of the model
        self.added["prefix"] = self.prefix

    def kept(self, trained: int) -> int:
        import prefixattn

        if isinstance(self.prefix, prefixattn.Prefix) and self.prefix.config.share != "simple":
            return int(self.prefix.num_parameters(kept=True))
        return trained

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        import prefixattn

        groups = [
            {"params": self.prefix, "weight_decay": weight_decay},
            {"params": [self.head.weight], "weight_decay": weight_decay},
            {"params": [self.head.bias], "weight_decay": 0.0},
        ]
        return prefixattn.FactoredSGD(groups, lr=lr, momentum=0.9)


class Prompted(Tuned):
    """VPT: prompts behind the class token, in layer 0 (first) or new ones in each layer (all), queries included."""

    def __init__(self, model: nn.Module, classes: int, seed: int, choices: Choices) -> None:
        plain_vit("vpt", model)
        super().__init__(model, classes, seed)
        self.added["prompts"] = prompts = Prompts(self.model, choices)
        for layer, block in enumerate(self.model.blocks):
            if layer < len(prompts.rows):
                block.register_forward_pre_hook(prompts.at(layer))
        self.model.blocks[-1].register_forward_hook(prompts.removed)


class Prompts(nn.Module):
    def __init__(self, model: Any, choices: Choices) -> None:
        super().__init__()
        weight = model.patch_embed.proj.weight  # [width, channels, patch, patch]
        bound = math.sqrt(6 / (weight[0].numel() + len(weight)))  # VPT's rule
        layers = len(model.blocks) if choices.layers == "all" else 1
        self.rows = nn.Parameter(torch.empty(layers, choices.length, len(weight)).uniform_(-bound, bound))
        self.dropout = nn.Dropout(choices.dropout)
        self.ahead = model.num_prefix_tokens  # the class token and registers

    def at(self, layer: int) -> Callable[..., Any]:
        def put(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            rows = self.dropout(self.rows[layer].expand(len(x), -1, -1)).to(x.dtype)
            behind = x[:, self.ahead + (len(rows[0]) if layer else 0) :]
            return torch.cat([x[:, : self.ahead], rows, behind], 1), *args[1:]

        return put

    def removed(self, block: nn.Module, args: Any, out: Tensor) -> Tensor:
        return torch.cat([out[:, : self.ahead], out[:, self.ahead + self.rows.shape[1] :]], 1)


class Original(Tuned):
    """Deep-share as the published code has it: expanded to the batch, dropped out, concatenated, eager attention."""

    def __init__(self, model: nn.Module, classes: int, seed: int, choices: Choices) -> None:
        plain_vit("original", model)
        vit: Any = model
        for block in vit.blocks:
            parts = [getattr(block.attn, part) for part in ("q_norm", "k_norm", "norm")]
            if not all(isinstance(part, nn.Identity) for part in parts):
                raise Refusal(f"original: the attention of this {type(model).__name__} has norms of its own")
        super().__init__(model, classes, seed)
        self.added["networks"] = networks = Networks(self.model, choices)
        for block, layer in zip(self.model.blocks, networks.layers, strict=False):
            block.attn.forward = _Concatenating(block.attn, layer)

    def kept(self, trained: int) -> int:
        networks: Any = self.added["networks"]
        return sum(2 * layer.rows.numel() for layer in networks.layers)


class Networks(nn.Module):
    def __init__(self, model: Any, choices: Choices) -> None:
        super().__init__()
        weight = model.patch_embed.proj.weight
        bound = math.sqrt(6 / (weight[0].numel() + len(weight)))
        count = len(model.blocks) if choices.layers == "all" else 1
        self.layers = nn.ModuleList(Network(len(weight), bound, choices) for _ in range(count))


class Network(nn.Module):
    def __init__(self, width: int, bound: float, choices: Choices) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.empty(choices.length, width).uniform_(-bound, bound))
        self.net = nn.Sequential(nn.Linear(width, choices.hidden), nn.Tanh(), nn.Linear(choices.hidden, 2 * width))
        self.dropout = nn.Dropout(choices.dropout)

    def forward(self, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, P, width]; the network's output interleaves them."""
        out = self.net(self.rows)
        key, value = out[:, 0::2], out[:, 1::2]
        return self.dropout(key.expand(batch, -1, -1)), self.dropout(value.expand(batch, -1, -1))


class _Concatenating:
    """In the place of an attention's forward."""

    def __init__(self, attention: Any, network: nn.Module) -> None:
        self.attention, self.network = attention, network

    def __call__(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        attention = self.attention
        heads = attention.num_heads
        q, k, v = attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, N, D]
        ahead = [t.unflatten(-1, (heads, -1)).transpose(1, 2).to(k.dtype) for t in self.network(len(x))]
        k, v = torch.cat([ahead[0], k], 2), torch.cat([ahead[1], v], 2)
        out = (q @ k.mT * attention.scale).softmax(-1).to(v.dtype) @ v
        made: Tensor = attention.proj(out.transpose(1, 2).flatten(2))
        return made


class Adapted(Tuned):
    """Adapters behind each MLP, with a residual (Pfeiffer's place), zero at first."""

    def __init__(self, model: nn.Module, classes: int, seed: int, choices: Choices) -> None:
        plain_vit("adapter", model)
        super().__init__(model, classes, seed)
        adapters = nn.ModuleList()
        for block in self.model.blocks:
            width = self.model.embed_dim
            adapters.append(adapter := Adapter(width, max(1, width // choices.reduction)))
            block.mlp.register_forward_hook(adapter.added)
        self.added["adapters"] = adapters
        self.adamw = True


class Adapter(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.up.weight)

    def added(self, mlp: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + self.up(nn.functional.gelu(self.down(out)))


def _prefix(share: str) -> Callable[..., Tuned]:
    def make(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
        import prefixattn

        more = {"hidden": choices.hidden} if share == "deep" else {}
        config = prefixattn.PrefixConfig(
            length=choices.length, share=share, layers=choices.layers, dropout=choices.dropout, **more
        )
        return Prefixed(model, classes, seed, config)

    return make


def _plus(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    import prefixattn

    return Prefixed(model, classes, seed, prefixattn.PrefixPlusConfig(layers=choices.layers))


def _linear(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    tuned = Tuned(model, classes, seed)
    tuned.first = len(getattr(model, "blocks", ()))
    return tuned


def _partial(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    """The last blocks, and the norm behind them."""
    plain_vit("partial", model)
    tuned = Tuned(model, classes, seed)
    blocks = tuned.model.blocks
    if not 1 <= choices.last <= len(blocks):
        raise Refusal(f"partial: last is {choices.last}, expected 1 to {len(blocks)} of the backbone's blocks")
    tuned.first = len(blocks) - choices.last
    for block in blocks[tuned.first :]:
        block.requires_grad_(True)
    tuned.model.norm.requires_grad_(True)
    tuned.adamw = True
    return tuned


def _bias(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    tuned = Tuned(model, classes, seed)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.requires_grad_(True)
    tuned.adamw = True
    return tuned


def _lora(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    from peft import LoraConfig, inject_adapter_in_model

    plain_vit("lora", model)  # others read qkv.weight, past what PEFT wraps
    tuned = Tuned(model, classes, seed)
    targets = [name for name, _ in model.named_modules() if name.endswith("attn.qkv")]
    if choices.layers == "first":
        targets = targets[:1]
    inject_adapter_in_model(LoraConfig(r=choices.rank, lora_alpha=2 * choices.rank, target_modules=targets), model)
    tuned.head.requires_grad_(True)  # PEFT freezes all of the model
    tuned.adamw = True
    return tuned


def _finetune(model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    tuned = Tuned(model, classes, seed)
    model.requires_grad_(True)
    tuned.whole = tuned.adamw = True
    return tuned


METHODS: dict[str, Callable[[nn.Module, int, int, Choices], Tuned]] = {
    **{share: _prefix(share) for share in PREFIXES},
    "original": Original,
    "plus": _plus,
    "vpt": Prompted,
    "lora": _lora,
    "adapter": Adapted,
    "bias": _bias,
    "partial": _partial,
    "linear": _linear,
    "finetune": _finetune,
}


def tune(name: str, model: nn.Module, classes: int, seed: int, choices: Choices) -> Tuned:
    """The method `name` on a fresh backbone; its numbers are drawn from the seed."""
    if name not in METHODS:
        raise Refusal(f"no method {name!r}; there are {', '.join(METHODS)}")
    if choices.layers == "first" and name not in BY_LAYERS:
        raise Refusal(f"{name}: layers='first' says nothing of it; of {', '.join(BY_LAYERS)} it does")
    return METHODS[name](model, classes, seed, choices)
