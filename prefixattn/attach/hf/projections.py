"""How an attention layer of a Hugging Face model makes keys and values, for share="simple"."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixattn.prefixes.geometry import Geometry

# class of the attention -> the norm before it, an attribute of the module around it; "" if there is none
NORMS = {
    "GPT2Attention": "ln_1",
    "LlamaAttention": "input_layernorm",
    "MistralAttention": "input_layernorm",
    "Qwen2Attention": "input_layernorm",
    "Qwen3Attention": "input_layernorm",
    "Gemma2Attention": "input_layernorm",
    "Gemma3Attention": "input_layernorm",
    "GptOssAttention": "input_layernorm",
    "DeepseekV2Attention": "input_layernorm",
    "DeepseekV3Attention": "input_layernorm",
    "ViTAttention": "layernorm_before",
    "T5Attention": "layer_norm",
    "BartAttention": "",
    "BertSelfAttention": "",
    "RobertaSelfAttention": "",
}
# those that make keys and values of a latent vector, and one rotated part of all keys beside it
LATENT = "DeepseekV2Attention", "DeepseekV3Attention"
_PAIRS = ("k_proj", "v_proj"), ("key", "value"), ("k", "v")


def _parts(base: nn.Module, path: str) -> list[nn.Module]:
    """The modules that make keys and values: the norm if there is one, projections, the norm of the keys."""
    attention: Any = base.get_submodule(path)
    name = type(attention).__name__
    if name not in NORMS:
        raise NotImplementedError(
            f"share='simple' does not know how a {name} makes keys and values; it knows {', '.join(NORMS)}"
        )
    around = base.get_submodule(path.rpartition(".")[0])
    parts = [getattr(around, NORMS[name])] if NORMS[name] else []
    if name == "GPT2Attention":
        return [*parts, attention.c_attn]
    if name in LATENT:
        return [*parts, attention.kv_a_proj_with_mqa, attention.kv_a_layernorm, attention.kv_b_proj]
    pair = next(pair for pair in _PAIRS if hasattr(attention, pair[0]))
    parts += [getattr(attention, attribute) for attribute in pair]
    return [*parts, attention.k_norm] if hasattr(attention, "k_norm") else parts


def parameters(base: nn.Module, path: str) -> Iterator[Tensor]:
    for part in _parts(base, path):
        yield from part.parameters()


def project(base: Any, path: str, vectors: Tensor, geometry: Geometry) -> Tensor:
    """A layer's kv (prefixes/networks.py) of `vectors` [P, E], which take the place of the layer's input.

    Keys are not rotated: a prefix has no position.
    """
    attention: Any = base.get_submodule(path)
    kv_heads, head_dim = geometry.kv_heads, geometry.head_dim
    parts = _parts(base, path)
    weights = [p for part in parts for p in part.parameters()]
    # quantised weights are integers, and take the model's type
    dtype = next((w.dtype for w in weights if w.is_floating_point()), base.dtype)
    rows = vectors.to(device=weights[0].device, dtype=dtype)
    if NORMS[type(attention).__name__]:
        rows = parts.pop(0)(rows)
    if type(attention).__name__ == "GPT2Attention":
        E = kv_heads * head_dim
        c_attn: Any = parts[0]
        if type(c_attn) is Conv1D:  # and nothing around it: queries are a third of its work
            kv = torch.addmm(c_attn.bias[E:], rows, c_attn.weight[:, E:])
        else:
            kv = c_attn(rows)[:, E:]
        return kv.view(-1, 2, kv_heads, head_dim).permute(1, 2, 0, 3)
    if type(attention).__name__ in LATENT:
        latent, rotated = parts[0](rows).split((attention.kv_lora_rank, attention.qk_rope_head_dim), -1)
        if getattr(attention.config, "rope_interleave", False):  # rotation lays pairs out in halves, by 0 too
            rotated = torch.cat([rotated[:, 0::2], rotated[:, 1::2]], -1)
        made = parts[2](parts[1](latent)).view(len(rows), kv_heads, -1).transpose(0, 1)  # [Hkv, P, D + Dv less rotated]
        key, value = made.split((head_dim - rotated.shape[-1], geometry.value_dim), -1)
        return geometry.joined(torch.cat([key, rotated.expand(kv_heads, -1, -1)], -1), value)
    key, value = (part(rows).view(-1, kv_heads, head_dim) for part in parts[:2])  # [P, Hkv, D]
    if len(parts) == 3:
        key = parts[2](key)
    return torch.stack([key, value]).transpose(1, 2)
