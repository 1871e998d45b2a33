"""The edges of what prefix_attention takes: nothing, no memory, numbers at the end of their range, hidden nans."""

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prefixattn import backends, prefix_attention, prefix_attention_qkvpacked

NAN = float("nan")
# numpy, which interprets the Triton kernels, warns of what is meant here
QUIET = pytest.mark.filterwarnings("ignore:.*(invalid value|overflow|All-NaN).*:RuntimeWarning")


def inputs(B: int, H: int, L: int, S: int, P: int, D: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = (B, H, L, D), (B, H, S, D), (B, H, S, D), (H, P, D), (H, P, D)
    return [torch.randn(size).to(dtype) for size in sizes]


def sdpa(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, **options: Any) -> Tensor:
    keys, values = (torch.cat([p.expand(len(q), -1, -1, -1), t], 2) for p, t in ((prefix_k, k), (prefix_v, v)))
    return F.scaled_dot_product_attention(q, keys, values, **options)


EMPTIES = """
import itertools, sys
import torch
from prefixattn import prefix_attention
backend = sys.argv[1]
features = [{}, {"prefix_dropout_p": 0.1}, {"dropout_p": 0.1, "is_causal": True}, {"softcap": 2.0, "mask": 1}]
features += [{"memory": 1}, {"bank": 1, "prefix_dropout_p": 0.1}, {"lengths": 1, "memory": 1}]
for threads in (1, 2):
    torch.set_num_threads(threads)
    sizes = itertools.product((0, 2), (0, 4), (0, 1, 2), (0, 3), (0, 2))
    for (B, H, L, S, P), feature in itertools.product(sizes, features):
        for dtype in (torch.float32, torch.bfloat16):
            options = dict(feature, backend=backend)
            size = (2, H, P, 8) if options.pop("bank", 0) else (H, P, 8)
            shapes = (B, H, L, 8), (B, H, S, 8), (B, H, S, 8), size, size
            tensors = [torch.ones(s, dtype=dtype).requires_grad_() for s in shapes]
            if len(size) == 4:
                options["prefix_ids"] = torch.zeros(B, dtype=torch.int64)
            if options.pop("lengths", 0):
                options["prefix_lengths"] = torch.full((B,), P, dtype=torch.int64)
            if options.pop("mask", 0):
                options["attn_mask"] = torch.ones(B, 1, 1, S, dtype=torch.bool)
            if options.pop("memory", 0):
                options["memory"] = torch.ones(H, 8, 8, dtype=dtype).requires_grad_()
                tensors.append(options["memory"])
            out, lse, mass = prefix_attention(*tensors[:5], **options, return_lse=True, return_prefix_mass=True)
            assert out.shape == (B, H, L, 8) and lse.shape == mass.shape == (B, H, L), (B, H, L, S, P, feature)
            for t, grad in zip(tensors, torch.autograd.grad(out.float().sum(), tensors)):
                assert grad.shape == t.shape and grad.isfinite().all(), (B, H, L, S, P, feature)
                assert out.numel() or not grad.any(), (B, H, L, S, P, feature)
print("all", end="")
"""


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_no_size_of_zero_ends_the_process(name: str) -> None:
    if reasons := backends.here()[name]:
        pytest.skip(f"{name}: " + "; ".join(reasons))
    done = subprocess.run([sys.executable, "-c", EMPTIES, name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all"), done.stderr[-3000:]


def test_the_reparameterizations_kernels_refuse_a_size_of_zero() -> None:
    _C = pytest.importorskip("prefixattn._C", reason="the CPU kernels are not built")
    for sizes in itertools.product((0, 1), repeat=4):
        if 0 in sizes:
            with pytest.raises(ValueError, match="a size is 0, expected 1 or more"):
                _C.reparam_step_workspace(dict(zip("GPOM", sizes, strict=True)))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("L", [1, 70])
def test_scratch_that_cannot_be_had_is_an_error_in_words(L: int, threads: int) -> None:
    _C = pytest.importorskip("prefixattn._C", reason="the CPU kernels are not built")
    tensors = [t.requires_grad_() for t in inputs(4, 2, L, 9, 3, 32)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = prefix_attention(*tensors, backend="cpu")
        grads = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        _C.limit_scratch(64)
        words = "no memory for [0-9]+ bytes of scratch of one thread of the CPU kernels"
        with pytest.raises(MemoryError, match=words):
            prefix_attention(*tensors, backend="cpu")
        with pytest.raises(MemoryError, match=words):
            torch.autograd.grad(out.sum(), tensors, retain_graph=True)
        _C.limit_scratch(0)
        assert torch.equal(prefix_attention(*tensors, backend="cpu"), out)  # and nothing is left behind
        for a, b in zip(torch.autograd.grad(out.sum(), tensors), grads, strict=True):
            assert torch.equal(a, b)
    finally:
        _C.limit_scratch(0)
        torch.set_num_threads(before)


@pytest.mark.parametrize("argument, value, words", [
    ("scale", 1e39, "scale is 1e+39; expected a finite number in float32"),
    ("scale", NAN, "scale is nan; expected a finite number"),
    ("scale", float("-inf"), "scale is -inf; expected a finite number"),
    ("scale", 10**400, "scale is an integer of 1329 bits, expected a number that a float holds"),
    ("softcap", 10**400, "softcap is an integer of 1329 bits, expected a number that a float holds"),
    ("dropout_p", -(10**400), "dropout_p is an integer of 1329 bits, expected a number that a float holds"),
    ("softcap", 1e39, "softcap is 1e+39; expected 1.18e-38 to 8.51e+37"),
    ("softcap", 1e-46, "softcap is 1e-46; expected 1.18e-38 to 8.51e+37"),
    ("softcap", NAN, "softcap is nan; expected None or a positive number"),
    ("dropout_p", 1.5, "dropout_p is 1.5; expected a probability in [0, 1]"),
    ("prefix_dropout_p", 1, "prefix_dropout_p is 1; expected a probability in [0, 1)"),
    ("is_causal", "no", "is_causal is 'no', expected True or False"),
    ("is_causal", 1, "is_causal is 1, expected True or False"),
    ("enable_gqa", None, "enable_gqa is None, expected True or False"),
    ("return_lse", "no", "return_lse is 'no', expected True or False"),
    ("return_prefix_mass", 0, "return_prefix_mass is 0, expected True or False"),
])  # fmt: skip
def test_a_number_out_of_range_is_refused(argument: str, value: Any, words: str, backend: str) -> None:
    with pytest.raises(ValueError) as caught:
        prefix_attention(*inputs(1, 2, 3, 4, 2, 8), **{argument: value}, backend=backend)
    assert str(caught.value).startswith(words)


def test_float64_takes_what_float64_holds() -> None:
    tensors = inputs(1, 2, 3, 4, 2, 8, torch.float64)
    capped = prefix_attention(*tensors, softcap=1e39)
    torch.testing.assert_close(capped, prefix_attention(*tensors))
    assert prefix_attention(*tensors, scale=1e-46).isfinite().all()  # type: ignore[union-attr]


@QUIET
@pytest.mark.parametrize("options", [
    {"softcap": 2.0**-126}, {"softcap": 2.0**126}, {"softcap": 2.0**126, "scale": 1e-30}, {"scale": 1e-46},
    {"softcap": 1e-30, "scale": 1e30}, {"scale": 0.0},
], ids=str)  # fmt: skip
def test_numbers_at_the_end_of_their_range_mean_what_they_do_in_float64(
    options: dict[str, float], backend: str
) -> None:
    tensors = inputs(1, 2, 5, 6, 3, 16)
    found = prefix_attention(*tensors, **options, backend=backend)  # type: ignore[arg-type]
    expected = prefix_attention(*[t.double() for t in tensors], **options)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


HIDDEN: dict[str, tuple[dict[str, Any], slice]] = {  # options, and the queries that see nothing of keys 30 to 37
    "bool": ({"attn_mask": (torch.arange(40) < 30) | (torch.arange(40) > 37)}, slice(None)),
    "by_query": ({"attn_mask": ((torch.arange(40) < 30) | (torch.arange(40) > 37)).expand(33, 40)}, slice(None)),
    "float": ({"attn_mask": torch.where((torch.arange(40) < 30) | (torch.arange(40) > 37), 0.5, -1e38)}, slice(None)),
    "causal": ({"is_causal": True}, slice(0, 23)),
}


@QUIET
@pytest.mark.parametrize("D", [8, 32])
@pytest.mark.parametrize("L", [33, 1])
@pytest.mark.parametrize("case", HIDDEN)
def test_a_nan_in_a_hidden_key_reaches_neither_lse_nor_mass_nor_out(case: str, L: int, D: int, backend: str) -> None:
    options, queries = HIDDEN[case]
    if L == 1 and case in ("causal", "by_query"):
        pytest.skip("one query: causality hides nothing, and its mask is the other case")
    tensors = inputs(2, 2, L, 40, 5, D)

    def attend() -> tuple[Tensor, ...]:
        results = prefix_attention(*tensors, **options, return_lse=True, return_prefix_mass=True, backend=backend)
        return tuple(t[:, :, queries] for t in results)

    expected = attend()
    for value in (NAN, float("inf"), float("-inf")):
        tensors[1][:, :, 30:38] = value
        for t, e in zip(attend(), expected, strict=True):
            torch.testing.assert_close(t, e, rtol=0, atol=0)
    tensors[2][:, :, 30:38] = NAN
    for t, e in zip(attend()[1:], expected[1:], strict=True):  # a weight of zero makes nan of one in a value
        torch.testing.assert_close(t, e, rtol=0, atol=0)


@QUIET
@pytest.mark.parametrize("P, L", [(5, 40), (260, 2)])  # the second: a kernel of its own for few queries
def test_rows_past_a_prefixs_length_may_hold_anything(P: int, L: int, backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(3, 2, L, 6, P, 16)]
    lengths = torch.tensor([3, P, 2])

    def results() -> list[Tensor]:
        out, lse = prefix_attention(*tensors, prefix_lengths=lengths, return_lse=True, backend=backend)
        grads = torch.autograd.grad((out[0] + out[2]).sum(), tensors[:3])
        return [t[[0, 2]] for t in (out, lse, *grads)]

    expected = results()
    with torch.no_grad():
        tensors[3][:, 4:], tensors[4][:, 4:] = NAN, NAN
    for t, e in zip(results(), expected, strict=True):
        torch.testing.assert_close(t, e, rtol=0, atol=0)


def test_the_axis_of_samples_may_be_missing(backend: str) -> None:
    tensors = inputs(1, 3, 5, 6, 2, 8)
    mask = torch.rand(3, 5, 6) > 0.3
    results = prefix_attention(*tensors, attn_mask=mask, return_lse=True, return_prefix_mass=True, backend=backend)
    short = [t[0] if t.dim() == 4 else t for t in tensors]
    found = prefix_attention(*short, attn_mask=mask, return_lse=True, return_prefix_mass=True, backend=backend)
    assert [t.shape for t in found] == [(3, 5, 8), (3, 5), (3, 5)]
    assert all(torch.equal(a, b[0]) for a, b in zip(found, results, strict=True))
    with pytest.raises(ValueError, match=r"q has shape \[3, 5, 8\], expected 4 axes"):
        prefix_attention(short[0], *tensors[1:], backend=backend)


@pytest.mark.parametrize("single", [("k",), ("v",), ("q",), ("k", "v"), ("q", "v")])
def test_one_sample_serves_all(single: tuple[str, ...], backend: str) -> None:
    tensors = inputs(3, 2, 5, 6, 2, 8)
    given = [t[:1] if name in single else t for name, t in zip("qkv", tensors, strict=False)] + tensors[3:]
    given = [t.clone().requires_grad_() for t in given]
    out, plain = (
        prefix_attention(*given, backend=backend),
        sdpa(*[t.expand(3, -1, -1, -1) if t.dim() == 4 else t for t in given]),
    )
    torch.testing.assert_close(out, plain)
    found, expected = (torch.autograd.grad(x.square().sum(), given) for x in (out, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("with_memory", [False, True])
def test_dropout_of_all_weights_leaves_the_memory(with_memory: bool, backend: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(2, 2, 5, 6, 3, 8)]
    memory = torch.randn(2, 8, 8) if with_memory else None
    mask = torch.ones(5, 6, dtype=torch.bool)
    options = {"attn_mask": mask, "memory": memory, "phi": "relu", "backend": backend}
    out, lse = prefix_attention(*tensors, dropout_p=1, return_lse=True, **options)  # type: ignore[arg-type]
    expected = torch.zeros(2, 2, 5, 8) if memory is None else tensors[0].relu() @ memory
    torch.testing.assert_close(out, expected)
    if memory is None:
        assert torch.equal(out, sdpa(*tensors, dropout_p=1.0))
    torch.testing.assert_close(lse, prefix_attention(*tensors, return_lse=True, **options)[1])  # type: ignore[arg-type]
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), tensors[1:]))


def test_dropout_of_all_weights_of_a_packed_projection(backend: str) -> None:
    qkv, prefix = torch.randn(2, 6, 3, 2, 8, requires_grad=True), torch.randn(2, 3, 8)
    out = prefix_attention_qkvpacked(qkv, prefix, prefix, dropout_p=1.0, backend=backend)
    assert out.shape == (2, 6, 2, 8) and not out.any()  # type: ignore[union-attr]
    assert not torch.autograd.grad(out.sum(), qkv)[0].any()  # type: ignore[union-attr]


def test_a_head_size_of_zero_is_sdpas() -> None:
    tensors = [t.requires_grad_() for t in inputs(2, 4, 5, 6, 3, 0)]
    out, lse, mass = prefix_attention(*tensors, return_lse=True, return_prefix_mass=True)
    assert out.shape == sdpa(*tensors).shape
    torch.testing.assert_close(lse, torch.full((2, 4, 5), 9.0).log())
    torch.testing.assert_close(mass, torch.full((2, 4, 5), 3 / 9))
    (out.sum() + lse.sum()).backward()
    for name in ("cpu", "triton"):
        with pytest.raises(NotImplementedError, match="head_dim=0; needs" if not backends.here()[name] else name):
            prefix_attention(*tensors, backend=name)
