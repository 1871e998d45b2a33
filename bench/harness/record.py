"""Where and of what a run is made, and the file that it leaves: one JSON, rewritten as a whole.

Light to import: torch is loaded only where a header is made.
"""

import contextlib
import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.harness.files import replacing

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
ABSENT = "not installed"


class Provenance(NamedTuple):
    """No name of a machine, a user or a folder is in it."""

    time: datetime.datetime
    python: str
    versions: dict[str, str]  # of the packages asked for; ABSENT for some
    commit: str | None  # None: git does not say
    changes: tuple[str, ...] | None  # tracked files that are not the commit's, a line each

    def tree(self, apart_from: str | None = None) -> str | None:
        """ "clean" or "dirty"; changes whose lines hold `apart_from` do not count."""
        if self.changes is None:
            return None
        counted = [line for line in self.changes if apart_from is None or apart_from not in line]
        return "dirty" if counted else "clean"


def provenance(packages: Sequence[str] = ()) -> Provenance:
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ABSENT
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return Provenance(
        datetime.datetime.now(datetime.UTC),
        platform.python_version(),
        versions,
        _git("rev-parse", "HEAD"),
        None if changes is None else tuple(changes.splitlines()),
    )


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(("git", "-C", str(ROOT), *words), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def device_slug(device: str = "cpu") -> str:
    """For names of files. CPUs of one name differ in their vectors: an "AMD EPYC" has AVX2 or AVX-512."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    name = f"cpu {cpu_name()} {capability} {torch.get_num_threads()} threads"
    name = device_name(device) if device == "cuda" else name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def header(device: str = "cpu") -> dict[str, object]:
    """The head of a benchmark's record: what its numbers depend on."""
    import torch

    import prefixattn

    found = provenance(("triton", "transformers", "timm", "peft") if device == "cuda" else ())
    return (_of_the_gpu(found.versions) if device == "cuda" else {}) | {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": found.python,
        "torch": torch.__version__,
        "prefixattn": prefixattn.__version__,
        "commit": found.commit or "unknown",
        "tree": found.tree(apart_from="bench/results/") or "dirty",
        "date": found.time.isoformat(timespec="seconds"),
    }


def _of_the_gpu(versions: dict[str, str]) -> dict[str, object]:
    """What a GPU's numbers depend on besides the GPU."""
    import torch

    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver,
        "processors": torch.cuda.get_device_properties(0).multi_processor_count,
        **{name: version for name, version in versions.items() if version != ABSENT},
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


def write(path: Path, result: dict[str, Any]) -> None:
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(result, indent=1) + "\n")


def write_rows(path: Path, result: dict[str, Any]) -> None:
    """As `write`, one line a row."""
    with replacing(path) as fresh:
        fresh.write_text(re.sub(r"\n {3,}", " ", json.dumps(result, indent=1)) + "\n")
