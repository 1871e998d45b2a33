"""Packed sequences for tests: named inputs, and plain PyTorch's answer, one sequence after the other."""

from typing import Any

import torch
from torch import Tensor

from prefixattn.attention.functional import prefix_attention_varlen
from prefixattn.attention.sequences import Sequences
from prefixattn.testing.attention import Inputs, Shape, make_inputs
from prefixattn.testing.plain import concat_attention

LENGTHS = {  # of each sequence: its queries and its keys
    "training": ([17, 64, 1, 33, 20], None),
    "cached": ([3, 1, 8, 1], [40, 70, 8, 129]),  # each one's last queries
    "ragged": ([5, 0, 37, 1, 2], [9, 3, 20, 0, 70]),  # some have no query, some no key, some more queries than keys
    "decoding": ([1, 1, 0, 1], [30, 1, 5, 100]),
    "one": ([45], None),
    "none": ([], None),
}


class Packed(Inputs):
    """A call of prefix_attention_varlen; dout is [total_q, H, D], dlse [H, total_q]."""

    def call(self, backend: str = "auto", **options: Any) -> Any:
        arguments: dict[str, Any] = {**self.tensors, **self.options, "backend": backend, **options}
        return prefix_attention_varlen(**arguments)

    def of_normal_form(self, **options: Any) -> dict[str, Any]:
        given: dict[str, Any] = {**self.tensors, **self.options, **options}
        sequences = Sequences(*[given.pop(name) for name in Sequences._fields])
        return {**given, **{name: given[name].transpose(0, 1)[None] for name in "qkv"}, "sequences": sequences}

    def concatenated(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        given: dict[str, Any] = {**self.tensors, **self.options, **options}
        q, k, v, ids, lengths = (given.pop(name, None) for name in ("q", "k", "v", "prefix_ids", "prefix_lengths"))
        offsets = [given.pop(f"cu_seqlens_{x}").tolist() for x in "qk"]
        if offsets[0] == [0]:  # no sequence is as good as a batch without samples
            del given["max_seqlen_q"], given["max_seqlen_k"]
            none = [t[:, :, None] for t in (q, k, v)]  # [0, heads, 1, D]
            out, lse, mass = concat_attention(*none, **{**given, "prefix_ids": ids, "prefix_lengths": lengths})
            return out[:, :, 0], lse[:, :, 0].T, mass[:, :, 0].T
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for i in range(len(offsets[0]) - 1):
            own = dict(given)
            del own["max_seqlen_q"], own["max_seqlen_k"]
            if ids is None:
                own |= {n: own[n][i : i + 1] for n in ("prefix_k", "prefix_v", "memory") if _dims(own, n) == 4}
            else:
                own["prefix_ids"] = ids[i : i + 1]
            if lengths is not None:
                of_bank = ids is not None and len(lengths) == own["prefix_k"].shape[0]
                own["prefix_lengths"] = lengths if of_bank else lengths[i : i + 1]
            parts = []
            for t, at in ((q, offsets[0]), (k, offsets[1]), (v, offsets[1])):
                parts.append(t[at[i] : at[i + 1]].transpose(0, 1)[None])
            out, lse, mass = concat_attention(*parts, **{**own, "first": i})
            found.append((out[0].transpose(0, 1), lse[0], mass[0]))
        outs, lses, masses = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(lses, 1), torch.cat(masses, 1)


def _dims(own: dict[str, Any], name: str) -> int:
    return own[name].dim() if own.get(name) is not None else 0


def packed_sequences(
    sizes: str | tuple[list[int], list[int] | None],  # of LENGTHS, or like them
    dtype: torch.dtype = torch.float32,
    shape: Shape | None = None,
    **options: Any,
) -> Packed:
    """Inputs as `make_inputs` makes them, but for the numbers of samples, queries and keys."""
    own, others = LENGTHS[sizes] if isinstance(sizes, str) else sizes
    keys = own if others is None else others
    H, Hkv, P, D = (4, 2, 9, 16) if shape is None else (shape.H, shape.Hkv, shape.P, shape.D)
    n, total_q, total_k = len(own), sum(own), sum(keys)
    made = make_inputs(Shape(n, H, Hkv, total_q, total_k, P, D), dtype, **options)
    tensors = dict(made.tensors)
    layout = options.get("layout", "dense")
    for name in "qkv":  # one sample's, [total, heads, D], dense or a part of a packed projection
        t = tensors[name].detach()[:1] if n else tensors[name].detach().new_empty(1, *tensors[name].shape[1:])
        rows = t[0].transpose(0, 1)
        tensors[name] = (rows if layout == "packed" else rows.contiguous()).requires_grad_(tensors[name].requires_grad)
    given = {key: value for key, value in made.options.items() if key != "attn_mask"}
    for x, tokens in (("q", own), ("k", keys)):
        given[f"cu_seqlens_{x}"] = torch.tensor([0, *tokens]).cumsum(0).int()
        given[f"max_seqlen_{x}"] = max(tokens, default=0)
    assert made.dout is not None and made.dlse is not None
    dout = made.dout[0].transpose(0, 1) if n else made.dout.new_empty(0, H, made.dout.shape[3])
    dlse = made.dlse[0] if n else made.dlse.new_empty(H, 0)
    return Packed(tensors, given, dout.contiguous(), dlse)
