"""What a run of the benchmarks leaves behind: one JSON for each device, rewritten as a whole."""

import datetime
import json
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import prefixattn
from timing import gemm_gflops

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"cpu {cpu_name()} {torch.get_num_threads()} threads".lower()).strip("-")


def git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def header() -> dict[str, object]:
    changes = git("status", "--porcelain", "--untracked-files=no").splitlines()
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prefixattn": prefixattn.__version__,
        "commit": git("rev-parse", "HEAD"),
        "tree": "dirty" if any("bench/results/" not in line for line in changes) else "clean",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class Record:
    """Rows of this run, the ceiling they are held against, and the clock that the run is spread over."""

    def __init__(self, cases: list[dict[str, Any]], quick: bool, minutes: float) -> None:
        self.cases = tuple(dict.fromkeys((case["shape"], case["dtype"]) for case in cases))
        self.rows: list[dict[str, object]] = []
        self.compile_seconds, self.compile_budget = 0.0, 0.0 if quick else 100.0  # FlexAttention's
        self._gemm_seconds = 0.1 if quick else 1.5
        self.ceiling = {str(dtype): gemm_gflops(dtype, self._gemm_seconds) for dtype in (torch.float32, torch.bfloat16)}
        self._cases_left, self._end = len(cases), time.perf_counter() + 60 * minutes

    def seconds_for_case(self) -> float:
        """An equal share of what is left."""
        share = (self._end - time.perf_counter()) / max(1, self._cases_left)
        self._cases_left -= 1
        return max(0.2, share)

    def write(self, path: Path) -> None:
        for dtype, before in self.ceiling.items():  # the better of both ends: another program may have run at one
            self.ceiling[dtype] = max(
                before, gemm_gflops(getattr(torch, dtype.removeprefix("torch.")), self._gemm_seconds)
            )
        for row in self.rows:
            if "gflops" in row:
                row["gemm_share"] = round(row["gflops"] / self.ceiling[row["dtype"]], 3)  # type: ignore[operator, index]
        text = json.dumps(header() | {"gemm_gflops": self.ceiling, "rows": self.rows}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(re.sub(r"\n {3,}", " ", text) + "\n")  # one line a row
        fresh.replace(path)
