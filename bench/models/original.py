"""Prefix-tuning the way the published code does it, to measure ours against.

The token ids of the prefix are expanded to the batch first, so embedding and network run on B identical rows; the
result goes in as past keys and values, which each layer concatenates with its own; eager attention over the
concatenation; positions start at P; the concatenated keys and values of all layers stay alive through the step (the
published loop leaves the cache on). Dropout of the frozen model is off, as there.

Differs from the authors' code: transformers 5 and its cache class in place of a patched 3.2.0; the causal mask is the
type's least value (there -1e4); P placeholder ids before the prompt tell generate() that the cache holds P positions
(there prepare_inputs_for_generation was edited); models with fewer key
than query heads have as many in the prefix (PEFT's embedding is narrower then, by that factor).
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel


class OriginalPrefix(nn.Module):
    """Deep-share: one Embedding -> Linear -> tanh -> Linear for the keys and values of all layers."""

    def __init__(self, model: PreTrainedModel, length: int, hidden: int) -> None:
        super().__init__()
        config = model.config
        width, heads = config.hidden_size, config.num_attention_heads
        self.length, self.layers = length, config.num_hidden_layers
        self.heads = getattr(config, "num_key_value_heads", None) or heads  # of keys and values
        self.head_size = getattr(config, "head_dim", None) or width // heads
        out = self.layers * 2 * self.heads * self.head_size
        self.wte = nn.Embedding(length, width)
        self.control_trans = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out))
        self.kept = length * out
        self.to(model.device)

    def cache(self, rows: int, config: Any) -> DynamicCache:
        """The prefixes of `rows` samples as a cache, each row through the network."""
        ids = torch.arange(self.length, device=self.wte.weight.device).expand(rows, -1)  # [B, P]
        out = self.control_trans(self.wte(ids))  # [B, P, layers * 2 * heads * D]
        out = out.view(rows, self.length, self.layers * 2, self.heads, self.head_size)
        past = out.permute(2, 0, 3, 1, 4).split(2)  # layers x [2, B, H, P, D]
        cache = DynamicCache(config=config)
        for layer, (prefix_k, prefix_v) in enumerate(past):
            cache.update(prefix_k, prefix_v, layer)
        return cache
