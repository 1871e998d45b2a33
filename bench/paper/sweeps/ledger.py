"""One JSON file for each finished run of a sweep: what is done, who is at what, and what failed."""

import fcntl
import gc
import importlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.command import FULL
from bench.harness.peak_rss import PeakMemory
from bench.paper.runs import Refusal, digest, provenance, read_json, write_json

DONE, FAILED, BUSY = "done", "failed", "busy"
STATES = (DONE, "running", FAILED, "left")
TAKEN_UP_AGAIN = 3  # times that a run whose worker was killed is taken up again in one launch
ELAPSED = "elapsed.json"
RECORD = {"name": str, "config": dict, "result": dict, "seconds": (int, float), "peak_mib": (int, float)}
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "peft", "numpy", "pillow", "scikit-learn", "prefixattn",
            "triton")  # fmt: skip
Work = Callable[[dict[str, Any], Path], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run: its name, a relative path such as tiny/dogs/deep/search-lr5, and all that its result depends on.

    Raises:
        Refusal: a name that is no path inside a folder, or a config that JSON cannot hold.
    """

    name: str
    config: dict[str, Any]

    def __post_init__(self) -> None:
        if not all(PART.fullmatch(part) for part in self.name.split("/")) or self.name.endswith(".failed"):
            raise Refusal(f"run {self.name!r}: expected parts of letters, digits and ._+=-, divided by /")
        try:  # as it will be read again: tuples are lists, keys are strings
            object.__setattr__(self, "config", json.loads(json.dumps(self.config, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise Refusal(f"run {self.name}: its config cannot be written as JSON ({error})") from None

    @property
    def key(self) -> str:
        """The name of its lock and of its scratch folder, in which no other's can lie."""
        return f"{self.name.replace('/', '.')[-100:]}-{digest(self.name)[:12]}"


class Ledger:
    """The runs of a sweep in a folder, for any number of processes at once, on one machine or several.

    A finished run is FOLDER/NAME.json, a failed one FOLDER/NAME.failed.json; both appear whole. A run is claimed by
    `flock` on a file in FOLDER/.claims, which the kernel gives back when the process dies. Across machines this needs a
    shared disk that passes locks on: NFS from version 4 (not mounted with local_lock or nolock), Lustre mounted with
    flock (not localflock), GPFS, CephFS. On a disk that takes locks and keeps them to itself two machines do a run
    twice. So do two that hear late of each other's files (NFS keeps names for up to a minute). The second then finds
    the first's file and drops its own result. A process that `work` forked holds its claim too, until it ends.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._read: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {}

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def record(self, run: Run) -> dict[str, Any] | None:
        """The whole file of a finished run (seconds in s, peak_mib in MiB); None if it is not finished.

        Raises:
            Refusal: a file that is damaged, or of a run with another config.
        """
        path = self.path(run)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if self._read.get(run.name, (None,))[0] != mark:  # plans ask for each result again and again
            content = read_json(path, "delete it to do this run again")
            known = content if isinstance(content, dict) else {}
            wrong = [key for key, kind in RECORD.items() if key not in known or not isinstance(known[key], kind)]
            if wrong:
                raise Refusal(f"{path}: not a result of a sweep (lacks {', '.join(wrong)}); delete it to do it again")
            self._read[run.name] = (mark, content)
        content = self._read[run.name][1]
        if content["config"] != run.config:
            other, ours = content["config"], run.config
            keys = sorted(key for key in {*other, *ours} if key not in other or key not in ours
                          or other[key] != ours[key])  # fmt: skip
            raise Refusal(
                f"{path}: result of another config (differs in {', '.join(keys)}); delete it or choose another folder"
            )
        return content

    def result(self, run: Run) -> dict[str, Any] | None:
        """What `work` returned for a finished run, else None; refuses as `record` does."""
        record = self.record(run)
        return None if record is None else record["result"]

    def write(self, run: Run, result: dict[str, Any], seconds: float = 0.0, peak_mib: float = 0.0,
              begun_with: dict[str, Any] | None = None) -> None:  # fmt: skip
        """Makes the run finished. Its scratch folder and its failure go.

        Raises:
            Refusal: it is finished already.
        """
        path = self.path(run)
        if path.exists():
            raise Refusal(f"{path}: already finished; delete it to do this run again")
        write_json(path, {"name": run.name, "config": run.config, "result": result, "seconds": seconds,
                          "peak_mib": peak_mib, "provenance": begun_with or provenance(PACKAGES)})  # fmt: skip
        self.forgive(run)
        self.clear(run)

    def failed(self, run: Run, message: str) -> None:
        """Writes the failure in one line. The scratch folder stays, for a retry to go on from."""
        write_json(self._failure(run), {"name": run.name, "config": run.config, "message": " ".join(message.split())})

    def failure(self, run: Run) -> str | None:
        """The message of a failed run; None for one that did not fail, or did so with another config."""
        if not (path := self._failure(run)).exists():
            return None
        found = read_json(path, "delete it to do this run again")
        if not isinstance(found, dict) or not isinstance(found.get("message"), str):
            raise Refusal(f"{path}: not a failure of a sweep; delete it to do this run again")
        return found["message"] if found.get("config") == run.config else None

    def forgive(self, run: Run) -> None:
        """Forgets that the run failed."""
        self._failure(run).unlink(missing_ok=True)

    def scratch(self, run: Run) -> Path:
        """The folder for the run's checkpoint, made if it is missing; it goes when the run is finished."""
        path = self.folder / ".scratch" / run.key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def clear(self, run: Run) -> None:
        shutil.rmtree(self.folder / ".scratch" / run.key, ignore_errors=True)

    @contextmanager
    def claim(self, run: Run, launch: str = "") -> Iterator[bool]:
        """Keeps the run to this process until the block, or the process, ends; yields whether it was free.

        `launch` names what this process is a worker of: `deaths` counts within it.
        """
        path = self.folder / ".claims" / run.key
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:  # open for writing, or NFS gives no exclusive lock
            if not _lock(file.fileno(), fcntl.LOCK_EX, path):
                yield False
                return
            before = _holder(path)  # who left words here died
            deaths = before.get("deaths", 0) + 1 if before.get("launch") == launch else 0
            try:
                _put(file.fileno(), json.dumps({"launch": launch, "deaths": deaths}).encode())
                yield True
            finally:
                with suppress(OSError):  # of a full disk: the lock must go all the same
                    _put(file.fileno(), b"")
                fcntl.flock(file, fcntl.LOCK_UN)  # closing would leave it to a process that was forked meanwhile

    def holder(self, run: Run) -> dict[str, Any]:
        """Of a claimed run: `launch` and `deaths`, how many workers of this launch died at it."""
        return _holder(self.folder / ".claims" / run.key)

    def running(self, run: Run) -> bool:
        """Whether a living process has claimed it."""
        path = self.folder / ".claims" / run.key
        try:
            if path.stat().st_size == 0:  # nobody is at it: one that claims it now must not meet our lock
                return False
            with open(path, "rb") as file:
                return not _lock(file.fileno(), fcntl.LOCK_SH, path)
        except FileNotFoundError:
            return False

    def state(self, runs: Sequence[Run]) -> dict[str, list[Run]]:
        """The runs by state: done, running, failed, left."""
        found: dict[str, list[Run]] = {name: [] for name in STATES}
        for run in runs:
            if self.record(run) is not None:
                found[DONE].append(run)
            elif self.running(run):
                found["running"].append(run)
            elif self.record(run) is not None:  # it has just ended
                found[DONE].append(run)
            else:
                found["left" if self.failure(run) is None else FAILED].append(run)
        return found

    def _failure(self, run: Run) -> Path:
        return self.folder / f"{run.name}.failed.json"


def _lock(descriptor: int, kind: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise Refusal(f"{path}: this disk takes no locks ({error.strerror}); choose another folder") from None
    return True


def _put(descriptor: int, data: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, data)  # at the end, which is the start: opened to append


def _holder(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):  # nobody, or between two of his writes
        return {}
    return found if isinstance(found, dict) else {}


class _Clock:
    """Seconds of work on a run, summed over its interruptions; written down every few, for a kill gives no notice."""

    def __init__(self, scratch: Path, every: float = 5.0) -> None:
        self.path, self.every, self.start, self.before = scratch / ELAPSED, every, time.monotonic(), 0.0
        others = [entry for entry in scratch.iterdir() if entry.name != ELAPSED and not entry.name.startswith(".")]
        if others:  # else it starts anew
            with suppress(Refusal, TypeError, KeyError, ValueError):
                self.before = float(read_json(self.path)["seconds"])
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "_Clock":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._save()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def _tick(self) -> None:
        while not self.ended.wait(self.every):
            self._save()

    def _save(self) -> None:
        with suppress(OSError):  # the run itself will say that the disk is full
            write_json(self.path, {"seconds": self.seconds()})


@contextmanager
def settings(environment: Mapping[str, str], threads: int | None = None) -> Iterator[None]:
    """Environment variables and torch's threads for the block; then as before, for this process may do other work."""
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        if threads is None:
            yield
            return
        import torch

        had = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(had)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def load_work(name: str, paths: Sequence[str] = ()) -> Work:
    """The function that "module:function" names, looked for in `paths` too, which stay on sys.path."""
    sys.path.extend(path for path in dict.fromkeys(paths) if path not in sys.path)
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise Refusal(f"work {name!r}: expected module:function, to be imported ({error})") from None
    if not callable(found):
        raise Refusal(f"work {name!r}: not a function")
    return found


def execute(ledger: Ledger, run: Run, work: Work, launch: str = "", device: str | None = None) -> str:
    """Does a run that nobody has done, failed or claimed: `work(config, scratch folder)` returns its result, a dict.

    Returns DONE or FAILED, whoever did it, or BUSY where another process is at it. An exception of `work` makes it
    failed, and so do TAKEN_UP_AGAIN + 1 deaths of workers of the same `launch`. A full disk is the caller's: no run
    can be done there. `device` says whose memory is measured, that of the last process if it was interrupted: "cuda",
    "cpu", or None for CUDA where torch sees one.
    """
    with ledger.claim(run, launch) as got:
        if not got:
            return BUSY
        if ledger.record(run) is not None:
            ledger.clear(run)  # whoever finished it may have died on the way here
            return DONE
        if ledger.failure(run) is not None:
            return FAILED
        if (deaths := ledger.holder(run).get("deaths", 0)) > TAKEN_UP_AGAIN:
            ledger.failed(run, f"its worker was killed {deaths} times (by the kernel, if memory ran out)")
            return FAILED
        if device is None:
            import torch

            device = "cuda" if torch.cuda.is_available() else "cpu"
        scratch, begun_with = ledger.scratch(run), provenance(PACKAGES)
        with _Clock(scratch) as clock:
            try:
                free(device)
                meter = PeakMemory(device)
                result = work(deepcopy(run.config), scratch)
                if not isinstance(result, dict):
                    raise TypeError(f"the work returned a {type(result).__name__}, expected a dict")
                json.dumps(result)
                seconds, peak = clock.seconds(), meter.mib()
            except Exception as error:  # a run may fail in any way, and the others go on
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                ledger.failed(run, one_line(error))
                return FAILED
        if ledger.record(run) is None:  # else a machine that did not see our lock was first
            ledger.write(run, result, seconds, peak, begun_with)
        return DONE


def free(device: str) -> None:
    """Gives back what the last run of this process left, or it would count as in use at the start of this one."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """A refusal's own words; of another error its kind, its first line and where it rose."""
    if isinstance(error, Refusal):
        return str(error)
    text, at = str(error).strip().splitlines(), error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    where = f" ({Path(at.tb_frame.f_code.co_filename).name}:{at.tb_lineno})" if at is not None else ""
    return f"{type(error).__name__}: {text[0] if text else ''}{where}"
