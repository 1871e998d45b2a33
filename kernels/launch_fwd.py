"""The forward pass: which kernels run, with what grid."""

import torch
import triton
from torch import Tensor

from prefixattn.attention.call import Results, Wants
from prefixattn.attention.invariance import batch_invariant
from prefixattn.attention.layout import empty_like_order, lse_type
from prefixattn.kernels.arguments import Layout, Window, strides
from prefixattn.kernels.call import Call, options, tile_width
from prefixattn.kernels.prefix_attn_fwd import prefix_attn_fwd
from prefixattn.kernels.prefix_attn_fwd_fold import prefix_attn_fwd_fold
from prefixattn.kernels.prefix_attn_fwd_short import prefix_attn_fwd_short
from prefixattn.kernels.table import FOLD_PREFIX, FOLD_QUERIES, MEDIUM_QUERIES, SHORT_KEYS, Launch, processors

# a window changes no plan: each kernel skips tiles in its own loops, and a folded prefix is still read once for all


def forward(call: Call, wants: Wants) -> Results:
    rows = call.q.shape[:3]
    out = empty_like_order(call.q)
    lse = call.q.new_empty(rows, dtype=lse_type(call.q))
    mass = call.q.new_empty(rows if wants.mass else 0, dtype=torch.float32)
    results = Results(out, lse, mass, torch.empty_like(out) if wants.attended else call.q.new_empty(0))
    if out.numel() == 0:
        return results
    if folds(call):
        _online(call, results, _fold(call))
    elif (plan := short_plan(call)) is not None:
        _short(call, results, plan)
    else:
        _online(call, results, [])
    return results


def folds(call: Call) -> bool:
    """Whether few queries of many samples meet one long prefix, which a kernel of its own then reads once for all."""
    if batch_invariant():  # the parts of the prefix are cut by the batch
        return False
    B, H, KV, L, _, T, P, _ = call.sizes
    shared = T == 1 or call.prefix_ids is not None
    few = L * (H // KV) <= FOLD_QUERIES and B * (H // KV) > 1
    return shared and few and P >= FOLD_PREFIX and call.prefix_dropout_p == 0 and call.packed is None


def short_plan(call: Call) -> Launch | None:
    _, _, _, L, S, _, P, _ = call.sizes
    # decoding meets every S; a kernel that is compiled for few of them would keep compiling
    return call.launch("fwd_short") if S + P <= SHORT_KEYS and L > 1 and call.packed is None else None


def _short(call: Call, results: Results, plan: Launch) -> None:
    B, H, KV, L, S, _, P, _ = call.sizes
    own_alone = call.window != Window() and P == 0  # which may hide the last tile, a prefix beside a window does not
    prefix_attn_fwd_short[(triton.cdiv(L, plan.block_m) * B * H,)](
        *(*call.operands, call.readable_mask(), *call.indices(), call.readable_memory(), *results),
        *(call.layout(out=strides(results.out)), H, L, S, P, call.scale, call.cap, call.drops(), call.window),
        FEATURES=call.features(),
        GROUP=H // KV,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        TILES=(S + P) // plan.block_n,
        TAIL=tile_width((S + P) % plan.block_n),
        OWN_TILES=triton.cdiv(S, plan.block_n) if own_alone else S // plan.block_n,
        SPLIT_TILE=S % plan.block_n > 0 and not own_alone,
        MASS=results.mass.numel() > 0,
        KEEP=results.attended.numel() > 0,
        **options(plan),
    )


def _online(call: Call, results: Results, parts: list[Tensor]) -> None:
    """`parts`: sums of values, largest scores and sums of weights over parts of the prefix, which then is done."""
    B, H, KV, L, S, _, P, _ = call.sizes
    by_longest = call.packed is not None and batch_invariant()  # which may choose no kernel then
    plan = call.launch("fwd_medium") if L <= MEDIUM_QUERIES and not by_longest else None
    plan = plan or call.launch("fwd")
    assert plan is not None
    prefix_attn_fwd[(triton.cdiv(L, plan.block_m) * B * H,)](
        *(*call.operands, call.readable_mask(), *call.indices(), call.readable_memory(), *results),
        *(parts or [results.mass] * 3),
        *(call.layout(out=call.strides(results.out)), B, H, L, S, P, call.scale, call.cap, call.drops()),
        *(call.window, call.packed),
        FEATURES=call.features(),
        GROUP=H // KV,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        PARTS=len(parts[0]) if parts else 0,
        MASS=results.mass.numel() > 0,
        KEEP=results.attended.numel() > 0,
        **call.rest(plan.block_n, prefix=not parts),
        **options(plan),
    )


def _fold(call: Call) -> list[Tensor]:
    B, H, KV, L, _, _, P, D = call.sizes
    plan = call.launch("fwd_fold")
    assert plan is not None
    tiles = triton.cdiv(B * (H // KV) * L, plan.block_m)
    wanted = triton.cdiv(2 * processors(call.q.device), tiles * KV)  # two programs for each processor
    width = triton.cdiv(triton.cdiv(P, wanted), plan.block_n) * plan.block_n
    parts = triton.cdiv(P, width)
    part_out = call.q.new_empty((parts, B, H, L, D), dtype=torch.float32)
    part_top, part_sum = (call.q.new_empty((parts, B, H, L), dtype=torch.float32) for _ in range(2))
    ids, lengths, seed = call.indices()
    order = call.q if call.prefix_ids is None else call.prefix_ids.argsort(stable=True)
    prefix_attn_fwd_fold[(tiles, KV * parts)](
        *(call.q, call.prefix_k, call.prefix_v, order, ids, lengths, seed, part_out, part_top, part_sum),
        Layout(q=strides(call.q), prefix_k=strides(call.prefix_k), prefix_v=strides(call.prefix_v)),
        *(B, H, L, P, call.scale, call.cap, call.drops(prefix=False), call.prefix_window, width),
        FEATURES=call.features(masks=False, memory=False),
        GROUP=H // KV,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        **options(plan),
    )
    return [part_out, part_top, part_sum]
