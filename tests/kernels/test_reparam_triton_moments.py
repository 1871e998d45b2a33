"""Moments of 8 bits in Triton's fused step: the definition's codes to the bit, and a step as near as rounding lets."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixattn.optim import FactoredAdamW
from prefixattn.reparam import fused_step as reference
from prefixattn.reparam import moments8, triton
from prefixattn.reparam import reference as network
from prefixattn.reparam.call import Form
from prefixattn.reparam.moments8 import BLOCK, Moment8
from prefixattn.testing.optim import network as optimized
from prefixattn.testing.optim import targets, train
from prefixattn.testing.reparam import NEEDS, detached, make_inputs

if reasons := triton.unsupported(detached(make_inputs("tiny")), NEEDS):
    pytest.skip("triton: " + "; ".join(reasons), allow_module_level=True)

import triton as compiler
import triton.language as tl

from prefixattn.kernels import launch_reparam
from prefixattn.kernels.moments8 import coin

ADAMW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


def test_a_tile_is_a_block() -> None:
    assert launch_reparam.BLOCK == BLOCK
    assert {plan.block_m for plan in launch_reparam.FUSED8.values()} == {BLOCK}


def kept(values: Tensor, form: str, signed: bool) -> Any:
    """A moment [G, O, M] as the optimizer keeps it."""
    if form != "8bit":
        return values.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[form], copy=True)
    G, O, M = values.shape
    made = Moment8(values.new_empty(G, O, M, dtype=torch.uint8), values.new_empty(G, O, -(-M // BLOCK)), signed)
    for g in range(G):
        made.encode(g, slice(0, O), values[g], 5)
    return made


def numbers(moment: Any) -> Tensor:
    if not isinstance(moment, Moment8):
        return moment.float()
    return torch.stack([moment.decode(g, slice(0, moment.code.shape[1])) for g in range(len(moment.code))])


def moments(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Of very different sizes in a row and between rows, down to where scales vanish; some numbers are zero."""
    generator = torch.Generator().manual_seed(1)
    m, v, size = (torch.randn(shape, generator=generator) for _ in range(3))
    row = torch.logspace(-35, 15, shape[1])[None, :, None]
    m, v = m * torch.exp(2 * size) * row, v.square() * torch.exp(4 * size) * row.square().clamp(1e-38, 1e30)
    m[:, ::5], v[:, ::7], m[:, 1, ::2] = 0, 0, 0
    return m, v


# G, P, O, M: less than a block, whole ones, and a remainder; odd O; P of each kind of tile, and past them
SIZES = {"M40": (2, 5, 21, 40), "M256": (1, 17, 32, 256), "M300": (2, 33, 19, 300), "M520": (1, 70, 18, 520)}


def factors(name: str) -> tuple[Tensor, Tensor]:
    """h and dy whose product is a power of two, about as large as the moments of its row, or zero."""
    G, P, O, M = SIZES[name]
    h, dy = torch.zeros(G, P, M), torch.zeros(G, P, O)
    h[:, 0] = 2.0 ** torch.randint(-3, 2, (G, M), generator=torch.Generator().manual_seed(2))
    h[:, 0, ::3] *= -1
    h[:, 0, ::4] = 0
    dy[:, 0] = 2.0 ** torch.logspace(-35, 15, O).log2().round()
    dy[:, 0, 0] = 0
    return h, dy


@pytest.mark.parametrize("step", [1, 2, 3, 2**20])
@pytest.mark.parametrize("name", SIZES)
def test_codes_and_scales_are_the_definitions_to_the_bit(name: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the moment before it is rounded is the same: gradients and betas that are powers of two.

    With the square root of IEEE 754, that is; torch's on a CPU may be a unit in the last place off.
    """
    monkeypatch.setattr(Tensor, "sqrt", lambda t: torch.from_numpy(np.sqrt(t.numpy())))
    G, _, O, M = SIZES[name]
    m, v = moments((G, O, M))
    (h, dy), w = factors(name), torch.ones(G, O, M)
    options: dict[str, Any] = {**ADAMW, "beta1": 0.75, "beta2": 0.5, "step": step, "grad_scale": 1.0, "want_dh": False}
    found, right = ([kept(m, "8bit", True), kept(v, "8bit", False)] for _ in range(2))
    triton.fused_adamw(w.clone(), *found, h, dy, **options)
    reference.fused_adamw(w.clone(), *right, h, dy, **options)
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a.scale, b.scale)
        assert torch.equal(a.code, b.code)
    other = [kept(m, "8bit", True), kept(v, "8bit", False)]
    triton.fused_adamw(w.clone(), *other, h, dy, **{**options, "step": step + 1})
    assert all((a.code != b.code).float().mean() > 0.1 for a, b in zip(found, other, strict=True)), "the coin decides"
    assert all((t.scale == 0).any() and (t.scale > 0).any() for t in right), "scales that vanish, and that last"


@compiler.jit(do_not_specialize=["salt"])
def draw(out, start, salt, M: tl.constexpr, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    m = tl.arange(0, M)
    rows = tl.arange(0, 2)
    tl.store(out + rows[:, None] * M + m[None, :], coin(tl.load(start + rows), m, salt, SIGNED))


def test_the_coin_knows_places_past_32_bits() -> None:
    """A kernel of its own: no matrix here is so large."""
    start = torch.tensor([[2**32 - 7], [5 * 2**33 + 11]])
    for step in (3, 77):
        salt = moments8.salt(step) - (moments8.salt(step) >= 2**31) * 2**32
        for signed in (True, False):
            out = torch.empty(2, 64)
            draw[(1,)](out, start.flatten(), salt, M=64, SIGNED=signed)
            assert torch.equal(out, moments8._coin(start, 64, step, signed))


def assert_codes_are_right(found: Moment8, plain: Moment8, exact: Tensor, step: int) -> None:
    """Equal; or one apart, where `exact`, the moment before it is rounded, lies at the edge that the coin drew.

    The moments are the definition's up to the rounding of a few operations and of the sum of products in them, and a
    code changes where that crosses an edge: for less than one number in a thousand.
    """
    torch.testing.assert_close(found.scale, plain.scale, rtol=1e-5, atol=0)
    apart = found.code.to(torch.int16) - plain.code.to(torch.int16)
    assert apart.abs().max() <= 1
    assert (apart != 0).float().mean() < 1e-3
    G, O, M = exact.shape
    power, most = (1, 127) if found.signed else (2, 255)
    share = (exact.abs() if found.signed else exact.sqrt()) / plain.scale.repeat_interleave(BLOCK, -1)[..., :M]
    square = torch.where(exact == 0, 0, share) * most**2
    low = square.sqrt().floor()
    drawn = (square**power - low ** (2 * power)) / ((low + 1) ** (2 * power) - low ** (2 * power))
    start = torch.arange(G * O)[:, None] * M
    off = (drawn - moments8._coin(start, M, step, found.signed).view(G, O, M)).abs()
    assert (torch.minimum(off, 1 - off)[apart != 0] < 1e-3).all()


FORMS = [("8bit", "8bit"), ("8bit", "float32"), ("bfloat16", "8bit"), ("float32", "8bit"), ("8bit", "bfloat16")]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
def test_a_step(forms: tuple[str, str], name: str) -> None:
    G, P, O, M = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    w, h, dy = (torch.randn(G, *size, generator=generator) for size in ((O, M), (P, M), (P, O)))
    h[:, :, 2 * M // 3 :] = 0  # a part of the gradient that is zero
    m, v = torch.randn(G, O, M, generator=generator), torch.randn(G, O, M, generator=generator).square()
    m[:, ::5], v[:, ::7] = 0, 0
    options = {**ADAMW, "step": 7, "grad_scale": 0.5, "want_dh": True}
    found, plain = ([w.clone(), kept(m, forms[0], True), kept(v, forms[1], False)] for _ in range(2))
    exact = [w.double(), numbers(kept(m, forms[0], True)).double(), numbers(kept(v, forms[1], False)).double()]
    dh = triton.fused_adamw(*found, h, dy, **options)
    dh_plain = reference.fused_adamw(*plain, h, dy, **options)
    reference.fused_adamw(*exact, h.double(), dy.double(), **options)
    # where v nearly vanishes, m / sqrt(v) magnifies its rounding
    assert ((found[0] - plain[0]).abs() <= 1e-5 * plain[0].abs() + 1e-5).float().mean() > 0.999
    torch.testing.assert_close(found[0], plain[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(dh, dh_plain, rtol=1e-4, atol=1e-4)
    for i, form in enumerate(forms, 1):
        if form == "8bit":
            assert_codes_are_right(found[i], plain[i], exact[i], 7)
        else:
            torch.testing.assert_close(
                found[i].double(), exact[i], rtol=2**-7 if form == "bfloat16" else 1e-5, atol=1e-5
            )


@pytest.mark.parametrize("interleaved", [False, True], ids=["blocked", "interleaved"])
def test_coins_belong_to_rows_of_the_matrix(interleaved: bool) -> None:
    """An interleaved matrix is stepped in another order; its codes are the same."""
    form, P, M = Form(2, 1, 12, interleaved, "tanh"), 6, 70
    O = form.layers * 2 * form.kv_heads * form.head_dim
    generator = torch.Generator().manual_seed(0)
    w, h, dy = (torch.randn(1, *size, generator=generator) for size in ((O, M), (P, M), (P, O)))
    kv = network.kv_of(dy, form, torch.float32)
    found = []
    for gradient, its in ((dy, None), (kv, form)):
        state = [kept(t, "8bit", signed) for t, signed in zip(moments((1, O, M)), (True, False), strict=True)]
        triton.fused_adamw(w.clone(), *state, h, gradient, form=its, **{**ADAMW, "step": 4}, want_dh=False)
        found.append(state)
    assert all(torch.equal(x, y) for a, b in zip(*found, strict=True) for x, y in zip(a[:2], b[:2], strict=True))


def test_refusals() -> None:
    w, h, dy = torch.ones(1, 4, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 4)
    m, v = kept(w, "8bit", True), kept(w, "8bit", False)
    assert triton.fused_step_unsupported(w, m.code, v.code, h, dy) == []
    assert "exp_avg is torch.uint8" in triton.fused_step_unsupported(w, m.code, None, h, dy)[0], "SGD's buffer"
    options: dict[str, Any] = {**ADAMW, "step": 1}
    for first, second, words in (
        (m.code, v, "exp_avg is uint8, expected a Moment8"),
        (v, v, "exp_avg has signed=False"),
        (m, v._replace(scale=torch.ones(1, 4, 2)), r"exp_avg_sq has signed=False with scales \[1, 4, 2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            triton.fused_adamw(w, first, second, h, dy, **options)


@pytest.mark.parametrize("moments", ["8bit", ("8bit", "bfloat16"), ("float32", "8bit")], ids=str)
def test_an_optimizer_with_moments_of_8_bits(moments: Any) -> None:
    nets = []
    for backend in ("triton", "reference"):
        net = optimized("three")
        train(net, FactoredAdamW(net, lr=1e-2, moments=moments, backend=backend), targets(net), 3)
        nets.append(net)
    for ours, plain in zip(*(net.parameters() for net in nets), strict=True):
        assert ((ours - plain).abs() <= 1e-5).float().mean() > 0.99
