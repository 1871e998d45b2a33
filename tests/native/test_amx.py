"""Kernels over tiles: which is chosen, what is said of the others, and that tiles are configured where they are used.

What they compute is asked wherever `_C.isas()` is gone through; csrc/tests asks tiles and their products alone.
`PREFIXATTN_TEST_ISA=amx_plain` runs any test on plain tiles.
"""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch

from prefixattn import __main__, backends
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

AMX = ["amx_fp16", "amx_bf16"]
PLAIN = [name for name in _C.isas() if name.startswith("amx_plain")]
TILES = [name for name in _C.isas() if name.startswith("amx")]
HALF = [torch.bfloat16, torch.float16]


def test_plain_tiles_run_anywhere_and_like_float16_on_tiles_are_never_chosen() -> None:
    assert _C.isas()[-len(PLAIN) :] == PLAIN and PLAIN[-1] == "amx_plain"
    code = "import torch; from prefixattn import _C; print(_C.isa(), *_C.isas())"
    environment = {name: x for name, x in os.environ.items() if name != "PREFIXATTN_TEST_ISA"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    chosen, *usable = done.stdout.split()
    assert chosen == usable[0] and chosen not in (*PLAIN, "amx_fp16")


def test_what_does_not_run_here_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    objections = _C.isa_objections()
    assert not objections.keys() & set(_C.isas())
    assert {*AMX, "portable"} <= objections.keys() | set(_C.isas())
    for name, words in objections.items():
        assert words.startswith(
            ("this CPU has no ", "this CPU is not ", "it was not compiled: ", "the system refuses ", "its tiles gave ")
        )
        with pytest.raises(ValueError, match=f"instruction set is '{name}', expected one that runs here"):
            _C.set_isa(name)
    __main__.main(["--no-verdicts"])
    printed = capsys.readouterr().out
    assert f"cpu kernels: {_C.isa()} in use" in printed
    for name, words in objections.items():
        assert re.search(rf"^    {name} +no: {re.escape(words)}$", printed, re.MULTILINE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_threads_made_later_have_tiles_of_their_own(name: str, dtype: torch.dtype) -> None:
    """A tile that was not configured ends the process, as a CPU's would."""
    inputs = make_inputs(Shape(3, 4, 2, 37, 41, 5, 40), dtype, causal=True)
    right, allowed = exact(inputs), same_dtype(inputs)
    found: list[dict[str, torch.Tensor]] = []
    with isa(name), threads(3):
        for _ in range(2):
            worker = threading.Thread(target=lambda: found.append(ours(inputs, "cpu")))
            worker.start()
            worker.join()
        found.append(ours(inputs, "cpu"))
    assert len(found) == 3
    for results in found:
        assert_all_as_accurate(results, allowed, right)
        for key, t in results.items():
            assert torch.equal(t, found[0][key]), key


@pytest.mark.parametrize("name", PLAIN)
def test_a_call_that_fails_leaves_tiles_as_another_needs_them(name: str) -> None:
    inputs = make_inputs(Shape(2, 2, 2, 20, 33, 5, 64), torch.bfloat16)
    with isa(name):
        before = ours(inputs, "cpu")
        _C.limit_scratch(1 << 14)  # what threads take is more, and what the call takes before is less
        try:
            with pytest.raises(MemoryError):
                ours(inputs, "cpu")
        finally:
            _C.limit_scratch(0)
        after = ours(inputs, "cpu")
    for key, t in before.items():
        assert torch.equal(t, after[key]), key


# heads of a diagonal strip and of chunks that padding begins within, for tiles of 32 keys; few queries; wide heads
CASES = {
    "diagonal": (Shape(2, 2, 1, 150, 150, 33, 64), "causal"),
    "offset": (Shape(1, 2, 2, 40, 103, 31, 96), "causal"),
    "padding": (Shape(2, 2, 2, 70, 180, 17, 72), "key_padding"),
    "two_queries": (Shape(3, 4, 2, 2, 170, 40, 64), "bank_sample_lengths"),
    "chunks": (Shape(1, 2, 2, 70, 300, 140, 32), "bias"),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PLAIN)
def test_tails_of_tiles(name: str, case: str, dtype: torch.dtype) -> None:
    shape, feature = CASES[case]
    inputs, words = suited("cpu", make_inputs(shape, dtype, **FEATURES[feature]))
    assert not words
    with isa(name):
        assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", _C.isas())
def test_a_call_of_nans_leaves_none_to_the_next(name: str, dtype: torch.dtype) -> None:
    """Scratch is kept between calls, and lanes without a query are summed with the others."""
    poison, _ = suited("cpu", make_inputs(Shape(1, 2, 2, 64, 128, 33, 64), dtype, mask="BHLS", mask_dtype="float"))
    with torch.no_grad():
        for t in poison.tensors.values():
            t.fill_(float("nan"))
    inputs, words = suited("cpu", make_inputs("ragged", dtype, mask="BHLS", mask_dtype="float"))
    assert not words
    with isa(name), threads(1):
        ours(poison, "cpu")
        results = ours(inputs, "cpu")
    assert_all_as_accurate(results, same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("first_seen", [0, 150, 450])
@pytest.mark.parametrize("P", [0, 5, 64])
@pytest.mark.parametrize("name", TILES)
def test_maxima_that_rise_by_much_within_a_chunk_and_from_one_to_the_next(name: str, P: int, first_seen: int) -> None:
    """What was summed is scaled then; a query may meet its first key late."""
    inputs = make_inputs(Shape(2, 4, 2, 40, 500, P, 64), torch.bfloat16)
    with torch.no_grad():
        for key, least, most in (("prefix_k", 0.1, 1.0), ("k", 1.0, 8.0)):
            t = inputs.tensors[key]
            t *= torch.linspace(least, most, t.shape[-2])[:, None]
    mask = torch.ones(40, 500, dtype=torch.bool)
    mask[::3, :first_seen] = False
    inputs.options["attn_mask"] = mask
    with isa(name):
        assert_all_as_accurate(ours(inputs, "cpu"), same_dtype(inputs), exact(inputs))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_both_vectors_beside_plain_tiles_agree_to_rounding(dtype: torch.dtype) -> None:
    """The scores of two sets differ by nothing: a product's sums do not depend on where in a tile it stands."""
    if len(PLAIN) < 2:
        pytest.skip("no second set of vectors beside plain tiles: " + _C.isa_objections()["amx_plain_avx512"])
    inputs = make_inputs(Shape(2, 2, 2, 37, 75, 5, 72), dtype)
    lse = []
    for name in PLAIN:
        with isa(name):
            lse.append(ours(inputs, "cpu")["lse"])
    torch.testing.assert_close(lse[0], lse[1], rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("prefixes", ["shared", "per_sample"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_packed_prefixes_end_at_their_lengths(name: str, dtype: torch.dtype, prefixes: str) -> None:
    """Also within a pair of rows, whose other one holds no number; whether a head's queries are one unit or several."""
    inputs = make_inputs(Shape(3, 4, 2, 90, 70, 40, 24), dtype, prefixes=prefixes, lengths="B")
    lengths = [33, 7, 32]
    inputs.options["prefix_lengths"] = torch.tensor(lengths)
    right, allowed = exact(inputs), same_dtype(inputs)
    for key in ("prefix_k", "prefix_v"):
        t = inputs.tensors[key].detach()  # of one storage
        for row, last in zip(
            t.reshape(-1, 2, 40, 24), [max(lengths)] if prefixes == "shared" else lengths, strict=True
        ):
            row[:, last:] = float("nan")
    with isa(name):
        with threads(1):
            one_unit = ours(inputs, "cpu")
        with threads(8):
            several = ours(inputs, "cpu")
    assert_all_as_accurate(one_unit, allowed, right)
    for key, t in one_unit.items():
        assert torch.equal(t, several[key]), key
