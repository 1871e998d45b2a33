"""The kernels of the reparameterization, compiled for GPUs that need not be here, and the bytes that they move."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prefixattn.kernels.table import INTERPRETED, SHARED_KIB

pytest.importorskip("triton", reason="triton is not installed")

import triton

from bench.static import kernel_sources, reparam_counts
from bench.static.reparam_counts import CASES, Case, Launched, intercepted, moved, step
from prefixattn.kernels.launch_reparam import DATE
from tests.support import ROOT

RESULTS = ROOT / "bench" / "results"
ARCHS = "sm_80", "sm_90", "sm_100"  # sm_86 has the instructions of sm_80; its memory is a test below
KERNELS = {"reparam_hidden", "reparam_kv", "reparam_dh", "reparam_dw2", "factored_adamw", "factored_sgd"}


def compiled_for(arch: str, folder: Path, only: str = "") -> list[dict[str, Any]]:
    out = folder / f"{arch}.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.static.reparam_resources", "--arch", arch, "--only", only, "--out", str(out)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("resources")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for found in pool.map(compiled_for, ARCHS, [folder] * len(ARCHS)) for row in found]


def recorded(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return record


@pytest.mark.slow
def test_every_kernel_compiles_fits_and_spills_nothing(rows: list[dict[str, Any]]) -> None:
    for arch in ARCHS:
        assert {row["kernel"] for row in rows if row["arch"] == arch} == KERNELS
    # another compiler than the record's may spill a few words
    allowed = 0 if triton.__version__ == recorded("reparam_resources.json")["triton"] else 64
    assert not [row for row in rows if row["stack"] > allowed or row["shared_kib"] > SHARED_KIB[row["arch"]]]


def test_the_record_is_of_these_sources(tmp_path: Path) -> None:
    record = recorded("reparam_resources.json")
    assert record["sources"] == kernel_sources.digest("launch_reparam.py"), (
        "kernels/ changed; run python -m bench.static.reparam_resources --out bench/results/reparam_resources.json"
    )
    found = compiled_for("sm_90", tmp_path, "GPT-2m P5$")
    assert {row["kernel"] for row in found} == KERNELS
    if record["triton"] == triton.__version__:
        assert found == [row for row in record["rows"] if (row["arch"], row["case"]) == ("sm_90", "GPT-2m P5")]


@pytest.mark.slow
def test_the_record_is_of_this_code(rows: list[dict[str, Any]]) -> None:
    record = recorded("reparam_resources.json")
    assert record["table"] == DATE
    if record["triton"] != triton.__version__:
        pytest.skip(f"the record is of triton {record['triton']}, this is {triton.__version__}")
    assert [row for row in record["rows"] if row["arch"] in ARCHS] == rows


def test_the_record_spills_nowhere_and_fits_everywhere() -> None:
    rows = recorded("reparam_resources.json")["rows"]
    assert {row["arch"] for row in rows} == set(SHARED_KIB)
    assert not [row for row in rows if row["stack"] or row["shared_kib"] > SHARED_KIB[row["arch"]]]


def test_bytes_are_near_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.15 of 7 W for language, the whole step too; for vision reading w1, which 7 W lacks, is 7 %."""
    monkeypatch.setattr(reparam_counts.backend, "_is_emulated", lambda dtype: False)  # a GPU's kv is bfloat16
    counted = {name: reparam_counts.row(name, case) for name, case in CASES.items()}
    assert recorded("reparam_counts.json") == {"table": DATE, "rows": json.loads(json.dumps(list(counted.values())))}
    for key in ("bytes_ratio", "whole_ratio"):
        ratios = {name: row[key] for name, row in counted.items()}
        language = [name for name, case in CASES.items() if "ViT" not in name and case.P <= 200 and not case.eight]
        assert all(ratios[name] <= 1.15 for name in language)
    assert counted["GPT-2m P10"]["bytes_ratio"] < 1.02
    assert counted["GPT-2m P10, 8 bits"]["bytes_ratio"] < 1.05
    assert counted["GPT-2m P200, 8 bits"]["bytes_ratio"] < 1.5, "dh costs another read of w"
    assert counted["ViT-B P10"]["bytes_ratio"] < 1.2


NETWORKS = (
    Case(2, 5, 70, 33, 1, 1, 40),
    Case(1, 40, 20, 70, 3, 1, 12, True),
    Case(1, 130, 9, 40, 1, 3, 8),
    Case(1, 300, 9, 20, 1, 1, 20),
    Case(2, 7, 9, 270, 1, 1, 12, True, eight=True),
    Case(1, 20, 9, 40, 1, 1, 12, eight=True),
)


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: f"P{case.P}{'-8bit' * case.eight}")
def test_the_counts_are_what_the_kernels_do(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    touched: list[tuple[np.ndarray, int]] = []  # addresses, and the bytes of each

    def note(name: str, mask_at: int) -> None:
        original = getattr(InterpreterBuilder, name)

        def noted(builder: Any, at: Any, *rest: Any) -> Any:
            bytes_each = at.get_element_ty().primitive_bitwidth // 8
            touched.append((at.data[np.broadcast_to(rest[mask_at].data, at.data.shape)], bytes_each))
            return original(builder, at, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, noted)

    note("create_masked_load", 0)
    note("create_masked_store", 1)

    def compare(launched: Launched, launch: Any) -> None:
        touched.clear()
        launch()
        kernel, a = launched
        state = [a.w2, a.exp_avg, a.exp_avg_sq] if kernel == "factored_adamw" else []  # read and written
        if case.eight and state:
            state += [a.exp_avg_scale, a.exp_avg_sq_scale]
        distinct = sum(t.nbytes for t in state)
        for size in (1, 4):
            addresses = [at for at, bytes_each in touched if bytes_each == size]
            distinct += size * len(np.unique(np.concatenate(addresses))) if addresses else 0
        assert (distinct, sum(size * len(at) for at, size in touched)) == moved(kernel, a), kernel

    with intercepted(compare):
        step(case, "cpu", torch.float32)
