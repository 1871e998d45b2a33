"""The counts of bench/static/triton_counts.py are what the kernels really do, product by product and byte by byte."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from prefixattn.attention.triton import INTERPRETED

pytest.importorskip("triton", reason="triton is not installed")

from bench.static import triton_counts
from bench.static.triton_counts import ALL, COUNTS, SHAPES, Count, Launched, count, intercepted
from bench.static.triton_shapes import TargetShape
from prefixattn.attention.call import Given, Needs, Wants
from prefixattn.kernels import launch_bwd, launch_fwd, table
from prefixattn.kernels.call import Call
from prefixattn.kernels.launch_bwd import backward
from prefixattn.kernels.launch_fwd import forward
from prefixattn.kernels.table import Launch
from tests.grids import covered
from tests.support import ROOT

RECORD = ROOT / "bench" / "results" / "triton_counts.json"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")


class Case(NamedTuple):
    B: int
    H: int
    Hkv: int
    L: int
    S: int
    P: int
    D: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    prefix_in_window: bool = False


class Issued:
    """What an interpreted kernel has done so far: its products, and the elements it has read and written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        dot, load, store = (getattr(InterpreterBuilder, f"create_{n}") for n in ("dot", "masked_load", "masked_store"))
        self.reset()

        def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
            (M, K), N = a.data.shape, b.data.shape[1]
            self.flops += 2 * M * N * K
            return dot(builder, a, b, *others)

        def create_masked_load(builder: Any, at: Any, mask: Any, *others: Any) -> Any:
            value = load(builder, at, mask, *others)
            self._note(self.read, at, mask, value)
            return value

        def create_masked_store(builder: Any, at: Any, value: Any, mask: Any, *others: Any) -> Any:
            self._note(self.written, at, mask, value)
            return store(builder, at, value, mask, *others)

        for patch in (create_dot, create_masked_load, create_masked_store):
            monkeypatch.setattr(InterpreterBuilder, patch.__name__, patch)

    def reset(self) -> None:
        self.flops = 0
        self.read: dict[int, list[Any]] = {}  # addresses by bytes of an element
        self.written: dict[int, list[Any]] = {}

    @staticmethod
    def _note(where: dict[int, list[Any]], at: Any, mask: Any, value: Any) -> None:
        inside = np.broadcast_to(mask.data, at.data.shape)
        where.setdefault(value.data.dtype.itemsize, []).append(at.data[inside])

    def count(self) -> Count:
        """What a kernel both writes and reads, it reads because it wrote it: that needs no device memory."""
        read = written = 0
        for itemsize in self.read.keys() | self.written.keys():
            touched, stored = (
                np.concatenate([np.empty(0, np.uint64), *w.get(itemsize, [])]) for w in (self.read, self.written)
            )
            read += itemsize * len(np.setdiff1d(touched, stored))
            written += itemsize * len(np.unique(stored))
        return Count(self.flops, read, written)


Run = Callable[..., list[str]]


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs both passes of a case, compares each launch with its count, and returns the names of the kernels."""
    issued = Issued(monkeypatch)

    def run(
        case: Case,
        needs: Needs = ALL,
        dtype: torch.dtype = torch.float16,
        per_sample: bool = False,
        dropout: tuple[float, float] = (0.0, 0.0),
        dlse: bool = False,
        phi: str = "",  # of a memory, if there is one
        processors: int = 4,
    ) -> list[str]:
        B, H, KV, L, S, P, D, causal, (left, right), prefix_in_window = case
        q, dout = (torch.randn(B, H, L, D).to(dtype) for _ in range(2))
        k, v = (torch.randn(B, S, KV, D).to(dtype).transpose(1, 2) for _ in range(2))
        prefix_k, prefix_v = (torch.randn(B if per_sample else 1, KV, P, D).to(dtype) for _ in range(2))
        seed = torch.tensor([3]) if max(dropout) else None
        memory = torch.randn(B if per_sample else 1, H, D, D).to(dtype) if phi else None
        call = Call(
            q, k, v, prefix_k, prefix_v, memory=memory, seed=seed, dropout_p=dropout[0], prefix_dropout_p=dropout[1],
            is_causal=causal, scale=D**-0.5, phi=phi or "none",
            window_left=left, window_right=right, prefix_in_window=prefix_in_window,
        )  # fmt: skip
        names: list[str] = []

        def take(launched: Launched, really: Callable[[], Any]) -> None:
            issued.reset()
            really()
            names.append(launched.kernel.removeprefix("prefix_attn_"))
            assert count(launched) == issued.count(), names

        with intercepted(take, processors):
            out, lse, _, attended = forward(call, Wants(mass=dlse, attended=phi != ""))
            given = Given(dout, torch.randn_like(lse) if dlse else None, attended if phi else out, lse)
            backward(call, given, needs, None)
        return names

    yield run
    table.trial = {}


SHORT = {
    "vit": Case(2, 2, 2, 197, 197, 10, 64),
    "causal": Case(2, 2, 2, 128, 128, 20, 64, True),
    "grouped": Case(2, 4, 2, 70, 70, 17, 24),
    "grouped_causal": Case(2, 4, 2, 70, 70, 17, 24, True),
    "no_prefix": Case(4, 1, 1, 33, 33, 0, 16),
    "no_prefix_causal": Case(4, 1, 1, 64, 64, 0, 16, True),
    "whole_tiles": Case(4, 1, 1, 64, 64, 64, 16),
    "whole_tiles_causal": Case(4, 1, 1, 128, 128, 64, 16, True),
    "more_queries": Case(4, 1, 1, 100, 70, 5, 16, True),
    "more_keys": Case(4, 1, 1, 70, 100, 5, 16, True),
    "no_keys": Case(4, 1, 1, 7, 0, 10, 16),
}
LONG = {
    **SHORT,
    "tails": Case(1, 1, 1, 300, 300, 50, 16),
    "causal_tails": Case(1, 1, 1, 300, 300, 20, 16, True),
    "prefix_of_tiles": Case(1, 2, 2, 130, 130, 200, 16),
    "prefix_of_tiles_causal": Case(2, 2, 1, 192, 192, 130, 16, True),
    "whole_keys": Case(1, 1, 1, 256, 256, 10, 16),
    "wide_heads": Case(1, 1, 1, 140, 140, 10, 128, True),
    "widest_heads": Case(1, 1, 1, 70, 70, 10, 256, True),
}


def long_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_fwd, "SHORT_KEYS", -1)
    monkeypatch.setattr(launch_bwd, "HEAD_KEYS", -1)


@interpreted
@pytest.mark.parametrize("name", SHORT)
def test_short_kernels(compare: Run, name: str) -> None:
    names = compare(SHORT[name])
    assert names == ["fwd_short", "bwd_short", "bwd_reduce"][: 3 if SHORT[name].P else 2]


@interpreted
@pytest.mark.parametrize("name", LONG)
def test_long_kernels(compare: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    long_kernels(monkeypatch)
    names = set(compare(LONG[name]))
    assert names >= {"fwd", "bwd_queries"} | {n for n in ("bwd_keys",) if LONG[name].S}
    assert ("bwd_delta" in names) == (LONG[name].P not in range(1, 65))


@interpreted
@pytest.mark.parametrize("tile", [Launch(16, 32, 4, 1), Launch(32, 16, 4, 1)], ids=["16x32", "32x16"])
@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_other_tiles(compare: Run, monkeypatch: pytest.MonkeyPatch, tile: Launch, short: bool, causal: bool) -> None:
    if not short:
        long_kernels(monkeypatch)
    table.trial = {name.removeprefix("prefix_attn_"): tile for name in (*COUNTS, "fwd_medium")}
    for L, S, P in ((37, 37, 5), (64, 64, 32), (50, 20, 40), (20, 50, 7)):
        compare(Case(2, 2, 1, L, S, P, 16, causal), processors=2)


WINDOWS = {
    "causal": Case(1, 2, 1, 70, 70, 20, 16, True, (17, -1)),
    "left": Case(1, 1, 1, 70, 70, 5, 16, False, (33, -1)),
    "right": Case(1, 1, 1, 70, 70, 40, 16, False, (-1, 17)),
    "both": Case(1, 1, 1, 80, 80, 17, 16, False, (31, 16)),
    "of_one": Case(1, 1, 1, 70, 70, 0, 16, True, (0, -1)),
    "wide": Case(1, 1, 1, 70, 70, 20, 16, True, (60, -1)),
    "prefix": Case(1, 2, 1, 70, 70, 50, 16, True, (40, -1), True),
    "prefix_right": Case(1, 1, 1, 70, 70, 40, 16, False, (50, 3), True),
    "prefix_wide": Case(1, 1, 1, 64, 64, 64, 16, True, (100, -1), True),
    "more_keys": Case(1, 1, 1, 30, 100, 20, 16, False, (40, 5), True),
    "more_keys_far": Case(1, 1, 1, 30, 100, 20, 16, True, (75, -1), True),
    "more_queries": Case(1, 1, 1, 100, 30, 20, 16, False, (9, 7), True),
    "more_queries_causal": Case(1, 1, 1, 100, 30, 40, 16, True, (9, -1), True),
    "one_query": Case(1, 1, 1, 1, 100, 40, 16, True, (37, -1)),
    "no_keys": Case(1, 1, 1, 40, 0, 40, 16, True, (5, -1), True),
}
TILES = {"16x32": Launch(16, 32, 4, 1), "32x16": Launch(32, 16, 4, 1)}


@interpreted
@pytest.mark.parametrize("tile, kernels, name", covered(TILES, ["long", "short"], WINDOWS))
def test_tiles_outside_a_window_are_not_visited(
    compare: Run, monkeypatch: pytest.MonkeyPatch, tile: str, kernels: str, name: str
) -> None:
    """The counts are of the tiles that hold a pair of a query and a key that it sees, and of no other."""
    if kernels == "long":
        long_kernels(monkeypatch)
    table.trial = {name.removeprefix("prefix_attn_"): TILES[tile] for name in (*COUNTS, "fwd_medium")}
    names = compare(WINDOWS[name], processors=1)
    assert ("bwd_short" in names) == (kernels == "short")


@interpreted
@pytest.mark.parametrize("group", [1, 2])
def test_fold(compare: Run, group: int) -> None:
    assert "fwd_fold" in compare(Case(5, 2 * group, 2, 3, 70, 300, 32, True))


@interpreted
@pytest.mark.parametrize("left", [20, 69, 170, 320], ids=str)
def test_fold_with_a_window(compare: Run, left: int) -> None:
    """Up to all of the prefix, none of it, some, and all but its first rows for the last queries."""
    assert "fwd_fold" in compare(Case(9, 4, 2, 3, 70, 300, 16, True, (left, -1), True), processors=20)


@interpreted
@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
@pytest.mark.parametrize("needs", ["qkv..", "q..kv", ".kv..", "...k.", "...kv", "qk..v", "qkvk."])
def test_fewer_gradients(compare: Run, monkeypatch: pytest.MonkeyPatch, short: bool, needs: str) -> None:
    if not short:
        long_kernels(monkeypatch)
    compare(Case(2, 4, 2, 70, 70, 17, 16, True), needs=Needs(*(letter != "." for letter in needs)))


@interpreted
@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
@pytest.mark.parametrize(
    "options",
    [
        {"per_sample": True},
        {"dlse": True},
        {"dropout": (0.1, 0.0)},
        {"dropout": (0.0, 0.1)},
        {"dtype": torch.float32},
    ],
    ids=["per_sample", "dlse", "dropout", "prefix_dropout", "fp32"],
)
def test_features(compare: Run, monkeypatch: pytest.MonkeyPatch, short: bool, options: dict[str, Any]) -> None:
    if not short:
        long_kernels(monkeypatch)
    compare(Case(2, 4, 2, 70, 70, 17, 16, True), **options)


@interpreted
@pytest.mark.parametrize("short", [False, True], ids=["long", "short"])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
def test_a_memory(compare: Run, monkeypatch: pytest.MonkeyPatch, short: bool, per_sample: bool) -> None:
    if not short:
        long_kernels(monkeypatch)
    names = compare(Case(2, 4, 2, 40, 40, 0, 24, True), ALL._replace(memory=True), per_sample=per_sample, phi="elu")
    assert names[1] == "bwd_memory" and ("bwd_short" in names) == short


@interpreted
def test_the_gradient_of_a_memory_is_shared_out(compare: Run) -> None:
    needs = Needs(memory=True)
    assert compare(Case(2, 1, 1, 600, 2, 0, 16), needs, phi="elu") == ["fwd_short", "bwd_memory", "bwd_reduce"]


OFFSETS = torch.empty(2, dtype=torch.int64, device="meta")
NOT_COUNTED: dict[str, dict[str, Any]] = {
    "fwd_short with HAS_LENGTHS": {"prefix_lengths": torch.empty(64, dtype=torch.int64, device="meta")},
    "fwd with packed": {"cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS, "max_seqlen_q": 197, "max_seqlen_k": 197},
}


@pytest.mark.parametrize("words", NOT_COUNTED)
def test_what_is_not_counted_is_refused(words: str) -> None:
    call = triton_counts.operands(SHAPES[0])._replace(**NOT_COUNTED[words])
    found: list[Launched] = []
    with intercepted(lambda launched, _: found.append(launched), processors=4):
        forward(call, Wants())
    with pytest.raises(ValueError, match=f"{words} is not counted"):
        count(found[0])


@pytest.mark.parametrize("shape", SHAPES, ids=[shape.name for shape in SHAPES])
def test_the_floors_are_those_of_the_targets(shape: TargetShape) -> None:
    floor = max(shape.useful / triton_counts.FLOPS, shape.floor_bytes(grads=False) / triton_counts.BYTES)
    assert floor * 1e6 == pytest.approx(shape.floor[0], rel=0.02)


def test_the_record_is_of_this_code() -> None:
    rows = [triton_counts.row(shape, grads) for grads in (False, True) for shape in SHAPES]
    assert json.loads(RECORD.read_text())["rows"] == json.loads(json.dumps(rows))
