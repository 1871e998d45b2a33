"""What tests and benchmarks of timm's models share: small random models, concatenation."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from prefixattn.attach.prefix import Prefix

_SIZES = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 3, "num_classes": 5}
_DIRECT = {**_SIZES, "class_token": True}
_NAFLEX = {n: v for n, v in _SIZES.items() if n != "img_size"}
# name -> name of the model in timm, or module and class, and sizes
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", _SIZES),
    "deit": ("deit_tiny_distilled_patch16_224", _SIZES),
    "deit3": ("deit3_small_patch16_224", _SIZES),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", _SIZES),
    "siglip": ("vit_base_patch16_siglip_224", _SIZES),
    "clip": ("vit_base_patch16_clip_224", _SIZES),
    "normed": ("vit_tiny_patch16_224", _SIZES | {"qk_norm": True, "scale_attn_norm": True}),
    "eva": ("eva_giant_patch14_224", _SIZES),
    "eva02": ("eva02_tiny_patch14_224", _SIZES),
    "eva02_fused": ("eva02_base_patch14_224", _SIZES | {"qkv_fused": True, "scale_attn_inner": True}),
    "dinov3": ("vit_small_patch16_dinov3", _SIZES),
    "pe_core": ("vit_pe_core_tiny_patch16_384", _SIZES),
    "rope_mixed": ("vit_base_patch16_rope_mixed_224", _SIZES),
    "few_kv_heads": (
        "timm.models.eva.Eva",
        _DIRECT | {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2, "use_rot_pos_emb": True},
    ),
    "naflex": ("naflexvit_base_patch16_gap", _NAFLEX),
    "naflex_gated": ("naflexvit_base_patch16_gap", _NAFLEX | {"attn_gated": True, "qk_norm": True}),
    "post_norm": ("timm.models.eva.Eva", _DIRECT | {"use_post_norm": True}),
    "parallel": ("timm.models.vision_transformer.VisionTransformer", _SIZES | {"block_fn": "ParallelThingsBlock"}),
}


def tiny(family: str, seed: int = 0, **choices: Any) -> Any:
    """A random model of a family in evaluation mode: 3 blocks of width 32 with 4 heads, images of 24 x 24 pixels."""
    import timm

    torch.manual_seed(seed)
    name, sizes = FAMILIES[family]
    sizes = sizes | choices
    module, _, cls = name.rpartition(".")
    if "block_fn" in sizes:
        sizes["block_fn"] = getattr(importlib.import_module(module), sizes["block_fn"])
    model = getattr(importlib.import_module(module), cls)(**sizes) if module else timm.create_model(name, **sizes)
    with torch.no_grad():
        # Larger weights than usual, and in LayerScale too, or a prefix would hardly move the logits.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def images(batch: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(batch, 3, 24, 24, generator=generator, device="cpu")
    return drawn.to(torch.get_default_device())


@contextmanager
def concatenating(prefix: Prefix) -> Iterator[None]:
    """Inside, timm's own code runs, but its attention concatenates: for a model without prefixes, like `prefix`'s.

    Gradients reach the prefix's parameters.
    """
    kvs = dict(zip(prefix.slots, zip(prefix(), prefix.lengths, strict=True), strict=True))
    plain, calls = torch.nn.functional.scaled_dot_product_attention, count()

    def attention(
        q: Tensor,  # [B, H, N, D]
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
    ) -> Tensor:
        slot = next(calls)
        if slot not in kvs:  # a layer without a prefix, or the pooling at the end
            return plain(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
        kv, P = kvs[slot]  # [2, Hkv, P, D]
        ahead = kv[:, :, :P].repeat_interleave(q.shape[1] // kv.shape[1], 1).to(q.dtype)
        k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], 2) for p, x in zip(ahead, (k, v), strict=True))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if is_causal:
            attn_mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~nn.functional.pad(attn_mask, (P, 0), value=True), float("-inf"))
        elif attn_mask is not None:
            scores = scores + nn.functional.pad(attn_mask, (P, 0))
        return scores.softmax(-1) @ v

    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
