"""GPT-2: where its blocks are, and how one of its layers makes keys and values."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixattn.attach.huggingface import HuggingFaceAdapter
from prefixattn.prefix import Geometry


class GPT2Adapter(HuggingFaceAdapter):
    """Any Hugging Face model around a `GPT2Model`, or the `GPT2Model` itself."""

    def __init__(self, model: nn.Module, base: nn.Module) -> None:
        super().__init__(model, base)
        config = self.base.config
        if not getattr(config, "is_causal", True):
            raise NotImplementedError("GPT-2 with config.is_causal=False: attach works with causal GPT-2 only")
        heads = config.num_attention_heads
        self.geometry = Geometry(
            model_type="gpt2",
            layers=config.num_hidden_layers,
            kv_heads=heads,
            head_dim=config.hidden_size // heads,
            width=config.hidden_size,
        )

    @property
    def max_positions(self) -> int:
        return int(self.base.config.max_position_embeddings)

    def blocks(self) -> Any:
        return self.base.h

    def project(self, layer: int, vectors: Tensor) -> Tensor:
        """Keys and values `[2, Hkv, P, D]` that the frozen layer makes of `vectors` `[P, E]`, biases included."""
        block = self.blocks()[layer]
        weight, attn, E = block.ln_1.weight, block.attn.c_attn, self.geometry.width
        rows = block.ln_1(vectors.to(device=weight.device, dtype=weight.dtype))
        if type(attn) is Conv1D:  # and nothing around it: queries are a third of its work
            kv = torch.addmm(attn.bias[E:], rows, attn.weight[:, E:])
        else:
            kv = attn(rows)[:, E:]
        return kv.view(-1, 2, self.geometry.kv_heads, self.geometry.head_dim).permute(1, 2, 0, 3)

    def projection_parameters(self, layer: int) -> Iterator[Tensor]:
        block = self.blocks()[layer]
        yield from block.ln_1.parameters()
        yield from block.attn.c_attn.parameters()

    @torch.no_grad()
    def activations(self, ids: list[int]) -> Tensor:
        """Keys and values `[layers, 2, Hkv, n, D]` of the n tokens `ids` in the frozen model."""
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        if max(ids) >= vocabulary:
            raise ValueError(f"init has token id {max(ids)}, but the model's vocabulary ends at {vocabulary - 1}")
        if len(ids) > self.max_positions:
            raise ValueError(f"init has {len(ids)} tokens, but the model has {self.max_positions} positions")
        modes = {module: module.training for module in self.base.modules()}
        self.base.eval()
        try:
            out = self.base(torch.tensor([ids], device=self.base.device), use_cache=True)
        finally:
            for module, mode in modes.items():
                module.training = mode
        layers = out.past_key_values.layers
        bank = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers])
        return bank.to(torch.promote_types(bank.dtype, torch.float32))
