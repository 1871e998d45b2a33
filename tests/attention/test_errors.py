"""Every refusal, in its words: which argument, what came, what was expected."""

import pathlib
import re
import types
from typing import Any

import pytest
import torch

from prefixattn import backends, prefix_attention

B, H, Hkv, L, S, P, D, T = 2, 4, 2, 3, 5, 6, 8, 3


def call(**changed: Any) -> Any:
    """A good call of every size above, with some arguments changed."""
    arguments = {
        "q": torch.randn(B, H, L, D),
        "k": torch.randn(B, Hkv, S, D),
        "v": torch.randn(B, Hkv, S, D),
        "prefix_k": torch.randn(Hkv, P, D),
        "prefix_v": torch.randn(Hkv, P, D),
        "enable_gqa": True,
    }
    return prefix_attention(**{**arguments, **changed})


def bank(**changed: Any) -> Any:
    prefix = torch.randn(T, Hkv, P, D)
    return call(**{"prefix_k": prefix, "prefix_v": prefix, "prefix_ids": torch.tensor([0, 2]), **changed})


REFUSED = {
    "q_axes": ({"q": torch.ones(H, L, D)}, "q has shape [4, 3, 8], expected 4 axes [B, H, L, D]"),
    "k_axes": ({"k": torch.ones(S, D)}, "k has shape [5, 8], expected 4 axes [B, Hkv, S, D]"),
    "k_batch": ({"k": torch.ones(3, Hkv, S, D)}, "k has shape [3, 2, 5, 8], expected [B=2, Hkv=2, S=5, D=8]"),
    "v_length": ({"v": torch.ones(B, Hkv, 4, D)}, "v has shape [2, 2, 4, 8], expected [B=2, Hkv=2, S=5, Dv=8]"),
    "v_axes": ({"v": torch.ones(Hkv, S, D)}, "v has shape [2, 5, 8], expected [B=2, Hkv=2, S=5, Dv=8]"),
    "v_width": ({"v": torch.ones(B, Hkv, S, 9)}, "prefix_v has shape [2, 6, 8], expected [Hkv=2, P=6, Dv=9]"),
    "v_of_no_width": (
        {"v": torch.ones(B, Hkv, S, 0), "prefix_v": torch.ones(Hkv, P, 0)},
        "v has shape [2, 2, 5, 0], expected [B=2, Hkv=2, S=5, Dv] with Dv from 1",
    ),
    "k_width": ({"k": torch.ones(B, Hkv, S, 9)}, "k has shape [2, 2, 5, 9], expected [B=2, Hkv=2, S=5, D=8]"),
    "prefix_k_width": (
        {"prefix_k": torch.ones(Hkv, P, 9)},
        "prefix_k has shape [2, 6, 9], expected [Hkv=2, P=6, D=8]",
    ),
    "prefix_v_width": (
        {"prefix_v": torch.ones(Hkv, P, 9)},
        "prefix_v has shape [2, 6, 9], expected [Hkv=2, P=6, Dv=8]",
    ),
    "prefix_k_axes": (
        {"prefix_k": torch.ones(P, D)},
        "prefix_k has shape [6, 8], expected [Hkv, P, D], or [B, Hkv, P, D] for one per sample",
    ),
    "prefix_k_heads": (
        {"prefix_k": torch.ones(H, P, D), "prefix_v": torch.ones(H, P, D)},
        "prefix_k has shape [4, 6, 8], expected [Hkv=2, P=6, D=8]",
    ),
    "prefix_v_length": (
        {"prefix_v": torch.ones(Hkv, 7, D)},
        "prefix_v has shape [2, 7, 8], expected [Hkv=2, P=6, Dv=8]",
    ),
    "prefix_v_axes": (
        {"prefix_v": torch.ones(1, Hkv, P, D)},
        "prefix_v has shape [1, 2, 6, 8], expected [Hkv=2, P=6, Dv=8]",
    ),
    "prefix_batch": (
        {"prefix_k": torch.ones(T, Hkv, P, D), "prefix_v": torch.ones(T, Hkv, P, D)},
        "prefix_k holds T=3 prefixes for B=2 samples; pass prefix_ids to choose among them",
    ),
    "gqa_unasked": (
        {"enable_gqa": False},
        "q has H=4 heads and k has Hkv=2; expected as many, or enable_gqa=True",
    ),
    "gqa_uneven": ({"q": torch.ones(B, 3, L, D)}, "q has H=3 heads, expected a multiple of the Hkv=2 heads of k"),
    "q_type": (
        {"q": torch.ones(B, H, L, D).long()},
        "q is torch.int64, expected float32, bfloat16, float16 or float64",
    ),
    "prefix_type": (
        {"prefix_v": torch.ones(Hkv, P, D).half()},
        "prefix_v is torch.float16, expected torch.float32 as q",
    ),
    "k_device": (
        {"k": torch.ones(B, Hkv, S, D, device="meta")},
        "k is on meta, expected cpu as q",
    ),
    "mask_shape": (
        {"attn_mask": torch.ones(L, P + S).bool()},
        "attn_mask has shape [3, 11], expected one that broadcasts to [B=2, H=4, L=3, S=5]",
    ),
    "mask_axes": (
        {"attn_mask": torch.ones(1, 1, 1, 1, S).bool()},
        "attn_mask has shape [1, 1, 1, 1, 5], expected one that broadcasts to [B=2, H=4, L=3, S=5]",
    ),
    "mask_type": ({"attn_mask": torch.ones(S).long()}, "attn_mask is torch.int64, expected bool or float32"),
    "mask_device": ({"attn_mask": torch.ones(S, device="meta")}, "attn_mask is on meta, expected cpu as q"),
    "dropout_p": ({"dropout_p": 1.5}, "dropout_p is 1.5; expected a probability in [0, 1]"),
    "dropout_nan": ({"dropout_p": float("nan")}, "dropout_p is nan; expected a probability in [0, 1]"),
    "prefix_dropout_p": ({"prefix_dropout_p": -0.1}, "prefix_dropout_p is -0.1; expected a probability in [0, 1)"),
    "ids_without_bank": (
        {"prefix_ids": torch.tensor([0, 1])},
        "prefix_ids picks prefixes of a bank [T, Hkv, P, D], but prefix_k has shape [2, 6, 8]",
    ),
    "lengths_shape": (
        {"prefix_lengths": torch.tensor([1, 2, 3])},
        "prefix_lengths has shape [3], expected [T] or [B], here [1] or [2]",
    ),
    "lengths_type": (
        {"prefix_lengths": torch.tensor([1.0, 2.0])},
        "prefix_lengths is torch.float32, expected torch.int64",
    ),
    "lengths_past_P": ({"prefix_lengths": torch.tensor([6, 7])}, "prefix_lengths[1] is 7, expected 0 to 6 (P=6)"),
    "lengths_negative": ({"prefix_lengths": torch.tensor([-1])}, "prefix_lengths[0] is -1, expected 0 to 6 (P=6)"),
    "memory_shape": ({"memory": torch.ones(Hkv, D, D)}, "memory has shape [2, 8, 8], expected [H=4, D=8, Dv=8]"),
    "memory_width": (
        {"v": torch.ones(B, Hkv, S, 6), "prefix_v": torch.ones(Hkv, P, 6), "memory": torch.ones(H, D, D)},
        "memory has shape [4, 8, 8], expected [H=4, D=8, Dv=6]",
    ),
    "memory_without_bank": (
        {"memory": torch.ones(T, H, D, D)},
        "memory has shape [3, 4, 8, 8], expected [H=4, D=8, Dv=8]",
    ),
    "memory_type": ({"memory": torch.ones(H, D, D).half()}, "memory is torch.float16, expected torch.float32 as q"),
    "memory_device": ({"memory": torch.ones(H, D, D, device="meta")}, "memory is on meta, expected cpu as q"),
    "phi": ({"phi": "selu"}, "phi is 'selu', expected one of 'none', 'elu', 'gelu', 'relu'"),
    "phi_type": ({"phi": None}, "phi is None, expected one of 'none', 'elu', 'gelu', 'relu'"),
    "softcap": ({"softcap": 0.0}, "softcap is 0.0; expected None or a positive number"),
    "backend_unknown": (
        {"backend": "gpu"},
        'backend is "gpu"; expected "auto", "cpu", "cuda", "triton" or "reference"',
    ),
}

BANK_REFUSED = {
    "ids_shape": ({"prefix_ids": torch.tensor([0])}, "prefix_ids has shape [1], expected [B], here [2]"),
    "ids_axes": ({"prefix_ids": torch.tensor([[0, 1]])}, "prefix_ids has shape [1, 2], expected [B], here [2]"),
    "ids_type": ({"prefix_ids": torch.tensor([0, 1]).int()}, "prefix_ids is torch.int32, expected torch.int64"),
    "ids_device": ({"prefix_ids": torch.ones(B, device="meta").long()}, "prefix_ids is on meta, expected cpu as q"),
    "ids_past_T": ({"prefix_ids": torch.tensor([2, 3])}, "prefix_ids[1] is 3, expected 0 to 2 (T=3)"),
    "ids_negative": ({"prefix_ids": torch.tensor([-1, 0])}, "prefix_ids[0] is -1, expected 0 to 2 (T=3)"),
    "memory_rows": (
        {"memory": torch.ones(2, H, D, D)},
        "memory has shape [2, 4, 8, 8], expected [T=3, H=4, D=8, Dv=8]",
    ),
    "lengths_shape": (
        {"prefix_lengths": torch.ones(4).long()},
        "prefix_lengths has shape [4], expected [T] or [B], here [3] or [2]",
    ),
    "lengths_past_P": ({"prefix_lengths": torch.tensor([0, 6, 9])}, "prefix_lengths[2] is 9, expected 0 to 6 (P=6)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_words(case: str) -> None:
    changed, words = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        call(**changed)


@pytest.mark.parametrize("case", BANK_REFUSED)
def test_a_bank_is_refused_in_words(case: str) -> None:
    changed, words = BANK_REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        bank(**changed)


def test_the_good_calls_are_good() -> None:
    assert call().shape == bank().shape == (B, H, L, D)


def test_a_mask_of_another_half_type_is_refused() -> None:
    halves = {n: torch.ones(1, 1, 2, 8).half() for n in ("q", "k", "v", "prefix_k", "prefix_v")}
    words = "attn_mask is torch.bfloat16, expected bool, float32 or torch.float16 as q"
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        prefix_attention(**halves, attn_mask=torch.ones(2).bfloat16())


@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_named_backend_says_why_it_cannot(needs_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = [f"head_dim={D}; needs 16", "a second reason"]
    refusing = types.SimpleNamespace(unsupported=lambda call, needs: reasons if call.q.shape[3] == D else [])
    monkeypatch.setitem(backends._modules, "cpu", refusing)
    monkeypatch.delitem(backends._not_loaded, "cpu", raising=False)
    words = "no backend for q [2, 4, 3, 8] torch.float32 on cpu:\n  cpu: head_dim=8; needs 16; a second reason"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(words)}$"):
        call(q=torch.randn(B, H, L, D, requires_grad=needs_grad), backend="cpu")
    assert call(backend="auto").shape == (B, H, L, D)  # the next row takes it


def test_a_backend_that_is_not_built_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefixattn.__main__ import main

    monkeypatch.setitem(backends._not_loaded, "cpu", backends.TABLE[0].missing)
    words = "no backend for q [2, 4, 3, 8] torch.float32 on cpu:\n  cpu: prefixattn._C is not built"
    with pytest.raises(NotImplementedError, match=f"^{re.escape(words)}$"):
        call(backend="cpu")
    main([])
    printed = capsys.readouterr().out
    assert "cpu        no: prefixattn._C is not built" in printed
    assert "reference  works" in printed


def test_every_reason_is_given_when_none_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in backends.TABLE:
        monkeypatch.setitem(backends._not_loaded, row.name, f"{row.module} is away")
    words = (
        "no backend for q [2, 4, 3, 8] torch.float32 on cpu:\n  cpu: prefixattn.attention.cpu is away\n"
        "  triton: prefixattn.attention.guard is away\n  reference: prefixattn.attention.reference is away"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(words)}$"):
        call()


def test_a_build_that_failed_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'prefixattn._C'", name="prefixattn._C")

    (tmp_path / "_C_build.json").write_text('{"built": false, "reason": "no C++ compiler found"}')
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "backends.py"))
    monkeypatch.setattr(backends.importlib, "import_module", missing)
    monkeypatch.setattr(backends, "_not_loaded", {})
    backends._load(backends.TABLE[0])
    assert backends._not_loaded == {"cpu": "prefixattn._C is not built: no C++ compiler found"}


def test_an_extension_that_does_not_load_is_named_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: str) -> types.ModuleType:
        raise ImportError("undefined symbol: prefix_attn_fwd")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    monkeypatch.setattr(backends, "_not_loaded", {})
    backends._load(backends.TABLE[0])
    assert backends._not_loaded == {"cpu": "prefixattn.attention.cpu does not load: undefined symbol: prefix_attn_fwd"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("argument, value, words", [
    ("q", None, "q is a NoneType, expected a tensor"),
    ("prefix_v", [1.0], "prefix_v is a list, expected a tensor"),
    ("attn_mask", [True], "attn_mask is a list, expected a tensor"),
    ("prefix_ids", [0], "prefix_ids is a list, expected a tensor"),
    ("prefix_lengths", 3, "prefix_lengths is a int, expected a tensor"),
    ("memory", 1.0, "memory is a float, expected a tensor"),
    ("dropout_p", None, "dropout_p is 'NoneType', expected a number"),
    ("prefix_dropout_p", "half", "prefix_dropout_p is 'half', expected a number"),
    ("scale", torch.tensor(0.5, requires_grad=True), "scale is 'Tensor', expected a number"),
])  # fmt: skip
def test_another_type_is_refused(argument: str, value: object, words: str, autocast: bool) -> None:
    q = torch.randn(1, 2, 3, 8)
    given = {"q": q, "k": q, "v": q, "prefix_k": q, "prefix_v": q, argument: value}
    with torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=re.escape(words)):
        prefix_attention(**given)


def test_what_is_no_dense_tensor_is_refused() -> None:
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="k is a nested or sparse tensor, expected a dense one"):
        prefix_attention(q, q.to_sparse(), q, q[0], q[0])


def test_integers_are_refused_under_autocast_too() -> None:
    q = torch.ones(1, 2, 3, 8, dtype=torch.int32)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"q is torch.int32, expected float32"):
        prefix_attention(q, q, q, q[0], q[0])
