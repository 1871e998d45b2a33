"""The backward pass: which kernels run, with what grid, and only for gradients that somebody wants."""

import torch
import triton
from torch import Tensor

from prefixattn.attention.call import Given, Grads, Into, Needs, allocated
from prefixattn.attention.invariance import batch_invariant
from prefixattn.attention.layout import empty_like_order
from prefixattn.kernels.arguments import Layout, Rows, Window, strides
from prefixattn.kernels.call import EXACT, HALF_TYPES, Call, options, tile_width
from prefixattn.kernels.prefix_attn_bwd import prefix_attn_bwd_delta, prefix_attn_bwd_keys, prefix_attn_bwd_queries
from prefixattn.kernels.prefix_attn_bwd_memory import prefix_attn_bwd_memory
from prefixattn.kernels.prefix_attn_bwd_prefix import prefix_attn_bwd_prefix, prefix_attn_bwd_reduce
from prefixattn.kernels.prefix_attn_bwd_short import prefix_attn_bwd_short
from prefixattn.kernels.table import HEAD_KEYS, INTERPRETED, Launch, processors


def backward(call: Call, given: Given, needs: Needs, into: Into | None) -> Grads:
    grads = allocated(call, needs, into)
    if call.q.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads._replace(attn_mask=_mask_zeros(call)) if needs.attn_mask else grads
    if needs.memory:
        _memory(call, given, grads.memory)
    if not needs.softmax:
        return grads
    _, _, _, _, S, _, P, _ = call.sizes
    delta = call.q.new_empty(call.q.shape[:3], dtype=torch.float32)
    if (plan := short_plan(call, needs)) is not None:
        _short(call, given, delta, grads, needs, plan)
        return grads
    prefix = (needs.prefix_k or needs.prefix_v) and P > 0
    # whose queries are all queries, unless a window hides the prefix from some
    in_prefix_pass = prefix and P <= prefix_plan(call).block_n and call.prefix_window == Window()
    if not in_prefix_pass:
        _delta(call, given, delta)
    if prefix:
        _prefix(call, given, delta, grads, needs, in_prefix_pass)
    if (needs.k or needs.v) and S > 0:
        _keys(call, given, delta, grads, needs)
    if needs.q or needs.attn_mask:
        grads = grads._replace(attn_mask=_queries(call, given, delta, grads, needs))
    return grads


def short_plan(call: Call, needs: Needs) -> Launch | None:
    """The parameters of the kernel for a whole key head: where heads are small, and many, and most gradients wanted."""
    B, _, KV, L, S, _, P, _ = call.sizes
    others = needs.k or needs.v or needs.prefix_k or needs.prefix_v
    most_wanted = needs.q and others and not needs.attn_mask
    many = batch_invariant() or B * KV >= processors(call.q.device)
    if call.packed is not None or not most_wanted or max(S + P, L) > HEAD_KEYS or not many:
        return None
    return call.launch("bwd_short")


def prefix_plan(call: Call) -> Launch:
    """Tiles no wider than the prefix."""
    plan = call.launch("bwd_prefix")
    assert plan is not None
    return plan._replace(block_n=min(plan.block_n, tile_width(call.prefix_k.shape[2])))


def _dlse(given: Given) -> Tensor:
    """dlse as the kernels read it, or what is never read."""
    return given.lse if given.dlse is None else given.dlse


def _short(call: Call, given: Given, delta: Tensor, grads: Grads, needs: Needs, plan: Launch) -> None:
    B, H, KV, L, S, T, P, D = call.sizes
    own, prefix = needs.k or needs.v, (needs.prefix_k or needs.prefix_v) and P > 0
    partial = tuple(call.q.new_empty((2, B, KV, P, D) if prefix else (2, 0), dtype=torch.float32))
    # the pair is made together; what nobody wants goes where nobody looks
    dk = grads.k if needs.k or not own else empty_like_order(call.k)
    dv = grads.v if needs.v or not own else empty_like_order(call.v)
    prefix_attn_bwd_short[(B * KV,)](
        *(*call.operands, call.readable_mask(), *call.indices(), call.readable_memory()),
        *(given.out, given.dout, given.lse, _dlse(given)),
        *(delta, grads.q, dk, dv, partial[0], partial[1]),
        call.layout(
            out=strides(given.out), dout=strides(given.dout), dq=strides(grads.q), dk=strides(dk), dv=strides(dv)
        ),
        *(H, L, S, P, call.scale, call.cap, call.drops(), call.window),
        FEATURES=call.features(),
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        GROUP=H // KV,
        QUERY_TAIL=tile_width(L % plan.block_m),
        HAS_DLSE=given.dlse is not None,
        NEED_OWN=own,
        NEED_PREFIX=prefix,
        **call.rest(plan.block_n),
        **options(plan),
    )
    if prefix:
        each = KV * P * D
        pair, wanted = (grads.prefix_k, grads.prefix_v), (needs.prefix_k, needs.prefix_v)
        if call.prefix_ids is None and T > 1:
            _reduce(partial, pair, wanted, None, T, each, stride_n=0, stride_t=each, count=1)
        else:
            _reduce(partial, pair, wanted, call.prefix_ids, T, each, stride_n=each, stride_t=0, count=B)


def _reduce(
    partial: tuple[Tensor, ...],  # a pair
    sums: tuple[Tensor, ...],  # a pair [T, numel]
    wanted: tuple[bool, ...],  # a pair
    ids: Tensor | None,
    T: int,
    numel: int,
    stride_n: int,
    stride_t: int,
    count: int,
) -> None:
    block, slices = 128, 32
    prefix_attn_bwd_reduce[(triton.cdiv(numel, block) * T,)](
        *(*partial, *sums, partial[0] if ids is None else ids),
        *(stride_n, stride_t, count, numel),
        HAS_IDS=ids is not None,
        NEED_K=wanted[0],
        NEED_V=wanted[1],
        BLOCK=block,
        SLICES=min(slices, triton.next_power_of_2(count)),
        enable_fp_fusion=True,
    )


def _delta(call: Call, given: Given, delta: Tensor) -> None:
    B, H, L, D = call.q.shape  # packed sequences are one sample: each row has a delta of its own
    block = max(16, min(64, 4096 // call.block_d))
    prefix_attn_bwd_delta[(triton.cdiv(L, block) * B * H,)](
        *(given.out, given.dout, _dlse(given), delta),
        *(Layout(out=strides(given.out), dout=strides(given.dout)), H, L),
        D=D,
        BLOCK_D=call.block_d,
        BLOCK_M=block,
        HAS_DLSE=given.dlse is not None,
        enable_fp_fusion=True,
    )


def _prefix(call: Call, given: Given, delta: Tensor, grads: Grads, needs: Needs, make_delta: bool) -> None:
    B, H, KV, L, _, T, P, D = call.sizes
    plan = prefix_plan(call)
    tiles = triton.cdiv(P, plan.block_n)
    _, lengths, seed = call.indices()
    order, starts = (call.q, call.q) if call.prefix_ids is None else _by_prefix(call.prefix_ids, T)
    samples, used = (B, 1) if call.prefix_ids is None and T == 1 else (1, T)
    if call.prefix_ids is not None:
        samples, used = B, min(T, B)  # all may use one row, or each its own
    rows = call.q.shape[2] if call.packed is not None and samples == B else samples * L
    # enough programs for the GPU, but none with less than a few tiles of queries
    most = triton.cdiv(rows * (H // KV), 4 * plan.block_m)
    shares = _shares(call, most, tiles * KV, used, T)
    partial = (grads.prefix_k, grads.prefix_v)
    if shares > 1:
        partial = tuple(call.q.new_empty((2, shares, T, KV, P, D), dtype=torch.float32))
    prefix_attn_bwd_prefix[(tiles * T * KV, shares)](
        *(call.q, call.prefix_k, call.prefix_v, order, starts, lengths, seed),
        *(given.out, given.dout, given.lse, _dlse(given), delta, *partial),
        Layout(
            q=call.strides(call.q),
            prefix_k=strides(call.prefix_k),
            prefix_v=strides(call.prefix_v),
            out=call.strides(given.out),
            dout=call.strides(given.dout),
        ),
        *(B, H, L, P, T, call.scale, call.cap, call.drops()),
        *(call.prefix_window, call.packed, _rows(call, order)),
        FEATURES=call.features(masks=False, memory=False),
        GROUP=H // KV,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        DELTA=make_delta,
        HAS_DLSE=given.dlse is not None,
        NEED_K=needs.prefix_k,
        NEED_V=needs.prefix_v,
        **options(plan),
    )
    if shares > 1:
        each, pair, wanted = KV * P * D, (grads.prefix_k, grads.prefix_v), (needs.prefix_k, needs.prefix_v)
        _reduce(partial, pair, wanted, None, T, each, stride_n=T * each, stride_t=each, count=shares)


def _shares(call: Call, most: int, programs: int, used: int, T: int) -> int:
    """How many share the rows of a program; there are so many for each of T gradients, of which `used` get rows."""
    if batch_invariant() and call.prefix_ids is None and (T > 1 or call.sizes[0] == 1):  # each is one sample's
        used = 1
        most = most if call.packed is None else 1  # or the longest sequence would say it
    return max(1, min(most, triton.cdiv(4 * processors(call.q.device), programs * used)))


def _by_prefix(ids: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The samples in the order of their prefixes, and where those of each begin."""
    order = ids.argsort(stable=True)
    return order, torch.searchsorted(ids[order], torch.arange(T + 1, device=ids.device))


def _rows(call: Call, order: Tensor) -> Rows | None:
    """Of packed sequences, in the order of their prefixes; None where prefix_attn_bwd_prefix has tiles by sequence."""
    packed = call.packed
    if packed is None or call.prefix_dropout_p > 0 or call.prefix_window != Window():
        return None
    bounds = packed.queries
    if call.prefix_ids is not None:
        bounds = torch.cat([bounds[:1], bounds.diff()[order].cumsum(0)])
    return Rows(bounds, _owners(bounds, packed.total))


def _owners(bounds: Tensor, total: int) -> Tensor:
    """Between which two of the bounds each of so many rows lies."""
    return torch.searchsorted(bounds[1:], torch.arange(total, device=bounds.device), right=True)


def _memory(call: Call, given: Given, dmemory: Tensor) -> None:
    B, H, _, L, _, _, _, D = call.sizes
    T, packed = dmemory.shape[0], call.packed
    ids = call.prefix_ids if T > 1 else None
    if packed is not None and T == 1:  # all are one sample
        B, L = 1, packed.total
    elif packed is not None:  # each row is one
        owners = _owners(packed.queries, packed.total)
        B, L, ids = packed.total, 1, owners if ids is None else ids[owners]
    by_ids, (order, starts) = ids is not None, (call.q, call.q) if ids is None else _by_prefix(ids, T)
    samples, used = (B, 1) if T == 1 else (B, min(T, B)) if by_ids else (1, T)
    half = call.q.dtype in HALF_TYPES or INTERPRETED
    block_m = 64 if half and call.block_d <= 128 else 32 if half or call.block_d <= 64 else 16
    block_n = min(64 if block_m * call.block_d <= 4096 else 32, block_m, call.block_d)  # or it spills
    tiles = triton.cdiv(D, block_n)
    # as many programs as make sense, by the rules of _prefix
    most = triton.cdiv(samples * L, 4 * block_m)
    shares = _shares(call, most, tiles * H, used, dmemory.shape[0])
    partial = dmemory if shares == 1 else call.q.new_empty((shares, T, H, D, D), dtype=torch.float32)
    prefix_attn_bwd_memory[(tiles * T * H, shares)](
        *(call.q, order, starts, given.dout, partial),
        *(Layout(q=call.strides(call.q), dout=call.strides(given.dout)), B, H, L, T),
        D=D,
        BLOCK_D=call.block_d,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        HAS_IDS=by_ids,
        PER_SAMPLE=T > 1 and not by_ids,
        PHI=call.memories()["PHI"],
        COMPENSATED=call.exp == EXACT,
        PRECISION=call.numbers()["PRECISION"],
        num_warps=4,
        enable_fp_fusion=True,
    )
    if shares > 1:
        each = H * D * D
        partials, sums = (partial, partial), (dmemory, dmemory)
        _reduce(partials, sums, (True, False), None, T, each, stride_n=T * each, stride_t=each, count=shares)


def _keys(call: Call, given: Given, delta: Tensor, grads: Grads, needs: Needs) -> None:
    B, H, KV, L, S, _, P, _ = call.sizes
    plan = call.launch("bwd_keys")
    assert plan is not None
    prefix_attn_bwd_keys[(triton.cdiv(S, plan.block_n) * B * KV,)](
        *(call.q, call.k, call.v, call.readable_mask(), call.indices()[2], given.dout, given.lse, delta),
        *(grads.k, grads.v),
        Layout(
            q=call.strides(call.q),
            k=call.strides(call.k),
            v=call.strides(call.v),
            mask=call.mask_strides(),
            dout=call.strides(given.dout),
            dk=call.strides(grads.k),
            dv=call.strides(grads.v),
        ),
        *(H, L, S, P, call.scale, call.cap, call.drops(prefix=False), call.window, call.packed),
        FEATURES=call.features(prefixes=False, memory=False),
        GROUP=H // KV,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        NEED_K=needs.k,
        NEED_V=needs.v,
        **options(plan),
    )


def _queries(call: Call, given: Given, delta: Tensor, grads: Grads, needs: Needs) -> Tensor:
    """Writes dq; returns the gradient of the mask, or empty [0]."""
    B, H, KV, L, S, _, P, _ = call.sizes
    plan = call.launch("bwd_queries")
    assert plan is not None
    # tiles outside a window are not visited
    make = call.q.new_empty if call.window == Window() else call.q.new_zeros
    scores = make((B, H, L, S) if needs.attn_mask else 0, dtype=torch.float32)
    prefix_attn_bwd_queries[(triton.cdiv(L, plan.block_m) * B * H,)](
        *(*call.operands, call.readable_mask(), *call.indices(), call.readable_memory()),
        *(given.dout, given.lse, delta, grads.q, scores),
        call.layout(dout=call.strides(given.dout), dq=call.strides(grads.q)),
        *(B, H, L, S, P, call.scale, call.cap, call.drops(), call.window, call.packed),
        FEATURES=call.features(),
        GROUP=H // KV,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        NEED_Q=needs.q,
        NEED_MASK=needs.attn_mask,
        **call.rest(plan.block_n),
        **options(plan),
    )
    if not needs.attn_mask:
        return scores
    assert call.attn_mask is not None
    return scores.sum_to_size(call.attn_mask.shape).to(call.attn_mask.dtype)


def _mask_zeros(call: Call) -> Tensor:
    assert call.attn_mask is not None
    return call.attn_mask.new_zeros(call.attn_mask.shape)
