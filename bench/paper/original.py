"""Prefix-tuning the way the published code does it, to measure ours against.

The token ids of the prefix are expanded to the batch first, so embedding and network run on B identical rows; the
result goes in as past keys and values, which each layer concatenates with its own; eager attention over the
concatenation; positions start at P; the concatenated keys and values of all layers stay alive through the step (the
published loop leaves the cache on). Dropout of the frozen model is off, as there.

Differs from the authors' code: transformers 5 and its cache class in place of a patched 3.2.0; the causal mask is the
type's least value (there -1e4); P placeholder ids before the prompt tell generate() that the cache holds P positions
(there prepare_inputs_for_generation was edited).
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
        self.length, self.layers, self.heads = length, config.n_layer, config.n_head
        self.wte = nn.Embedding(length, config.n_embd)
        self.control_trans = nn.Sequential(
            nn.Linear(config.n_embd, hidden), nn.Tanh(), nn.Linear(hidden, config.n_layer * 2 * config.n_embd)
        )
        self.kept = length * config.n_layer * 2 * config.n_embd
        self.to(model.device)

    def cache(self, rows: int, config: Any) -> DynamicCache:
        """The prefixes of `rows` samples as a cache, each row through the network."""
        ids = torch.arange(self.length, device=self.wte.weight.device).expand(rows, -1)  # [B, P]
        out = self.control_trans(self.wte(ids))  # [B, P, layers * 2 * n_embd]
        out = out.view(rows, self.length, self.layers * 2, self.heads, -1)  # column ((2 layer + kv) H + head) D + d
        past = out.permute(2, 0, 3, 1, 4).split(2)  # layers x [2, B, H, P, D]
        cache = DynamicCache(config=config)
        for layer, (prefix_k, prefix_v) in enumerate(past):
            cache.update(prefix_k, prefix_v, layer)
        return cache
