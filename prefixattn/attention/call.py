"""The records of an attention call: what backends take and return, by name. torch's flat schemas are made from them.

A backend has `unsupported(call, needs)`, `fwd(call, wants)` and `bwd(call, given, needs, into)`.
"""

from collections.abc import Iterable
from typing import NamedTuple, get_type_hints

import torch
from torch import Tensor

from prefixattn.attention.layout import empty_like_order


class Call(NamedTuple):
    """A call in the normal form of normal_form.py: checked, and complete but for what is None."""

    # of packed sequences [1, H, total, D]: then B, L and S are those of the sequences
    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, Hkv, S, D]
    v: Tensor  # [B, Hkv, S, Dv]
    prefix_k: Tensor  # [T, Hkv, P, D]
    prefix_v: Tensor  # [T, Hkv, P, Dv]
    attn_mask: Tensor | None = None  # [B or 1, H or 1, L or 1, S or 1]
    sinks: Tensor | None = None  # [H]
    memory: Tensor | None = None  # [1 or T, H, D, Dv]
    prefix_ids: Tensor | None = None  # int64 [B]: each sample's prefix; None: the only one, or prefix b of sample b
    prefix_lengths: Tensor | None = None  # int64 [B], per sample
    cu_seqlens_q: Tensor | None = None  # int64 [B + 1], where sequences are packed; rows between are a sequence's
    cu_seqlens_k: Tensor | None = None  # likewise, of k and v
    seed: Tensor | None = None  # int64 [1], where there is dropout of either kind
    dropout_p: float = 0.0
    prefix_dropout_p: float = 0.0
    is_causal: bool = False
    scale: float = 1.0
    phi: str = "elu"
    softcap: float = 0.0  # 0: none
    # query l, at position l + S - L, sees own keys so far before and behind it; -1: all there are
    window_left: int = -1
    window_right: int = -1  # so, too, where is_causal
    prefix_in_window: bool = False  # prefix row i lies at i - its length; False: every query sees it
    max_seqlen_q: int = 0  # no sequence has more, where they are packed
    max_seqlen_k: int = 0
    splits_float32: bool = False  # a CPU's products may be three of bfloat16; see precision.py

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """What may have a gradient, in the order of `Needs`."""
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v, self.attn_mask, self.sinks, self.memory


Unknown = tuple[tuple[str, object], ...]


def unknown(known: Iterable[str]) -> Unknown:
    """The options that a backend of these fields has not, with the value that leaves each out.

    A new field of Call is refused by every backend but those that name it.
    """
    kept = set(known)
    return tuple((name, default) for name, default in Call._field_defaults.items() if name not in kept)


def refused(call: Call, options: Unknown) -> list[str]:
    return [f"it has no {name}" for name, default in options if getattr(call, name) != default]


class Needs(NamedTuple):
    """Whose gradient is wanted: of the first fields of `Call`, in their order."""

    q: bool = False
    k: bool = False
    v: bool = False
    prefix_k: bool = False
    prefix_v: bool = False
    attn_mask: bool = False
    sinks: bool = False
    memory: bool = False

    @property
    def softmax(self) -> bool:
        """Whether any is wanted that goes through the softmax: all but the memory's."""
        return any(self[:-1])


class Wants(NamedTuple):
    """What else a forward pass is to return."""

    mass: bool = False
    attended: bool = False


class Results(NamedTuple):
    """Of a forward pass; what was not wanted is empty [0]."""

    out: Tensor  # [B, H, L, Dv]
    lse: Tensor  # [B, H, L], natural log, of layout.lse_type
    mass: Tensor  # the softmax weight on the prefix [B, H, L], float32
    attended: Tensor  # out without the memory's part [B, H, L, Dv]


class Given(NamedTuple):
    """What a backward pass is given beside the call: what arrived, and what the forward pass left."""

    dout: Tensor  # [B, H, L, Dv]
    dlse: Tensor | None  # [B, H, L]
    out: Tensor  # [B, H, L, Dv]; with a memory what was `attended`, or empty if no gradient but the memory's is wanted
    lse: Tensor  # [B, H, L]


class Grads(NamedTuple):
    """Each in its input's shape, in the order of `Needs`; what is not wanted is empty [0]."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    attn_mask: Tensor
    sinks: Tensor
    memory: Tensor


Into = tuple[Tensor, Tensor, Tensor]  # where the gradients of q, k and v are written: strides as they come, 1 in D


def allocated(call: Call, needs: Needs, into: Into | None) -> Grads:
    """Memory for the gradients that are wanted, `into` for those of q, k and v; all others are empty."""
    empty = call.q.new_empty(0)
    dq, dk, dv = into or (None, None, None)

    def own(t: Tensor, need: bool, at: Tensor | None) -> Tensor:
        return empty if not need else empty_like_order(t) if at is None else at

    def dense(t: Tensor | None, need: bool) -> Tensor:  # whatever t's order: as the op's fake and the reference make it
        return t.new_empty(t.shape) if need and t is not None else empty

    return Grads(
        own(call.q, needs.q, dq),
        own(call.k, needs.k, dk),
        own(call.v, needs.v, dv),
        dense(call.prefix_k, needs.prefix_k),
        dense(call.prefix_v, needs.prefix_v),
        empty,
        dense(call.sinks, needs.sinks),
        dense(call.memory, needs.memory),
    )


_SPELLED = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}
TENSORS = tuple(name for name, of in get_type_hints(Call).items() if of in (Tensor, Tensor | None))
NUMBERS = tuple(name for name in Call._fields if name not in TENSORS)


def schema(record: type[tuple[object, ...]], prefix: str = "", first: int = 0) -> str:
    """A record's fields from the `first` as the arguments of a torch operator, their names behind `prefix`.

    A record within it stands as its own fields.
    """
    fields = list(get_type_hints(record).items())[first:]
    return ", ".join(f"{_SPELLED[of]} {prefix}{name}" if of in _SPELLED else schema(of) for name, of in fields)
