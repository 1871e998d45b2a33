"""One call of the op as the kernels take it: operands, strides, numbers, and the features that are compiled in."""

from typing import Any

import torch
from torch import Tensor

from prefixattn.attention import call
from prefixattn.attention.philox import threshold
from prefixattn.kernels import phi_tiles, tiles
from prefixattn.kernels.arguments import Drops, Features, Layout, MaskStrides, Packed, Strides, Window, strides
from prefixattn.kernels.table import INTERPRETED, Launch, choose

HALF_TYPES = torch.bfloat16, torch.float16
OWN, PREFIX, SPLIT = tiles.OWN.value, tiles.PREFIX.value, tiles.SPLIT.value
RAW, NATURAL, EXACT = tiles.RAW.value, tiles.NATURAL.value, tiles.EXACT.value
NO_MASK, BOOL_MASK, FLOAT_MASK = tiles.NO_MASK.value, tiles.BOOL_MASK.value, tiles.FLOAT_MASK.value
NO_MEMORY = phi_tiles.NO_MEMORY.value
PHIS = {
    "none": phi_tiles.NONE.value,
    "elu": phi_tiles.ELU.value,
    "gelu": phi_tiles.GELU.value,
    "relu": phi_tiles.RELU.value,
}


class Call(call.Call):
    """A call whose tensors the kernels can read as they lie."""

    __slots__ = ()

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.prefix_k, self.prefix_v

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int, int]:
        """B, H, Hkv, L, S, T, P, D; of packed sequences their number and the longest one's."""
        B, H, L, D = self.q.shape
        T, KV, P, _ = self.prefix_k.shape
        S = self.k.shape[2]
        if self.cu_seqlens_q is not None:
            B, L, S = len(self.cu_seqlens_q) - 1, min(L, self.max_seqlen_q), min(S, self.max_seqlen_k)
        return B, H, KV, L, S, T, P, D

    @property
    def packed(self) -> Packed | None:
        """None where samples have an axis of their own: as of `cap`, a kernel has no code for sequences then."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return None
        return Packed(self.cu_seqlens_q, self.cu_seqlens_k, self.q.shape[2])

    @property
    def causal(self) -> bool:
        return self.is_causal and self.sizes[3] > 1  # a single query, aligned bottom-right, sees every key

    @property
    def cap(self) -> float | None:
        """None where there is none: to Triton a constant, so that a kernel without a cap has no code for one."""
        return self.softcap or None

    @property
    def window(self) -> Window:
        """A bound that hides nothing is None, and so are all without one: as of `cap`, a kernel has no code for it."""
        if self.window_left < 0 and self.window_right < 0:
            return Window()
        _, _, _, L, S, _, P, _ = self.sizes
        left, right = self.window_left, self.window_right
        bound_left = 0 <= left < S - 1 + (P if self.prefix_in_window else 0)
        bound_right = 0 <= right < L - 1
        if not (bound_left or bound_right):
            return Window()
        first = S - L if self.packed is None else 0
        return Window(left if bound_left else None, right if bound_right else None, first)

    @property
    def prefix_window(self) -> Window:
        """The window for a kernel of the prefix alone: none if it hides nothing there."""
        window = self.window if self.prefix_in_window else Window()
        return Window() if window.left is None else window

    @property
    def exp(self) -> int:
        """How weights are computed. RAW: scores are products and no more, and the largest is the largest scaled one."""
        if self.q.dtype not in HALF_TYPES:
            return EXACT
        biased = self.attn_mask is not None and self.attn_mask.dtype != torch.bool
        changed = biased or self.prefix_dropout_p > 0 or self.cap is not None
        return RAW if self.scale > 0 and not changed else NATURAL

    @property
    def block_d(self) -> int:
        return tile_width(self.q.shape[3]) or 16

    def launch(self, kernel: str) -> Launch | None:
        half = INTERPRETED or self.q.dtype in HALF_TYPES
        return choose(kernel, self.q.device, self.block_d, half)

    def readable_mask(self) -> Tensor:
        """A bool mask is read as bytes; where there is none, some tensor that is never read."""
        if self.attn_mask is None:
            return self.q
        return self.attn_mask.view(torch.uint8) if self.attn_mask.dtype == torch.bool else self.attn_mask

    def mask_strides(self) -> MaskStrides:
        mask = self.attn_mask
        if mask is None:
            return MaskStrides(0, 0, 0, 0)
        return MaskStrides(*(s if n > 1 else 0 for s, n in zip(mask.stride(), mask.shape, strict=True)))

    def layout(
        self,
        out: Strides | None = None,
        dout: Strides | None = None,
        dq: Strides | None = None,
        dk: Strides | None = None,
        dv: Strides | None = None,
    ) -> Layout:
        """With the operands and the mask."""
        q, k, v = map(self.strides, (self.q, self.k, self.v))
        prefix_k, prefix_v = strides(self.prefix_k), strides(self.prefix_v)
        return Layout(q, k, v, prefix_k, prefix_v, self.mask_strides(), out, dout, dq, dk, dv)

    def strides(self, t: Tensor) -> Strides:
        """Of q, k, v and what lies as they do."""
        return strides(t, packed=self.packed is not None)

    def indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, lengths and seed, or what is never read."""
        ids, lengths, seed = (self.q if t is None else t for t in (self.prefix_ids, self.prefix_lengths, self.seed))
        return ids, lengths, seed

    def drops(self, prefix: bool = True) -> Drops:
        """Without the prefix: for a kernel that has no dropout of it."""
        own = threshold(self.dropout_p), 1 / (1 - self.dropout_p)
        if not prefix:
            return Drops(*own)
        return Drops(*own, threshold(self.prefix_dropout_p), 1 / (1 - self.prefix_dropout_p))

    def features(self, masks: bool = True, prefixes: bool = True, memory: bool = True) -> Features:
        """Of those that a kernel has code for: it is not compiled again for any other."""
        return Features(
            **self.numbers(),
            **(self.masks() if masks else {}),
            **(self.prefixes() if prefixes else {}),
            **(self.memories() if memory else {}),
        )

    def numbers(self) -> dict[str, Any]:
        """The features that every kernel has."""
        tf32 = self.q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return {
            "D": self.q.shape[3],
            "BLOCK_D": self.block_d,
            "DROPOUT": self.dropout_p > 0,
            "PRECISION": "tf32" if tf32 else "ieee",
            "EXP": self.exp,
        }

    def masks(self) -> dict[str, Any]:
        kind = NO_MASK if self.attn_mask is None else BOOL_MASK if self.attn_mask.dtype == torch.bool else FLOAT_MASK
        return {
            "MASK": kind,
            "KEY_MASK": self.attn_mask is not None and self.attn_mask.shape[2] == 1,
            "CAUSAL": self.causal,
        }

    def prefixes(self) -> dict[str, Any]:
        return {
            "HAS_IDS": self.prefix_ids is not None,
            "PER_SAMPLE": self.prefix_ids is None and self.prefix_k.shape[0] > 1,
            "HAS_LENGTHS": self.prefix_lengths is not None,
            "PREFIX_DROPOUT": self.prefix_dropout_p > 0,
            "PREFIX_IN_WINDOW": self.prefix_window != Window(),
        }

    def memories(self) -> dict[str, Any]:
        return {
            "PHI": NO_MEMORY if self.memory is None else PHIS[self.phi],
            "MEMORY_PER_PREFIX": self.memory is not None and self.memory.shape[0] > 1,
        }

    def readable_memory(self) -> Tensor:
        """Where there is none, some tensor that is never read."""
        return self.q if self.memory is None else self.memory

    def rest(self, block_n: int, prefix: bool = True) -> dict[str, Any]:
        """How the columns after the whole tiles of own keys are cut: see prefix_attn_fwd."""
        one_query = self.sizes[3] == 1
        apart = self.window != Window() or self.packed is not None
        own = 0 if self.causal or apart else self.k.shape[2] % block_n  # which are in masked tiles of own keys then
        P = self.prefix_k.shape[2] if prefix else 0
        part = OWN if P == 0 else SPLIT if own else PREFIX
        width = own + P
        if one_query and prefix:  # decoding: one kernel for every S, masked, rather than few products
            part = PREFIX if apart else SPLIT
        # without tensor cores one more kind of tile costs more registers than it saves
        if self.exp == EXACT or one_query:
            loop, tail = True, 0
        elif width <= block_n:
            loop, tail = False, width
        elif self.prefix_lengths is not None and prefix:  # where the last tile begins is known to the kernel alone
            loop, tail = True, 0
        else:
            loop, tail = True, width % block_n
        return {"REST": part, "REST_LOOP": loop, "TAIL": tile_width(tail)}


def tile_width(n: int) -> int:
    """The narrowest tile that holds n: 0, or a power of two from 16 on, the least that a product of tiles takes."""
    return max(16, 1 << (n - 1).bit_length()) if n else 0  # triton.next_power_of_2 takes microseconds


def options(plan: Launch) -> dict[str, Any]:
    # fusing a multiplication into an addition stops being Triton's default with 3.10
    return {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": True}
