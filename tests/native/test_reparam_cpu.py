"""What is particular to the reparameterization's CPU kernels: every instruction set, threads, sizes off the tiles."""

from typing import Any

import pytest
import torch
from torch import Tensor

from prefixattn.reparam import functional, fused_step, moments8
from prefixattn.reparam.call import Given, Needs
from prefixattn.reparam.moments8 import BLOCK, Moment8
from prefixattn.testing.attention import assert_all_as_accurate
from prefixattn.testing.reparam import (
    FEATURES,
    NEEDS,
    PARAMETERS,
    SHAPES,
    NetShape,
    detached,
    exact,
    from_module,
    make_inputs,
    ours,
    same_dtype,
)
from tests.support import isa, threads

if reasons := functional.here()["cpu"]:
    pytest.skip("cpu: " + "; ".join(reasons), allow_module_level=True)

from prefixattn import _C
from prefixattn.reparam import cpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT32_ISAS = [name for name in _C.isas() if name in ("avx512", "avx2", "portable")]  # others run one of these's

# each for a path of its own: more than one panel of lanes or rows, tails of both, heads that straddle blocks
CASES = {
    "tails": (NetShape(1, 17, 33, 65, 2, 3, 20), "plain"),
    "pairs": (NetShape(2, 5, 16, 48, 3, 2, 20), "gelu"),
    "blocks": (NetShape(1, 131, 8, 200, 2, 2, 72), "no_b2"),
    "few": (NetShape(1, 16, 8, 300, 1, 3, 50), "interleaved"),
    "narrow": (NetShape(2, 3, 5, 3, 1, 1, 7), "interleaved"),
    "one": (NetShape(1, 1, 1, 1, 1, 1, 1), "plain"),
}
# (G, P, O, M)
SIZES = [
    (1, 1, 1, 1),
    (1, 10, 130, 512),
    (2, 5, 77, 48),
    (1, 17, 129, 3),
    (3, 1, 64, 80),
    (1, 200, 300, 70),
    (1, 30, 131, 517),
    (1, 16, 140, 331),
]
ADAMW: dict[str, Any] = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
SGD = {
    "plain": {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    "momentum": {"momentum": 0.9, "dampening": 0.2, "nesterov": False},
    "nesterov": {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
}


def step_inputs(size: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    G, P, O, M = size
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=generator) for shape in ((G, O, M), (G, P, M), (G, P, O)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FLOAT32_ISAS)
def test_every_instruction_set(name: str, case: str, dtype: str) -> None:
    shape, feature = CASES[case]
    inputs = make_inputs(shape, DTYPES[dtype], **FEATURES[feature])
    with isa(name):
        assert_all_as_accurate(from_module(inputs, cpu), same_dtype(inputs), exact(inputs))


def adamw_steps(
    module: Any, size: tuple[int, int, int, int], dtype: torch.dtype, moments: torch.dtype
) -> dict[str, Tensor]:
    """What three steps leave behind."""
    w, h, dy = (t.to(dtype) for t in step_inputs(size))
    found = {"w": w, "exp_avg": torch.zeros_like(w, dtype=moments), "exp_avg_sq": torch.zeros_like(w, dtype=moments)}
    for step in (1, 2, 3):
        options = {**ADAMW, "step": step, "grad_scale": 0.5, "want_dh": step != 2}
        dh = module.fused_adamw(w, found["exp_avg"], found["exp_avg_sq"], h, dy, **options)
        assert (dh is not None) == (step != 2)
        if dh is not None:
            found[f"dh{step}"] = dh
    return found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FLOAT32_ISAS)
def test_adamw_equals_the_definition(name: str, size: tuple[int, int, int, int]) -> None:
    right = adamw_steps(fused_step, size, torch.float64, torch.float64)
    plain = adamw_steps(fused_step, size, torch.float32, torch.float32)
    with isa(name):
        assert_all_as_accurate(adamw_steps(cpu, size, torch.float32, torch.float32), plain, right)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FLOAT32_ISAS)
def test_moments_in_bfloat16(name: str, size: tuple[int, int, int, int]) -> None:
    """As the definition keeps them: rounded to nearest once a step, so at most a neighbour apart."""
    plain = adamw_steps(fused_step, size, torch.float32, torch.bfloat16)
    with isa(name):
        found = adamw_steps(cpu, size, torch.float32, torch.bfloat16)
    for moment in ("exp_avg", "exp_avg_sq"):
        assert found[moment].dtype == torch.bfloat16
        scale = plain[moment].abs().max().item()
        torch.testing.assert_close(found[moment], plain[moment], rtol=2**-6, atol=1e-4 * scale)
        assert (found[moment] == plain[moment]).float().mean() > 0.98
    assert (found["w"] - plain["w"]).abs().max() < ADAMW["lr"] / 4


def kept(values: Tensor, form: str, signed: bool, step: int = 0) -> Any:
    """A moment [G, O, M] as the optimizer keeps it."""
    if form != "8bit":
        return values.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[form])
    G, O, M = values.shape
    made = Moment8(values.new_empty(G, O, M, dtype=torch.uint8), values.new_empty(G, O, -(-M // BLOCK)), signed)
    for g in range(G):
        made.encode(g, slice(0, O), values[g], step)
    return made


def numbers(moment: Any) -> Tensor:
    if not isinstance(moment, Moment8):
        return moment.float()
    return torch.stack([moment.decode(g, slice(0, moment.code.shape[1])) for g in range(len(moment.code))])


def moments_before(w: Tensor) -> tuple[Tensor, Tensor]:
    """Of a run, of very different sizes in a row and between rows; some are zero."""
    generator = torch.Generator().manual_seed(1)
    m, v, size, row = (torch.randn(w.shape, generator=generator) for _ in range(4))
    m = m * torch.exp(2 * size) * torch.exp(3 * row[:, :, :1])
    v = v.square() * torch.exp(4 * size) * torch.exp(6 * row[:, :, :1])
    m[:, ::5], v[:, ::7] = 0, 0
    return m, v


def one_step(module: Any, size: tuple[int, int, int, int], forms: tuple[str, str], step: int = 7) -> tuple[Any, ...]:
    w, h, dy = step_inputs(size)
    h[:, :, 2 * size[3] // 3 :] = 0  # a part of the gradient that is zero
    first, second = (kept(t, form, i == 0) for i, (t, form) in enumerate(zip(moments_before(w), forms, strict=True)))
    options = {**ADAMW, "step": step, "grad_scale": 0.5, "want_dh": True}
    return w, first, second, module.fused_adamw(w, first, second, h, dy, **options)


def code_of(moment: Moment8) -> Tensor:
    return moment.code.to(torch.int16)


def assert_codes_are_right(found: Moment8, plain: Moment8, exact: Tensor, step: int) -> None:
    """Equal; or a step apart, where `exact`, the moment before it is rounded, lies at the edge that the coin drew."""
    torch.testing.assert_close(found.scale, plain.scale, rtol=1e-5, atol=0)
    apart = code_of(found) - code_of(plain)
    assert apart.abs().max() <= 1
    G, O, M = exact.shape
    most = 127 if found.signed else 255
    share = (exact.abs() if found.signed else exact.sqrt()) / plain.scale.repeat_interleave(BLOCK, -1)[..., :M]
    square = torch.where(exact == 0, 0, share) * most**2
    power = 1 if found.signed else 2
    low = square.sqrt().floor()
    drawn = (square**power - low ** (2 * power)) / ((low + 1) ** (2 * power) - low ** (2 * power))
    start = torch.arange(G * O)[:, None] * M
    off = (drawn - moments8._coin(start, M, step, found.signed).view(G, O, M)).abs()
    off = torch.minimum(off, 1 - off)  # a number just below a code and just above it
    assert (off[apart != 0] < 1e-3).all()
    assert (apart != 0).float().mean() < 1e-3


EDGES = {("8bit", "8bit"), ("8bit", "float32"), ("bfloat16", "8bit"), ("float32", "bfloat16"), ("8bit", "bfloat16")}
BLOCKS = [*SIZES, (1, 10, 130, 513), (2, 3, 9, 255), (1, 21, 150, 777), (1, 32, 70, 600), (1, 40, 30, 256)]


@pytest.mark.parametrize("size", BLOCKS, ids=str)
@pytest.mark.parametrize("forms", [*sorted(EDGES), ("bfloat16", "float32")], ids=str)
@pytest.mark.parametrize("name", FLOAT32_ISAS)
def test_moments_of_two_kinds(name: str, forms: tuple[str, str], size: tuple[int, int, int, int]) -> None:
    plain = one_step(fused_step, size, forms)
    with isa(name):
        found = one_step(cpu, size, forms)
    w, h, dy = (t.double() for t in step_inputs(size))
    h[:, :, 2 * size[3] // 3 :] = 0
    pairs = zip(moments_before(w), forms, (True, False), strict=True)
    before = [numbers(kept(t, form, signed)).double() for t, form, signed in pairs]
    fused_step.fused_adamw(w, before[0], before[1], h, dy, **ADAMW, step=7, grad_scale=0.5, want_dh=False)
    for i, form in enumerate(forms, 1):
        if form == "8bit":
            assert_codes_are_right(found[i], plain[i], before[i - 1], 7)
        else:
            rtol, scale = {"float32": 1e-5, "bfloat16": 2**-6}[form], before[i - 1].abs().amax(-1, keepdim=True)
            assert ((found[i] - before[i - 1]).abs() <= rtol * before[i - 1].abs() + 1e-6 * scale).all()
    # where m and v nearly vanish their quotient is anything
    assert ((found[0] - w).abs() <= 1e-5 * w.abs() + 1e-5).float().mean() > 0.999
    torch.testing.assert_close(found[3], plain[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOAT32_ISAS)
def test_codes_of_any_values(name: str) -> None:
    """With betas of one and no gradient a step writes what it reads, on average: values lie on codes."""
    generator = torch.Generator().manual_seed(0)
    for M in (1, 100, 256, 300):
        w, h, dy = torch.randn(1, 9, M, generator=generator), torch.zeros(1, 2, M), torch.zeros(1, 2, 9)
        size = torch.logspace(-33, 16, 9)[None, :, None]
        first, second = (
            kept(t, "8bit", i == 0) for i, t in enumerate((w * size, (w * size.clamp(min=1e-12)).square()))
        )
        before = numbers(first), numbers(second)
        options: dict[str, Any] = {**ADAMW, "beta1": 1 - 1e-12, "beta2": 1 - 1e-12, "step": 3}
        with isa(name):
            cpu.fused_adamw(w, first, second, h, dy, **options, grad_scale=1.0, want_dh=False)
        for moment, old in zip((first, second), before, strict=True):
            new = numbers(moment)
            assert torch.equal(new == 0, old == 0)
            assert (new - old).abs().le(0.04 * old.abs() + 1e-30).float().mean() > 0.99


def test_a_small_value_keeps_a_code() -> None:
    w, h, dy = torch.zeros(1, 2, 300), torch.zeros(1, 1, 300), torch.ones(1, 1, 2)
    h[..., 0], h[..., 1] = 1.0, 1e-18
    for name in FLOAT32_ISAS:
        moments = kept(w, "8bit", True), kept(w, "8bit", False)
        with isa(name):
            cpu.fused_adamw(w.clone(), *moments, h, dy, **ADAMW, step=1, grad_scale=1.0, want_dh=False)
        assert moments[1].code[0, 0].tolist() == [255, 1, *[0] * 298]
        assert moments[0].code[0, 0, 0] == 254 and moments[0].code[0, 0, 2:].eq(127).all()


@pytest.mark.parametrize("form", SGD)
@pytest.mark.parametrize("name", FLOAT32_ISAS)
def test_sgd_equals_the_definition(name: str, form: str) -> None:
    for size in SIZES:
        w, h, dy = step_inputs(size)
        buffer = torch.full_like(w, torch.nan) if SGD[form]["momentum"] else None
        right_w, right_buffer = w.double(), None if buffer is None else buffer.double()
        with isa(name):
            for first in (True, False):
                options: dict[str, Any] = {**SGD[form], "lr": 0.1, "weight_decay": 0.01, "first": first}
                options |= {"grad_scale": 2.0, "want_dh": True}
                dh = cpu.fused_sgd(w, buffer, h, dy, **options)
                right_dh = fused_step.fused_sgd(right_w, right_buffer, h.double(), dy.double(), **options)
                scale = right_dh.abs().max().item()  # type: ignore[union-attr]
                torch.testing.assert_close(dh.double(), right_dh, rtol=1e-5, atol=1e-5 * scale)  # type: ignore[union-attr]
        scale = right_w.abs().max().item()
        torch.testing.assert_close(w.double(), right_w, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("size", [(1, 10, 5000, 48), (2, 130, 300, 200), (1, 20, 2600, 300)], ids=str)
def test_bits_do_not_depend_on_threads(size: tuple[int, int, int, int]) -> None:
    found = []
    for n in (1, 2, 5):
        w, h, dy = step_inputs(size)
        state: list[Any] = [torch.zeros_like(w), torch.zeros_like(w)]
        with threads(n):
            dh = cpu.fused_adamw(w, state[0], state[1], h, dy, **ADAMW, step=1, grad_scale=1.0, want_dh=True)
            assert torch.equal(cpu.dh_only(step_inputs(size)[0], dy), dh)  # type: ignore[arg-type]
        state += [t for k in (True, False) for t in kept(torch.zeros_like(w), "8bit", k)[:2]]
        w8 = step_inputs(size)[0]
        with threads(n):
            eight: list[Any] = [Moment8(state[2], state[3], True), Moment8(state[4], state[5], False)]
            cpu.fused_adamw(w8, eight[0], eight[1], h, dy, **ADAMW, step=1, grad_scale=1.0, want_dh=True)
        found.append((w, w8, *state, dh))
    for other in found[1:]:
        for t, first in zip(other, found[0], strict=True):
            assert torch.equal(t, first)


def test_each_gradient_alone_is_the_same() -> None:
    inputs = make_inputs("three_networks")
    call = detached(inputs)
    given = Given(inputs.dkv, cpu.fwd(call).z)
    every = cpu.bwd(call, given, NEEDS)._asdict()
    for wanted in PARAMETERS:
        for name, grad in cpu.bwd(call, given, Needs(**{wanted: True}))._asdict().items():
            assert torch.equal(grad, every[name]) if name == wanted else grad.numel() == 0


@pytest.mark.parametrize("n", [1, 3])
def test_scratch_that_cannot_be_had_is_an_error_in_words(n: int) -> None:
    """Also where a worker is refused it, whose exception has to reach the caller's thread."""
    call, (w, _, dy) = detached(make_inputs("three_networks")), step_inputs((2, 40, 300, 70))
    for run in (lambda: cpu.fwd(call).kv, lambda: cpu.dh_only(w, dy)):
        with threads(n):
            right = run()
            _C.limit_scratch(64)
            try:
                with pytest.raises(MemoryError, match=r"no memory for [0-9]+ bytes of scratch of one thread"):
                    run()
            finally:
                _C.limit_scratch(0)
            assert torch.equal(run(), right)


def test_refusals_are_in_words() -> None:
    w, h, dy = step_inputs((1, 2, 8, 16))
    assert cpu.fused_step_unsupported(w, w, w, h, dy) == []
    assert cpu.fused_step_unsupported(w.double(), None, None, h, dy) == ["w is torch.float64; needs torch.float32"]
    assert cpu.fused_step_unsupported(w, w.bfloat16(), w.byte(), h, dy) == []
    [reason] = cpu.fused_step_unsupported(w, w, w.half(), h, dy)
    assert reason == "exp_avg_sq is torch.float16; needs torch.float32 or torch.bfloat16 or torch.uint8"
    [reason] = cpu.fused_step_unsupported(w, w.byte(), None, h, dy)  # SGD's
    assert reason == "exp_avg is torch.uint8; needs torch.float32 or torch.bfloat16"
    [reason] = cpu.fused_step_unsupported(w.mT.contiguous().mT, None, None, h, dy)
    assert reason.startswith("w is not contiguous")
    options: dict[str, Any] = {**ADAMW, "step": 1, "grad_scale": 1.0, "want_dh": False}
    first, second = kept(torch.zeros_like(w), "8bit", True), kept(torch.zeros_like(w), "8bit", False)
    wrong = {
        r"exp_avg are codes without a scale": (first.code, second),
        r"exp_avg_sq has signed=True": (first, first),
        r"the scale of exp_avg is torch.float32 \[1, 8\], expected \[1, 8, 1\]": (
            first._replace(scale=first.scale[..., 0]),
            second,
        ),
        r"exp_avg_sq has shape \[1, 8, 8\], expected \[1, 8, 16\]": (
            first,
            second._replace(code=second.code[..., :8].contiguous()),
        ),
    }
    for words, moments in wrong.items():
        with pytest.raises(NotImplementedError, match=words):
            cpu.fused_adamw(w, *moments, h, dy, **options)
    with pytest.raises(NotImplementedError, match=r"dy has shape \[1, 2, 7\], expected \[1, 2, 8\]"):
        cpu.dh_only(w, dy[:, :, :7].contiguous())
    inputs = make_inputs("tiny", torch.float64)
    with pytest.raises(NotImplementedError, match=r"the parameters are torch.float64; needs float32"):
        inputs.call("cpu")


def test_fields_are_read_by_name() -> None:
    sizes = {"G": 1, "P": 2, "O": 8, "M": 16}
    assert _C.reparam_step_workspace(sizes) > 0
    with pytest.raises(TypeError, match="sizes: unknown field 'form'"):
        _C.reparam_step_workspace(sizes | {"form": None})
    fields = sizes | {"h": None, "dy": 0, "form": {"layers": 1}, "dtype": 0, "w": 0, "dh": 0, "workspace": 0}
    with pytest.raises(TypeError, match="form: no field 'kv_heads'"):
        _C.reparam_dh(fields | {"grad_scale": 1.0}, 1)


def test_every_named_shape_by_the_op() -> None:
    for name in SHAPES:
        inputs = make_inputs(name)
        assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))
