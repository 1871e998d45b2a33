"""Random calls against float64: python -m tests.fuzz --calls 6000; one of them again: python -m tests.fuzz --case 17.

A run that is interrupted goes on where it stopped, as long as the code is the same. Exits with 1 if more lies outside
the bar than may.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "build" / "fuzz.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--calls", type=int, default=6000, help="answers to judge, of all backends together")
    parser.add_argument("--case", type=int, help="run the case of this number alone and print every tensor")
    parser.add_argument("--start", type=int, default=0, help="the first case's number")
    parser.add_argument("--backends", nargs="+", default=["cpu", "reference"], choices=["cpu", "reference", "triton"])
    parser.add_argument("--record", type=Path, default=RECORD, help=f"JSON file of counts and worst cases ({RECORD})")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever the record holds")
    options = parser.parse_args()
    if "triton" in options.backends:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
    from prefixattn.testing import interpreter

    if options.calls < 1:
        parser.error(f"--calls is {options.calls}, expected 1 or more")
    from prefixattn import backends

    for name in options.backends:  # where none answers, a run would never end
        if reasons := backends.here()[name]:
            parser.error(f"{name} does not run here: {'; '.join(reasons)}")
    interpreter.prepare()
    if options.case is not None:
        return one(options.case, options.backends)
    return many(options)


def one(number: int, backends: list[str]) -> int:
    from tests.fuzz.cases import make
    from tests.fuzz.judge import Judge

    case = make(number)
    print(case)
    judge, outside = Judge(case), False
    for backend in backends:
        answer = judge.answer(backend)
        if isinstance(answer, str):
            print(f"  {backend}: {answer}")
            continue
        for f in judge.findings(answer):
            outside |= not f.ratio <= 1
            print(
                f"  {backend} {f.name}: rms error {f.error:.2e}, allowed {f.allowed:.2e}: {f.ratio:.2f} times the bar"
            )
    return int(outside)


def many(options: argparse.Namespace) -> int:
    from tests.fuzz import tally

    run = {"code": fingerprint(), "backends": options.backends, "start": options.start}
    record = {**run, **tally.empty(), "next": options.start, "answers": 0}
    if options.record.is_file() and not options.fresh:
        before = json.loads(options.record.read_text())
        if {key: before.get(key) for key in run} == run:
            record = before
            print(f"going on at case {record['next']}, after {record['answers']} calls", flush=True)
    try:
        while record["answers"] < options.calls:
            record["answers"] += tally.add(record, record["next"], options.backends)
            if record["next"] % 100 == 0:
                write(options.record, record)
                print(f"{record['answers']} of {options.calls} calls; {summary(record)}", flush=True)
    except KeyboardInterrupt:
        write(options.record, record)
        print(f"\ninterrupted; the same command goes on at case {record['next']}")
        return 130
    reasons = tally.verdict(record)
    record["verdict"] = reasons or "within the bar"
    write(options.record, record)
    for worst in record["worst"][:15]:
        print(f"{worst['ratio']:8.2f} times the bar, {worst['backend']}: {worst['case']} {worst['times_the_bar']}")
    print(f"{record['answers']} calls; {summary(record)}; {options.record}")
    for reason in reasons:
        print(f"FAILED {reason}")
    return int(bool(reasons))


def summary(record: dict) -> str:
    from tests.fuzz import tally

    return "; ".join(
        f"{backend} {dtype}: {tally.share(count)} outside"
        for backend, types in record["calls"].items()
        for dtype, count in sorted(types.items())
        if count["calls"]
    )


def write(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def fingerprint() -> str:
    """Of all the code that a count depends on, PyTorch's version among it."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    files = [*(ROOT / "prefixattn").rglob("*"), *(ROOT / "kernels").glob("*.py"), *Path(__file__).parent.glob("*.py")]
    for path in sorted(files):
        if path.suffix in (".py", ".so"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main())
