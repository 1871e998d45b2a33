"""For tests of batch invariance: some samples or sequences of a call, and results compared to the bit."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefixattn.testing.attention import Inputs
from prefixattn.testing.varlen import Packed

OF_QUERIES, OF_KEYS = ("out", "lse", "mass", "dq"), ("dk", "dv")


def samples(inputs: Inputs, keep: list[int]) -> Inputs:
    """The call of these samples alone, in this order."""
    B = inputs.q.shape[0]
    shared = "prefix_ids" in inputs.options
    at = torch.tensor(keep)

    def rows(name: str, t: Any) -> Any:
        own = name in ("q", "k", "v", "prefix_ids") or (name in ("prefix_k", "prefix_v", "memory") and not shared)
        own = own or name in ("attn_mask", "prefix_lengths")
        return t[at] if isinstance(t, Tensor) and own and t.dim() != 3 and t.shape[0] == B else t

    tensors = {n: rows(n, t.detach()).requires_grad_(t.requires_grad) for n, t in inputs.tensors.items()}
    options = {n: rows(n, option) for n, option in inputs.options.items()}
    assert inputs.dout is not None and inputs.dlse is not None
    return replace(inputs, tensors=tensors, options=options, dout=inputs.dout[at], dlse=inputs.dlse[at])


def rows_of_samples(inputs: Inputs) -> list[str]:
    """The names of the results that have a row for each sample: none of a sum over them."""
    names = [*OF_QUERIES, *OF_KEYS] if inputs.q.requires_grad else [*OF_QUERIES[:3]]
    if "prefix_ids" not in inputs.options:
        names += ["d" + n for n in ("prefix_k", "prefix_v", "memory") if _has_rows(inputs, n)]
    if _has_rows(inputs, "attn_mask") and inputs.tensors["attn_mask"].shape[0] > 1:
        names.append("dattn_mask")
    return names


def _has_rows(inputs: Inputs, name: str) -> bool:
    t = inputs.tensors.get(name)
    return t is not None and t.dim() == 4 and t.requires_grad


def sequences(inputs: Packed, keep: list[int]) -> Packed:
    """The call of these sequences alone, in this order."""
    tensors, options = dict(inputs.tensors), dict(inputs.options)
    assert inputs.dout is not None and inputs.dlse is not None
    rows = {x: _tokens(options[f"cu_seqlens_{x}"], keep) for x in "qk"}
    for name in "qkv":
        tensors[name] = inputs.tensors[name].detach()[torch.cat(rows["q" if name == "q" else "k"])]
    for name in ("prefix_k", "prefix_v", "memory"):
        if name in tensors and tensors[name].dim() == 4 and "prefix_ids" not in options:
            tensors[name] = tensors[name].detach()[torch.tensor(keep)]
    if "prefix_ids" in options:
        options["prefix_ids"] = options["prefix_ids"][torch.tensor(keep)]
    for x, own in rows.items():
        lengths = [len(tokens) for tokens in own]
        options[f"cu_seqlens_{x}"] = torch.tensor([0, *lengths]).cumsum(0).int()
        options[f"max_seqlen_{x}"] = max(lengths)
    for name, t in tensors.items():
        tensors[name] = t.detach().requires_grad_(inputs.tensors[name].requires_grad)
    at = torch.cat(rows["q"])
    return replace(inputs, tensors=tensors, options=options, dout=inputs.dout[at], dlse=inputs.dlse[:, at])


def of_sequence(found: dict[str, Tensor], inputs: Packed, i: int) -> dict[str, Tensor]:
    """What a packed call returned for its sequence i, as [1, heads, tokens, D]; no sum over sequences."""
    rows = {x: _tokens(inputs.options[f"cu_seqlens_{x}"], [i])[0] for x in "qk"}
    own = {n: found[n][rows["k" if n in OF_KEYS else "q"]].transpose(0, 1)[None] for n in ("out", "dq", "dk", "dv")}
    own |= {n: found[n][:, rows["q"]][None] for n in ("lse", "mass")}
    if "prefix_ids" not in inputs.options:
        own |= {n: found[n][i : i + 1] for n in ("dprefix_k", "dprefix_v", "dmemory") if n in found}
    return {n: t for n, t in own.items() if t.dim() == 4 or n in ("lse", "mass")}


def alone(inputs: Packed, i: int) -> Inputs:
    """Sequence i as the one sample of a call of prefix_attention."""
    one = sequences(inputs, [i])
    tensors = {n: t.detach().transpose(0, 1)[None] if n in "qkv" else t.detach() for n, t in one.tensors.items()}
    tensors = {n: t.requires_grad_() for n, t in tensors.items()}
    options = {n: o for n, o in one.options.items() if "seqlen" not in n}
    assert one.dout is not None and one.dlse is not None
    return Inputs(tensors, options, one.dout.transpose(0, 1)[None], one.dlse[None])


def _tokens(offsets: Tensor, keep: list[int]) -> list[Tensor]:
    ends = offsets.tolist()
    return [torch.arange(ends[i], ends[i + 1]) for i in keep]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def differing(whole: dict[str, Tensor], part: dict[str, Tensor], names: list[str], keep: list[int]) -> list[str]:
    """Which results of the samples `keep` have other bits in the whole batch than in the part that they are."""
    return [name for name in names if not same_bits(whole[name][torch.tensor(keep)], part[name])]
