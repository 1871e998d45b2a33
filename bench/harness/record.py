"""What a run of the benchmarks leaves behind: one JSON for each device, rewritten as a whole."""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import platforms
import prefixattn
import timing_gpu
from peers import Shape
from platforms import Platform

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def device_slug(device: str = "cpu") -> str:
    """For names of files. CPUs of one name differ in their vectors: an "AMD EPYC" has AVX2 or AVX-512."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = f"cpu {cpu_name()} {capability} {torch.get_num_threads()} threads"
    name = device_name(device) if device == "cuda" else name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def gpu_versions() -> dict[str, object]:
    """What a GPU's numbers depend on besides the GPU."""
    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    found = {name: importlib.util.find_spec(name) is not None for name in ("triton", "transformers", "timm", "peft")}
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver,
        "processors": torch.cuda.get_device_properties(0).multi_processor_count,
        **{name: importlib.metadata.version(name) for name, there in found.items() if there},
    }


def kept(path: Path, head: dict[str, Any], apart: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier command that this one goes on from: of the same `apart`, which are keys of the header."""
    if not path.is_file():
        return []
    before: dict[str, Any] = json.loads(path.read_text())
    if other := [key for key in apart if before.get(key) != head.get(key)]:
        print(f"{path} is of another {', '.join(other)}: all of it is measured anew")
        return []
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def header(device: str = "cpu") -> dict[str, object]:
    changes = git("status", "--porcelain", "--untracked-files=no").splitlines()
    return (gpu_versions() if device == "cuda" else {}) | {
        "device": device_name(device),
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

    def __init__(self, side: Platform, cases: list[dict[str, Any]], quick: bool, minutes: float) -> None:
        self.side = side
        self.missing: dict[str, str] = {}  # peers that are not installed
        self.cases = tuple(dict.fromkeys((case["shape"], case["dtype"]) for case in cases))
        self.rows: list[dict[str, object]] = []
        self.compile_seconds, self.compile_budget = 0.0, 0.0 if quick else 100.0  # FlexAttention's
        self._gemm_seconds = 0.1 if quick else 1.5
        self.ceiling = {str(dtype): side.gemm_gflops(dtype, self._gemm_seconds) for dtype in side.dtypes}
        self._cases_left, self._end = len(cases), time.perf_counter() + 60 * minutes

    def seconds_for_case(self) -> float:
        """An equal share of what is left."""
        share = (self._end - time.perf_counter()) / max(1, self._cases_left)
        self._cases_left -= 1
        return max(0.2, share)

    def write(self, path: Path) -> None:
        for dtype, before in self.ceiling.items():  # the better of both ends: another program may have run at one
            self.ceiling[dtype] = max(
                before, self.side.gemm_gflops(getattr(torch, dtype.removeprefix("torch.")), self._gemm_seconds)
            )
        for row in self.rows:
            if "gflops" in row:
                row["gemm_share"] = round(row["gflops"] / self.ceiling[row["dtype"]], 3)
        result = header(self.side.device) | {"gemm_gflops": self.ceiling}
        if self.side is not platforms.platform("cpu"):
            result["copy_gbytes"] = copy = timing_gpu.copy_gbytes(self._gemm_seconds)
            for row in self.rows:
                _add_floor(row, self.ceiling, copy)
        text = json.dumps(result | {"rows": self.rows}, indent=1)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".new")
        fresh.write_text(re.sub(r"\n {3,}", " ", text) + "\n")  # one line a row
        fresh.replace(path)


def _add_floor(row: dict[str, Any], gflops: dict[str, float], gbytes: float) -> None:
    """The least time that arithmetic and memory allow, by the ceilings of this run, and the share of it reached."""
    if "gflops" not in row and not (row["pass"] == "prefix grads" and "ms" in row):
        return
    shape, dtype = Shape(**row["shape"]), getattr(torch, row["dtype"].removeprefix("torch."))
    gflop = shape.gflop(backward=row["pass"] == "fwd+bwd")
    if row["pass"] == "prefix grads":  # four products over the prefix
        gflop += 8e-9 * shape.B * shape.H * shape.L * shape.P * shape.D
    row["floor_ms"] = round(
        max(gflop / gflops[row["dtype"]] * 1e3, shape.mbytes(row["pass"], dtype.itemsize) / gbytes), 5
    )
    row["floor_share"] = round(row["floor_ms"] / row["ms"][1], 3)
