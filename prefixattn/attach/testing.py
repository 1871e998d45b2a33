"""What tests and benchmarks of attached models share: a toy GPT-2 and the model that concatenates."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import sdpa_mask

from prefixattn.attach.prefix import Prefix

CONCAT = "concat_for_tests"


def tiny_gpt2(seed: int = 0, cls: Any = GPT2LMHeadModel, **choices: Any) -> Any:
    """A GPT-2 of 2 layers, 2 heads, width 32, 64 positions and 50 tokens, 0 being beginning, end and padding."""
    torch.manual_seed(seed)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 50}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    # Weights larger than the usual 0.02, or a prefix would hardly move the logits.
    model = cls(GPT2Config(**{**sizes, **special, "initializer_range": 0.2, **choices})).eval()
    model.loss_type = "ForCausalLM"  # transformers logs a warning without it, which no compiler can trace
    return model


def token_ids(batch: int = 3, length: int = 9, seed: int = 1) -> Tensor:
    drawn = torch.randint(1, 50, (batch, length), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return drawn.to(torch.get_default_device())


def concat_attention(
    module: Any,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, H, S, D]
    value: Tensor,
    attention_mask: Tensor,  # [B, 1, L, S]
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The definition: the prefix in front of the keys, expanded over the batch, under an explicit mask."""
    bank = module.reference_prefix  # [2, H, P, D] or None
    if bank is not None:
        key, value = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in zip(bank, (key, value), strict=True))
        attention_mask = nn.functional.pad(attention_mask, (bank.shape[2], 0), value=True)
    scores = (query @ key.mT * scaling).masked_fill(~attention_mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def concat_mask(**kwargs: Any) -> Tensor:
    mask: Tensor = sdpa_mask(**{**kwargs, "allow_is_causal_skip": False})
    return mask


AttentionInterface.register(CONCAT, concat_attention)
AttentionMaskInterface.register(CONCAT, concat_mask)


def concat_twin(model: Any, prefix: Prefix) -> Any:
    """A copy of the plain model that concatenates the prefix; gradients reach the prefix's parameters."""
    twin = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
    twin.load_state_dict(model.state_dict())
    twin.loss_type = model.loss_type
    twin.set_attn_implementation(CONCAT)
    banks = dict(zip(prefix.slots, prefix(), strict=True))
    for layer, block in enumerate(twin.transformer.h):
        block.attn.reference_prefix = banks.get(layer)
    return twin
