"""The definition of the optimizers' fused steps of the large matrix, in plain PyTorch, a tile of rows at a time.

The gradient of w [G, O, M] is `grad_scale * dy.mT @ h`, of rank P at most; a tile of it lives while its rows are
updated and the whole never. `dh`, the gradient of h, is taken from the old rows in the same visit. The rules are those
of torch.optim.AdamW and torch.optim.SGD, operation by operation. An element type other than w's (bfloat16, or the 8
bits of moments8.py) is how a moment is kept, not how it is computed. With a `form`, dy is the gradient of kv
[N, 2, Hkv, P, D] that the network made, of any float type; without one it is rows [G, P, O].
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from prefixattn.reparam.call import Form
from prefixattn.reparam.moments8 import Moment8
from prefixattn.reparam.reference import as_rows

Moment = Tensor | Moment8
TILE = 1 << 16  # numbers in a tile, 256 kB of float32: with its moments it stays in a cache


def fused_step_unsupported(
    w: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    h: Tensor,
    dy: Tensor,
    form: Form | None = None,
) -> list[str]:
    """Objections in words. A moment of 8 bits comes as its codes, uint8."""
    if w.dtype not in (torch.float32, torch.float64):
        return [f"w is {w.dtype}; needs float32 or float64"]
    return []


def fused_adamw(
    w: Tensor,  # [G, O, M], updated in place
    exp_avg: Moment,  # [G, O, M]
    exp_avg_sq: Moment,  # [G, O, M]
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or of kv
    *,
    form: Form | None = None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,  # decoupled
    step: int,  # from 1
    grad_scale: float,
    want_dh: bool,
) -> Tensor | None:
    """One step of AdamW. Returns `grad_scale * dy @ w` of the old w, [G, P, M], if wanted."""

    def update(g: int, rows: slice, grad: Tensor) -> None:
        adamw_tile(w, exp_avg, exp_avg_sq, g, rows, grad, lr, beta1, beta2, eps, weight_decay, step)

    return _by_tiles(w, h, as_rows(dy, form, w), grad_scale, want_dh, update)


def fused_sgd(
    w: Tensor,  # [G, O, M], updated in place
    momentum_buffer: Tensor | None,  # [G, O, M]; None without momentum
    h: Tensor,  # [G, P, M]
    dy: Tensor,  # [G, P, O], or of kv
    *,
    form: Form | None = None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,  # added to the gradient
    nesterov: bool,
    first: bool,  # the buffer holds nothing yet and becomes the gradient
    grad_scale: float,
    want_dh: bool,
) -> Tensor | None:
    """One step of SGD. Returns `grad_scale * dy @ w` of the old w, [G, P, M], if wanted."""

    def update(g: int, rows: slice, grad: Tensor) -> None:
        row = w[g, rows]
        if weight_decay != 0:
            grad.add_(row, alpha=weight_decay)
        if momentum_buffer is not None:
            buffer = momentum_buffer[g, rows]
            if first:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add_(buffer, alpha=momentum) if nesterov else buffer
        row.add_(grad, alpha=-lr)

    return _by_tiles(w, h, as_rows(dy, form, w), grad_scale, want_dh, update)


def dh_only(w: Tensor, dy: Tensor, form: Form | None = None) -> Tensor:
    """dy @ w, [G, P, M], from w [G, O, M]: what clipping needs before the step."""
    return as_rows(dy, form, w) @ w


def adamw_tile(
    w: Tensor,  # [G, O, M]
    exp_avg: Moment,
    exp_avg_sq: Moment,
    g: int,
    rows: slice,
    grad: Tensor,  # [rows, M], overwritten
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """torch.optim.AdamW on the rows of one network."""
    m, v = _read(exp_avg, g, rows, w.dtype), _read(exp_avg_sq, g, rows, w.dtype)
    row = w[g, rows]
    if weight_decay != 0:
        row.mul_(1 - lr * weight_decay)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = torch.sqrt(v, out=grad).div_((1 - beta2**step) ** 0.5).add_(eps)
    row.addcdiv_(m, root, value=-lr / (1 - beta1**step))
    _write(exp_avg, g, rows, m, step)
    _write(exp_avg_sq, g, rows, v, step)


def tiles(w: Tensor) -> Iterator[tuple[int, slice]]:
    """The network and the rows of each tile of w [G, O, M], in the order in which sums are taken."""
    networks, outputs, hidden = w.shape
    count = max(1, TILE // hidden)
    for g in range(networks):
        for start in range(0, outputs, count):
            yield g, slice(start, min(outputs, start + count))


def _by_tiles(
    w: Tensor, h: Tensor, dy: Tensor, grad_scale: float, want_dh: bool, update: Callable[[int, slice, Tensor], None]
) -> Tensor | None:
    dh = w.new_zeros(h.shape) if want_dh else None
    for g, rows in tiles(w):
        part = dy[g, :, rows]  # [P, rows]
        if dh is not None:
            dh[g].addmm_(part, w[g, rows])
        grad = part.mT @ h[g]  # [rows, M]
        update(g, rows, grad if grad_scale == 1 else grad.mul_(grad_scale))
    return dh if dh is None or grad_scale == 1 else dh.mul_(grad_scale)


def _read(moment: Moment, g: int, rows: slice, dtype: torch.dtype) -> Tensor:
    """A view where the moment is kept in w's own type, so that writing to it is enough."""
    return moment.decode(g, rows, dtype) if isinstance(moment, Moment8) else moment[g, rows].to(dtype)


def _write(moment: Moment, g: int, rows: slice, values: Tensor, step: int) -> None:
    if isinstance(moment, Moment8):
        moment.encode(g, rows, values, step)
    elif moment.dtype != values.dtype:
        moment[g, rows] = values.to(moment.dtype)
