"""Sums over many samples or queries err no more than plain PyTorch's, and scores of any size no more either."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import backends, prefix_attention, prefix_attention_qkvpacked
from prefixattn.attention import reference, triton
from prefixattn.attention.call import Call, Given, Needs, Wants
from prefixattn.attention.philox import PREFIX_K, PREFIX_V, keep
from tests.support import threads

NAMES = "q", "k", "v", "prefix_k", "prefix_v"
# where a sum is exact but for its last rounding: of float32, by rms of a uniform error, and some more
FLOOR = 2**-25

_C = pytest.importorskip("prefixattn._C", reason="the CPU kernels are not built")


def rms(t: Tensor) -> float:
    return float(t.double().square().mean().sqrt())


def assert_twice(found: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, t in found.items():
        error, allowed = rms(t.double() - exact[name]), rms(plain[name].double() - exact[name])
        assert error <= 2 * max(allowed, FLOOR * rms(exact[name])), f"{name} errs {error:.2e}, plain {allowed:.2e}"


def sdpa(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, ids: Tensor | None = None) -> Tensor:
    rows = [t.expand(len(q), -1, -1, -1) if ids is None else t[ids] for t in (prefix_k, prefix_v)]
    keys, values = (torch.cat(pair, 2) for pair in zip(rows, (k, v), strict=True))
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=q.shape[1] != k.shape[1])


def gradients(f: Any, tensors: dict[str, Tensor], dout: Tensor, wanted: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    out = f(*leaves.values())
    return dict(zip(wanted, torch.autograd.grad(out, [leaves[n] for n in wanted], dout.to(out.dtype)), strict=True))


def compare(tensors: dict[str, Tensor], dout: Tensor, options: dict[str, Any], wanted: tuple[str, ...]) -> None:
    ids = options.get("prefix_ids")

    def ours(*args: Tensor) -> Tensor:
        out: Tensor = prefix_attention(*args, enable_gqa=True, **options)  # type: ignore[assignment]
        return out

    plain = gradients(lambda *t: sdpa(*t, ids), tensors, dout, wanted)
    doubles = {n: t.double() for n, t in tensors.items()}
    exact = gradients(lambda *t: sdpa(*t, ids), doubles, dout, wanted)
    assert_twice(gradients(ours, tensors, dout, wanted), plain, exact)


def inputs(B: int, H: int, Hkv: int, L: int, S: int, P: int, D: int, T: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(0)
    prefix = (T, Hkv, P, D) if T else (Hkv, P, D)
    sizes = (B, H, L, D), (B, Hkv, S, D), (B, Hkv, S, D), prefix, prefix
    return {n: torch.randn(size) for n, size in zip(NAMES, sizes, strict=True)}


def biased(tensors: dict[str, Tensor], ids: Tensor | None = None) -> Tensor:
    """A dout whose sums have one sign, as a real loss has it."""
    return sdpa(*tensors.values(), ids).detach() + 1  # type: ignore[misc]


# one thread: the fused schedule; the prefix alone, or more threads: the split one
SCHEDULES = {"fused": (1, NAMES), "split": (4, NAMES), "prefix_alone": (1, NAMES[3:])}
BATCHES = {
    "shared": (4096, 2, 2, 3, 3, 5, 8, 0),
    "one_query": (65536, 1, 1, 1, 1, 2, 16, 0),
    "grouped": (256, 32, 2, 2, 3, 4, 8, 0),
    "bank": (6000, 1, 1, 2, 2, 3, 8, 3),
    "long": (64, 1, 1, 197, 40, 5, 64, 0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", BATCHES)
def test_the_gradient_of_a_prefix_errs_as_little_for_many_samples(case: str, schedule: str) -> None:
    *sizes, T = BATCHES[case]
    tensors, options = inputs(*sizes, T), {"backend": "cpu"}  # type: ignore[misc]
    ids = torch.arange(sizes[0]) % T if T else None
    if ids is not None:
        options["prefix_ids"] = ids  # type: ignore[assignment]
    n, wanted = SCHEDULES[schedule]
    with threads(n):
        compare(tensors, biased(tensors, ids), options, wanted)


@pytest.mark.parametrize("T", [0, 3])
def test_the_reference_sums_samples_in_halves(T: int) -> None:
    tensors = inputs(4097, 2, 2, 3, 3, 5, 8, T)
    ids = torch.arange(4097) % T if T else None
    dout = biased(tensors, ids)
    compare(tensors, dout, {"backend": "reference", "prefix_ids": ids}, NAMES[3:])


@pytest.mark.parametrize("n", [1, 4])
def test_gradients_of_keys_err_as_little_for_many_queries(n: int) -> None:
    tensors = inputs(1, 1, 1, 16384, 16, 4, 16)
    with threads(n):
        compare(tensors, biased(tensors), {"backend": "cpu"}, NAMES)


def test_a_packed_projection_errs_as_little() -> None:
    torch.manual_seed(0)
    qkv, prefix = torch.randn(8192, 2, 3, 1, 8), torch.randn(1, 3, 8)

    def packed(x: Tensor, p: Tensor) -> Tensor:
        out: Tensor = prefix_attention_qkvpacked(x, p, p, backend="cpu")  # type: ignore[assignment]
        return out

    def plain(x: Tensor, p: Tensor) -> Tensor:
        return sdpa(*x.permute(2, 0, 3, 1, 4).unbind(), p, p).transpose(1, 2)

    dout = plain(qkv, prefix) + 1
    given, names = {"qkv": qkv, "prefix": prefix}, ("qkv", "prefix")
    exact = gradients(plain, {n: t.double() for n, t in given.items()}, dout, names)
    assert_twice(gradients(packed, given, dout, names), gradients(plain, given, dout, names), exact)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("B, L", [(3000, 2), (1, 16384)])
def test_prefix_dropout_errs_as_little(B: int, L: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, p, seed = inputs(B, 1, 1, L, 2, 3, 8), 0.25, torch.tensor([5])
    monkeypatch.setattr(torch, "randint", lambda *_, **__: seed)
    shape = (B, 1, 3, 8)
    kept = [keep(seed, p, shape, kind) / (1 - p) for kind in (PREFIX_K, PREFIX_V)]

    def plain(q: Tensor, k: Tensor, v: Tensor, *prefix: Tensor) -> Tensor:
        rows = [t.expand(B, -1, -1, -1) * m.to(q.dtype) for t, m in zip(prefix, kept, strict=True)]
        return F.scaled_dot_product_attention(q, torch.cat([rows[0], k], 2), torch.cat([rows[1], v], 2))

    def ours(*args: Tensor) -> Tensor:
        out: Tensor = prefix_attention(*args, prefix_dropout_p=p, backend="cpu")  # type: ignore[assignment]
        return out

    dout = plain(*tensors.values()).detach() + 1
    with threads(n):
        found = gradients(ours, tensors, dout)
    exact = gradients(plain, {n: t.double() for n, t in tensors.items()}, dout)
    assert_twice(found, gradients(plain, tensors, dout), exact)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_gradient_of_a_memory_errs_as_little_for_many_samples(backend: str) -> None:
    torch.manual_seed(0)
    q, memory = torch.rand(6000, 1, 2, 8), torch.randn(1, 8, 8)
    k, dout = torch.randn(6000, 1, 1, 8), torch.rand(6000, 1, 2, 8)

    def ours(memory: Tensor) -> Tensor:
        prefix = k[0, :, :0]
        out: Tensor = prefix_attention(q, k, k, prefix, prefix, memory=memory, phi="none", backend=backend)  # type: ignore[assignment]
        return out

    def plain(memory: Tensor) -> Tensor:
        return q.to(memory.dtype) @ memory

    given = {"memory": memory}
    exact = gradients(plain, {"memory": memory.double()}, dout, ("memory",))
    assert_twice(gradients(ours, given, dout, ("memory",)), gradients(plain, given, dout, ("memory",)), exact)


@pytest.mark.parametrize("of", ["prefix", "memory"])
def test_the_triton_kernels_sum_many_samples_in_two_floats(of: str) -> None:
    """By the backward alone, as the interpreter is slow; one chain of these tiles would err five times as much."""
    if reasons := backends.here()["triton"]:
        pytest.skip("triton: " + "; ".join(reasons))
    tensors = inputs(1024, 1, 1, 4, 1, 2, 16)
    memory = torch.randn(1, 1, 16, 16) if of == "memory" else None
    needs = Needs(prefix_k=of == "prefix", prefix_v=of == "prefix", memory=of == "memory")
    dout = biased(tensors)

    def backward(backend: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, v, *prefix = (t.to(dtype) for t in tensors.values())
        call = Call(q, k, v, *(t[None] for t in prefix), scale=0.25, phi="none")
        out, lse, _, _ = reference.fwd(call, Wants())
        call = call._replace(memory=None if memory is None else memory.to(dtype))
        grads = backend.bwd(call, Given(dout.to(dtype), None, out, lse), needs)._asdict()
        return {name: grad for name, grad in grads.items() if getattr(needs, name)}

    exact = backward(reference, torch.float64)
    for name, t in backward(triton, torch.float32).items():
        assert rms(t.double() - exact[name]) <= 1e-7 * rms(exact[name])


@pytest.fixture(params=_C.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.mark.parametrize("L, causal", [(1, False), (33, False), (70, True)])
def test_weights_of_both_passes_agree_where_scores_are_large(isa: str, L: int, causal: bool) -> None:
    """The backward's weights of a query have the sum 1, so dv of all keys has that of dout.

    They are recomputed from lse: from another sum of the products, or another rounding, each would be wrong by a part
    of the score.
    """
    tensors = inputs(1, 2, 2, L, 90, 7, 80)
    for name in ("q", "k", "prefix_k"):
        tensors[name] *= 300
    dout = torch.eye(L, 80).expand(1, 2, L, 80)  # an element for each query

    def ours(*args: Tensor) -> Tensor:
        out: Tensor = prefix_attention(*args, is_causal=causal, backend="cpu")  # type: ignore[assignment]
        return out

    found = gradients(ours, tensors, dout)
    total = (found["v"].double().sum((0, 2)) + found["prefix_v"].double().sum(1))[:, :L]
    assert (total - 1).abs().max() < 1e-6  # a float's lse would be wrong by up to 4e-3


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("size", [1, 4, 30])
def test_gradients_of_few_queries_err_as_sdpas_on_every_instruction_set(isa: str, size: int, L: int) -> None:
    tensors = inputs(4, 4, 4, L, 20, 9, 128)
    for name in ("q", "k", "prefix_k"):
        tensors[name] *= size
    compare(tensors, torch.randn(4, 4, L, 128), {"backend": "cpu"}, NAMES)


def test_weights_of_a_query_have_the_sum_one_under_a_large_mask(backend: str) -> None:
    """dv sums to dout; of lse in one float it would be off by 2^-25 of the mask, 3e-6."""
    tensors = inputs(1, 8, 8, 3, 20, 4, 16)
    mask = torch.full((1, 1, 1, 20), 97.3)

    def ours(*args: Tensor) -> Tensor:
        out: Tensor = prefix_attention(*args, attn_mask=mask, backend=backend)  # type: ignore[assignment]
        return out

    found = gradients(ours, tensors, torch.eye(3, 16).expand(1, 8, 3, 16))  # an element for each query
    total = (found["v"].double().sum((0, 2)) + found["prefix_v"].double().sum(1))[:, :3]
    assert (total - 1).abs().max() < 6e-7


def test_near_its_cap_a_score_has_the_derivative_that_tanh_has(backend: str) -> None:
    """1 - tanh^2 of floats is wrong by 5 % at seven times the cap, where 3e-6 is left."""
    tensors = inputs(2, 2, 2, 3, 20, 4, 16)
    for name in ("q", "k", "prefix_k"):
        tensors[name] = torch.ones_like(tensors[name])

    def ours(*args: Tensor, backend: str = backend) -> Tensor:
        out = prefix_attention(*args, softcap=0.5, scale=7 * 0.5 / 16, backend=backend)
        return out  # type: ignore[return-value]

    dout, doubles = torch.randn(2, 2, 3, 16), {n: t.double() for n, t in tensors.items()}
    exact = gradients(lambda *t: ours(*t, backend="reference"), doubles, dout, ("k", "prefix_k"))
    for name, t in gradients(ours, tensors, dout, ("k", "prefix_k")).items():
        assert rms(t.double() - exact[name]) < 1e-5 * rms(exact[name]), name


def test_the_references_gradients_in_16_bits_do_not_start_from_the_rounded_output() -> None:
    """As SDPA's math backend, which keeps its weights; a key or two of a sharp softmax show it."""
    tensors = {
        n: (t if n in ("v", "prefix_v") else 2 * t).bfloat16() for n, t in inputs(4, 4, 4, 30, 20, 9, 64).items()
    }
    dout, doubles = torch.randn(4, 4, 30, 64).bfloat16(), {n: t.double() for n, t in tensors.items()}
    exact = gradients(sdpa, doubles, dout, ("q", "k", "prefix_k"))

    def ours(*args: Tensor) -> Tensor:
        out: Tensor = prefix_attention(*args, backend="reference")  # type: ignore[assignment]
        return out

    for name, t in gradients(ours, tensors, dout, ("q", "k", "prefix_k")).items():
        rounding = rms(exact[name].bfloat16().double() - exact[name])
        assert rms(t.double() - exact[name]) < 1.1 * rounding, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("L, causal", [(1, False), (2, False), (70, True)])
def test_scores_of_any_size_give_finite_results(isa: str, L: int, causal: bool, dtype: torch.dtype) -> None:
    for size in (2e3, 2e4, 6e4) if dtype == torch.float16 else (2e3, 4e4, 3e5, 1e10):
        tensors = inputs(1, 2, 2, L, 70, 5, 64)
        for name in ("q", "k", "prefix_k"):
            tensors[name] = tensors[name].clamp(-1, 1) * size
        tensors = {n: t.to(dtype) for n, t in tensors.items()}
        dout = torch.randn(1, 2, L, 64)

        def attend(backend: str, *args: Tensor, causal: bool = causal) -> Tensor:
            out: Tensor = prefix_attention(*args, is_causal=causal, backend=backend)  # type: ignore[assignment]
            return out

        ours, expected = (attend(backend, *tensors.values()) for backend in ("cpu", "reference"))
        assert ours.isfinite().all(), f"out of scores from {size}"
        # one key takes all, and both sides find the same one, but where two are as near as rounding
        near = ((ours - expected).abs() < 0.1).double().mean()
        assert near > 0.9, f"out of scores from {size}: {near}"
        found = gradients(lambda *t: attend("cpu", *t), tensors, dout)
        for name, t in found.items():
            assert t.isfinite().all(), f"d{name} of scores from {size}"
