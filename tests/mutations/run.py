"""Makes each mistake of cases.py in a copy of the repository, and sees whether a test fails.

    python -m tests.mutations.run --out tests/records/mutations.json     # minutes; those in the file are not repeated

First the tests pass without a mistake. The record says for each which test saw it, or none; exit status 1 if none did.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from bench.harness.record import write
from tests.mutations.cases import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "build", "__pycache__", "results", "*.egg-info", ".*_cache")


def failing(folder: Path, tests: str) -> str:
    """The first test that fails, or ""."""
    words = re.findall(r"'([^']*)'|(\S+)", tests)
    asked = [quoted or plain for quoted, plain in words]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--benchmark-disable", *asked],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)|^_+ (?:ERROR .* )?(\S+) _+$", done.stdout, flags=re.MULTILINE)
    return next(filter(None, found.groups())) if found else done.stdout[-300:]


def told(mistake: Mistake) -> dict[str, Any]:
    return {"file": mistake.file, "right": mistake.right, "wrong": mistake.wrong, "tests": mistake.tests}


def made(folder: Path, mistake: Mistake) -> str:
    """What saw the mistake."""
    path = folder / mistake.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(mistake.right, mistake.wrong), encoding="utf-8")
    try:
        return failing(folder, mistake.tests)
    finally:
        path.write_text(before, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if out.is_file() else []
    known = [{key: row[key] for key in ("file", "right", "wrong", "tests")} for row in rows]
    with TemporaryDirectory() as place:
        folder = Path(place) / "copy"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT, symlinks=True)
        for name in ("bench/results", "bench/paper/results"):
            shutil.copytree(ROOT / name, folder / name)
        left = [mistake for mistake in MISTAKES if told(mistake) not in known]
        sound: set[str] = set()
        for mistake in tqdm(left, unit="mistake"):
            if mistake.tests not in sound:
                if name := failing(folder, mistake.tests):
                    raise SystemExit(f"{name} fails without a mistake")
                sound.add(mistake.tests)
            rows.append({**told(mistake), "seen_by": made(folder, mistake)})
            write(out, {"torch": torch.__version__, "rows": rows})
    for row in (missed := [row for row in rows if not row["seen_by"]]):
        print(f"no test saw this mistake: {row['file']}: {row['wrong']!r}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
