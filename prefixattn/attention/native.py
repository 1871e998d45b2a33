"""A call as the kernels of csrc/ read it: a dict of the members of struct AttnParams, which all its modules share."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from prefixattn.attention.call import Call

if TYPE_CHECKING:
    from prefixattn._C import Attn


class Numbers(Protocol):
    """A compiled module: the numbers behind the names of csrc/api/limits.h."""

    DTYPES: dict[str, int]
    MASK_KINDS: dict[str, int]
    PHIS: dict[str, int]


def strided(t: Tensor) -> tuple[int, int, int, int]:
    return t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def attn_fields(numbers: Numbers, dtype: int, call: Call) -> "Attn":
    """What both passes hand over; `dtype` is the number of q's type."""
    q, mask, memory = call.q, call.attn_mask, call.memory
    B, H, L, D = q.shape
    T, Hkv, P, _ = call.prefix_k.shape
    kind, mask_at, mask_strides = "none", 0, [0, 0, 0, 0]
    if mask is not None:
        kind = {torch.bool: "bool", q.dtype: "same_as_q"}.get(mask.dtype, "float32")
        mask_at = mask.data_ptr()
        mask_strides = [s if n > 1 else 0 for s, n in zip(mask.stride(), mask.shape, strict=True)]
    return {
        "dtype": dtype,
        "B": B, "H": H, "Hkv": Hkv, "L": L, "S": call.k.shape[2], "T": T, "P": P, "D": D,
        "q": strided(q), "k": strided(call.k), "v": strided(call.v),
        "prefix_k": strided(call.prefix_k), "prefix_v": strided(call.prefix_v),
        "memory": None if memory is None else strided(memory),
        "memories": 0 if memory is None else memory.shape[0],
        "phi": numbers.PHIS[call.phi],
        "prefix_ids": address(call.prefix_ids), "prefix_lengths": address(call.prefix_lengths),
        "mask_kind": numbers.MASK_KINDS[kind],
        "mask": (mask_at, mask_strides[0], mask_strides[1], mask_strides[2]), "mask_stride3": mask_strides[3],
        "scale": call.scale, "softcap": call.softcap, "causal": call.is_causal,
        "dropout_p": call.dropout_p, "prefix_dropout_p": call.prefix_dropout_p,
        "seed": address(call.seed),
    }  # fmt: skip
