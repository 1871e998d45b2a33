"""`reparameterize`: what a call means, in words and shapes; every refusal of bad input is here."""

from typing import Any

import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.reparam.call import Call, Form, Needs, Results
from prefixattn.reparam.ops import reparam, reparam_fwd, reparam_onto
from prefixattn.reparam.reference import ACTIVATIONS

_FLOATS = torch.float32, torch.bfloat16, torch.float16, torch.float64


def reparameterize(
    x: Tensor,  # [G, P, E], or [P, E] of one network
    w1: Tensor,  # [G, M, E] | [M, E]
    b1: Tensor | None,  # [G, M] | [M]
    w2: Tensor,  # [G, O, M] | [O, M], O = layers * 2 * kv_heads * head_dim
    b2: Tensor | None,  # [G, O] | [O]
    *,
    layers: int,
    kv_heads: int,
    head_dim: int,
    interleaved: bool = False,
    activation: str = "tanh",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:  # [G * layers, 2, kv_heads, P, head_dim], contiguous
    """The keys and values of a prefix, for all layers at once, from the small network that makes them.

    Equal, for each network g, to ``y = F.linear(act(F.linear(x[g], w1[g], b1[g])), w2[g], b2[g])``, viewed as
    ``[P, layers, 2, kv_heads, head_dim]`` and permuted to ``[layers, 2, kv_heads, P, head_dim]``; key before value. It
    knows nothing of a batch: call it once a step.

    Args:
        x: The rows' embeddings.
        layers: Of each network; network g makes the layers from ``g * layers`` on.
        interleaved: Key and value of a number lie side by side in y, ``[P, layers, kv_heads, head_dim, 2]``, as in
            published networks for vision; otherwise a block of keys comes before a block of values.
        activation: "tanh", "relu", "gelu" (with erf) or "none".
        dtype: Type of the result; that of the parameters if None. The arithmetic is float32 (float64 of float64), under
            autocast too.
        backend: "auto", or the name of one backend, which then runs or says why it cannot.
    """
    for name, t in (("x", x), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if t is not None or name in ("x", "w1", "w2"):
            _check_tensor(name, t, x)
    if x.dim() == 2:
        tensors = _check_shapes(x, w1, b1, w2, b2, "")
        x, w1, b1, w2, b2 = (None if t is None else t.unsqueeze(0) for t in tensors)  # type: ignore[assignment]
    elif x.dim() == 3:
        _check_shapes(x, w1, b1, w2, b2, "G")
    else:
        raise ValueError(f"x has shape {list(x.shape)}, expected [G, P, E], or [P, E] for one network")
    form = _form(layers, kv_heads, head_dim, interleaved, activation, w2)
    if dtype is None:
        dtype = x.dtype
    elif dtype not in _FLOATS:
        raise ValueError(f"dtype is {dtype!r}, expected float32, bfloat16, float16 or float64")
    call = Call(x, w1, b1, w2, b2, form, dtype)
    return reparam(call, _chosen(backend, call))


def kv_and_z(call: Call) -> Results:
    """kv and z [G, P, M] without a graph, for who carries the gradient back himself."""
    with torch.inference_mode(False), torch.no_grad():
        return reparam_fwd(call, _chosen("auto", call))


def kv_onto(stand_in: Tensor, call: Call) -> Tensor:  # stand_in [N, 2, Hkv, P, D]
    """kv, whose gradient becomes that of `stand_in`; the parameters get none. Compiles."""
    call = call.each(Tensor.detach)
    return reparam_onto(stand_in, call, _chosen("auto", call))


def _chosen(backend: str, call: Call) -> str:
    recorded = torch.is_grad_enabled()
    needs = Needs(*[recorded and t is not None and t.requires_grad for t in call.tensors])
    return backends.choose_reparam(backend, call, needs)


def here() -> dict[str, list[str]]:
    """What each backend objects to on this machine, asked with a small ordinary call on each kind of device."""

    def call(device: str) -> tuple[Call, Needs]:
        x, w1, w2 = (torch.zeros(1, n, m, device=device) for n, m in ((8, 64), (64, 64), (128, 64)))
        b1, b2 = torch.zeros(1, 64, device=device), torch.zeros(1, 128, device=device)
        every = Needs(x=True, w1=True, b1=True, w2=True, b2=True)
        return Call(x, w1, b1, w2, b2, Form(1, 1, 64, False, "tanh"), torch.float32), every

    return backends.here_of(backends.REPARAM, call)


def _form(layers: int, kv_heads: int, head_dim: int, interleaved: bool, activation: str, w2: Tensor) -> Form:
    for name, value in (("layers", layers), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer from 1")
    if not isinstance(interleaved, bool):
        raise ValueError(f"interleaved is {interleaved!r}, expected True or False")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected {', '.join(map(repr, ACTIVATIONS))}")
    outputs = layers * 2 * kv_heads * head_dim
    if w2.shape[-2] != outputs:
        raise ValueError(
            f"w2 makes O={w2.shape[-2]} numbers a row, expected {outputs}: layers={layers} * 2 * kv_heads={kv_heads} * "
            f"head_dim={head_dim}"
        )
    return Form(layers, kv_heads, head_dim, interleaved, activation)


def _check_tensor(name: str, t: Any, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise ValueError(f"{name} is a {type(t).__name__}, expected a tensor")
    if t.is_nested or t.layout != torch.strided:
        raise NotImplementedError(f"{name} is a nested or sparse tensor, expected a dense one")
    if t.dtype not in _FLOATS:
        raise ValueError(f"{name} is {t.dtype}, expected float32, bfloat16, float16 or float64")
    if t.dtype != x.dtype:
        raise ValueError(f"{name} is {t.dtype}, expected {x.dtype} as x")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, expected {x.device} as x")


def _check_shapes(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, groups: str
) -> tuple[Tensor | None, ...]:
    sizes = dict(zip(groups + "PE", x.shape, strict=True))
    for name, t, axes in (("w1", w1, "ME"), ("w2", w2, "OM"), ("b1", b1, "M"), ("b2", b2, "O")):
        if t is None:
            continue
        axes = groups + axes
        if t.dim() == len(axes):
            for axis, size in zip(axes, t.shape, strict=True):
                sizes.setdefault(axis, size)
        if t.dim() != len(axes) or any(t.shape[i] != sizes[axis] for i, axis in enumerate(axes)):
            wanted = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
            raise ValueError(f"{name} has shape {list(t.shape)}, expected [{wanted}]")
    if empty := [axis for axis, size in sizes.items() if size == 0]:
        raise ValueError(f"x has shape {list(x.shape)} and w1 {list(w1.shape)}: {empty[0]} is 0, expected 1 or more")
    return x, w1, b1, w2, b2
