"""The network that makes a prefix, and its optimizer's sweep: which kernels run, with what tiles and grid.

Nothing here was measured: the tiles are those that spill nowhere, by bench/static/reparam_resources.py.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from prefixattn.kernels import reparam_bwd, reparam_fwd
from prefixattn.kernels.call import options
from prefixattn.kernels.factored_adamw import factored_adamw, factored_sgd
from prefixattn.kernels.reparam_bwd import reparam_dh, reparam_dw2
from prefixattn.kernels.reparam_fwd import reparam_hidden, reparam_kv
from prefixattn.kernels.table import Launch
from prefixattn.reparam.call import Call, Form, Results

DATE = "2026-11-25"
ACTIVATIONS = {
    "none": reparam_fwd.NONE.value,
    "tanh": reparam_fwd.TANH.value,
    "relu": reparam_fwd.RELU.value,
    "gelu": reparam_fwd.GELU.value,
}
PLAIN, BLOCKED = reparam_bwd.PLAIN.value, reparam_bwd.BLOCKED.value
INTERLEAVED = reparam_bwd.INTERLEAVED.value

SHORT_SUM = 7
PROGRAMS = 512  # that a sum over O is cut for, on every GPU, so that each makes the same sums
SHARE = 0.03  # of a sweep's own bytes, that its parts of dh may add where there are programs enough
FEW = 128
STEP_ROWS = 32  # of P, that a product over P takes at once


class Tiles(NamedTuple):
    block_o: int
    block_m: int
    warps: int
    stages: int
    registers: int | None = None  # a thread's most, so that two programs fit a processor


# of the sweeps, by rows of P up to; beyond, dh is too much for a program to hold
FUSED = {
    16: Tiles(16, 64, 8, 2, 128),
    32: Tiles(16, 64, 8, 2, 128),
    64: Tiles(16, 32, 4, 2),
    128: Tiles(16, 64, 8, 2),
    256: Tiles(16, 64, 8, 2),
}

BLOCK = 256  # of reparam/moments8.py: numbers that share a scale, and so a tile of codes
FUSED8 = {16: Tiles(16, BLOCK, 8, 2)}  # of AdamW's with moments of 8 bits


class Sizes(NamedTuple):
    G: int
    P: int
    O: int
    M: int


def precision(terms: int) -> str:
    """How a sum of products is made.

    tf32x3, on tensor cores, errs by about 2**-22 of each product and then as float32 does: of a long sum that is little
    beside the rounding of the sum itself, of a short one it is more than twice what plain float32 does.
    """
    return "ieee" if terms <= SHORT_SUM else "tf32x3"


def tile(n: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(n)))


def forward(call: Call) -> Results:
    x, w1, b1, w2, b2, form, dtype = call
    (G, P, E), (O, M) = x.shape, w2.shape[1:]
    z, h = (x.new_empty(G, P, M) for _ in range(2))
    kv = x.new_empty((G * form.layers, 2, form.kv_heads, P, form.head_dim), dtype=dtype)
    block_p, block_m = tile(P, 64), 16
    reparam_hidden[(triton.cdiv(P, block_p) * triton.cdiv(M, block_m) * G,)](
        *(x, w1, x if b1 is None else b1, z, h, P, E, M),
        HAS_BIAS=b1 is not None,
        ACTIVATION=ACTIVATIONS[form.activation],
        BLOCK_P=block_p,
        BLOCK_M=block_m,
        BLOCK_K=tile(E, 64),
        PRECISION=precision(E),
        **options(Launch(0, 0, 4, 3)),
    )
    block_p, block_o = tile(P, 64), 64
    block_k = tile(M, 64 if block_p < 64 else 32)
    reparam_kv[(triton.cdiv(P, block_p) * triton.cdiv(O, block_o) * G,)](
        *(h, w2, x if b2 is None else b2, kv, P, O, M, form.kv_heads * form.head_dim),
        D=form.head_dim,
        INTERLEAVED=form.interleaved,
        HAS_BIAS=b2 is not None,
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_K=block_k,
        PRECISION=precision(M),
        **options(Launch(0, 0, 4, 3)),
    )
    return Results(kv, z)


def hidden_gradient(dy: Tensor, w2: Tensor, P: int, form: Form | None = None, scale: float = 1.0) -> Tensor:
    """dh [G, P, M] = scale * dy w2. dy: rows [G, P, O], or with a form dkv."""
    sizes = Sizes(w2.shape[0], P, *w2.shape[1:])
    block_p, block_m = tile(P, 64), tile(sizes.M, 64)
    block_o = 64 if block_p < 64 else 32
    tiles = triton.cdiv(P, block_p) * triton.cdiv(sizes.M, block_m) * sizes.G
    rows = rows_of_part(sizes, tiles, block_o, bytes_an_element=4)
    part = w2.new_empty((triton.cdiv(sizes.O, rows), sizes.G, P, sizes.M))
    reparam_dh[(tiles, len(part))](
        *(dy, w2, part, *sizes, heads_d(form), rows, scale),
        D=head_dim(form),
        LAYOUT=layout(form),
        BLOCK_P=block_p,
        BLOCK_O=block_o,
        BLOCK_M=block_m,
        PRECISION=precision(sizes.O),
        **options(Launch(0, 0, 4, 2)),
    )
    return added(part)


def matrix_gradient(dkv: Tensor, h: Tensor, w2: Tensor, form: Form) -> Tensor:
    """dw2 [G, O, M]."""
    G, P, M = h.shape
    O = w2.shape[1]
    dw2 = torch.empty_like(w2)
    block_o, block_m = 64, tile(M, 64)
    reparam_dw2[(triton.cdiv(O, block_o) * triton.cdiv(M, block_m) * G,)](
        *(dkv, h, dw2, P, O, M, form.kv_heads * form.head_dim),
        D=form.head_dim,
        LAYOUT=layout(form),
        BLOCK_P=tile(P, STEP_ROWS),
        BLOCK_O=block_o,
        BLOCK_M=block_m,
        PRECISION=precision(P),
        **options(Launch(0, 0, 4, 1)),
    )
    return dw2


def adamw(
    w: Tensor,  # [G, O, M]
    exp_avg: Tensor,  # [G, O, M], numbers or codes
    exp_avg_sq: Tensor,  # [G, O, M], numbers or codes
    scales: tuple[Tensor | None, Tensor | None],  # of codes
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or with a form dkv
    form: Form | None,
    numbers: tuple[float, ...],  # factored_adamw's from scale to salt
    want_dh: bool,
) -> Tensor | None:
    table = FUSED if all(scale is None for scale in scales) else FUSED8
    given = tuple(w if scale is None else scale for scale in scales)
    state = w, exp_avg, exp_avg_sq
    return _fused_step(factored_adamw, table, state, given, h, dy, form, numbers, want_dh, {})


def sgd(
    w: Tensor,  # [G, O, M]
    buffer: Tensor | None,  # [G, O, M]
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or with a form dkv
    form: Form | None,
    numbers: tuple[float, ...],  # factored_sgd's from scale to weight_decay
    nesterov: bool,
    first: bool,
    want_dh: bool,
) -> Tensor | None:
    flags = {"MOMENTUM": buffer is not None, "NESTEROV": nesterov, "FIRST": first}
    state = w, w if buffer is None else buffer
    return _fused_step(factored_sgd, FUSED, state, (), h, dy, form, numbers, want_dh, flags)


def _fused_step(
    kernel: Any,
    table: dict[int, Tiles],
    state: tuple[Tensor, ...],
    scales: tuple[Tensor, ...],
    h: Tensor,
    dy: Tensor,
    form: Form | None,
    numbers: tuple[float, ...],
    want_dh: bool,
    flags: dict[str, bool],
) -> Tensor | None:
    w = state[0]
    sizes = Sizes(w.shape[0], h.shape[1], *w.shape[1:])
    P, dh, most = sizes.P, None, max(table)
    if want_dh and P > most:  # too much for a program to hold: one more read of w
        dh, want_dh = hidden_gradient(dy, w, P, form, scale=numbers[0]), False
    block_p = tile(P, most)
    plan = table[block_p]
    block_o, block_m = plan.block_o, tile(sizes.M, plan.block_m)
    tiles = triton.cdiv(sizes.M, block_m) * sizes.G
    rows = rows_of_part(sizes, tiles, block_o, bytes_an_element=sum(2 * t.element_size() for t in state))
    parts = triton.cdiv(sizes.O, rows)
    part = w.new_empty((parts, sizes.G, P, sizes.M) if want_dh else 0)
    kernel[(tiles, parts)](
        *(*state, *scales, h, dy, part, *sizes, heads_d(form), rows, *numbers),
        **flags,
        D=head_dim(form),
        LAYOUT=layout(form),
        WANT_DH=want_dh,
        ONCE=block_p <= STEP_ROWS and table is FUSED,  # beside codes a tile has no registers to keep h in
        BLOCK_P=block_p,
        STEP_P=min(block_p, STEP_ROWS),
        BLOCK_O=block_o,
        BLOCK_M=block_m,
        STAGES=plan.stages,
        PRECISION=precision(P),
        PRECISION_DH=precision(sizes.O),
        maxnreg=plan.registers,
        **options(Launch(0, 0, plan.warps, plan.stages)),
    )
    return added(part) if want_dh else dh


def rows_of_part(sizes: Sizes, tiles: int, block_o: int, bytes_an_element: int) -> int:
    """Of the O rows of w2, how many a program goes over; the programs of one part make a part of dh.

    Enough parts for PROGRAMS programs, but parts of dh, written and read, no more than SHARE of what goes over w2
    anyway: unless that leaves fewer than FEW programs.
    """
    cheap = int(SHARE * sizes.O * bytes_an_element / (8 * sizes.P))
    parts = max(triton.cdiv(FEW, tiles), min(cheap, triton.cdiv(PROGRAMS, tiles)))
    return triton.cdiv(triton.cdiv(sizes.O, block_o), parts) * block_o


def added(part: Tensor) -> Tensor:
    """The sum of parts [n, G, P, M], in the order that their shape alone decides."""
    return part[0] if len(part) == 1 else part.sum(0)


def head_dim(form: Form | None) -> int:
    return 1 if form is None else int(form.head_dim)


def heads_d(form: Form | None) -> int:
    return 1 if form is None else int(form.kv_heads * form.head_dim)


def layout(form: Form | None) -> int:
    return PLAIN if form is None else INTERLEAVED if form.interleaved else BLOCKED
