"""What `reparameterize` refuses, and how a backend is chosen."""

from typing import Any

import pytest
import torch

from prefixattn import backends, reparameterize
from prefixattn.testing.reparam import NEEDS, detached, make_inputs


def bad(**changes: Any) -> dict[str, Any]:
    inputs = make_inputs("ten_rows", grad=False)
    return {**inputs.tensors, **inputs.form._asdict(), **changes}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not_a_tensor": ({"w1": [1.0]}, "w1 is a list, expected a tensor"),
    "no_w2": ({"w2": None}, "w2 is a NoneType, expected a tensor"),
    "integers": ({"x": torch.zeros(1, 10, 64, dtype=torch.int64)}, "x is torch.int64, expected float32, bfloat16"),
    "mixed_types": ({"b2": torch.zeros(1, 384).double()}, "b2 is torch.float64, expected torch.float32 as x"),
    "device": ({"b1": torch.zeros(1, 96, device="meta")}, "b1 is on meta, expected cpu as x"),
    "axes": ({"x": torch.zeros(10)}, r"x has shape \[10\], expected \[G, P, E\], or \[P, E\] for one network"),
    "w1": ({"w1": torch.zeros(1, 96, 63)}, r"w1 has shape \[1, 96, 63\], expected \[G=1, M=96, E=64\]"),
    "w1_networks": ({"w1": torch.zeros(2, 96, 64)}, r"w1 has shape \[2, 96, 64\], expected \[G=1, M=96, E=64\]"),
    "w1_flat": ({"w1": torch.zeros(96, 64)}, r"w1 has shape \[96, 64\], expected \[G=1, M, E=64\]"),
    "b1": ({"b1": torch.zeros(1, 95)}, r"b1 has shape \[1, 95\], expected \[G=1, M=96\]"),
    "w2": ({"w2": torch.zeros(1, 384, 95)}, r"w2 has shape \[1, 384, 95\], expected \[G=1, O=384, M=96\]"),
    "b2": ({"b2": torch.zeros(1, 383)}, r"b2 has shape \[1, 383\], expected \[G=1, O=384\]"),
    "outputs": (
        {"layers": 4},
        r"w2 makes O=384 numbers a row, expected 512: layers=4 \* 2 \* kv_heads=2 \* head_dim=32",
    ),
    "layers": ({"layers": 0}, "layers is 0, expected an integer from 1"),
    "kv_heads": ({"kv_heads": 2.0}, "kv_heads is 2.0, expected an integer from 1"),
    "head_dim": ({"head_dim": True}, "head_dim is True, expected an integer from 1"),
    "interleaved": ({"interleaved": 1}, "interleaved is 1, expected True or False"),
    "activation": ({"activation": "swish"}, "activation is 'swish', expected 'tanh', 'relu', 'gelu', 'none'"),
    "activation_type": ({"activation": ["tanh"]}, r"activation is \['tanh'\], expected 'tanh'"),
    "dtype": ({"dtype": torch.int8}, "dtype is torch.int8, expected float32, bfloat16, float16 or float64"),
    "no_rows": (
        {"x": torch.zeros(1, 0, 64)},
        r"x has shape \[1, 0, 64\] and w1 \[1, 96, 64\]: P is 0, expected 1 or more",
    ),
    "backend": ({"backend": "cuda"}, 'backend is "cuda"; expected "auto", "cpu", "triton" or "reference"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_call_is_refused_in_words(name: str) -> None:
    changes, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        reparameterize(**bad(**changes))


def test_sparse_and_nested_tensors_are_refused_in_words() -> None:
    with pytest.raises(NotImplementedError, match="w1 is a nested or sparse tensor, expected a dense one"):
        reparameterize(**bad(w1=torch.zeros(1, 96, 64).to_sparse()))


def test_auto_takes_the_first_without_an_objection(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs("ten_rows", grad=False)
    refusing = type("Refusing", (), {"unsupported": staticmethod(lambda *_: ["it is Sunday"])})
    monkeypatch.setitem(backends._modules, "reparam cpu", refusing)
    monkeypatch.delitem(backends._not_loaded, "reparam cpu", raising=False)
    assert backends.choose_reparam("auto", detached(inputs), NEEDS) == "reference"
    with pytest.raises(
        NotImplementedError, match=r"no backend for x \[1, 10, 64\] torch.float32 on cpu:\n  cpu: it is S"
    ):
        inputs.call("cpu")


def test_a_backend_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._not_loaded, "reparam cpu", "prefixattn._C is not built")
    monkeypatch.delitem(backends._modules, "reparam cpu", raising=False)
    with pytest.raises(NotImplementedError, match=r"cpu: prefixattn._C is not built"):
        make_inputs("ten_rows").call("cpu")
    with pytest.raises(
        NotImplementedError, match=r'backend "cpu" was chosen when this program was made: prefixattn._C'
    ):
        backends.module("cpu", "reparam")
