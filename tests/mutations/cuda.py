"""Makes each mistake of cuda_sites.py in a copy of the CUDA kernels, and sees whether their programs find it.

    python -m tests.mutations.cuda --out tests/records/cuda_mutations.json      # minutes; goes on where it was stopped
    python -m tests.mutations.cuda --out ... --only fwd_short.h:arrive           # part of file:function:kind:text

The programs are csrc/cuda/tests/{fwd,bwd}.cpp on the host machine: every feature, at two orders of the threads and
more. First they pass without a mistake. What found it is the first thing that a program says. In the record stays
what was caught in a file that has not changed; the others are made again. Exit status 1: one was not caught, and
REASONS of cuda_reasons.py does not say why.
"""

import argparse
import functools
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from bench.harness.record import write_rows
from build_support.common import find_compiler
from tests.mutations.cuda_reasons import reason_of
from tests.mutations.cuda_sites import PROGRAMS, Site, digests, programs_of, sites, write_switched

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O1", "-I", "csrc", "-include", "csrc/mutant.h"]
SECONDS = 120  # of a processor, that a program may take

SAID = re.compile(r"^\S+:\d+: ")  # as CHECK does
# what the machine's words are about, and else what the programs compare
OUTCOMES = {
    "race": r"with no (order|barrier) between",
    "late copy": r"still fills|has waited for this asynchronous copy",
    "never written": r"nobody has written yet",
    "deadlock": r"deadlock",
    "outside": r"bytes at (shared|global)",
    "meeting": r", block \(\d",
    "wrong result": r" errs? by ",
    "other bits": r"other (bits|mass)",
    "cost": r"costs more|of the (useful products|floor's bytes)|conflicts|ldmatrix meets",
}
CAUGHT = *OUTCOMES, "crash", "no end", "else"
SURVIVED = "survived"
NOT_REACHED = "not reached"  # no case of the programs comes to it, so that none was run


class Copy:
    """Of the kernels, with a switch for each site."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        self.sites = write_switched(folder)

    @functools.cache  # noqa: B019
    def program(self, name: str) -> Path:
        path = self.folder / name
        command = [*find_compiler(), *FLAGS, f"csrc/cuda/tests/{name}.cpp", "-o", str(path)]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} does not compile with its switches: {done.stdout[-2000:]}")
        return path

    def reached(self, name: str) -> set[int]:
        """By a program without a mistake, which passes."""
        outcome, lines = self._run(name, 0)
        if outcome != SURVIVED:
            raise SystemExit(f"{name} fails without a mistake: {lines[-1]}")
        return {int(line.split()[1]) for line in lines if line.startswith("reached ")}

    def outcome(self, name: str, number: int) -> tuple[str, str]:
        """Of a program with a mistake, and what it says first."""
        outcome, lines = self._run(name, number)
        said = lines[-1] if lines and outcome != SURVIVED else ""
        said = re.sub(r"^\S+:\d+: ", "", said.replace(f"{self.folder}/csrc/", "").replace("csrc/", ""))
        return outcome, re.sub(r"\b0x[0-9a-f]+", "0x...", said)

    def _run(self, name: str, number: int) -> tuple[str, list[str]]:
        lines = []
        with _running(self.program(name), number) as program:
            assert program.stdout is not None
            for line in program.stdout:
                lines.append(line.strip())
                if SAID.match(line):
                    return next((key for key, words in OUTCOMES.items() if re.search(words, line)), "else"), lines
            program.wait()
        if program.returncode == -24:  # SIGXCPU
            return "no end", [f"not done after {SECONDS} seconds"]
        if program.returncode < 0:
            return "crash", [f"killed by signal {-program.returncode}"]
        return ("else" if program.returncode else SURVIVED), lines


@contextmanager
def _running(path: Path, number: int) -> Iterator[subprocess.Popen[str]]:
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    with subprocess.Popen(
        [path], env={"MUTANT": str(number)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", preexec_fn=limit,
    ) as program:  # fmt: skip
        try:
            yield program
        finally:
            program.kill()


def name_of(row: dict[str, Any]) -> str:
    return ":".join(str(row[key]) for key in ("file", "function", "kind", "text", "nth", "change"))


def kept(before: dict[str, Any], now: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Rows by their names that are still true: all if nothing changed, else those caught in files that did not."""
    same = before["sources"] == now
    return {
        name_of(row): row
        for row in before["rows"]
        if before["sources"].get(f"attention/{row['file']}") == now.get(f"attention/{row['file']}")
        and (same or row["outcome"] in CAUGHT)
    }


def judged(copy: Copy, number: int, site: Site, reached: dict[str, set[int]]) -> dict[str, Any]:
    programs = programs_of(site.file, ROOT)
    outcome, said, seen_by = NOT_REACHED, "", ""
    for name in programs:
        if number in reached[name]:
            outcome, said = copy.outcome(name, number)
            seen_by = name if outcome in CAUGHT else ""
        if seen_by:
            break
    return {**site.identity(), "outcome": outcome, "program": seen_by, "said": said}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of the names of the mutants to make")
    args = parser.parse_args()
    before = json.loads(args.out.read_text()) if args.out.is_file() else {"sources": {}, "rows": []}
    with TemporaryDirectory() as place:
        now = digests(ROOT)
        copy = Copy(Path(place) / "copy")
        rows = kept(before, now)
        order = [name_of(site.identity()) for site in copy.sites]
        left = [n for n, name in enumerate(order, 1) if args.only in name and (args.only or name not in rows)]
        reached = {name: copy.reached(name) for name in tqdm(PROGRAMS if left else (), unit="program")}
        start = time.perf_counter()

        def save() -> list[dict[str, Any]]:
            made = [rows[name] for name in order if name in rows]
            write_rows(args.out, {"sources": now, "rows": made})
            return made

        for number in tqdm(left, unit="mutant"):
            rows[order[number - 1]] = judged(copy, number, copy.sites[number - 1], reached)
            save()
        made = save()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{len(left)} mutants, {time.perf_counter() - start:.0f} s, {used.ru_utime:.0f} s of a processor")
    missing = [name for name in order if name not in rows]
    unexplained = [row for row in made if row["outcome"] not in CAUGHT and not reason_of(row)]
    for row in made:
        if row["outcome"] not in CAUGHT:
            print(f"{row['outcome']}: {name_of(row)}: {reason_of(row) or 'no reason is known'}", file=sys.stderr)
    for name in missing:
        print(f"not made yet: {name}", file=sys.stderr)
    return 1 if unexplained or missing else 0


def all_names() -> list[str]:
    return [name_of(site.identity()) for site in sites(ROOT)]


if __name__ == "__main__":
    sys.exit(main())
