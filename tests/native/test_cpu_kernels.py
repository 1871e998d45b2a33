"""What is particular to the CPU kernels: every instruction set, the schedules of the backward, threads."""

import ctypes
import re
import subprocess
import sys

import pytest
import torch

from prefixattn import backends, prefix_attention
from prefixattn.attention import reference
from prefixattn.reparam import moments8
from prefixattn.testing.attention import (
    FEATURES,
    Shape,
    assert_all_as_accurate,
    exact,
    make_inputs,
    ours,
    same_dtype,
    suited,
)
from tests.support import isa, threads

if reasons := backends.here()["cpu"]:
    pytest.skip("cpu: " + "; ".join(reasons), allow_module_level=True)

from prefixattn import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# each for a path of its own: tails of vectors and pairs, the diagonal, copies, both schedules of the backward
CASES = {
    "tails": (Shape(2, 3, 3, 37, 41, 5, 40), "causal"),
    "diagonal": (Shape(1, 2, 2, 130, 130, 17, 64), "causal"),
    "grouped_bank": (Shape(3, 4, 2, 20, 33, 10, 24), "bank_sample_lengths"),
    "blind": (Shape(2, 2, 2, 18, 9, 0, 16), "blind_rows"),
    "wide": (Shape(1, 1, 1, 70, 140, 65, 256), "plain"),
    "padding": (Shape(2, 2, 2, 33, 70, 3, 64), "key_padding"),
    "memory_tails": (Shape(2, 3, 3, 37, 37, 5, 40), "memory_gelu"),
    "wide_memory": (Shape(3, 4, 2, 70, 20, 0, 256), "memory"),
    "memory_bank": (Shape(3, 2, 2, 20, 33, 10, 24), "memory_bank"),
    "softcap_tails": (Shape(2, 3, 3, 37, 41, 5, 40), "softcap_causal"),
    "wide_softcap": (Shape(1, 2, 1, 70, 140, 65, 256), "softcap_50"),
    # one query a head has a forward of its own, where vectors fill the head size: 72 they do on some
    "decoding": (Shape(3, 6, 2, 1, 150, 70, 64), "bank_sample_lengths"),
    "decoding_plain": (Shape(8, 4, 4, 1, 64, 129, 16), "plain"),
    "decoding_bias": (Shape(2, 4, 2, 1, 70, 3, 72), "bias"),
    "decoding_blind": (Shape(9, 2, 2, 1, 9, 0, 128), "blind_rows"),
    "decoding_softcap": (Shape(2, 4, 1, 1, 33, 70, 256), "softcap"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", _C.isas())
def test_every_instruction_set(name: str, case: str, dtype: str) -> None:
    shape, feature = CASES[case]
    inputs, words = suited("cpu", make_inputs(shape, DTYPES[dtype], **FEATURES[feature]))
    assert not words
    with isa(name):
        assert _C.isa() == name
        assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))


# queries of several blocks that share what is drawn, a head size that fills no word of 64 bits; more rows than are
# drawn at a time
@pytest.mark.parametrize("shape", [Shape(3, 4, 2, 70, 20, 140, 72), Shape(2, 4, 4, 70, 40, 1100, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.isas())
def test_dropout_on_every_instruction_set(name: str, dtype: str, shape: Shape) -> None:
    inputs = make_inputs(shape, DTYPES[dtype], softcap=2.0)
    inputs.options |= {"dropout_p": 0.1, "prefix_dropout_p": 0.4}
    torch.manual_seed(11)
    seed = torch.randint(2**62, (1,))  # what prefix_attention draws
    torch.manual_seed(11)
    with isa(name):
        assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs, seed), exact(inputs, seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.isas())
def test_windows_on_every_instruction_set(name: str, dtype: str) -> None:
    """Several blocks of queries and chunks of keys, with a gap between what is seen of the prefix and of own keys."""
    for more in ({"mask": "B11S", "prefix_in_window": True}, {"causal": True, "prefixes": "bank", "lengths": "T"}):
        inputs = make_inputs(Shape(2, 4, 2, 330, 340, 300, 32), DTYPES[dtype], window=(37, 21), **more)
        with isa(name):
            assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))


def test_a_cap_is_accurate_at_every_size_of_score() -> None:
    """One key beside a prefix of one whose score is 0, so that lse is log(1 + exp(score))."""
    scores = torch.cat([torch.logspace(-6, 3, 400), -torch.logspace(-6, 3, 400)])
    q = torch.zeros(1, 1, 800, 8)
    q[..., 0] = scores
    one = torch.zeros(1, 1, 1, 8)
    one[..., 0] = 1
    zero = torch.zeros(1, 1, 8)
    for name in _C.isas():
        with isa(name):
            _, lse = prefix_attention(q, one, one, zero, zero, scale=1.0, softcap=50.0, backend="cpu", return_lse=True)
        expected = torch.nn.functional.softplus(50 * torch.tanh(scores.double() / 50))
        torch.testing.assert_close(lse[0, 0].double(), expected, rtol=3e-7, atol=1.2e-7)


def test_what_is_said_in_both_languages_agrees() -> None:
    assert _C.PHIS.keys() == reference.PHIS.keys()
    assert _C.MOMENT_BLOCK == moments8.BLOCK


WRONG = {
    "missing": ({"softcap": ...}, "no field 'softcap'"),
    "unknown": ({"sofcap": 0.0, "cap": 1}, "unknown field 'sofcap', 'cap'"),
    "kind": ({"B": "2"}, "field 'B' is '2', expected an integer"),
    "too_large": ({"S": 2**63}, "field 'S' is 9223372036854775808, expected an integer"),
    "number": ({"scale": None}, "field 'scale' is None, expected a number"),
    "flag": ({"causal": 1}, "field 'causal' is 1, expected a bool"),
    "enum": ({"phi": 4}, "field 'phi' is 4, expected 0 to 3"),
    "strides": ({"q": (0, 1)}, "field 'q' is (0, 1), expected (address, stride, stride, stride) or None"),
    "address": ({"lse": 1.5}, "field 'lse' is 1.5, expected an address or None"),
}


@pytest.mark.parametrize("case", WRONG)
def test_fields_are_read_by_name(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, object]] = []
    read = _C.prefix_attn_fwd
    monkeypatch.setattr(_C, "prefix_attn_fwd", lambda fields, threads: taken.append(fields))
    make_inputs("even").call("cpu")
    changes, words = WRONG[case]
    fields = {name: x for name, x in (taken[0] | changes).items() if x is not ...}
    with pytest.raises(TypeError, match=re.escape(f"prefix_attn_fwd: {words}")):
        read(fields, 1)
    with pytest.raises(ValueError, match="head_dim is 264, expected a multiple of 8 up to 256"):
        read(taken[0] | {"D": 264}, 1)
    with pytest.raises(ValueError, match="dropout has no seed"):
        read(taken[0] | {"dropout_p": 0.5}, 1)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"instruction set is 'mmx', expected one that runs here: .*portable"):
        _C.set_isa("mmx")


@pytest.mark.parametrize("mask_dtype", ["bool", "float32"])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_scale(scale: float, dtype: str, mask_dtype: str) -> None:
    shape = Shape(1, 2, 2, 20, 35, 5, 32)  # odd numbers of keys: bf16 pads them to pairs
    inputs = make_inputs(shape, DTYPES[dtype], mask="BHLS", mask_dtype=mask_dtype, causal=True, scale=scale)
    if mask_dtype == "float32":
        inputs.options["attn_mask"] = inputs.tensors.pop("attn_mask").detach()
    assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))


# L and D beyond what a megabyte of scratch holds; fewer heads than threads; gradients of part of the inputs
@pytest.mark.parametrize("wanted", ["all", "prefix", "q", "kv", "q_and_prefix"])
@pytest.mark.parametrize("shape", [Shape(2, 2, 2, 40, 40, 10, 64), Shape(1, 2, 1, 1100, 1100, 5, 128)], ids=str)
def test_schedules_of_the_backward_agree(shape: Shape, wanted: str) -> None:
    names = {"all": ["q", "k", "v", "prefix_k", "prefix_v"], "prefix": ["prefix_k", "prefix_v"], "q": ["q"]}
    names |= {"kv": ["k", "v"], "q_and_prefix": ["q", "prefix_k", "prefix_v"]}
    inputs = make_inputs(shape, causal=True)
    right = exact(inputs)
    for name, t in inputs.tensors.items():
        t.requires_grad_(name in names[wanted])
    for n in (1, 3):
        with threads(n):
            found = ours(inputs, "cpu")
        assert {"d" + name for name in names[wanted]} <= found.keys()
        for name, t in found.items():
            torch.testing.assert_close(
                t.double(), right[name].double(), rtol=1e-4, atol=2e-5, msg=f"{name}, {n} threads"
            )


@pytest.mark.parametrize("feature", ["plain", "causal", "key_padding", "bank_lengths", "memory_bank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_on_neither_threads_nor_what_is_wanted(feature: str, dtype: str) -> None:
    """One thread runs the fused schedule; more threads than heads and prefixes, or no dq, run the split one."""
    inputs = make_inputs(Shape(9, 2, 2, 70, 150, 20, 16), DTYPES[dtype], **FEATURES[feature])
    with threads(1):
        every = ours(inputs, "cpu")
    choices = [("q", "k", "v", "prefix_k", "prefix_v"), ("prefix_k", "prefix_v"), ("q",), ("k", "v")]
    if "memory" in inputs.tensors:
        choices += [("memory",), ("q", "memory"), tuple(inputs.tensors)]
    for wanted in choices:
        for name, t in inputs.tensors.items():
            t.requires_grad_(name in wanted)
        for n in (1, 2, 4):
            with threads(n):
                found = ours(inputs, "cpu")
            assert {"d" + name for name in wanted} <= found.keys()
            for name, t in found.items():
                assert torch.equal(t, every[name]), f"{name} with {n} threads, gradients of {wanted}"


def test_threads_are_torchs_own() -> None:
    """A second OpenMP runtime would be a second pool of threads; other tests of a process may load scikit-learn's."""
    code = """
import torch
from pathlib import Path
from prefixattn import _C, prefix_attention
q, prefix = torch.randn(1, 1, 8, 8), torch.randn(1, 4, 8)
prefix_attention(q, q, q, prefix, prefix, backend="cpu")
files = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
runtimes = {file for file in files if file.name.startswith(("libgomp", "libomp", "libiomp"))}
assert len(runtimes) == 1, runtimes
assert Path(_C.openmp_runtime()).name.split("-")[0].split(".")[0] == runtimes.pop().name.split("-")[0].split(".")[0]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_runtime_is_found_while_another_thread_loads_libraries() -> None:
    """The loader has two locks; taking them in the wrong order hangs both threads."""
    code = """
import ctypes, os, signal, sys, threading
import torch
from prefixattn import _C
loader = ctypes.CDLL(None)  # called through ctypes, so that the interpreter's lock is not held
loader.dlopen.restype = ctypes.c_void_p
loader.dlclose.argtypes = [ctypes.c_void_p]
for _ in range(20):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, "the runtime was not found within a minute"
        continue
    signal.alarm(60)
    started = threading.Event()
    def load():
        while True:
            loader.dlclose(loader.dlopen(b"libBrokenLocale.so.1", 2))
            started.set()
    threading.Thread(target=load, daemon=True).start()
    started.wait()
    found = _C.openmp_runtime()
    os._exit(0 if found else 1)
"""
    try:
        ctypes.CDLL("libBrokenLocale.so.1")
    except OSError:
        pytest.skip("no library at hand that nothing else has loaded")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", _C.isas())
@pytest.mark.parametrize("bias", [100.0, -1e4])
def test_a_large_common_bias_loses_no_more_than_in_sdpa(bias: float, name: str) -> None:
    """Both passes must round scores with a bias in the same units, or the difference is a factor on every weight."""
    inputs = make_inputs(Shape(2, 2, 2, 64, 64, 10, 32))
    inputs.options["attn_mask"] = torch.full((1, 1, 64, 64), bias)
    with isa(name):
        assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))
