"""Where the CUDA kernels' fragments and tiles lie, against the atoms, swizzles and bank counts of tensor-layouts.

csrc/cuda/tests/maps.cpp and accesses.cpp print what the kernels' own functions do on the host machine. What another
library says stands here; nothing of tiles.h does.
"""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

tensor_layouts = pytest.importorskip("tensor_layouts", reason="tensor-layouts, whose atoms are compared, is missing")

from tensor_layouts import ComposedLayout, Layout, Swizzle  # noqa: E402
from tensor_layouts.analysis import operand_analysis, per_group_bank_conflicts  # noqa: E402
from tensor_layouts.atoms_nv import (  # noqa: E402
    SM75_U16x8_LDSM_T,
    SM75_U32x4_LDSM_N,
    SM80_16x8x16_F32BF16BF16F32_TN,
    SM80_16x8x16_F32F16F16F32_TN,
)

from tests.support import ROOT  # noqa: E402

ATOMS = {"bf16": SM80_16x8x16_F32BF16BF16F32_TN, "fp16": SM80_16x8x16_F32F16F16F32_TN}
ATOM = ATOMS["bf16"]
LANES = 32
# by the elements of a row: CuTe's swizzles of 128, 256 and 64 bytes a row, in elements of two bytes
SWIZZLES = {64: Swizzle(3, 3, 3), 128: Swizzle(3, 3, 4), 32: Swizzle(2, 3, 3)}
# lanes whose accesses of so many bytes are served at once, 128 bytes of different banks
TOGETHER = {2: 32, 4: 32, 8: 16, 16: 8}


@cache
def printed(program: str) -> Any:
    command = [sys.executable, "setup.py", "-q", "build_tests"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if "no C++ compiler" in built.stdout:
        pytest.skip(built.stdout.strip())
    assert built.returncode == 0, built.stdout
    paths = [line for line in built.stdout.splitlines() if line.startswith(str(ROOT))]  # and not what ninja says
    path = next(path for path in paths if path.endswith(f"/{program}.cuda"))
    done = subprocess.run([path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return json.loads(done.stdout)


def a_of(lane: int, element: int) -> tuple[int, int]:
    """Row and what is summed over, of A [16][16]."""
    k, row = divmod(ATOM.a_layout(lane, element), 16)
    return row, k


def b_of(lane: int, element: int) -> tuple[int, int]:
    """Column and what is summed over, of two B [16][8] side by side."""
    k, column = divmod(ATOM.b_layout(lane, element % 4), 8)
    return column + 8 * (element // 4), k


def c_of(lane: int, element: int) -> tuple[int, int]:
    """Row and column of C [16][8]."""
    column, row = divmod(ATOM.c_layout(lane, element), 16)
    return row, column


def tile_layout(width: int) -> ComposedLayout:
    """Bytes / 2 at which an element of a tile lies, by row and column."""
    return ComposedLayout(SWIZZLES[width], Layout((32, width), (width, 1)))


@pytest.mark.parametrize("dtype", ATOMS)
def test_the_atoms_cover_their_operands(dtype: str) -> None:
    """The library's two types have one layout, and no element is missing or there twice."""
    atom = ATOMS[dtype]
    assert all(operand["coverage_ok"] and not operand["duplicates"] for operand in operand_analysis(atom).values())
    for operand in ("a_layout", "b_layout", "c_layout"):
        assert getattr(atom, operand) == getattr(ATOM, operand)


@pytest.mark.parametrize("dtype", ATOMS)
def test_mma(dtype: str) -> None:
    """One element of A and one of B make one of C if they share what is summed over, and else none."""
    by_k: dict[int, list[tuple[int, int]]] = {k: [] for k in range(16)}
    for lane in range(LANES):
        for element in range(4):
            column, k = b_of(lane, element)
            by_k[k].append((4 * lane + element, column))
    place = {c_of(lane, element): 4 * lane + element for lane in range(LANES) for element in range(4)}
    wanted = []
    for lane in range(LANES):
        for element in range(8):
            row, k = a_of(lane, element)
            wanted += [[8 * lane + element, b, place[row, column]] for b, column in by_k[k]]
    assert sorted(printed("maps")[f"mma {dtype}"]) == sorted(wanted) and len(wanted) == 16 * 8 * 16


def test_accumulators() -> None:
    wanted = [[x for element in range(4) for x in c_of(lane, element)] for lane in range(LANES)]
    assert printed("maps")["accumulator"] == wanted


@pytest.mark.parametrize("width", SWIZZLES)
def test_tiles_are_swizzled_as_cutes(width: int) -> None:
    layout = tile_layout(width)
    wanted = [[2 * layout(row, 8 * piece) for piece in range(width // 8)] for row in range(32)]
    assert printed("maps")["tiles"][str(width)] == wanted
    for row in range(32):  # the eight elements of a piece lie one after the other
        for column in range(width):
            assert layout(row, column) == layout(row, column // 8 * 8) + column % 8


@pytest.mark.parametrize("operand", ["a", "a transposed", "b", "b transposed"])
def test_ldmatrix(operand: str) -> None:
    """The row that each lane must give, by the copy atom and the operand's layout; and what registers hold then."""
    loads = [load for load in printed("maps")["loads"] if load["operand"] == operand]
    assert {load["width"] for load in loads} == ({32} if operand == "a transposed" else {64, 128})
    transposed = operand.endswith("transposed")
    copy = SM75_U16x8_LDSM_T if transposed else SM75_U32x4_LDSM_N
    given_by = {copy.src_layout_bits(lane, 16 * j): (lane, j) for lane in range(LANES) for j in range(8)}
    for load in loads:
        layout = tile_layout(load["width"])
        for lane in range(LANES):
            for element in range(8):
                along, k = (a_of if operand[0] == "a" else b_of)(lane, element)
                row, column = (k, along) if transposed else (along, k)
                row, column = load["row"] + row, load["column"] + column
                giver, j = given_by[copy.dst_layout_bits(lane, 16 * element)]
                assert load["given"][giver] + 2 * j == 2 * layout(row, column), (load["by"], lane, element)
                assert load["held"][lane][element] == load["width"] * row + column


@pytest.mark.parametrize("dtype", ATOMS)
def test_accumulators_become_operands(dtype: str) -> None:
    """In registers, and through the tile of dS, which gives the transpose."""
    places = [[a_of(lane, element) for element in range(8)] for lane in range(LANES)]
    assert printed("maps")[f"as_a {dtype}"] == [[16 * row + column for row, column in lane] for lane in places]
    assert printed("maps")[f"through dS {dtype}"] == [[16 * k + row for row, k in lane] for lane in places]


@pytest.mark.parametrize("D", [64, 128])
def test_rows_of_tensors(D: int) -> None:
    """Read as operands without shared memory, and written from accumulators."""
    rows = printed("maps")[f"rows_as_a {D}"]
    for lane in range(LANES):
        places = [(a_of(lane, i % 8), i // 8 * 16) for i in range(D // 2)]
        assert rows[lane] == [row * D + first + k for (row, k), first in places]
    memory = printed("maps")[f"store_rows {D}"]
    for lane in range(LANES):
        for i in range(D // 2):
            row, column = c_of(lane, i % 4)
            assert memory[row][i // 4 * 8 + column] == lane * (D // 2) + i


# bank conflicts


def ways(addresses: list[int], size: int) -> int:
    """How often the worst group of lanes is served, by the library's count; -1 is a lane without an access."""
    worst = 1
    words = max(size // 4, 1)
    for first in range(0, LANES, TOGETHER[size]):
        active = [at for at in addresses[first : first + TOGETHER[size]] if at >= 0]
        if active:
            table = [at + 4 * word for at in active for word in range(words)]
            layout = ComposedLayout(table.__getitem__, Layout((len(active), words), (words, 1)))
            worst = max(worst, per_group_bank_conflicts(layout, element_bytes=1)["worst_max_ways"])
    return worst


def test_the_count_of_conflicts() -> None:
    """Rows of 128 bytes one below the other meet in one bank without a swizzle; words side by side do not."""
    assert ways([128 * lane for lane in range(LANES)], 16) == 8 and ways([4 * lane for lane in range(LANES)], 4) == 1
    assert ways([0] * LANES, 4) == 1 and ways([128 * lane for lane in range(8)] + [-1] * 24, 4) == 8


def test_loads_of_matrices_meet_no_bank_twice() -> None:
    for load in printed("maps")["loads"]:
        assert ways(load["given"], 16) == 1, load


# Kernels and files whose accesses are served twice where once would do. A row of a stage has two or four threads there,
# so eight lanes are four or two rows, whose swizzles differ in bits that permute those pieces among themselves. Each
# row is copied once and read once for delta, beside some dozens of reads of matrices, which meet no bank twice.
TWICE = {
    ("copy", "bwd_keys", "bwd_stage.h"),
    ("copy", "bwd_prefix", "bwd_stage.h"),
    ("load", "bwd_prefix", "bwd_stage.h"),
    ("store", "fwd_long", "tiles.h"),  # queries of 128 elements, once in a block
}
KERNELS = "fwd_short_plain", "fwd_short", "fwd_long", "bwd_short", "bwd_prefix", "bwd_keys", "bwd_queries"


@pytest.mark.parametrize("kernel", KERNELS)
def test_conflicts_of_a_kernel(kernel: str) -> None:
    """Every access to shared memory of a run with all features: copies, stores, loads, and rows given to ldmatrix."""
    found: dict[tuple[str, str, str], int] = {}
    for access in printed("accesses"):
        if access["kernel"] == kernel:
            key = access["what"], kernel, access["place"].split(":")[0]
            found[key] = max(found.get(key, 1), ways(access["lanes"], access["bytes"]))
    assert {what for what, *_ in found} >= {"copy", "matrix"}
    assert {key: 2 for key in TWICE if key[1] == kernel} == {key: worst for key, worst in found.items() if worst > 1}
