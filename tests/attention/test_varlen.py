"""Packed sequences: every backend against float64, one sequence after the other; bad input; compiled calls."""

from typing import Any

import pytest
import torch

from prefixattn import prefix_attention, prefix_attention_varlen
from prefixattn.kernels.table import INTERPRETED
from prefixattn.testing.attention import (
    FEATURES,
    Shape,
    assert_all_as_accurate,
    exact,
    known_from_float32,
    ours,
    same_dtype,
)
from prefixattn.testing.varlen import LENGTHS, Packed, packed_sequences
from tests.grids import DTYPES

UNMASKED = {
    name: {**options, "layout": "dense"} if options.get("layout", "packed") != "packed" else options
    for name, options in FEATURES.items()
    if "mask" not in options
}
# of the same kinds, but shorter: an interpreter takes its time (tests/kernels/test_triton_packed.py has many tiles)
FEWER: dict[str, tuple[list[int], list[int] | None]] = {
    "training": ([17, 40, 1], None),
    "cached": ([3, 1, 8], [40, 70, 8]),
    "ragged": ([5, 0, 20, 1, 2], [9, 3, 12, 0, 30]),
    "decoding": ([1, 0, 1], [30, 5, 70]),
}


def packed(
    backend: str, sizes: str, dtype: torch.dtype = torch.float32, shape: Shape | None = None, **options: Any
) -> Packed:
    """Inputs of LENGTHS, but for an interpreter of FEWER."""
    if backend == "triton" and INTERPRETED and sizes in FEWER:
        return packed_sequences(FEWER[sizes], dtype, shape or Shape(0, 2, 1, 0, 0, 9, 16), **options)
    return packed_sequences(sizes, dtype, shape, **options)


@pytest.mark.parametrize("lengths", [name for name in LENGTHS if name != "none"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_lengths(backend: str, dtype: str, lengths: str) -> None:
    if words := known_from_float32(backend, DTYPES[dtype]):
        pytest.skip(words)
    inputs = packed(backend, lengths, DTYPES[dtype], causal=lengths != "one", prefixes="per_sample")
    assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("feature", UNMASKED)
def test_features(backend: str, feature: str) -> None:
    one = [list(UNMASKED).index(feature) % 2] if backend == "triton" and INTERPRETED else [0, 1]
    for i in one:
        lengths, dtype = ("training", "ragged")[i], (torch.bfloat16, torch.float32)[(i + len(feature)) % 2]
        inputs = packed(backend, lengths, dtype, **UNMASKED[feature])
        assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


def test_many_blocks(backend: str) -> None:
    """Of queries and of keys, with the order of sums that many samples have."""
    few = backend == "triton" and INTERPRETED
    own = [40, 3, 70] if few else [150, 3, 300, 270, 65]
    keys = [n + 9 * i for i, n in enumerate(own)]
    shape = Shape(0, 2, 1, 0, 0, 40 if few else 140, 32)
    for options in ({"causal": True}, {"window": (40, 7), "prefix_in_window": True}):
        inputs = packed_sequences((own, keys), torch.float32, shape, **options)
        assert_all_as_accurate(ours(inputs, backend), same_dtype(inputs), exact(inputs))


def test_no_sequence(backend: str) -> None:
    inputs = packed(backend, "none", causal=True)
    found = ours(inputs, backend)
    assert found["out"].shape == (0, 4, 16) and found["lse"].shape == (4, 0)
    assert found["dprefix_k"].shape == inputs.tensors["prefix_k"].shape and not found["dprefix_k"].any()


def test_a_sequence_is_what_it_is_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: no sum runs over another."""
    if backend == "triton":  # whose kernel for short samples takes no sequences
        monkeypatch.setattr("prefixattn.kernels.launch_fwd.SHORT_KEYS", -1)
    inputs = packed(backend, "cached", causal=True, prefixes="bank", grad=False)
    whole = inputs.call(backend)
    queries, keys = (inputs.options[f"cu_seqlens_{x}"].tolist() for x in "qk")
    for i in range(len(queries) - 1):
        rows, own = slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1])
        q, k, v = (inputs.tensors[n][at].transpose(0, 1)[None] for n, at in (("q", rows), ("k", own), ("v", own)))
        prefix = (inputs.tensors[n] for n in ("prefix_k", "prefix_v"))
        options = {"is_causal": True, "enable_gqa": True, "prefix_ids": inputs.options["prefix_ids"][i : i + 1]}
        alone = prefix_attention(q, k, v, *prefix, **options, backend=backend)
        # a single query has a path of its own, where all are single
        close = {"rtol": 1e-5, "atol": 1e-6} if rows.stop - rows.start == 1 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(whole[rows], alone[0].transpose(0, 1), **close)


def test_offsets_may_lie_apart_in_memory(backend: str) -> None:
    """A column of a table; who read the one beside it too would find other sequences."""
    inputs = packed(backend, "cached", causal=True)
    right = ours(inputs, backend)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        offsets = inputs.options[name].long()
        inputs.options[name] = torch.stack([offsets, offsets], 1)[:, 0]
    found = ours(inputs, backend)
    assert all(torch.equal(found[name], t) for name, t in right.items())


@pytest.mark.parametrize("options", [{"dropout_p": 0.3, "prefix_dropout_p": 0.2}, {"dropout_p": 1.0}])
def test_dropout(backend: str, options: dict[str, float]) -> None:
    inputs = packed(backend, "training", causal=True, memory="shared")
    torch.manual_seed(3)
    found = ours(inputs, backend, **options)
    torch.manual_seed(3)
    right = ours(inputs.to(torch.float64), "reference", **options)
    for name, t in right.items():
        torch.testing.assert_close(found[name].double(), t.double(), rtol=2e-4, atol=2e-4)


def test_the_reference_drops_by_sequence_and_place() -> None:
    """The first sequence drops what a sample of its own drops."""
    inputs = packed_sequences("training", torch.float64, grad=False)
    n = inputs.options["cu_seqlens_q"][1].item()
    options = {"dropout_p": 0.3, "prefix_dropout_p": 0.2, "backend": "reference"}
    torch.manual_seed(3)
    whole = inputs.call(**options)
    torch.manual_seed(3)
    q, k, v = (inputs.tensors[name][:n].transpose(0, 1)[None] for name in "qkv")
    prefix = [inputs.tensors[name] for name in ("prefix_k", "prefix_v")]
    alone = prefix_attention(q, k, v, *prefix, enable_gqa=True, **options)
    torch.testing.assert_close(whole[:n], alone[0].transpose(0, 1))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "start": ({"cu_seqlens_q": torch.tensor([1, 81, 135])}, r"cu_seqlens_q\[0\] is 1, expected 0"),
    "back": ({"cu_seqlens_q": torch.tensor([0, 60, 50, 135])}, r"cu_seqlens_q\[2\] is 50, below cu_seqlens_q\[1\], 60"),
    "end": ({"cu_seqlens_k": torch.tensor([0, 17, 81, 82, 115, 130])}, r"cu_seqlens_k\[5\] is 130, expected the total"),
    "longer": ({"max_seqlen_q": 63}, "sequence 1 of cu_seqlens_q has 64 tokens, max_seqlen_q is 63"),
    "negative": ({"max_seqlen_k": -1}, "max_seqlen_k is -1, expected a number of tokens"),
    "a fraction": ({"max_seqlen_k": 64.0}, "max_seqlen_k is 64.0, expected a number of tokens"),
    "count": ({"cu_seqlens_k": torch.tensor([0, 64, 128, 135])}, "have 6 and 4 offsets, expected equal"),
    "type": ({"cu_seqlens_q": torch.tensor([0.0, 135.0])}, "cu_seqlens_q is torch.float32, expected torch.int32"),
    "axes": (
        {"cu_seqlens_q": torch.tensor([[0, 135]])},
        r"cu_seqlens_q has shape \[1, 2\], expected \[sequences \+ 1\]",
    ),
    "empty": ({"cu_seqlens_q": torch.tensor([], dtype=torch.int64)}, r"cu_seqlens_q has shape \[0\]"),
    "a list": ({"cu_seqlens_q": [0, 135]}, "cu_seqlens_q is a list, expected a tensor"),
    "device": ({"cu_seqlens_q": torch.zeros(6, dtype=torch.int64, device="meta")}, "cu_seqlens_q is on meta"),
    "a batch": ({"q": torch.zeros(1, 4, 135, 16)}, r"q has shape \[1, 4, 135, 16\], expected \[total_q, H, D\]"),
    "ids": ({"prefix_ids": torch.tensor([0, 1])}, "prefix_ids picks prefixes of a bank"),
    "prefixes": ({"prefix_k": torch.zeros(3, 2, 9, 16), "prefix_v": torch.zeros(3, 2, 9, 16)}, "T=3 prefixes for B=5"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_packing_is_refused_in_words(what: str) -> None:
    changed, words = BAD[what]
    with pytest.raises(ValueError, match=words):
        packed_sequences("training", grad=False).call(**changed)


def test_offsets_may_have_either_type(backend: str) -> None:
    inputs = packed(backend, "training", causal=True, grad=False)
    wide = {name: inputs.options[name].long() for name in ("cu_seqlens_q", "cu_seqlens_k")}
    assert torch.equal(inputs.call(backend), inputs.call(backend, **wide))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_for_other_lengths_too(backend: str) -> None:
    inputs = packed_sequences(([7, 4, 1], None), causal=True)
    compiled = torch.compile(prefix_attention_varlen, backend="aot_eager", fullgraph=True)
    for sizes in ([7, 4, 1], [3, 7, 2]):
        offsets = torch.tensor([0, *sizes]).cumsum(0).int()
        arguments = {**inputs.tensors, **inputs.options, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        right = prefix_attention_varlen(**arguments, backend=backend)
        out = compiled(**arguments, backend=backend)
        torch.testing.assert_close(out, right)
        grads = [torch.autograd.grad(t, inputs.tensors["prefix_k"], inputs.dout)[0] for t in (out, right)]
        torch.testing.assert_close(*grads)
    torch.compiler.reset()
