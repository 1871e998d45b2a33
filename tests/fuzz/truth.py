"""The answer in float64, forward and backward by hand: own keys and prefix are never put together."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prefixattn.attention import philox
from tests.fuzz.cases import Case

HIDES = -1e37  # docs/op.md: a mask's number of -1e37 or less hides its key


def truth(case: Case) -> dict[str, Tensor]:
    """out, lse, mass, and the gradient of every tensor that wants one."""
    return _of_samples(case) if case.sequences is None else _of_sequences(case)


def _of_sequences(case: Case) -> dict[str, Tensor]:
    """Each as a call of one sample with the prefix that is its own, and what they share summed."""
    assert case.sequences is not None
    t, o = case.tensors, dict(case.options)
    H, Hkv, P, D, Dv = (case.sizes[name] for name in ("H", "Hkv", "P", "D", "Dv"))
    queries, keys = case.sequences
    row = _rows(case, t["prefix_k"])
    used = None if "prefix_lengths" not in o else _lengths(case, row)
    o.pop("prefix_ids", None)
    like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    found = {name: torch.zeros(H, sum(queries), **like) for name in ("lse", "mass")}
    found["out"] = torch.zeros(sum(queries), H, Dv, **like)
    found |= {f"d{name}": torch.zeros(x.shape, **like) for name, x in t.items() if x.requires_grad}
    begin_q = begin_k = 0
    for i, (L, S) in enumerate(zip(queries, keys, strict=True)):
        rows, own = slice(begin_q, begin_q + L), slice(begin_k, begin_k + S)
        begin_q, begin_k = begin_q + L, begin_k + S
        parts: dict[str, Any] = {"q": rows, "k": own, "v": own}  # where in its tensor a sequence's part lies
        for name, whole in t.items():
            several = whole.dim() == {"prefix_k": 4, "prefix_v": 4, "memory": 4}.get(name)
            parts.setdefault(name, int(row[i]) if several else slice(None))
        tensors = {}
        for name, whole in t.items():
            part = whole.detach()[parts[name]]
            part = part.transpose(0, 1)[None] if name in "qkv" else part
            tensors[name] = part.requires_grad_(whole.requires_grad)
        alone = replace(
            case,
            sizes={"B": 1, "H": H, "Hkv": Hkv, "L": L, "S": S, "P": P, "D": D, "Dv": Dv},
            tensors=tensors,
            options=o if used is None else {**o, "prefix_lengths": used[i : i + 1]},
            dout=case.dout[rows].transpose(0, 1)[None],
            dlse=None if case.dlse is None else case.dlse[None, :, rows],
            sequences=None,
        )
        for name, mine in _of_samples(alone, i).items():
            if name in ("lse", "mass"):
                found[name][:, rows] = mine[0]
            elif name == "out":
                found[name][rows] = mine[0].transpose(0, 1)
            else:
                found[name][parts[name[1:]]] += mine[0].transpose(0, 1) if name[1:] in "qkv" else mine
    return found


def _of_samples(case: Case, first: int = 0) -> dict[str, Tensor]:
    """Of a batch; dropout numbers its samples from `first`."""
    t = {name: x.detach().double() for name, x in case.tensors.items()}
    sizes, o = case.sizes, case.options
    B, H, Hkv, L, S, _, D, Dv = sizes.values()
    G = H // Hkv if Hkv else 1
    scale = o.get("scale")
    scale = 1 / math.sqrt(D) if scale is None else scale
    cap = o.get("softcap")
    q = t["q"].unflatten(1, (Hkv, G)) if Hkv else t["q"].view(B, 0, 1, L, D)  # [B, Hkv, G, L, D]
    k, v = t["k"], t["v"]
    row = _rows(case, t["prefix_k"])  # [B]: whose prefix a sample has
    banks = {name: t[name] if t[name].dim() == 4 else t[name][None] for name in ("prefix_k", "prefix_v")}
    pk, pv = (banks[name][row] for name in ("prefix_k", "prefix_v"))  # [B, Hkv, P, D or Dv]
    keeps = _keeps(case, first)
    pk, pv = pk * keeps["prefix_k"], pv * keeps["prefix_v"]

    # scores: own [B, Hkv, G, L, S] and of the prefix [B, Hkv, G, L, P]
    own, pre = (torch.einsum("bkgld,bksd->bkgls", q, keys) * scale for keys in (k, pk))
    bend_own, bend_pre = torch.ones_like(own), torch.ones_like(pre)
    if cap is not None:
        # near the cap, 1 - tanh^2 is what rounding left, also in float64
        bend_own, bend_pre = (1 / torch.cosh(s / cap) ** 2 for s in (own, pre))
        own, pre = (cap * torch.tanh(s / cap) for s in (own, pre))
    own, seen_own, seen_pre = *_masked(case, t, own), _used(case, row)
    seen_pre = seen_pre.expand(pre.shape)
    none = torch.full((), -math.inf, dtype=torch.float64)
    top = torch.maximum(_largest(torch.where(seen_own, own, none)), _largest(torch.where(seen_pre, pre, none)))
    sink = none if "sinks" not in t else t["sinks"].reshape(1, Hkv, G, 1)
    top = torch.maximum(top, sink)
    base = torch.where(top.isinf(), 0.0, top)
    e_own = torch.where(seen_own, (own - base[..., None]).exp(), 0.0)
    e_pre = torch.where(seen_pre, (pre - base[..., None]).exp(), 0.0)
    e_sink = (sink - base).exp()  # [B, Hkv, G, L]
    total = e_own.sum(-1) + e_pre.sum(-1) + e_sink
    lse = base + total.log()  # -inf where nothing is seen
    safe = torch.where(total == 0, 1.0, total)[..., None]
    w_own, w_pre = e_own / safe, e_pre / safe
    d_own, d_pre = w_own * keeps["own"], w_pre * keeps["pre"]  # after dropout
    # a hidden value may be anything
    out = torch.einsum("bkgls,bksd->bkgld", d_own, v) + torch.einsum("bkglp,bkpd->bkgld", d_pre, pv)
    found = {"out": out.reshape(B, H, L, Dv), "lse": lse.reshape(B, H, L), "mass": w_pre.sum(-1).reshape(B, H, L)}

    dout = case.dout.double().reshape(B, Hkv, G, L, Dv)
    dlse = torch.zeros(B, H, L, dtype=torch.float64) if case.dlse is None else case.dlse.double()
    dlse = dlse.reshape(B, Hkv, G, L)
    back_own = torch.einsum("bkgld,bksd->bkgls", dout, v) * keeps["own"]
    back_pre = torch.einsum("bkgld,bkpd->bkglp", dout, pv) * keeps["pre"]
    common = (w_own * back_own).sum(-1) + (w_pre * back_pre).sum(-1) - dlse
    g_own, g_pre = w_own * (back_own - common[..., None]), w_pre * (back_pre - common[..., None])
    grads: dict[str, Tensor] = {}
    if "sinks" in t:
        grads["sinks"] = (-common * e_sink / safe[..., 0]).sum((0, 3)).reshape(H)
    if "attn_mask" in t:
        grads["attn_mask"] = _summed_to(g_own.reshape(B, H, L, S), t["attn_mask"].shape)
    g_own, g_pre = g_own * bend_own * scale, g_pre * bend_pre * scale
    dq = torch.einsum("bkgls,bksd->bkgld", g_own, k) + torch.einsum("bkglp,bkpd->bkgld", g_pre, pk)
    grads["k"] = torch.einsum("bkgls,bkgld->bksd", g_own, q)
    grads["v"] = torch.einsum("bkgls,bkgld->bksd", d_own, dout)
    of_sample = {
        "prefix_k": torch.einsum("bkglp,bkgld->bkpd", g_pre, q) * keeps["prefix_k"],
        "prefix_v": torch.einsum("bkglp,bkgld->bkpd", d_pre, dout) * keeps["prefix_v"],
    }
    for name, grad in of_sample.items():
        grads[name] = torch.zeros_like(banks[name]).index_add(0, row, grad).reshape(t[name].shape)
    dq = dq.reshape(B, H, L, D)
    if "memory" in t:
        more, dq_more, grads["memory"] = _memory(case, t, row)
        found["out"], dq = found["out"] + more, dq + dq_more
    grads["q"] = dq
    return found | {f"d{name}": grads[name] for name, x in case.tensors.items() if x.requires_grad}


def _largest(t: Tensor) -> Tensor:
    return t.amax(-1) if t.shape[-1] else t.new_full(t.shape[:-1], -math.inf)


def _rows(case: Case, prefix: Tensor) -> Tensor:
    B = case.sizes["B"]
    if "prefix_ids" in case.options:
        ids: Tensor = case.options["prefix_ids"]
        return ids
    return torch.arange(B) if prefix.dim() == 4 and prefix.shape[0] > 1 else torch.zeros(B, dtype=torch.int64)


def _lengths(case: Case, row: Tensor) -> Tensor:
    """How many rows of its prefix a sample has, [B]."""
    lengths: Tensor | None = case.options.get("prefix_lengths")
    if lengths is None:
        return torch.full((case.sizes["B"],), case.sizes["P"])
    if "prefix_ids" in case.options and len(lengths) == case.tensors["prefix_k"].shape[0]:
        return lengths[row]
    return lengths.expand(case.sizes["B"])


def _used(case: Case, row: Tensor) -> Tensor:
    """Which rows of its prefix a sample's queries see, [B, 1, 1, L or 1, P]."""
    P, L, S = (case.sizes[name] for name in "PLS")
    length = _lengths(case, row)
    seen = (torch.arange(P) < length[:, None])[:, None, None, None]
    left, _ = case.options.get("window_size", (-1, -1))
    if left >= 0 and case.options["prefix_in_window"]:
        place = torch.arange(P) - length[:, None]  # [B, P]
        seen = seen & (place[:, None, None, None] >= torch.arange(S - L, S)[:, None] - left)
    return seen


def _masked(case: Case, t: dict[str, Tensor], own: Tensor) -> tuple[Tensor, Tensor]:
    """The own scores with a mask's numbers added, and which of them are seen, [B, Hkv, G, L, S] both."""
    B, H, _, L, S, _, _, _ = case.sizes.values()
    seen = torch.ones(B, H, L, S, dtype=torch.bool)
    added = torch.zeros(B, H, L, S, dtype=torch.float64)
    if "attn_mask" in case.options:
        seen = seen & case.options["attn_mask"]
    elif "attn_mask" in t:
        hides = t["attn_mask"] <= HIDES
        seen, added = seen & ~hides, added + t["attn_mask"].masked_fill(hides, 0.0)
    if case.options["is_causal"]:
        seen = seen & (torch.arange(S) <= torch.arange(L)[:, None] + (S - L))
    ahead = torch.arange(S) - torch.arange(S - L, S)[:, None]  # how far a key is ahead of a query
    left, right = case.options.get("window_size", (-1, -1))
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    return own + added.reshape(own.shape), seen.reshape(own.shape)


def _keeps(case: Case, first: int) -> dict[str, Any]:
    """What dropout multiplies by: prefix keys and values, and the weights of own keys and of the prefix."""
    B, H, Hkv, L, S, P, D, Dv = case.sizes.values()
    found: dict[str, Any] = dict.fromkeys(("prefix_k", "prefix_v", "own", "pre"), 1.0)
    if case.seed is None:
        return found
    torch.manual_seed(case.seed)
    seed = torch.randint(2**62, (1,))
    if p := case.options.get("prefix_dropout_p"):
        for name, width, kind in (("prefix_k", D, philox.PREFIX_K), ("prefix_v", Dv, philox.PREFIX_V)):
            found[name] = philox.keep(seed, p, (B, Hkv, P, width), kind, first).double() / (1 - p)
    if p := case.options.get("dropout_p"):
        kept = philox.keep(seed, p, (B, H, L, P + S), philox.ATTENTION, first).double() / (1 - p)
        kept = kept.reshape(B, Hkv, H // Hkv if Hkv else 1, L, P + S)
        found["pre"], found["own"] = kept[..., :P], kept[..., P:]
    return found


def _summed_to(t: Tensor, shape: torch.Size) -> Tensor:
    while t.dim() > len(shape):
        t = t.sum(0)
    for axis, n in enumerate(shape):
        if n == 1:
            t = t.sum(axis, keepdim=True)
    return t


def _memory(case: Case, t: dict[str, Tensor], row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """phi(q) @ memory, and its gradients of q and memory."""
    q, memory, dout = t["q"], t["memory"], case.dout.double()
    above = q > 0
    features, slope = {
        "none": (q, torch.ones_like(q)),
        "relu": (q.clamp(min=0), above.double()),
        "elu": (torch.where(above, q, torch.expm1(q)), torch.where(above, 1.0, q.exp())),
        "gelu": (
            q * torch.special.ndtr(q),
            torch.special.ndtr(q) + q * torch.exp(-q * q / 2) / math.sqrt(2 * math.pi),
        ),
    }[case.options["phi"]]
    several = memory if memory.dim() == 4 else memory[None]
    target = row if memory.dim() == 4 else torch.zeros_like(row)
    each = several[target]  # [B, H, D, Dv]
    dq = slope * torch.einsum("bhlj,bhij->bhli", dout, each)
    of_sample = torch.einsum("bhli,bhlj->bhij", features, dout)
    dmemory = torch.zeros_like(several).index_add(0, target, of_sample).reshape(memory.shape)
    return torch.einsum("bhli,bhij->bhlj", features, each), dq, dmemory
