"""timm's attention with a prefix: the same parameters and computation, with keys and values ahead of the tokens'.

What timm calls prefix tokens, and counts in `num_prefix_tokens`, are class and register tokens: tokens of the sequence.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from prefixattn.attach.records import LayerPrefix, PrefixCall
from prefixattn.attention.functional import prefix_attention, prefix_attention_qkvpacked


class _Prefixed(nn.Module):
    """Stands ahead of a class of timm's in a layer's class. A layer without a prefix runs that class's forward pass."""

    prefix_adapter: Any = None
    prefix_slot = -1

    def _found(self, x: Any) -> PrefixCall | None:
        call = None if self.prefix_adapter is None else self.prefix_adapter.call_for(self.prefix_slot, x)
        return call if call is not None and call.has(self.prefix_slot) else None

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            "torch.jit.script cannot compile attention with a prefix; torch.export.export can. For the model without "
            "its prefix call prefix.detach() before, and use timm's own Attention, not prefixattn.timm_attention"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # classes made by `prefixed` have no name to be imported by
        plain = type(self).__dict__.get("plain")
        return super().__reduce_ex__(protocol) if plain is None else (_empty, (plain,), self.__dict__)


class _Unrotated(_Prefixed):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        call = self._found(x)
        if call is None:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        return attend(self, call, x, None, attn_mask, is_causal)


class _Rotated(_Prefixed):
    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        call = self._found(x)
        if call is None:
            return super().forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)
        return attend(self, call, x, rope, attn_mask, is_causal)


class PrefixAttention(_Unrotated, Attention):
    """For `timm.create_model(..., attn_layer=)`: timm's Attention, to which `attach` can give a prefix."""


_FORWARDS = Attention.forward, AttentionRope.forward, EvaAttention.forward, _Unrotated.forward, _Rotated.forward


def known(module: nn.Module) -> bool:
    """True if the module computes as one of timm's three classes does."""
    return "forward" not in module.__dict__ and any(type(module).forward is forward for forward in _FORWARDS)


@cache
def prefixed(cls: Any) -> Any:
    ahead = _Rotated if issubclass(cls, (AttentionRope, EvaAttention)) else _Unrotated
    return type(f"Prefix{cls.__name__}", (ahead, cls), {"plain": cls})


def _empty(plain: type) -> Any:
    cls = prefixed(plain)
    return cls.__new__(cls)


def enter(layer: Any, adapter: Any, slot: int) -> None:
    # The class and not an attribute `forward`, which would bind the layer that a copy was made from.
    if not isinstance(layer, _Prefixed):
        cls: Any = type(layer)
        layer.__class__ = prefixed(cls)
    layer.prefix_adapter, layer.prefix_slot = adapter, slot


def leave(layer: Any) -> None:
    layer.__class__ = type(layer).__dict__.get("plain", type(layer))
    for name in ("prefix_adapter", "prefix_slot"):
        layer.__dict__.pop(name, None)


def attend(
    layer: Any, call: PrefixCall, x: Tensor, rope: Tensor | None, attn_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """The forward pass of `layer` on x [B, N, E] with the prefix that `call` has for it."""
    fused = layer.fused_attn
    if is_causal and attn_mask is not None:
        if fused:
            raise ValueError("attn_mask and is_causal=True exclude each other; give a mask that contains causality")
        attn_mask = None  # as timm's own unfused attention has it
    dropping = layer.attn_drop
    if not fused and (dropping._forward_hooks or dropping._forward_pre_hooks):
        raise NotImplementedError(
            "a hook on attn_drop waits for attention weights, which attention with a prefix never makes; inside "
            "prefix.disabled() the model makes those that it has without the prefix"
        )
    gate = None if layer.gate is None else layer.gate(x).sigmoid()
    packed, slot = _packed(layer, x), layer.prefix_slot
    found, memory = call.prefixes.get(slot), call.memories.get(slot)
    want_mass = call.masses is not None and found is not None
    options: dict[str, Any] = {
        "attn_mask": attn_mask,
        "dropout_p": dropping.p if (layer if fused else dropping).training else 0.0,
        "is_causal": is_causal,
        "prefix_dropout_p": call.dropout_p if found is not None else 0.0,
        "return_prefix_mass": want_mass,
    }
    inside = memory is None or memory.inside
    if memory is not None and inside:
        options |= {"memory": memory.matrix.to(x.device), "phi": memory.phi}
    normed = not (isinstance(layer.q_norm, nn.Identity) and isinstance(layer.k_norm, nn.Identity))
    # the projection's gradient is then one tensor
    together = packed is not None and rope is None and not normed and inside
    out: Any
    if packed is not None and together:
        prefix_k, prefix_v = _prefix(found, packed, packed.shape[3])
        out = prefix_attention_qkvpacked(packed, prefix_k, prefix_v, **options)
    else:
        q, k, v = _separate(layer, x, packed, rope)
        prefix_k, prefix_v = _prefix(found, v, v.shape[1])
        options["enable_gqa"] = q.shape[1] != k.shape[1]
        out = prefix_attention(q, k, v, prefix_k, prefix_v, **options)
    if want_mass:
        out, call.masses[slot] = out  # type: ignore[index]
    if memory is not None and not inside:
        out = out + memory.added(q)
    out = layer.norm((out if together else out.transpose(1, 2)).flatten(2))  # [B, N, H D]
    out = layer.proj(out if gate is None else out * gate)
    return layer.proj_drop(out)


def _prefix(found: LayerPrefix | None, like: Tensor, heads: int) -> LayerPrefix:
    """Keys and values of the type and on the device of `like` [..., D]; no rows if there are none."""
    if found is None:
        empty = like.new_empty(heads, 0, like.shape[-1])
        return empty, empty
    return found[0].to(like.device, like.dtype), found[1].to(like.device, like.dtype)


def _packed(layer: Any, x: Tensor) -> Tensor | None:
    """Queries, keys and values [B, N, 3, H, D] of a layer with one projection for them."""
    if layer.qkv is None:
        return None
    if getattr(layer, "q_bias", None) is None:
        qkv = layer.qkv(x)
    else:  # EvaAttention's; there is no bias for keys, and k_bias is zero
        bias = torch.cat([layer.q_bias, layer.k_bias, layer.v_bias])
        qkv = layer.qkv(x) + bias if layer.qkv_bias_separate else F.linear(x, layer.qkv.weight, bias)
    return qkv.view(*x.shape[:2], 3, layer.num_heads, layer.head_dim)


def _separate(layer: Any, x: Tensor, packed: Tensor | None, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D], k and v [B, Hkv, N, D], normed and rotated."""
    if packed is not None:
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    else:
        heads = layer.num_heads, kv_heads(layer), kv_heads(layer)
        parts = layer.q_proj, layer.k_proj, layer.v_proj
        shapes = [(*x.shape[:2], n, layer.head_dim) for n in heads]
        q, k, v = (part(x).view(shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True))
    q, k = layer.q_norm(q), layer.k_norm(k)
    if rope is not None:
        q, k = (_rotated(layer, t, rope).type_as(v) for t in (q, k))
    return q, k, v


def _rotated(layer: Any, t: Tensor, rope: Tensor) -> Tensor:
    still, patches = t.tensor_split([layer.num_prefix_tokens], 2)
    return torch.cat([still, apply_rot_embed_cat(patches, rope, half=layer.rotate_half)], 2)


def kv_heads(layer: Any) -> int:
    return int(getattr(layer, "num_kv_heads", layer.num_heads))


def sizes(layer: Any) -> tuple[int, int, int, int]:
    """H, Hkv, D, and the width of what the layer reads."""
    reads = layer.q_proj if layer.qkv is None else layer.qkv
    return layer.num_heads, kv_heads(layer), layer.head_dim, reads.in_features


# share="simple"

# class of the module around the layer -> the norm before the layer, "" if there is none
NORMS = {
    "Block": "norm1",
    "EvaBlock": "norm1",
    "DeepseekVitBlock": "norm1",
    "Sequential": "norm",  # of a block with several attentions beside each other
    "ResPostBlock": "",
    "EvaBlockPostNorm": "",
}


def _norm(layer: Any, around: Any) -> nn.Module:
    for cls in type(around).__mro__:
        if cls.__name__ in NORMS:
            name = NORMS[cls.__name__]
            return getattr(around, name) if name else nn.Identity()
    raise NotImplementedError(
        f"share='simple' does not know which norm stands before the attention of a {type(around).__name__}; "
        f"it knows {', '.join(NORMS)}"
    )


def projection_parameters(layer: Any, around: Any) -> Iterator[Tensor]:
    """What `project` reads."""
    for part in (_norm(layer, around), layer.qkv, getattr(layer, "k_proj", None), getattr(layer, "v_proj", None)):
        if part is not None:
            yield from part.parameters()
    if getattr(layer, "v_bias", None) is not None:
        yield layer.v_bias
    yield from layer.k_norm.parameters()


def project(layer: Any, around: Any, vectors: Tensor, device: torch.device) -> Tensor:
    """Keys and values [2, Hkv, P, D] on `device` of `vectors` [P, E], which take the place of what the block reads.

    Keys are not rotated: a prefix has no position.
    """
    weight = layer.proj.weight
    # offloaded weights are on meta until their modules run
    where = device if weight.device.type == "meta" else weight.device
    rows = _norm(layer, around)(vectors.to(device=where, dtype=weight.dtype))
    packed = _packed(layer, rows[None])
    if packed is not None:
        key, value = packed[0, :, 1:].unbind(1)  # [P, H, D]
    else:
        key, value = (
            part(rows).view(len(rows), kv_heads(layer), layer.head_dim) for part in (layer.k_proj, layer.v_proj)
        )
    return torch.stack([layer.k_norm(key), value]).transpose(1, 2).to(device)
