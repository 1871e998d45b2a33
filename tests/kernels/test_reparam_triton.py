"""The Triton kernels of the reparameterization and its fused steps: odd sizes, each kind of tile, fixed sums, bytes."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixattn.reparam import fused_step as reference
from prefixattn.reparam import reference as network
from prefixattn.reparam import triton
from prefixattn.reparam.call import Call, Form
from prefixattn.testing.attention import assert_all_as_accurate, assert_as_accurate, rms
from prefixattn.testing.reparam import NEEDS, NetShape, detached, exact, from_module, make_inputs, same_dtype

if reasons := triton.unsupported(detached(make_inputs("tiny")), NEEDS):
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)

from prefixattn.kernels import launch_reparam
from prefixattn.kernels.launch_reparam import Sizes, Tiles, precision, rows_of_part

# G, P, E, M, n, Hkv, D: P within, at and past tiles of 16 rows and 64; M of one, odd, and of several tiles; odd O
NETWORKS = {
    "M1": NetShape(1, 1, 3, 1, 1, 1, 5),
    "M3": NetShape(3, 5, 17, 3, 2, 1, 7),
    "M48": NetShape(4, 10, 72, 48, 1, 3, 20),
    "M512": NetShape(1, 10, 40, 512, 1, 3, 32),
    "P17": NetShape(3, 17, 20, 33, 1, 3, 12),
    "P33": NetShape(1, 33, 24, 48, 3, 1, 11),
    "P200": NetShape(1, 200, 130, 70, 1, 1, 24),
}


@pytest.mark.parametrize("interleaved", [False, True], ids=["blocked", "interleaved"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, interleaved: bool) -> None:
    inputs = make_inputs(NETWORKS[name], interleaved=interleaved)
    assert_all_as_accurate(from_module(inputs, triton), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_kv(dtype: torch.dtype) -> None:
    inputs = make_inputs(NETWORKS["M48"], dtype, interleaved=True)
    found = from_module(inputs, triton)
    assert found["kv"].dtype == dtype
    assert_all_as_accurate(found, same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("gain", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "none"])
def test_activations(activation: str, gain: float) -> None:
    """Near zero, where tanh(z) is z, and far out, where it is one."""
    inputs = make_inputs(NetShape(2, 9, 20, 64, 1, 1, 8), activation=activation, gain=gain, biases=(False, True))
    assert_all_as_accurate(from_module(inputs, triton), same_dtype(inputs), exact(inputs))


def test_tanh_is_accurate_everywhere() -> None:
    """Not only by its rms: each number to a few units in the last place, and at the seam of its two formulas."""
    z = torch.cat([torch.logspace(-30, 1.5, 601), torch.linspace(0.59, 0.61, 99)])
    z = torch.cat([-z, torch.tensor([0.0, 1e30, -1e30]), z])[None, None]  # [1, 1, E]
    x, one = z.mT.contiguous(), torch.ones(1, 1, 1)  # P = numbers, E = M = 1
    form = make_inputs("tiny").form._replace(head_dim=1)
    kv = triton.fwd(Call(x, one, None, torch.ones(1, 2, 1), None, form, torch.float32)).kv
    right = torch.tanh(z.double()).flatten()
    error = (kv[0, 0, 0, :, 0].double() - right).abs() / right.abs().clamp(min=1e-300)
    assert error.max() < 2 * torch.finfo(torch.float32).eps
    assert torch.equal(kv[0, 0], kv[0, 1])


def test_a_call_is_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows, layers and networks at once."""
    launched = []
    for name in ("reparam_hidden", "reparam_kv"):
        kernel = getattr(launch_reparam, name)

        class Recorded:
            def __init__(self, name: str, kernel: Any) -> None:
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                launched.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(launch_reparam, name, Recorded(name, kernel))
    triton.fwd(detached(make_inputs("three_networks")))
    assert launched == ["reparam_hidden", "reparam_kv"]


def test_the_same_bits_again() -> None:
    inputs = make_inputs(NETWORKS["P17"], interleaved=True)
    first, second = from_module(inputs, triton), from_module(inputs, triton)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals() -> None:
    call = detached(make_inputs("tiny"))
    words = triton.unsupported(call._replace(x=call.x.double(), dtype=torch.float64), NEEDS)
    assert words == [
        "x is torch.float64; needs float32",
        "dtype=torch.float64; needs float32, bfloat16 or float16",
    ]
    huge = torch.empty(1, 2**16, 2**15, device="meta")
    assert "2147483648" in triton.unsupported(call._replace(w2=huge), NEEDS)[-1]
    w2 = call.w2
    words = triton.fused_step_unsupported(w2, w2.to(torch.int8), w2.half(), call.x, torch.zeros(1, 3, 8).mT)
    assert [w.split(";")[0] for w in words] == [
        "exp_avg is torch.int8",
        "exp_avg_sq is torch.float16",
        "dy has strides (24, 1, 8)",
    ]


# --- the fused steps

# G, P, O, M: every row of the table of tiles, and past it; one part and several
MATRICES = {
    "M1": (1, 1, 7, 1),
    "M3": (3, 5, 21, 3),
    "P5": (1, 5, 129, 48),
    "P10": (4, 10, 66, 48),
    "M512": (1, 10, 33, 512),
    "P17": (3, 17, 45, 33),
    "P33": (1, 33, 50, 130),
    "P100": (1, 100, 40, 70),
    "P200": (2, 200, 35, 20),
    "P300": (1, 300, 35, 20),
}
ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SGD = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": False}


def matrix(name: str, dtype: torch.dtype = torch.float32, state: int = 2) -> tuple[list[Tensor], Tensor, Tensor]:
    """w with its moments, then h and dy."""
    G, P, O, M = MATRICES[name]
    generator = torch.Generator().manual_seed(0)
    w, average, square, h, dy = (
        torch.randn(G, *size, generator=generator) for size in ((O, M), (O, M), (O, M), (P, M), (P, O))
    )
    return [w, average.to(dtype), square.square().to(dtype)][: 1 + state], h, dy


def run(fused: Any, tensors: tuple[list[Tensor], Tensor, Tensor], dtype: torch.dtype, **numbers: Any) -> dict[str, Any]:
    """What the state becomes, and dh, when it is kept in its own type and computed in `dtype`."""
    state, h, dy = copy.deepcopy(tensors)
    if dtype == torch.float64:
        state = [t.double() for t in state]
    dh = fused(*state, h.to(dtype), dy.to(dtype), want_dh=True, **numbers)
    return dict(zip(("w", "first", "second"), state, strict=False)) | {"dh": dh}


def check(name: str, fused: str, moments: torch.dtype = torch.float32, state: int = 2, **numbers: Any) -> None:
    tensors, ours, other = matrix(name, moments, state), getattr(triton, fused), getattr(reference, fused)
    right, same = (run(other, tensors, t, **numbers) for t in (torch.float64, torch.float32))
    found = run(ours, tensors, torch.float32, **numbers)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in same.items()}
    assert_all_as_accurate(found, same, right)


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize("name", MATRICES)
def test_adamw(name: str, step: int) -> None:
    check(name, "fused_adamw", step=step, grad_scale=0.3, **ADAMW)


def test_adamw_is_that_of_torch() -> None:
    """A few steps from zero moments."""
    (w, *_), h, dy = matrix("P17")
    plain = {t: torch.nn.Parameter(w.to(t)) for t in (torch.float32, torch.float64)}
    kinds = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = {t: torch.optim.AdamW([p], **kinds) for t, p in plain.items()}  # type: ignore[arg-type]
    average, square = torch.zeros_like(w), torch.zeros_like(w)
    for step in range(1, 9):
        rows = dy * np.cos(step)
        triton.fused_adamw(w, average, square, h, rows, step=step, grad_scale=1.0, want_dh=False, **ADAMW)  # type: ignore[arg-type]
        for t, p in plain.items():
            p.grad = rows.to(t).mT @ h.to(t)
            optimizers[t].step()
    same, right = (plain[t].detach() for t in (torch.float32, torch.float64))
    assert_as_accurate("w", w, same, right)


def test_moments_in_bfloat16() -> None:
    check("P10", "fused_adamw", torch.bfloat16, step=3, grad_scale=1.0, **ADAMW)


SGDS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "first": {"first": True},
    "nesterov": {"nesterov": True},
    "nesterov_first": {"nesterov": True, "first": True},
    "dampening": {"dampening": 0.5},
}


@pytest.mark.parametrize("kind", SGDS)
def test_sgd(kind: str) -> None:
    check("P10", "fused_sgd", state=1, grad_scale=0.5, **{**SGD, "first": False, **SGDS[kind]})


def test_sgd_without_momentum() -> None:
    tensors = matrix("P17", state=0)

    def without(fused: Any) -> Any:
        return lambda w, h, dy, **numbers: fused(w, None, h, dy, **numbers)

    numbers = {**SGD, "momentum": 0.0, "first": False, "grad_scale": 1.0}
    right, same = (run(without(reference.fused_sgd), tensors, t, **numbers) for t in (torch.float64, torch.float32))
    assert_all_as_accurate(run(without(triton.fused_sgd), tensors, torch.float32, **numbers), same, right)


FORMS = {
    "P5": (5, Form(3, 1, 7, False, "tanh")),  # tiles end within a head
    "P33": (33, Form(1, 2, 24, False, "tanh")),
    "P300": (300, Form(2, 1, 5, False, "tanh")),  # dh by a kernel of its own
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["blocked", "interleaved"])
@pytest.mark.parametrize("name", FORMS)
def test_fused_steps_read_the_gradient_of_kv(
    name: str, interleaved: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it lies and in its own type: what rows of the same numbers give, and nobody makes rows."""
    P, form = FORMS[name]
    form = form._replace(interleaved=interleaved)
    G, O, M = 2, form.layers * 2 * form.kv_heads * form.head_dim, 20
    generator = torch.Generator().manual_seed(0)
    w, m, v, h, dy = (torch.randn(G, *s, generator=generator) for s in ((O, M), (O, M), (O, M), (P, M), (P, O)))
    kv = network.kv_of(dy, form, dtype)
    dy = network.rows_of(kv, form, G, torch.float32)
    kinds: list[tuple[str, list[Tensor], dict[str, Any]]] = [
        ("fused_adamw", [w, m, v.square()], {**ADAMW, "step": 3}),
        ("fused_sgd", [w, m], {**SGD, "first": False}),
    ]
    for fused, state, numbers in kinds:
        numbers |= {"grad_scale": 0.5, "want_dh": True}
        by_rows = [t.clone() for t in state]
        dh_by_rows = getattr(triton, fused)(*by_rows, h, dy, **numbers)
        with monkeypatch.context() as patched:
            patched.setattr(network, "rows_of", None)
            patched.setattr(network, "as_rows", None)
            by_kv = [t.clone() for t in state]
            dh = getattr(triton, fused)(*by_kv, h, kv, form=form, **numbers)
        assert all(torch.equal(a, b) for a, b in zip(by_rows, by_kv, strict=True))
        exact = 0.5 * dy.double() @ w.double()
        assert_as_accurate("dh", dh, 0.5 * dy @ w, exact)
        assert interleaved or torch.equal(dh, dh_by_rows)


def test_a_new_buffer_is_not_read() -> None:
    (w, buffer), h, dy = matrix("M3", state=1)
    triton.fused_sgd(w, buffer.fill_(torch.nan), h, dy, **SGD, first=True, grad_scale=1.0, want_dh=False)  # type: ignore[arg-type]
    assert w.isfinite().all() and buffer.isfinite().all()


@pytest.mark.parametrize("name", ["M3", "P10", "P200", "P300"])
def test_dh_alone(name: str) -> None:
    (w, *_), _, dy = matrix(name)
    assert_as_accurate("dh", triton.dh_only(w, dy), dy @ w, dy.double() @ w.double())


@pytest.mark.parametrize("name", ["P10", "P100"])
def test_any_number_of_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many parts or one: w is the same to the bit, dh as accurate; and the same parts make the same dh."""
    found = []
    for programs in (1, 10**6, 10**6):
        monkeypatch.setattr(launch_reparam, "PROGRAMS", programs)
        monkeypatch.setattr(launch_reparam, "FEW", programs)
        check(name, "fused_adamw", step=2, grad_scale=1.0, **ADAMW)
        found.append(run(triton.fused_adamw, matrix(name), torch.float32, step=2, grad_scale=1.0, **ADAMW))
    assert torch.equal(found[0]["w"], found[1]["w"])
    assert not torch.equal(found[0]["dh"], found[1]["dh"])
    assert torch.equal(found[1]["dh"], found[2]["dh"])


def test_numbers_beside_the_tensors_are_not_touched() -> None:
    """Whole tiles end past M, past O and past a program's rows."""
    (w, average, square), h, dy = matrix("P17")
    wide = [torch.full((3 * t.numel(),), 7.0) for t in (w, average, square)]
    inner = [b[t.numel() : 2 * t.numel()].view_as(t).copy_(t) for b, t in zip(wide, (w, average, square), strict=True)]
    triton.fused_adamw(*inner, h, dy, step=1, grad_scale=1.0, want_dh=True, **ADAMW)  # type: ignore[arg-type]
    for b, t in zip(wide, inner, strict=True):
        assert (b[: t.numel()] == 7).all() and (b[2 * t.numel() :] == 7).all()
        assert not torch.equal(t, w)


def test_parts_stay_small() -> None:
    """Parts of dh, written and read, are within SHARE of a large fused step, which has programs enough all the same."""
    for P in (1, 10, 50, 100, 200, 256):
        sizes, plan = Sizes(1, P, 49152, 512), launch_reparam.FUSED[launch_reparam.tile(P, 256)]
        tiles = -(-512 // plan.block_m)
        parts = -(-sizes.O // rows_of_part(sizes, tiles, plan.block_o, bytes_an_element=24))
        assert parts * tiles >= launch_reparam.FEW
        assert parts * 8 * P <= launch_reparam.SHARE * 24 * sizes.O


def test_every_number_of_rows_has_tiles() -> None:
    for table in (launch_reparam.FUSED, launch_reparam.FUSED8):
        for P in range(1, 600):
            plan = table[launch_reparam.tile(P, max(table))]
            assert isinstance(plan, Tiles)


# --- tf32x3, which the interpreter does not have


def to_tf32(t: np.ndarray) -> np.ndarray:
    """Ten bits of fraction, to nearest."""
    return ((t.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def toward_zero(t: np.ndarray) -> np.ndarray:
    rounded = t.astype(np.float32)
    over = np.abs(rounded.astype(np.float64)) > np.abs(t)
    return np.where(over, np.nextafter(rounded, np.float32(0)), rounded)


def tf32x3(a: np.ndarray, b: np.ndarray, block: int) -> np.ndarray:
    """a @ b as tensor cores make it: three products of halves, sums of eight cut off, blocks added to nearest."""
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for start in range(0, a.shape[1], block):
        cut = a[:, start : start + block], b[start : start + block]
        high = [to_tf32(t) for t in cut]
        low = [to_tf32(t - h) for t, h in zip(cut, high, strict=True)]
        part = np.zeros_like(total)
        for left, right in ((low[0], high[1]), (high[0], low[1]), (high[0], high[1])):
            for k in range(0, left.shape[1], 8):
                exact_sum = left[:, k : k + 8].astype(np.float64) @ right[k : k + 8].astype(np.float64)
                part = toward_zero(part.astype(np.float64) + exact_sum)
        total = total + part
    return total


@pytest.mark.parametrize("terms", [1, 3, 8, 10, 33, 48, 200, 1024])
def test_the_precision_of_a_sum_suits_its_length(terms: int) -> None:
    """tf32x3 where it errs at most twice as much as plain float32; shorter sums on FMA units, in float32."""
    rng = np.random.default_rng(terms)
    a, b = (rng.standard_normal(size).astype(np.float32) for size in ((96, terms), (terms, 96)))
    right = torch.from_numpy(a.astype(np.float64) @ b.astype(np.float64))
    ours, plain = torch.from_numpy(tf32x3(a, b, 64)), torch.from_numpy(a) @ torch.from_numpy(b)
    holds = rms(ours - right) <= 2 * rms(plain - right)
    assert holds == (precision(terms) == "tf32x3")
