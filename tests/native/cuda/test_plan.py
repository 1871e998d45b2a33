"""What backend="cuda" refuses, which kernels a call leads to on GPUs that are not here, what they multiply and move."""

import ast
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.static import cuda_resources
from bench.static.cuda_counts import ALL
from bench.static.cuda_counts import plan as planned
from prefixattn import backends, prefix_attention_qkvpacked
from prefixattn.attention import cuda
from prefixattn.attention.call import Call, Needs, Wants
from prefixattn.attention.native import attn_fields
from prefixattn.testing.attention import FEATURES, Shape, make_inputs, objections, ours, packed, suited
from tests.conftest import DEVICE
from tests.cuda_machine import Watched, host_machine
from tests.support import ROOT

KIB = 1024
GPUS = {arch: gpu.offers for arch, gpu in cuda_resources.GPUS.items()}  # shared memory, processors

if DEVICE == "cuda":
    pytest.skip("a GPU runs the kernels themselves: tests/native/cuda/test_op.py", allow_module_level=True)


@pytest.fixture(autouse=True)
def machine() -> Iterator[Watched]:
    with host_machine() as watched:
        watched.set_seed(1)
        yield watched


REFUSED = {
    "float32": (torch.float32, {}, {}, "dtype=torch.float32; needs bfloat16 or float16"),
    "head_dim": (torch.bfloat16, {"D": 96}, {}, "head_dim=96; needs 64 or 128"),
    "softcap": (torch.bfloat16, {}, FEATURES["softcap_50"] | {"mask": ""}, "it has no softcap"),
    "memory": (torch.bfloat16, {}, FEATURES["memory"], "it has no memory"),
    "a mask": (torch.bfloat16, {}, FEATURES["bool_mask"], "needs one of keys, [B, H, 1, S]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_has_not_it_says(what: str) -> None:
    dtype, sizes, options, words = REFUSED[what]
    inputs = make_inputs(Shape(2, 2, 2, 9, 9, 4, sizes.get("D", 64)), dtype, **options)
    said = suited("cuda", inputs)[1]
    assert words in said and "triton has" in said
    with pytest.raises(NotImplementedError, match=re.escape(words)):
        inputs.call("cuda")


def test_the_gradient_of_a_bias_is_refused() -> None:
    inputs = make_inputs(Shape(2, 2, 2, 9, 9, 4, 64), torch.bfloat16, **FEATURES["key_bias"])
    assert "attn_mask needs a gradient (triton has it)" in objections("cuda", inputs)
    assert suited("cuda", inputs)[1] == ""  # of a bias that wants none there is nothing to say


def test_a_mask_that_was_cast_since_is_refused() -> None:
    call = call_of(Shape(1, 1, 1, 9, 9, 4, 64))
    with pytest.raises(
        NotImplementedError, match=r"attn_mask torch.float64 on cpu; expected bool, float32 or q's type"
    ):
        cuda.fwd(call._replace(attn_mask=torch.zeros(1, 1, 1, 9, dtype=torch.float64)), Wants())


def test_softmax_dropout_is_refused() -> None:
    assert "it has no dropout_p" in objections(
        "cuda", make_inputs(Shape(1, 1, 1, 9, 9, 4, 64), torch.bfloat16), dropout_p=0.1
    )


def test_where_it_is_not_built_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_native", None)
    monkeypatch.setattr(cuda, "_missing", "prefixattn._cuda is not built: no nvcc found")
    said = objections("cuda", make_inputs(Shape(1, 1, 1, 9, 9, 4, 64), torch.bfloat16))
    assert "no nvcc found" in said and "q is on cpu; needs cuda" in said
    assert "no nvcc found" in backends.here()["cuda"][0]


def test_a_library_that_does_not_load_is_named(tmp_path: Any) -> None:
    broken = tmp_path / "_cuda_host.so"
    broken.write_text("no library")
    module, reason = cuda.load(str(broken))
    assert module is None and str(broken) in reason and "does not load" in reason


def test_auto_leaves_it_out() -> None:
    """Until a GPU has run it."""
    [row] = [row for row in backends.TABLE if row.name == "cuda"]
    assert row.named and not row.auto


def test_an_error_of_the_machine_reaches_python(machine: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(Shape(1, 1, 1, 9, 9, 4, 64), torch.bfloat16, grad=False)
    monkeypatch.setattr("tests.cuda_machine.extents", lambda fields: iter([("q", inputs.q.data_ptr(), 16)]))
    with pytest.raises(RuntimeError, match=r"the cuda kernels: fwd_short.*thread"):
        inputs.call("cuda")


HOSTS = "allow", "counts", "forget_tensors", "reset_counts", "set_device", "set_seed"  # of the host machine alone


def test_the_stub_names_what_the_module_has(machine: Watched) -> None:
    stub = ast.parse((ROOT / "prefixattn" / "_cuda.pyi").read_text(encoding="utf-8")).body
    functions = {node.name: len(node.args.args) for node in stub if isinstance(node, ast.FunctionDef)}
    values = {ast.unparse(node.target) for node in stub if isinstance(node, ast.AnnAssign)}
    records = {
        node.name: [ast.unparse(field.target) for field in node.body if isinstance(field, ast.AnnAssign)]
        for node in stub
        if isinstance(node, ast.ClassDef)
    }
    there = {name: getattr(machine.module, name) for name in dir(machine.module) if not name.startswith("_")}
    assert functions.keys() | values | set(HOSTS) == there.keys()
    for name, count in functions.items():
        assert len(re.findall(r"\barg\d+:", there[name].__doc__)) == count, name
    fields = attn_fields(machine.module, machine.module.DTYPES["bfloat16"], call_of(PLANNED["vit"][0]))
    out = {"out": fields["q"], "attended": None, "lse": 1, "mass": None}
    made = machine.module.fwd_plan({**fields, **out}, *GPUS["sm_90"])
    assert list(made) == records["Plan"] and list(made["launches"][0]) == records["Launch"]


# plans


def call_of(shape: Shape, causal: bool = False) -> Call:
    B, H, Hkv, L, S, P, D = shape
    row = torch.zeros(D, dtype=torch.bfloat16)
    q, k, prefix = (row.expand(*size, D) for size in ((B, H, L), (B, Hkv, S), (1, Hkv, P)))
    return Call(q, k, k, prefix, prefix, is_causal=causal, scale=D**-0.5)


def plans(shape: Shape, gpu: str, causal: bool = False, needs: Needs = ALL) -> list[list[dict[str, Any]]]:
    """Launches of a forward and a backward pass."""
    return planned(cuda._native, call_of(shape, causal), GPUS[gpu], needs)


def names(launches: list[dict[str, Any]]) -> list[str]:
    return [launch["kernel"] for launch in launches]


# shape: names of the kernels of both passes
PLANNED = {
    "vit": (Shape(64, 12, 12, 197, 197, 10, 64), False),
    "vit_50": (Shape(64, 12, 12, 197, 197, 50, 64), False),
    "gpt2_short": (Shape(16, 12, 12, 128, 128, 20, 64), True),
    "long": (Shape(4, 12, 12, 1024, 1024, 200, 64), True),
    "wide": (Shape(8, 4, 4, 100, 100, 20, 128), True),
    "wide_long": (Shape(2, 4, 1, 1024, 1024, 30, 128), True),
}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", PLANNED)
def test_a_plan_fits_its_gpu(shape: str, gpu: str) -> None:
    sizes, causal = PLANNED[shape]
    forward, backward = plans(sizes, gpu, causal)
    for launch in [*forward, *backward]:
        assert launch["shared_bytes"] <= GPUS[gpu][0], launch
        assert launch["threads"] % 32 == 0 and all(n >= 1 for n in launch["grid"]), launch
        assert launch["grid"][1] < 65536 and launch["grid"][2] < 65536, launch
    assert len(names(forward)) == 1
    assert names(forward)[0].startswith("fwd_short" if sizes.S + sizes.P <= 256 else "fwd_long")


def test_a_vit_takes_two_launches_with_its_backward() -> None:
    forward, backward = plans(PLANNED["vit"][0], "sm_90")
    assert names(forward) == ["fwd_short_plain"] and names(backward) == ["bwd_short"]


def test_what_nobody_wants_is_not_launched() -> None:
    shape, causal = PLANNED["long"]
    every, prefix_alone, q_alone = (
        names(plans(shape, "sm_90", causal, needs)[1])
        for needs in (ALL, Needs(prefix_k=True, prefix_v=True), Needs(q=True))
    )
    assert len(every) == 3 and prefix_alone == every[:1] and q_alone == [every[0], every[2]]


# counts


def test_a_vits_products_and_bytes(machine: Watched) -> None:
    """Forward and backward: at most 1.06 of the useful products, and 1.02 of the bytes that must move.

    Those are each of q, k, v, out, dout and the gradients once for each pass, the prefix once, and lse. The forward
    alone has 208 squared products for 197 x 207, which is 1.061.
    """
    B, H, _, N, _, P, D = shape = Shape(4, 1, 1, 197, 197, 10, 64)
    inputs = packed(make_inputs(shape, torch.bfloat16))
    counted = []
    machine.set_device(GPUS["sm_90"][0], 1)  # as many heads for each processor as a batch of images has, or more
    try:
        machine.reset_counts()
        out = prefix_attention_qkvpacked(**inputs.tensors, **inputs.options, backend="cuda")
        counted.append(machine.counts())
        machine.reset_counts()
        out.backward(torch.randn_like(out))
        counted.append(machine.counts())
    finally:
        machine.set_device(163 * KIB, 4)
    assert [counts["launches"] for counts in counted] == [1, 1]
    multiplied = [16 * 8 * 16 * counts["mma"] for counts in counted]
    useful = [products * B * H * N * (N + P) * D for products in (2, 5)]
    moved = [counts["load_bytes"] + counts["store_bytes"] + counts["copy_bytes"] for counts in counted]
    sizes = [2 * (own * B * H * N + prefixes * H * P) * D + 4 * B * H * N for own, prefixes in ((4, 2), (8, 4))]
    print("products", *(m / u for m, u in zip(multiplied, useful, strict=True)))
    print("bytes", *(m / s for m, s in zip(moved, sizes, strict=True)))
    assert sum(multiplied) <= 1.06 * sum(useful) and multiplied[0] <= 1.061 * useful[0]
    assert sum(moved) <= 1.02 * sum(sizes)


def test_nothing_conflicts_in_shared_memory(machine: Watched) -> None:
    """Every ldmatrix of both passes finds its rows in different banks."""
    machine.reset_counts()
    ours(make_inputs(Shape(1, 2, 1, 150, 150, 130, 64), torch.bfloat16, causal=True), "cuda")
    ours(make_inputs(Shape(1, 2, 1, 100, 100, 10, 64), torch.bfloat16), "cuda")
    counts = machine.counts()
    assert counts["ldmatrix"] > 0 and counts["ldmatrix_conflicts"] == 0
