"""The record that a run of bench_prefix_attn.py fills."""

import time
from pathlib import Path
from typing import Any

import torch

from bench.attention.baselines import BenchShape
from bench.attention.suites import Suite
from bench.harness import record, timing_gpu
from bench.harness.platforms import platform
from prefixattn import backends


class Record:
    """Rows of this run, the ceiling they are held against, and the clock that the run is spread over."""

    def __init__(self, suite: Suite, cases: list[dict[str, Any]], quick: bool, minutes: float) -> None:
        self.suite = suite
        self.missing: dict[str, str] = {}  # baselines that are not installed
        self.cases = tuple(dict.fromkeys((case["shape"], case["dtype"]) for case in cases))
        self.rows: list[dict[str, Any]] = []
        self.compile_seconds, self.compile_budget = 0.0, 0.0 if quick else 100.0  # FlexAttention's
        self._gemm_seconds = 0.1 if quick else 1.5
        gflops = suite.platform.gemm_gflops
        self.ceiling = {str(dtype): gflops(dtype, self._gemm_seconds) for dtype in suite.dtypes}
        self._cases_left, self._end = len(cases), time.perf_counter() + 60 * minutes

    def seconds_for_case(self) -> float:
        """An equal share of what is left."""
        share = (self._end - time.perf_counter()) / max(1, self._cases_left)
        self._cases_left -= 1
        return max(0.2, share)

    def write(self, path: Path) -> None:
        side = self.suite.platform
        for dtype, before in self.ceiling.items():  # the better of both ends: another program may have run at one
            again = side.gemm_gflops(getattr(torch, dtype.removeprefix("torch.")), self._gemm_seconds)
            self.ceiling[dtype] = max(before, again)
        for row in self.rows:
            if "gflops" in row:
                row["gemm_share"] = round(row["gflops"] / self.ceiling[row["dtype"]], 3)
        result = record.header(side.device) | {"gemm_gflops": self.ceiling}
        if side is platform("cpu") and not backends.here()["cpu"]:
            from prefixattn import _C

            result["instructions"] = _C.isa()
        if side is not platform("cpu"):
            result["copy_gbytes"] = copy = timing_gpu.copy_gbytes(self._gemm_seconds)
            for row in self.rows:
                _add_floor(row, self.ceiling, copy)
        record.write_rows(path, result | {"rows": self.rows})


def _add_floor(row: dict[str, Any], gflops: dict[str, float], gbytes: float) -> None:
    """The least time that arithmetic and memory allow, by the ceilings of this run, and the share of it reached."""
    if "gflops" not in row and not (row["pass"] == "prefix grads" and "ms" in row):
        return
    shape, dtype = BenchShape(**row["shape"]), getattr(torch, row["dtype"].removeprefix("torch."))
    gflop = shape.gflop(backward=row["pass"] == "fwd+bwd")
    if row["pass"] == "prefix grads":  # four products over the prefix
        gflop += 8e-9 * shape.B * shape.H * shape.L * shape.P * shape.D
    row["floor_ms"] = round(
        max(gflop / gflops[row["dtype"]] * 1e3, shape.mbytes(row["pass"], dtype.itemsize) / gbytes), 5
    )
    row["floor_share"] = round(row["floor_ms"] / row["ms"][1], 3)
