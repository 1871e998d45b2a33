"""What tests and benchmarks share: named inputs, the exact answer, plain PyTorch's answer, and how to compare."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from prefixattn.attention.functional import prefix_attention, prefix_attention_qkvpacked
from prefixattn.attention.normal_form import normal_form
from prefixattn.kernels.table import INTERPRETED
from prefixattn.testing.plain import INF, Roundings, concat_attention


class Shape(NamedTuple):
    B: int
    H: int
    Hkv: int
    L: int
    S: int
    P: int
    D: int


SHAPES = {
    "even": Shape(2, 2, 2, 64, 64, 16, 16),
    "ragged": Shape(2, 3, 3, 37, 37, 5, 32),  # nothing divides a block
    "no_prefix": Shape(1, 2, 2, 33, 33, 0, 16),  # must equal plain attention
    "prefix_of_one": Shape(2, 2, 2, 17, 17, 1, 8),
    "no_keys": Shape(2, 2, 2, 7, 0, 10, 32),  # the prefix alone
    "nothing": Shape(1, 2, 2, 5, 0, 0, 16),  # defined: zeros, never nan
    "single": Shape(1, 1, 1, 1, 1, 1, 8),
    "one_query": Shape(2, 2, 2, 1, 70, 200, 64),  # decoding, with a prefix longer than the keys
    "few_queries": Shape(1, 4, 1, 3, 130, 257, 128),  # L < S: causality is aligned bottom-right; one key head
    "more_queries": Shape(1, 2, 2, 40, 9, 5, 16),  # L > S: causal queries ahead of the first key see the prefix alone
    "tile_full": Shape(1, 2, 2, 47, 47, 17, 64),  # P + S = 64
    "tile_past": Shape(1, 2, 2, 64, 64, 65, 40),  # P + S = 129, each part one over a tile
    "vit": Shape(2, 3, 3, 197, 197, 10, 64),
    "grouped": Shape(2, 6, 2, 20, 20, 64, 24),
    "long_prefix": Shape(1, 1, 1, 18, 18, 1025, 64),
    "widest": Shape(1, 1, 1, 33, 33, 5, 256),
    "odd_width": Shape(1, 2, 2, 9, 9, 5, 20),  # D is no multiple of 8
}

# how a call departs from the plain one; the words make_inputs understands
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "key_padding": {"mask": "B11S"},  # the mask that must not become [L, S]
    "bool_mask": {"mask": "BHLS"},
    "shared_bool_mask": {"mask": "LS", "causal": True},
    "bias": {"mask": "1HLS", "mask_dtype": "float"},
    "key_bias": {"mask": "B11S", "mask_dtype": "float", "causal": True},
    "query_bias": {"mask": "BHL1", "mask_dtype": "float"},
    "float32_bias": {"mask": "BHLS", "mask_dtype": "float32"},
    "number_bias": {"mask": "1", "mask_dtype": "float"},
    "blind_rows": {"mask": "BHLS", "blind": True},  # whole rows of the mask are False
    "per_sample": {"prefixes": "per_sample"},
    "bank": {"prefixes": "bank", "causal": True},
    "lengths": {"lengths": "B"},
    "bank_lengths": {"prefixes": "bank", "lengths": "T"},
    "bank_sample_lengths": {"prefixes": "bank", "lengths": "B", "mask": "B11S", "causal": True},
    "packed": {"layout": "packed", "causal": True},  # views of one [B, L, 3, H, D] projection
    "expanded": {"layout": "expanded"},  # one head's keys for all, one sample's queries for all: stride 0
    "expanded_mask": {"mask": "BHLS", "mask_dtype": "float", "expand_mask": True},
    "scaled": {"scale": 0.3},
    "transposed_prefix": {"prefixes": "per_sample", "layout": "transposed_prefix"},  # [T, P, Hkv, D] in memory
    "memory": {"memory": "shared"},  # Prefix-Tuning+
    "memory_gelu": {"memory": "shared", "phi": "gelu", "causal": True, "layout": "packed"},
    "memory_relu": {"memory": "shared", "phi": "relu", "prefixes": "bank", "mask": "BHLS", "blind": True},
    "memory_bank": {"memory": "as_prefix", "phi": "none", "prefixes": "bank", "causal": True, "lengths": "T"},
    "memory_per_sample": {"memory": "as_prefix", "prefixes": "per_sample", "mask": "B11S", "mask_dtype": "float"},
    "softcap": {"softcap": 0.7, "mask": "BHLS", "mask_dtype": "float", "lengths": "B"},
    "softcap_causal": {"softcap": 0.7, "causal": True, "prefixes": "bank", "memory": "shared"},
    "softcap_50": {"softcap": 50.0, "mask": "B11S", "layout": "packed"},  # Gemma 2's
    "sinks": {"sinks": "float", "causal": True},  # gpt-oss
    "sinks_memory": {"sinks": "float", "memory": "as_prefix", "prefixes": "bank", "phi": "gelu", "mask": "B11S"},
    "window": {"window": (5, 2), "mask": "B11S"},
    "window_causal": {"window": (20, -1), "causal": True, "layout": "packed"},  # Mistral
    "window_right": {"window": (-1, 3), "mask": "BHLS", "mask_dtype": "float", "softcap": 0.7},
    "window_prefix": {"window": (9, 0), "prefix_in_window": True, "prefixes": "bank", "lengths": "T"},  # PEFT's
    "window_prefix_memory": {"window": (3, 4), "prefix_in_window": True, "memory": "shared"},
    "sinks_float32": {"sinks": "float32", "mask": "BHLS", "blind": True, "prefixes": "bank", "lengths": "T"},
}


@dataclass
class Inputs:
    """A call of prefix_attention: `tensors` are leaves that want gradients, `options` its other arguments."""

    tensors: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    dout: Tensor | None = None  # [B, H, L, Dv]
    dlse: Tensor | None = None  # [B, H, L]

    @property
    def q(self) -> Tensor:
        return self.tensors["q"]

    def call(self, backend: str = "auto", **options: Any) -> Any:
        arguments: dict[str, Any] = {**self.tensors, **self.options, "backend": backend, **options}
        return prefix_attention(**arguments)

    def of_normal_form(self, **options: Any) -> dict[str, Any]:
        """The arguments of normal_form, without defaults."""
        return {**self.tensors, **self.options, **options}

    def concatenated(self, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        arguments: dict[str, Any] = {**self.tensors, **self.options, **options}
        return concat_attention(**arguments)

    def to(self, dtype: torch.dtype) -> Self:
        """The same values in another type, as fresh leaves."""
        tensors = {n: t.detach().to(dtype).requires_grad_(t.requires_grad) for n, t in self.tensors.items()}
        options = dict(self.options)
        return type(self)(tensors, options, *(None if t is None else t.to(dtype) for t in (self.dout, self.dlse)))


def make_inputs(
    shape: Shape | str,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    grad: bool = True,
    device: str | None = None,  # torch's default
    causal: bool = False,
    mask: str = "",  # an axis per letter: B, H, L, S, or 1
    mask_dtype: str = "bool",  # "bool", "float" (that of q) or "float32"
    blind: bool = False,
    expand_mask: bool = False,
    prefixes: str = "shared",  # "shared", "per_sample" or "bank"
    lengths: str = "",  # "T" or "B"
    layout: str = "dense",  # "dense", "packed", "expanded" or "transposed_prefix"
    scale: float | None = None,
    memory: str = "",  # "shared" or "as_prefix": a row for each of the prefixes
    phi: str = "elu",
    softcap: float | None = None,
    sinks: str = "",  # "float" (that of q) or "float32"
    window: tuple[int, int] = (-1, -1),
    prefix_in_window: bool = False,
    value_width: int | None = None,  # Dv; None: D
) -> Inputs:
    """Random inputs; scores and lse of a size where every key counts."""
    shape = SHAPES[shape] if isinstance(shape, str) else shape
    B, H, Hkv, L, S, P, D = shape
    Dv = D if value_width is None else value_width
    device = device or torch.get_default_device().type
    # the same numbers on every device
    generator = torch.Generator("cpu").manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(dtype)

    q, k, v = normal(B, H, L, D), normal(B, Hkv, S, D), normal(B, Hkv, S, Dv)
    if layout == "packed":
        widths = H * D, Hkv * D, Hkv * Dv
        parts_of_one = normal(B, max(L, S), sum(widths)).split(widths, 2)
        q, k, v = (t.unflatten(2, (n, -1)).transpose(1, 2) for n, t in zip((H, Hkv, Hkv), parts_of_one, strict=True))
        q, k, v = q[:, :, :L], k[:, :, :S], v[:, :, :S]
    elif layout == "expanded":
        q, k, v = q[:1].expand(B, -1, -1, -1), k[:, :1].expand(-1, Hkv, -1, -1), v[:, :1].expand(-1, Hkv, -1, -1)
    T = {"shared": 1, "per_sample": B, "bank": 3}[prefixes]
    axes = (Hkv, P) if prefixes == "shared" else (T, Hkv, P)
    prefix_k, prefix_v = normal(*axes, D), normal(*axes, Dv)
    if layout == "transposed_prefix":  # as a network that makes all heads of a row at once leaves it
        prefix_k, prefix_v = (t.transpose(-3, -2).contiguous().transpose(-3, -2) for t in (prefix_k, prefix_v))
    tensors = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    options: dict[str, Any] = {"is_causal": causal, "enable_gqa": H != Hkv, "scale": scale}
    if memory:  # of a size where both parts of out count
        tensors["memory"] = normal(*((T,) if memory == "as_prefix" else ()), H, D, Dv) * D**-0.5
        options["phi"] = phi
    if softcap:
        options["softcap"] = softcap
    if sinks:
        tensors["sinks"] = 2 * normal(H).to(torch.float32 if sinks == "float32" else dtype)
    if window != (-1, -1):
        options |= {"window_size": window, "prefix_in_window": prefix_in_window}
    if prefixes == "bank":
        options["prefix_ids"] = torch.tensor([2, 0])[torch.arange(B) % 2]  # row 1 is used by nobody
    if lengths:
        options["prefix_lengths"] = torch.tensor([P, P // 2, 0])[torch.arange(T if lengths == "T" else B) % 3]
    if mask:
        size = [1 if axis == "1" else dict(B=B, H=H, L=L, S=S)[axis] for axis in mask]
        if mask_dtype == "bool":
            made = torch.rand(size, generator=generator, device="cpu") < 0.7
            if blind and L:
                made[..., ::3, :] = False
            options["attn_mask"] = made
        else:
            made = normal(*size).to(torch.float32 if mask_dtype == "float32" else dtype)
            tensors["attn_mask"] = made[..., :1].expand(size) if expand_mask else made
    tensors = {n: t.detach().to(device).requires_grad_(grad) for n, t in tensors.items()}
    options = {n: o.to(device) if isinstance(o, Tensor) else o for n, o in options.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(B, H, L, generator=generator, dtype=wide, device="cpu")
    return Inputs(tensors, options, normal(B, H, L, Dv).to(device), dlse.to(device))


def results(inputs: Inputs, out: Tensor, lse: Tensor, mass: Tensor) -> dict[str, Tensor]:
    """out, lse, mass and every gradient, also that through lse, by name."""
    assert inputs.dout is not None and inputs.dlse is not None
    found = {"out": out.detach(), "lse": lse.detach(), "mass": mass.detach()}
    wanted = {n: t for n, t in inputs.tensors.items() if t.requires_grad}
    if wanted:
        # a row that sees nothing has lse -inf, which no loss can use
        dlse = inputs.dlse.to(lse.dtype).masked_fill(lse == -INF, 0.0)
        pairs = [(t, grad) for t, grad in ((out, inputs.dout), (lse, dlse)) if t.requires_grad]
        outs, douts = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outs, list(wanted.values()), douts, materialize_grads=True)
        found |= {"d" + name: grad for name, grad in zip(wanted, grads, strict=True)}
    return found


def ours(inputs: Inputs, backend: str = "auto", **options: Any) -> dict[str, Tensor]:
    return results(inputs, *inputs.call(backend, return_lse=True, return_prefix_mass=True, **options))


def packed(inputs: Inputs) -> Inputs:
    """The same call with q, k and v in one leaf qkv [B, N, 3, H, D], for prefix_attention_qkvpacked."""
    qkv = torch.stack([inputs.tensors[name].detach().transpose(1, 2) for name in "qkv"], 2)
    rest = {n: t for n, t in inputs.tensors.items() if n not in ("q", "k", "v")}
    options = {n: o for n, o in inputs.options.items() if n != "enable_gqa"}
    return replace(inputs, tensors={"qkv": qkv.requires_grad_(inputs.q.requires_grad), **rest}, options=options)


def parts(t: Tensor) -> dict[str, Tensor]:
    """q, k and v [B, H, N, D] of [B, N, 3, H, D]: not in the words of layout.py, which are tested."""
    return {name: t[:, :, i].transpose(1, 2) for i, name in enumerate("qkv")}


def ours_packed(
    inputs: Inputs, backend: str = "auto", call: Callable[..., Any] = prefix_attention_qkvpacked, **options: Any
) -> dict[str, Tensor]:
    """`ours` of packed inputs, with out as [B, H, N, D] and one gradient dqkv; `call` may be a compiled form."""
    asked = {"backend": backend, "return_lse": True, "return_prefix_mass": True, **inputs.options, **options}
    out, lse, mass = call(**inputs.tensors, **asked)
    assert out.is_contiguous()
    found = results(inputs, out.transpose(1, 2), lse, mass)
    assert "dqkv" not in found or found["dqkv"].is_contiguous()
    return found


def exact(inputs: Inputs, seed: Tensor | None = None) -> dict[str, Tensor]:
    """The answer in float64: concatenation, an explicit softmax, and autograd."""
    doubled = inputs.to(torch.float64)
    return results(doubled, *doubled.concatenated(seed=seed))


def same_dtype(inputs: Inputs, seed: Tensor | None = None) -> dict[str, Tensor]:
    """Plain PyTorch's answers in the inputs' type, one along a new axis for each way of making it.

    One alone has the luck of one order of sums in one library. So they are: concatenation and
    scaled_dot_product_attention, in two orders of its sums; its formula for gradients, with float32 inside; and what is
    the same on every machine, float64 with the least roundings of float32, twice.
    """
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    found = [results(inputs, *inputs.concatenated(seed=seed, fused=True, order=i)) for i in range(2)]
    widened, doubled = inputs.to(wide), inputs.to(torch.float64)
    found.append(results(widened, *widened.concatenated(seed=seed, by_delta=True, order=2)))
    for i in range(2):
        found.append(results(doubled, *doubled.concatenated(seed=seed, roundings=Roundings(wide, i))))
    return {name: torch.stack([answer[name].double() for answer in found]) for name in found[0]}


def objections(backend: str, inputs: Inputs, **options: Any) -> str:
    """Why a backend refuses these inputs and their gradients, in its own words; empty if it does not. Runs nothing."""
    defaults = {name: p.default for name, p in signature(prefix_attention).parameters.items() if name != "return_lse"}
    try:
        normal_form(**{**defaults, **inputs.of_normal_form(**options, backend=backend)})
    except NotImplementedError as error:
        return str(error).partition("\n")[2].strip()
    return ""


def suited(backend: str, inputs: Inputs) -> tuple[Inputs, str]:
    """The inputs, with a mask that wants no gradient where the backend makes none, and the objections that are left."""
    words = objections(backend, inputs)
    if words and "attn_mask" in inputs.tensors:
        inputs = replace(inputs, tensors={**inputs.tensors, "attn_mask": inputs.tensors["attn_mask"].detach()})
        words = objections(backend, inputs)
    return inputs, words


def known_from_float32(backend: str, dtype: torch.dtype) -> str:
    """Why a test of this type says nothing new, or "": Triton's interpreter has no bfloat16 of its own."""
    if backend == "triton" and INTERPRETED and dtype == torch.bfloat16:
        return "triton: interpreted, bfloat16 is float32 inside; test_shapes has both"
    return ""


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def allowed_error(same: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 2.0) -> float:
    """The rms error that an answer in `dtype` may have: `factor` times plain PyTorch's in the same type.

    `same` is plain PyTorch's answer, or several along a first axis, of which the one that errs most counts; `exact` is
    float64 and finite.
    """
    plain = max(rms(answer.double() - exact) for answer in same.reshape(-1, *exact.shape))
    # luck (weights that are exactly one) must not ask for more than the last bit: of the type, and of its accumulator
    accumulator = torch.promote_types(dtype, torch.float32)
    last_bit = max(rms(exact.to(dtype).double() - exact), torch.finfo(accumulator).eps * rms(exact))
    # weights below the least normal number are 0 where an instruction set has no scaling of exponents: csrc/cpu/vec.h
    last_bit = max(last_bit, torch.finfo(accumulator).tiny)
    # so does the rms of a few numbers; and float64 is compared with its like
    factor *= 8 if accumulator == torch.float64 else 1
    return factor * max(plain, last_bit) * (1 + 3 / exact.numel() ** 0.5)


def assert_as_accurate(name: str, actual: Tensor, same: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """`actual` errs at most as much as `allowed_error` says."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    infinite = exact.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{name}: infinite at other places than the exact answer"
    if infinite.all():
        return
    actual_finite, same, exact = (t.double().masked_fill(infinite, 0.0).cpu() for t in (actual, same, exact))
    error, allowed = rms(actual_finite - exact), allowed_error(same, exact, actual.dtype, factor)
    at = tuple(int(i) for i in torch.unravel_index((actual_finite - exact).abs().argmax(), exact.shape))
    assert error <= allowed, (
        f"{name}: rms error {error:.1e}, plain PyTorch in the same dtype allows {allowed:.1e}; "
        f"worst at {at}: {actual_finite[at]:.6g}, exact {exact[at]:.6g}"
    )


def assert_all_as_accurate(
    actual: dict[str, Tensor], same: dict[str, Tensor], exact: dict[str, Tensor], factor: float = 2.0
) -> None:
    assert actual.keys() == exact.keys()
    for name in actual:
        assert_as_accurate(name, actual[name], same[name], exact[name], factor)
