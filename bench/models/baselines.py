"""What ours is compared with on a frozen model: no prefix, PEFT's, the published code's; ours too; and that two agree.

The published ways are written anew on the libraries' own model classes, from what the papers' code does: for GPT-2 in
original.py; for BART three networks (encoder, decoder, cross attention) that each run on B rows of ids; for ViT a small
network for each layer whose output interleaves keys and values, run once, expanded to the batch and then dropped out.
Each layer concatenates the prefix with its keys and values and attends eagerly. The networks stay in float32, and what
they make is cast to the model's type.

Differs from the authors' code: key, query and value of a timm ViT are one projection, there three; masks are the type's
least value, there -inf (BART); gradients are not clipped.
"""

import gc
import math
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.models.families import GPT2, SEED, Bart, Family, token_losses
from prefixattn.attention.call import Call

Pair = tuple[Tensor, Tensor]  # key and value of one attention call; [H, P, D] each, or [B, H, P, D] once expanded


def memory_bytes(device: str) -> tuple[int, int]:
    """What tensors take, and what the allocator has taken for them."""
    return (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) if device == "cuda" else (0, 0)


def collect(device: str) -> None:
    """Returns what nobody holds any more; on a CPU, where nothing is counted, later is early enough."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


class Baseline:
    """A way to train, ours too: the loss of a step, what is trained, and what the step keeps alive to its end."""

    labelled = False  # logits everywhere

    def __init__(self, family: Family, device: str, dtype: torch.dtype, P: int) -> None:
        self.family, self.P, self.device, self.dtype = family, P, device, dtype
        self.model: Any = family.frozen(device, dtype)
        self.batch = family.on(device, dtype)
        self.rows = len(self.batch["labels"])
        self.note = ""
        self.held: list[Pair] = []
        collect(device)
        self.before = memory_bytes(device)
        torch.manual_seed(SEED)
        self.trained: nn.Module = self.add().to(device)
        self.loss = self.make_loss()

    def add(self) -> nn.Module:
        """Puts the prefix in and returns what is trained."""
        raise NotImplementedError

    @property
    def called(self) -> Any:
        """The model, or what is around it."""
        return self.model

    def make_loss(self) -> Callable[[], Tensor]:
        """A step's loss; all that is Python's is made here and not in the step, which may be compiled."""
        return self.family.loss(self.called, self.batch, self.labelled)

    def given(self, prefixes: list[Pair]) -> Any:
        """A context in which the attention calls get these prefixes."""
        raise NotImplementedError(f"{type(self).__name__} takes no prefixes from outside")

    def mode(self, training: bool) -> None:
        """All dropout off, or as in a training step."""
        self.model.train(training and self.family.training)
        self.trained.train(training)


class Frozen(Baseline):
    """The floor: a vector added to the input embeddings is all that is trained, so the backward goes down to them."""

    def add(self) -> nn.Module:
        trained = nn.Module()
        trained.delta = delta = nn.Parameter(torch.zeros(self.family.sizes["width"], device=self.device))
        for module in self.family.embeddings(self.model):
            module.register_forward_hook(lambda module, args, out: out + delta.to(out.dtype))
        return trained


class Ours(Baseline):
    def add(self) -> nn.Module:
        import prefixattn

        family = self.family
        config = prefixattn.PrefixConfig(
            length=self.P, hidden=family.hidden, dropout=family.prefix_dropout, positions=family.positions
        )
        return prefixattn.attach(self.model, config)


class OursLabelled(Ours):
    """Logits at labelled positions only."""

    labelled = True

    def __init__(self, family: Family, device: str, dtype: torch.dtype, P: int) -> None:
        if family.task != "CAUSAL_LM":
            raise NotImplementedError(f"{family.name}: no position, or few of them, is without a label")
        super().__init__(family, device, dtype, P)


class Peft(Baseline):
    def add(self) -> nn.Module:
        if self.family.task is None:
            raise NotImplementedError("PEFT has no prefix-tuning for image models")
        from peft import PrefixTuningConfig, get_peft_model

        config = PrefixTuningConfig(
            task_type=self.family.task,
            num_virtual_tokens=self.P,
            prefix_projection=True,
            encoder_hidden_size=self.family.hidden,
        )
        self.wrapped = get_peft_model(self.model, config)
        self.wrapped.train(self.family.training)
        if self.family.task == "SEQ_2_SEQ_LM":
            self.note = "a prefix for the decoder's own attention only"
        self.encoder: nn.Module = self.wrapped.prompt_encoder["default"]
        return self.encoder

    @property
    def called(self) -> Any:
        return self.wrapped

    def given(self, prefixes: list[Pair]) -> Any:
        if self.family.task != "CAUSAL_LM":
            return super().given(prefixes)
        return _output_replaced(self.encoder, _columns(prefixes, self.rows))


class OriginalGPT2(Baseline):
    def add(self) -> nn.Module:
        from bench.models.original import OriginalPrefix

        self.model.set_attn_implementation("eager")
        self.prefix = OriginalPrefix(self.model, self.P, self.family.hidden)
        self.network = self.prefix.control_trans
        self.network.register_forward_hook(lambda module, args, out: out.to(self.dtype))
        return self.prefix

    def make_loss(self) -> Callable[[], Tensor]:
        ids, labels = self.batch["ids"], self.batch["labels"]

        def loss() -> Tensor:  # logits at every position, as published
            past = self.prefix.cache(self.rows, self.model.config)
            logits = self.model(input_ids=ids, past_key_values=past, use_cache=True).logits
            return token_losses(logits, labels) / self.rows

        return loss

    def given(self, prefixes: list[Pair]) -> Any:
        return _output_replaced(self.network, _columns(prefixes, self.rows).to(self.dtype))


class OriginalConcatenated(Baseline):
    """BART and ViT: `networks` make the prefixes of a step, the attention modules find them in `published`."""

    def add(self) -> nn.Module:
        self.outside: list[Pair] | None = None
        self.calls = self.family.attentions(self.model)
        for module in self.calls:
            module.published = None
            if self.family.library == "timm":
                module.forward = types.MethodType(_timm_forward, module)
        if self.family.library != "timm":
            _register()
            self.model.set_attn_implementation(PUBLISHED)
        self.networks = (
            BartNetworks(self.family, self.P) if isinstance(self.family, Bart) else ViTNetworks(self.family, self.P)
        )
        return self.networks

    def make_loss(self) -> Callable[[], Tensor]:
        plain = super().make_loss()

        def loss() -> Tensor:
            prefixes = self.outside or self.networks(self.rows, self.dtype)
            held = self.held if isinstance(self.family, Bart) else None  # there the cache of all layers lives on
            for module, (k, v) in zip(self.calls, prefixes, strict=True):
                module.published = k, v, held
            try:
                return plain()
            finally:
                for module in self.calls:
                    module.published = None

        return loss

    @contextmanager
    def given(self, prefixes: list[Pair]) -> Iterator[None]:
        self.outside = [(k.expand(self.rows, -1, -1, -1), v.expand(self.rows, -1, -1, -1)) for k, v in prefixes]
        try:
            yield
        finally:
            self.outside = None


class BartNetworks(nn.Module):
    def __init__(self, family: Family, P: int) -> None:
        super().__init__()
        self.layers, self.heads, width = family.sizes.values()
        self.P = P
        parts = ("encoder", "decoder", "cross")
        self.wte = nn.ModuleDict({part: nn.Embedding(P, width) for part in parts})
        self.control_trans = nn.ModuleDict(
            {
                part: nn.Sequential(
                    nn.Linear(width, family.hidden), nn.Tanh(), nn.Linear(family.hidden, self.layers * 2 * width)
                )
                for part in parts
            }
        )

    def forward(self, rows: int, dtype: torch.dtype) -> list[Pair]:
        past = {part: self.past(part, rows, dtype) for part in self.wte}
        decoder = [pair for both in zip(past["decoder"], past["cross"], strict=True) for pair in both]
        return past["encoder"] + decoder

    def past(self, part: str, rows: int, dtype: torch.dtype) -> list[Pair]:
        ids = torch.arange(self.P, device=self.wte[part].weight.device).expand(rows, -1)  # [B, P]
        out = self.control_trans[part](self.wte[part](ids)).to(dtype)  # [B, P, layers * 2 * width]
        out = out.view(rows, self.P, self.layers * 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return [(pair[0], pair[1]) for pair in out.split(2)]  # layers x [2, B, H, P, D]


class ViTNetworks(nn.Module):
    def __init__(self, family: Family, P: int) -> None:
        super().__init__()
        layers, self.heads, width = family.sizes.values()
        bound = math.sqrt(6 / (3 * 16 * 16 + width))
        self.embeddings = nn.Parameter(torch.empty(layers, P, width).uniform_(-bound, bound))
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, family.hidden), nn.Tanh(), nn.Linear(family.hidden, 2 * width))
            for _ in range(layers)
        )
        self.dropout = nn.Dropout(family.prefix_dropout)

    def forward(self, rows: int, dtype: torch.dtype) -> list[Pair]:
        outs = [network(x).to(dtype) for network, x in zip(self.networks, self.embeddings, strict=True)]
        return [(self.expanded(out[:, 0::2], rows), self.expanded(out[:, 1::2], rows)) for out in outs]

    def expanded(self, x: Tensor, rows: int) -> Tensor:
        x = self.dropout(x.expand(rows, -1, -1))  # [B, P, width]: an own mask for each sample
        return x.reshape(rows, x.shape[1], self.heads, -1).transpose(1, 2)  # [B, H, P, D]


def original(family: Family, device: str, dtype: torch.dtype, P: int) -> Baseline:
    return (OriginalGPT2 if isinstance(family, GPT2) else OriginalConcatenated)(family, device, dtype, P)


BASELINES: dict[str, Callable[[Family, str, torch.dtype, int], Baseline]] = {
    "frozen": Frozen,
    "ours": Ours,
    "peft": Peft,
    "original": original,
}

PUBLISHED = "published_way"


def concatenating_attention(
    module: Any,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, H, S, D]
    value: Tensor,  # [B, H, S, D]
    attention_mask: Tensor | None = None,  # float [B, 1, L, S]
    scaling: float = 1.0,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    prefix_k, prefix_v, held = module.published
    key, value = torch.cat([prefix_k, key], 2), torch.cat([prefix_v, value], 2)
    if held is not None:
        held.append((key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + F.pad(attention_mask, (prefix_k.shape[2], 0))
    weights = F.dropout(scores.softmax(-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None  # [B, L, H, D]


def _timm_forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, N, D]
    out, _ = concatenating_attention(self, *qkv.unbind(0), attn_mask, self.scale)
    return self.proj(out.flatten(2))


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(PUBLISHED, concatenating_attention)
    AttentionMaskInterface.register(PUBLISHED, eager_mask)


def _columns(prefixes: list[Pair], rows: int) -> Tensor:
    """[B, P, layers * 2 * H * D], as the networks of GPT-2 give them: column ((2 layer + kv) H + head) D + d."""
    stacked = torch.stack([t for pair in prefixes for t in pair])  # [layers * 2, H, P, D]
    return stacked.permute(2, 0, 1, 3).flatten(1).expand(rows, -1, -1)


@contextmanager
def _output_replaced(module: nn.Module, out: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, made: out.to(made.dtype))
    try:
        yield
    finally:
        handle.remove()


class Received(TorchDispatchMode):
    """Writes down the prefix of each call of our op, so that nothing is asked of how attach stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes: list[Pair] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prefixattn.fwd.default:
            call = Call(*args[: len(Call._fields)])
            prefix_k, prefix_v = (t.detach()[0].clone() for t in (call.prefix_k, call.prefix_v))  # of [1, H, P, D]
            self.prefixes.append((prefix_k, prefix_v))
        return func(*args, **(kwargs or {}))


def probe(baseline: Baseline) -> tuple[float, Tensor]:
    """The loss and its gradient at the input embeddings, all dropout off."""
    leaves: list[Tensor] = []

    def add_leaf(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        leaves.append(torch.zeros_like(out, requires_grad=True))
        return out + leaves[-1]

    baseline.mode(training=False)
    handles = [module.register_forward_hook(add_leaf) for module in baseline.family.embeddings(baseline.model)]
    try:
        loss = baseline.loss()
        gradients = torch.autograd.grad(loss, leaves)
    finally:
        for handle in handles:
            handle.remove()
        baseline.mode(training=True)
        baseline.held.clear()
    return float(loss.detach()), torch.cat([g.float().flatten() for g in gradients])


# Of the loss; and of the gradient at the embeddings, as a share of what the prefix changes there: without it, 1.
# float32 finds a single row that is missing; bfloat16, whose rounding is a tenth of the effect in the smallest models,
# finds a prefix that is missing or wrong.
TOLERANCES = {torch.float32: (1e-4, 0.01), torch.bfloat16: (1e-2, 0.5)}


def assert_agree(ours: Baseline, others: dict[str, Baseline], frozen: Baseline) -> dict[str, float]:
    """Ours and each baseline compute the same loss and the same gradient from the same prefixes; returns errors.

    The prefixes are drawn large for it, or in an untrained model they would hardly matter, and with them a mistake.
    """
    saved = [p.detach().clone() for p in ours.trained.parameters()]
    with torch.no_grad():
        for p in ours.trained.parameters():
            p.normal_(std=2 / math.sqrt(p.shape[-1]), generator=torch.Generator(p.device).manual_seed(11))
    try:
        with Received() as received:
            loss, gradient = probe(ours)
        calls = len(ours.family.attentions(ours.model))
        rows = [k.shape[1] for k, _ in received.prefixes]
        if rows != [ours.P] * calls:
            raise AssertionError(f"ours: prefixes of {rows} rows were attended to, expected {calls} of {ours.P} rows")
        effect = float((gradient - probe(frozen)[1]).norm())
        loss_bound, bound = TOLERANCES[ours.dtype]
        errors = {}
        for name, baseline in others.items():
            with baseline.given(received.prefixes):
                other_loss, other_gradient = probe(baseline)
            errors[name] = error = float((other_gradient - gradient).norm()) / effect
            if not (abs(other_loss - loss) <= loss_bound * abs(loss) and error <= bound):
                raise AssertionError(
                    f"ours and {name} disagree: loss {loss:.6f} and {other_loss:.6f}, gradients apart by {error:.4f} "
                    f"of what the prefix changes in them (at most {bound})"
                )
    finally:
        with torch.no_grad():
            for p, value in zip(ours.trained.parameters(), saved, strict=True):
                p.copy_(value)
    return errors
