"""The sweep as a command: every model class of transformers' auto classes, in processes of its own.

    python tests/sweep/run.py --jobs 2 --out results.json [--only REGEX] [--fresh] [--seconds 120]

Can be stopped and started again: of what stands in --out only failures are tried again, unless --fresh. Ends with 1
if a proof failed.
"""

import argparse
import hashlib
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

GIB = 2**30
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MEMORY = 6 * GIB  # of data, for one process
PER_PROCESS = 200  # models, then a fresh one


class Worker:
    """A process that sweeps one model after another, and is ended where one takes too long."""

    def __init__(self) -> None:
        read, write = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--worker", str(write)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[write],
            text=True,
            env=os.environ | QUIET,
        )
        os.close(write)
        self.pipe = os.fdopen(read)
        os.set_blocking(read, False)
        self.name, self.phase, self.since, self.done, self.rest = "", "", time.monotonic(), 0, ""

    def give(self, name: str) -> None:
        assert self.process.stdin is not None
        self.name, self.phase, self.since = name, "importing", time.monotonic()
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # which `take` finds out

    def take(self) -> dict[str, Any] | None:
        """The result, if it is there; the process is gone after a crash."""
        text = self.pipe.read()
        if text == "":
            self.end()
            if self.process.returncode == -signal.SIGTERM:  # from outside: says nothing about the model
                raise KeyboardInterrupt
            how = f"the process ended with {self.process.returncode} while {self.phase}"
            built = self.phase not in ("importing", "building", "plain")
            return {"outcome": "failed" if built else "not built", "reason": how}
        self.rest += text or ""
        while "\n" in self.rest:
            line, self.rest = self.rest.split("\n", 1)
            message = json.loads(line)
            if "phase" in message:
                self.phase = message["phase"]
            else:
                self.done += 1
                return dict(message)
        return None

    def late(self, seconds: float) -> dict[str, Any] | None:
        if time.monotonic() - self.since < seconds:
            return None
        self.end()
        built = self.phase not in ("importing", "building", "plain")
        return {
            "outcome": "failed" if built else "not built",
            "reason": f"more than {seconds:.0f} s while {self.phase}",
        }

    @property
    def gone(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if not self.pipe.closed:
            self.pipe.close()


def work(pipe: int) -> None:
    """The worker's side: names come in at stdin, phases and results go out through the pipe."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(pipe, "w", buffering=1)

    import torch
    import transformers

    from tests.sweep.catalogue import units
    from tests.sweep.one import sweep

    transformers.logging.set_verbosity(60)
    torch.set_num_threads(1)
    known = {unit.name: unit for unit in units()}
    for line in sys.stdin:
        try:
            result = sweep(known[line.strip()], lambda phase: print(json.dumps({"phase": phase}), file=out))
        except Exception as error:  # in the sweep itself
            result = {"outcome": "failed", "reason": f"the sweep: {type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(result), file=out)


def sweep_all(names: list[str], jobs: int, seconds: float, keep: Any) -> None:
    waiting, workers = list(reversed(names)), [Worker() for _ in range(min(jobs, len(names)))]
    for worker in workers:
        worker.give(waiting.pop())
    while workers:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.pipe, selectors.EVENT_READ, worker)
            ready = {key.data for key, _ in selector.select(timeout=1.0)}
        for place, worker in enumerate(list(workers)):
            result = worker.take() if worker in ready else worker.late(seconds)
            if result is None:
                continue
            keep(worker.name, result)
            if worker.gone or worker.done >= PER_PROCESS:
                worker.end()
                workers[place] = Worker()
            if waiting:
                workers[place].give(waiting.pop())
            else:
                workers[place].end()
        workers = [w for w in workers if not w.gone]


def write(path: Path, found: dict[str, Any]) -> None:
    import torch
    import transformers

    counts = dict(sorted(Counter(r["outcome"] for r in found.values()).items()))
    head = {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__, "counts": counts}
    lines = [f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]  # a line for each model
    text = json.dumps(head, indent=1)[:-2] + ',\n "models": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--out", type=Path, default=Path("sweep.json"), help="results; of what is in it only failures are tried again"
    )
    parser.add_argument("--only", default="", help="a regular expression for model_type/Class")
    parser.add_argument("--fresh", action="store_true", help="try again all that is in --out")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one model")
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs is {given.jobs}, expected 1 or more")
    try:
        re.compile(given.only or "")
    except re.error as error:
        parser.error(f"--only is no regular expression: {error}")
    if given.worker is not None:
        work(given.worker)
        return 0

    from tests.sweep.catalogue import units

    every = [unit.name for unit in units()]
    found = json.loads(given.out.read_text())["models"] if given.out.exists() else {}
    found = {name: r for name, r in found.items() if name in every}
    chosen = [
        n
        for n in every
        if re.search(given.only, n) and (given.fresh or n not in found or found[n]["outcome"] == "failed")
    ]
    chosen.sort(key=lambda n: hashlib.sha256(n.encode()).digest())  # so that what was done at any time says something
    start = last = time.monotonic()

    def keep(name: str, result: dict[str, Any]) -> None:
        nonlocal last
        found[name] = result
        done.append(name)
        said = f"{name}: {result['outcome']}  {result.get('reason', '')[:160]}"
        print(f"{len(done)}/{len(chosen)} {time.monotonic() - start:.0f} s  {said}", flush=True)
        if time.monotonic() - last > 5:
            write(given.out, found)
            last = time.monotonic()

    done: list[str] = []
    try:
        sweep_all(chosen, given.jobs, given.seconds, keep)
    finally:
        write(given.out, found)
    counts = Counter(r["outcome"] for r in found.values())
    print(f"{dict(counts)} of {len(every)} in {time.monotonic() - start:.0f} s")
    return int(any(found[n]["outcome"] == "failed" for n in found if re.search(given.only, n)))


if __name__ == "__main__":
    raise SystemExit(main())
