"""The counts of the CUDA kernels: today's sources made the record, and a shape that is run again has its numbers."""

import json

import pytest

from bench.static import cuda_counts, kernel_sources
from bench.static.triton_shapes import SHAPES
from tests.conftest import DEVICE
from tests.cuda_machine import watched
from tests.support import ROOT

RECORD = json.loads((ROOT / "bench" / "results" / "cuda_counts.json").read_text(encoding="utf-8"))
ROWS = {(row["shape"], row["pass"]): row for row in RECORD["rows"]}
VIT = SHAPES[0]


def test_the_record_is_of_todays_kernels() -> None:
    assert RECORD["sources"] == kernel_sources.native_digest(), "python -m bench.static.cuda_counts --out makes it anew"
    assert set(ROWS) == {(shape.name, which) for shape in SHAPES for which in ("fwd", "fwd+bwd")}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs the kernels themselves, and counts nothing")
def test_a_shape_counted_again_has_the_records_numbers() -> None:
    made = {(row["shape"], row["pass"]): row for row in cuda_counts.rows(watched().module, VIT)}
    for place, row in made.items():
        assert json.loads(json.dumps(row)) == ROWS[place]


def test_a_vit_takes_two_launches_near_the_useful_products_and_the_floors_bytes() -> None:
    forward, both = ROWS[VIT.name, "fwd"], ROWS[VIT.name, "fwd+bwd"]
    assert len(both["kernels"]) == 2
    assert forward["flops_ratio"] < 1.0615 and both["flops_ratio"] < 1.06
    assert both["bytes_ratio"] <= 1.02


def test_no_kernel_is_left_out_of_what_must_be_moved() -> None:
    names = {name for row in RECORD["rows"] for name in row["kernels"]}
    assert all(cuda_counts.compulsory(VIT, name) > 0 for name in names)
    for row in RECORD["rows"]:
        assert row["issued_gflop"] >= row["useful_gflop"] and row["compulsory_mb"] >= row["floor_mb"] * 0.999
        assert row["moved_mb"] >= row["compulsory_mb"] * 0.97


def test_the_documents_show_the_tables() -> None:
    shown = (ROOT / "docs" / "kernels" / "cuda.md").read_text(encoding="utf-8")
    for line in cuda_counts.markdown(RECORD["rows"]).splitlines()[2:]:
        assert line in shown
