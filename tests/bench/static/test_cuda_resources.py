"""The CUDA kernels, compiled for GPUs that need not be here: the record is of these sources, and nothing spills."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.static import cuda_resources, kernel_sources
from build_support.common import CannotBuild
from tests.conftest import DEVICE
from tests.support import ROOT

RECORD = ROOT / "bench" / "results" / "cuda_resources.json"
FEW = "sm_90", "^fwd_bf16_64$"  # what a run with nvcc compiles again: half a minute


def recorded() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(RECORD.read_text())
    return record


def test_the_record_is_of_these_sources() -> None:
    assert recorded()["sources"] == kernel_sources.native_digest(), (
        "csrc/cuda changed; run python -m bench.static.cuda_resources --out bench/results/cuda_resources.json"
    )


def test_the_proofs_are_of_these_sources() -> None:
    record = json.loads((ROOT / "bench" / "results" / "cuda_proofs.json").read_text())
    assert record["sources"] == kernel_sources.native_digest(), (
        "csrc/cuda changed; run python -m bench.static.verify_ptx --out bench/results/cuda_proofs.json"
    )
    # docs/kernels/cuda-proofs.md says why some are unsupported
    answers = {
        ("races", ""): ("race_free", "unsupported"),
        ("equality", "small shifts"): ("verified",),
        ("equality", "large shifts"): ("equivalence_not_proven",),
    }
    asked = {(row["asked"], row.get("of", "")) for row in record["rows"]}
    assert asked >= answers.keys(), "the record is not of a whole run"
    for row in record["rows"]:
        place = row["asked"], row.get("of", "")
        assert row["result"] in answers.get(place, ("potential_race", "not_wellsynced")), row


def test_no_kernel_touches_its_stack() -> None:
    assert [row for row in recorded()["rows"] if row["stack"] or row["spill"]] == []


def test_every_kernel_is_there_for_every_architecture() -> None:
    rows = recorded()["rows"]
    kernels = {arch: {row["kernel"] for row in rows if row["arch"] == arch} for arch in cuda_resources.ARCHS}
    first = kernels[cuda_resources.ARCHS[0]]
    assert all(found == first for found in kernels.values())
    for name in ("FwdShort", "FwdLong", "BwdShort", "BwdPrefix", "BwdKeys", "BwdQueries"):
        for types in ("BF16, 64", "BF16, 128", "FP16, 64", "FP16, 128"):
            assert any(kernel.startswith(f"{name}<{types}") for kernel in first), (name, types)


def test_kernels_live_by_tensor_cores_and_matrix_loads() -> None:
    for row in recorded()["rows"]:
        assert row["mma"] and row["ldmatrix"] and row["copy_async"] and row["exp2"], row
        registers_for, _ = cuda_resources.blocks(cuda_resources.GPUS[row["arch"]], row["registers"], row["threads"], 0)
        assert registers_for * row["threads"] >= 256, row  # two warps for each scheduler
        assert row["blocks"] * row["threads"] >= 128 and (row["bound"] == "shared" or row["blocks"] == registers_for)


def test_the_documents_show_how_many_blocks_there_are() -> None:
    shown = (ROOT / "docs" / "kernels" / "cuda.md").read_text(encoding="utf-8")
    assert cuda_resources.markdown(recorded()["rows"]) in shown


def test_what_a_multiprocessor_holds() -> None:
    large, small = cuda_resources.GPUS["sm_80"], cuda_resources.GPUS["sm_86"]
    assert cuda_resources.blocks(large, 168, 128, 53248) == (3, "registers")
    assert cuda_resources.blocks(large, 255, 256, 0) == (1, "registers")
    assert cuda_resources.blocks(large, 128, 128, 81 * 1024) == (2, "shared")
    assert cuda_resources.blocks(large, 128, 128, 82 * 1024) == (1, "shared")  # each costs 1 KiB beside its own
    assert cuda_resources.blocks(small, 128, 128, 80 * 1024) == (1, "shared")
    assert cuda_resources.blocks(small, 32, 512, 0) == (3, "threads")
    assert cuda_resources.blocks(small, 24, 32, 0) == (16, "blocks")


@pytest.mark.skipif(DEVICE == "cuda", reason="plans are asked of the kernels on the host machine")
def test_shared_memory_is_that_of_todays_plans() -> None:
    for row in recorded()["rows"]:
        if "BF16, 64" in row["kernel"]:  # fp16 and 128 are made by the same functions of sizes
            again = dict(row) | cuda_resources.occupancy(row)
            assert again == row


def test_a_change_of_a_kernel_is_seen(tmp_path: Path) -> None:
    for folder in ("api", "cuda/attention", "cuda/host"):
        (tmp_path / folder).mkdir(parents=True)
    kernel, machine = tmp_path / "cuda" / "attention" / "fwd.h", tmp_path / "cuda" / "host" / "run.h"
    kernel.write_text("int x = 1;  // why\n")
    machine.write_text("int y = 1;\n")
    before = kernel_sources.native_digest(tmp_path)
    kernel.write_text("int x =\n    1;  // another\n")
    machine.write_text("int y = 2;\n")
    assert kernel_sources.native_digest(tmp_path) == before
    kernel.write_text("int x = 2;  // why\n")
    assert kernel_sources.native_digest(tmp_path) != before


def test_the_same_nvcc_compiles_the_same(tmp_path: Path) -> None:
    try:
        compiler = cuda_resources.compiler()
    except CannotBuild as reason:
        pytest.skip(str(reason))
    if compiler != recorded()["compiler"] or shutil.which("c++filt") is None:
        pytest.skip(f"the record is of {recorded()['compiler']}, and nvcc here is {compiler}; or there is no c++filt")
    arch, only = FEW
    command = [sys.executable, "-m", "bench.static.cuda_resources", "--arch", arch, "--only", only, "--out"]
    done = subprocess.run([*command, str(tmp_path / "few.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "few.json").read_text())["rows"]
    assert rows == [row for row in recorded()["rows"] if row["arch"] == arch and row in rows]
