"""What tests of the sweep engine share: a ledger with a work that can be killed, fail or wait."""

import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.paper.sweeps import launch as launchers
from bench.paper.sweeps.launch import launch
from bench.paper.sweeps.ledger import DONE, Ledger, Run

WORK = """
import os, signal, time
from pathlib import Path

def work(config, scratch):
    with open(config["calls"], "a") as file:  # one write: lines of several processes do not mix
        file.write(f"{config['n']}\\n")
    tries = len(list(scratch.glob("try*")))
    (scratch / f"try{tries}").touch()
    if tries < config.get("kills", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if config.get("fails"):
        raise ValueError("loss is nan\\nat a second line")
    while config.get("until") and not Path(config["until"]).exists():
        time.sleep(0.01)
    time.sleep(config.get("sleep", 0))
    result = {"n": config["n"], "tries": tries, "pid": os.getpid()}
    result |= {name: os.environ.get(name) for name in config.get("environment", [])}
    if config.get("threads"):
        import torch
        result["born"] = "OMP_NUM_THREADS=3" in Path("/proc/self/environ").read_text().split("\\0")
        result["threads"] = torch.get_num_threads()
    return result
"""
SCRIPT = """
import json, runpy, sys
from pathlib import Path
runpy.run_path(sys.argv[1])
from bench.harness.command import command
from bench.paper.sweeps.launch import launch
from bench.paper.sweeps.ledger import Ledger, Run

def main():
    folder, configs, workers, paths, how = json.loads(sys.argv[2])
    runs = [Run(f"t/g/r{at}", config) for at, config in enumerate(configs)]
    state = launch(how, Ledger(folder), lambda ledger: runs, "sweep_work:work", workers, paths=paths, poll=0.05,
                   device="cpu")
    assert len(state["done"]) == len(runs)

if __name__ == "__main__":
    sys.exit(command("sweep", main))
"""


class Place:
    """A ledger, a work module beside it, and what the work was called for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger, self.calls_file = folder, Ledger(folder / "ledger"), folder / "calls"
        (folder / "code").mkdir()
        (folder / "code" / "sweep_work.py").write_text(WORK)
        self.paths = [str(folder / "code")]
        self.out = io.StringIO()

    def runs(self, *settings: dict[str, Any]) -> list[Run]:
        found = []
        for at, more in enumerate(settings):
            found.append(Run(f"t/g/r{at}", {"n": at, "calls": str(self.calls_file), **more}))
        return found

    def calls(self) -> Counter[int]:
        return Counter(map(int, self.calls_file.read_text().split())) if self.calls_file.exists() else Counter()

    def launch(self, runs: list[Run], how: str = "local", workers: int = 1, **options: Any) -> dict[str, list[Run]]:
        told = {"poll": 0.05, "device": "cpu", **options}  # None imports torch in each worker
        return launch(how, self.ledger, lambda ledger: runs, "sweep_work:work", workers,
                      paths=self.paths, out=self.out, **told)  # fmt: skip

    def start(self, runs: list[Run], workers: int, how: str = "local") -> subprocess.Popen[str]:
        (self.folder / "script.py").write_text(SCRIPT)
        told = [str(self.ledger.folder), [run.config for run in runs], workers, self.paths, how]
        words = [str(self.folder / "script.py"), launchers.AS_FILE, json.dumps(told)]
        return subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True, start_new_session=True)

    def is_whole(self, runs: list[Run]) -> None:
        """Each run is done and written; nothing but results, and no claim, is left."""
        for run in runs:
            record = json.loads(self.ledger.path(run).read_text())
            assert (record["name"], record["config"]) == (run.name, run.config)
            assert record["seconds"] >= 0 and "versions" in record["provenance"] and "peak_mib" in record
            assert record["result"]["n"] == run.config["n"]
        names = {f"{run.name}.json" for run in runs}
        files = [path for path in self.ledger.folder.rglob("*") if path.is_file()]
        mine = {str(path.relative_to(self.ledger.folder)) for path in files}
        assert {name for name in mine if not name.startswith((".claims", ".jobs"))} == names
        assert not any(path.stat().st_size for path in files if path.parent.name == ".claims")
        assert {name: len(found) for name, found in self.ledger.state(runs).items() if found} == {DONE: len(runs)}


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.01)


def of_group(group: int) -> list[str]:
    """The living processes of a group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(entry.parent.name)
    return found
