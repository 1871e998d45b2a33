"""torch's flat schemas and the records of a call are one list; each backend is asked and answers by these records."""

import inspect
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from prefixattn import backends
from prefixattn.attention.call import NUMBERS, TENSORS, Call, Given, Grads, Needs, Results, Wants, unknown
from prefixattn.reparam import call as reparam

SPELLED = {"Tensor": Tensor, "Optional[Tensor]": Tensor | None, "float": float, "bool": bool, "str": str}
SPELLED["int"] = int  # and so the schema says ScalarType


def arguments(op: Any) -> list[tuple[str, object]]:
    return [(a.name, SPELLED[str(a.type)]) for a in op._schema.arguments if str(a.type) != "List[bool]"]


def fields(record: Any, prefix: str = "") -> list[tuple[str, object]]:
    """A record's fields and types, of a record within it its own."""
    found: list[tuple[str, object]] = []
    for name, of in get_type_hints(record).items():
        found += fields(of) if hasattr(of, "_fields") else [(prefix + name, int if of is torch.dtype else of)]
    return found


def test_the_schemas_are_the_records() -> None:
    ops = torch.ops.prefixattn
    call, backend = fields(Call), [("backend", str)]
    assert arguments(ops.fwd.default) == [*call, *fields(Wants, "want_"), *backend]
    assert arguments(ops.bwd.default) == [*fields(Given), *call, *backend]
    assert arguments(ops.bwd_qkvpacked.default) == [*fields(Given), ("qkv", Tensor), *call[3:], *backend]
    for op, record, prefix in ((ops.fwd, Results, ""), (ops.bwd, Grads, "d")):
        assert [r.name for r in op.default._schema.returns] == [name for name, _ in fields(record, prefix)]
    assert [r.name for r in ops.bwd_qkvpacked.default._schema.returns][1:] == [f"d{n}" for n in Grads._fields[3:]]


def test_those_of_the_reparameterization_are_too() -> None:
    ops, call, backend = torch.ops.prefixattn, fields(reparam.Call), [("backend", str)]
    assert arguments(ops.reparam_fwd.default) == [*call, *backend]
    assert arguments(ops.reparam_bwd.default) == [*fields(reparam.Given), *call, *backend]
    for op, record, prefix in ((ops.reparam_fwd, reparam.Results, ""), (ops.reparam_bwd, reparam.Grads, "d")):
        assert [r.name for r in op.default._schema.returns] == [name for name, _ in fields(record, prefix)]
    assert reparam.Call._fields[: len(reparam.Needs._fields)] == reparam.Needs._fields == reparam.Grads._fields
    for name in reparam.Needs._fields:
        assert reparam.Needs(**{name: True}).hidden == (name in ("x", "w1", "b1"))


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_what_a_backend_does_not_name_it_refuses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in backends._modules:
        pytest.skip(backends._not_loaded[name])
    module = backends.module(name)
    known = [field for field in module.KNOWN if field != "softcap"]
    monkeypatch.setattr(module, "UNKNOWN", unknown(known))
    call = Call(*(torch.zeros(1, 1, 2, 8) for _ in range(5)))
    assert "it has no softcap" not in module.unsupported(call, Needs())
    assert "it has no softcap" in module.unsupported(call._replace(softcap=1.0), Needs())


def test_gradients_are_of_the_first_fields() -> None:
    assert Call._fields[: len(Needs._fields)] == Needs._fields == Grads._fields
    assert Call._fields == (*TENSORS, *NUMBERS)
    for name in Needs._fields:
        assert Needs(**{name: True}).softmax == (name != "memory")
    assert not Needs().softmax


@pytest.mark.parametrize("row", backends.TABLE + backends.REPARAM, ids=lambda row: row.key)
@pytest.mark.parametrize("function", ["unsupported", "fwd", "bwd"])
def test_backends_take_and_return_the_records(row: backends.Row, function: str) -> None:
    if row.key not in backends._modules:
        pytest.skip(backends._not_loaded[row.key])
    modules = backends.module(row.name, row.op), backends.module("reference", row.op)
    found, right = (inspect.get_annotations(getattr(module, function)) for module in modules)
    assert found == right and right["call"] is (reparam.Call if row.op else Call)
