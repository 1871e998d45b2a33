"""Does the runs of a plan with any number of workers: of this machine, of a Ray cluster, of a Slurm cluster."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any, TextIO

from bench.harness.command import Stopped, leave_signals_to_the_parent
from bench.harness.peak_rss import keep_memory
from bench.paper.runs import Refusal, parent_alive
from bench.paper.sweeps import ledger as ledgers
from bench.paper.sweeps.ledger import DONE, FAILED, Ledger, Run, execute, load_work, one_line, settings
from bench.paper.sweeps.progress import Screen, State, table

HOW = ("local", "ray", "slurm")
NEEDS = {"ray": "ray>=2.60", "submitit": "submitit>=1.5.4"}
Plan = Callable[[Ledger], list[Run]]
AS_FILE = str(Path(__file__).resolve().parents[1] / "as_file.py")


@dataclass(frozen=True)
class Job:
    """What every worker of a launch is told; plain data, for it goes to other machines."""

    folder: str
    work: str
    paths: tuple[str, ...]
    device: str | None
    launch: str
    environment: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    bench: str = AS_FILE  # what makes our modules known


def take(job: Job, runs: Sequence[Run], alive: Callable[[], bool] = lambda: True) -> str:
    """What a worker does: the runs that nobody else is at. Returns why it ended early, if it is not the runs' fault."""
    try:
        keep_memory()
        with settings(job.environment, job.threads):  # before the work is imported, which may read them
            work, ledger = load_work(job.work, job.paths), Ledger(job.folder)
            for run in runs:
                if alive():
                    execute(ledger, run, work, job.launch, job.device)
    except Stopped:  # the time of a job is up; another goes on from the checkpoint
        return ""
    except Exception as error:  # whatever it is, the launch has to hear of it
        return one_line(error)
    return ""


def launch(how: str, ledger: Ledger, plan: Plan, work: str, workers: int = 1, retry: bool = False, *,
           paths: Sequence[str] = (), environment: Mapping[str, str] | None = None, device: str | None = None,
           threads: int | None = None, address: str | None = None, cluster: str = "slurm",
           partition: str | None = None, timeout_min: int | None = None, gpus_per_node: int | None = None,
           cpus_per_task: int | None = None, poll: float = 0.5, out: TextIO | None = None) -> State:  # fmt: skip
    """Does the runs of `plan` until it has none that is neither done nor failed; returns its runs by state.

    `plan` is asked again and again, for what is done may decide what is to do. Several launches may share a ledger:
    each run is done once, and each launch waits for what it needs of the others. `work`, "module:function", and
    `paths` (for sys.path) must mean the same on every machine. A run whose worker dies is taken up again by another.

    how: "local", processes of this machine (workers=1: this one); "ray", tasks, at most `workers` at a time, each with
        cpus_per_task and gpus_per_node, on the cluster at `address` or RAY_ADDRESS, else on one of this process's own;
        "slurm", an array of `workers` jobs by submitit, with `cluster`, `partition`, `timeout_min`, `gpus_per_node`,
        `cpus_per_task`. A job whose time is up stops, and the next goes on from the run's checkpoint. Jobs of Slurm
        outlive this process; those of the others do not.
    gpus_per_node: None asks Ray and Slurm for no GPU, and then a worker of Ray sees none. Local: worker i of several
        sees GPU i modulo it; None means all that this process sees, unless `device` is "cpu"; 0 leaves all to each.
    environment: variables that every worker is to have; those of this process do not reach other machines.
    device: "cuda" or "cpu"; None leaves it to each worker: CUDA if it has that.
    threads: of torch and OMP in each worker; None leaves them as they are.
    retry: failed runs are tried once more.
    poll: seconds between two looks at the ledger, at least.
    out: where progress goes, stderr if None: a live table on a terminal, else a line for each finished run.

    Raises:
        Refusal: a library that is missing, work that cannot be imported, a plan with two runs of one name, workers
            that end before they take a run, whatever `Ledger` refuses.
    """
    if how not in HOW:
        raise Refusal(f"launcher {how!r}: expected one of {', '.join(HOW)}")
    if workers < 1:
        raise Refusal(f"workers is {workers}, expected 1 or more")
    if threads is not None and threads < 1:
        raise Refusal(f"threads is {threads}, expected 1 or more")
    load_work(work, paths)  # refused here once, and not by each worker
    asked(plan, ledger)
    told = {**(environment or {}), **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    job = Job(str(ledger.folder.resolve()), work, tuple(paths), device, uuid.uuid4().hex, told, threads)
    if how == "ray":
        pool: Pool = Ray(job, workers, address, cpus_per_task or 1, gpus_per_node or 0)
    elif how == "slurm":
        pool = Slurm(job, workers, cluster, slurm_partition=partition if cluster == "slurm" else None,
                     timeout_min=timeout_min, gpus_per_node=gpus_per_node, cpus_per_task=cpus_per_task)  # fmt: skip
    else:
        pool = Here(job) if workers == 1 else Local(job, workers, gpus_per_node)
    screen, seen, ended, whole = Screen(out or sys.stderr, ledger, workers), set(), -1, False
    try:
        while True:
            begun = time.monotonic()
            runs = asked(plan, ledger)
            again = [run for run in runs if retry and run.name not in seen and ledger.failure(run) is not None]
            seen |= {run.name for run in runs}
            for run in again:
                ledger.forgive(run)
            if again:  # the plan may be another now
                continue
            state = ledger.state(runs)
            screen.show(state)
            if not state["left"] and not state["running"]:
                whole = pool.rest()
                return state
            if len(state[DONE]) + len(state[FAILED]) != ended:
                ended, pool.deaths = len(state[DONE]) + len(state[FAILED]), 0
            pool.tend(ledger, state)
            if pool.deaths > (ledgers.TAKEN_UP_AGAIN + 2) * workers:
                raise Refusal(f"workers ended {pool.deaths} times, and no run did: {pool.look}")
            pool.pause(max(poll, 4 * (time.monotonic() - begun)))  # on a slow disk a look takes long
    finally:
        screen.close()
        pool.stop(whole)


def asked(plan: Plan, ledger: Ledger) -> list[Run]:
    runs = plan(ledger)
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise Refusal(f"run {double}: twice in the plan")
    return runs


def status(ledger: Ledger, plan: Plan) -> str:
    """The table of the plan's runs, by group, and why runs failed; runs nothing."""
    state = ledger.state(asked(plan, ledger))
    failed = [f"{run.name}: {ledger.failure(run)}" for run in state[FAILED]]
    return "\n".join([*table(ledger, state), *failed])


class Pool:
    """Workers of a launch. `tend` starts those that are wanted; `deaths` counts those that ended badly."""

    deaths = 0
    look = "see what they say above"

    def tend(self, ledger: Ledger, state: State) -> None:
        raise NotImplementedError

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def alive(self) -> bool:
        """Whether a worker may be at something."""
        return False

    def rest(self, seconds: float = 10.0) -> bool:
        """Lets workers end by themselves: one that has just written its result still has to clear up."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        return True

    def stop(self, whole: bool) -> None:
        """Ends the workers; `whole`: nothing is left to do."""


def wanted(job: Job, ledger: Ledger, state: State, workers: int, alive: int) -> int:
    """How many more workers have something to do: those that are alive and at no run yet will take some of it."""
    ours = sum(ledger.holder(run).get("launch") == job.launch for run in state["running"])
    return max(0, min(workers - alive, len(state["left"]) - max(0, alive - ours)))


class Here(Pool):
    """No worker but this process."""

    def __init__(self, job: Job) -> None:
        self.job, self.work, self.idle = job, load_work(job.work, job.paths), True

    def tend(self, ledger: Ledger, state: State) -> None:
        self.idle = True
        with settings(self.job.environment, self.job.threads):
            for run in state["left"]:
                if execute(ledger, run, self.work, self.job.launch, self.job.device) != ledgers.BUSY:
                    self.idle = False
                    return  # the plan may be another now

    def pause(self, seconds: float) -> None:
        if self.idle:
            time.sleep(seconds)


class Local(Pool):
    """Processes of this machine, started afresh so that CUDA works in them."""

    def __init__(self, job: Job, workers: int, gpus: int | None) -> None:
        self.job, self.workers, self.gpus = job, workers, gpus
        if gpus is None and job.device != "cpu":
            import torch

            self.gpus = torch.cuda.device_count()
        self.context = multiprocessing.get_context("spawn")
        self.slots: dict[int, tuple[Any, Connection]] = {}  # by slot, which decides the GPU

    def tend(self, ledger: Ledger, state: State) -> None:
        for slot, (process, said) in list(self.slots.items()):
            if process.is_alive():
                continue
            del self.slots[slot]
            with suppress(EOFError, OSError):
                if said.poll() and (why := said.recv()):
                    raise Refusal(why)
            self.deaths += process.exitcode != 0
            said.close()
        for _ in range(wanted(self.job, ledger, state, self.workers, len(self.slots))):
            slot = next(slot for slot in range(self.workers) if slot not in self.slots)
            said, say = self.context.Pipe(duplex=False)
            job = self.of_slot(slot)
            process = self.context.Process(target=_local_worker, args=(job, state["left"], os.getpid(), say))
            with settings(job.environment):  # from its first import on: OMP reads its threads once
                process.start()
            say.close()
            self.slots[slot] = (process, said)

    def of_slot(self, slot: int) -> Job:
        if not self.gpus:
            return self.job
        known = {**os.environ, **self.job.environment}
        seen = known.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(self.gpus)))).split(",")[: self.gpus]
        return replace(self.job, environment={**self.job.environment, "CUDA_VISIBLE_DEVICES": seen[slot % len(seen)]})

    def pause(self, seconds: float) -> None:
        wait([process.sentinel for process, _ in self.slots.values()], seconds) if self.slots else time.sleep(seconds)

    def alive(self) -> bool:
        return any(process.is_alive() for process, _ in self.slots.values())

    def stop(self, whole: bool) -> None:
        for process, _ in self.slots.values():
            process.terminate()
        for process, said in self.slots.values():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
            said.close()


def _local_worker(job: Job, runs: list[Run], parent: int, say: Connection) -> None:
    leave_signals_to_the_parent()
    alive = parent_alive(parent)

    def watch() -> None:  # a parent that is killed takes its workers with it, or they would hold the claims
        while alive():
            time.sleep(0.5)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
    say.send(take(job, runs, alive))


def by_value() -> Callable[[Job, list[tuple[str, dict[str, Any]]]], str]:
    """`take` for other machines: pickled whole, as it is no module's, so that it can say where our modules are."""

    def begin(job: dict, runs: list) -> str:
        from runpy import run_path

        run_path(job["bench"])
        from bench.paper.sweeps.launch import from_afar

        return from_afar(job, runs)

    return begin


def from_afar(job: dict[str, Any], runs: list[tuple[str, dict[str, Any]]]) -> str:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):  # submitit's own would make the run fail, or go on
        if getattr(signal.getsignal(number), "__module__", "").startswith("submitit"):
            signal.signal(number, _stop)
    return take(Job(**job), [Run(*run) for run in runs])


def _stop(number: int, _: Any) -> None:
    raise Stopped(number)


def needed(name: str, how: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refusal(f"launcher {how} needs {name} ({error}): pip install '{NEEDS[name]}'") from None


class Ray(Pool):
    """A task for each run; Ray starts it again when its worker dies."""

    def __init__(self, job: Job, workers: int, address: str | None, cpus: int, gpus: int) -> None:
        self.ray, self.job, self.workers, self.tasks = needed("ray", "ray"), job, workers, {}
        self.ours = not self.ray.is_initialized()
        address = address or os.environ.get("RAY_ADDRESS")
        if self.ours:
            before = signal.getsignal(signal.SIGTERM)  # Ray's would end this process in other words than command's
            own = {} if address else {"num_cpus": workers * cpus, "include_dashboard": False,
                                      "object_store_memory": 100 * 2**20}  # fmt: skip
            try:
                self.ray.init(address=address or "local", log_to_driver=False, logging_level="error", **own)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise Refusal(f"ray at {address or 'this machine'}: {one_line(error)}") from None
            with suppress(ValueError):  # not in the main thread
                signal.signal(signal.SIGTERM, before)
        self.begin = self.ray.remote(by_value()).options(
            max_retries=ledgers.TAKEN_UP_AGAIN, num_cpus=cpus, num_gpus=gpus
        )

    def tend(self, ledger: Ledger, state: State) -> None:
        at_work = self.at_work()
        for task in [task for task in self.tasks if task not in at_work]:
            run = self.tasks.pop(task)
            try:
                why = self.ray.get(task)
            except self.ray.exceptions.RayTaskError as error:
                raise Refusal(f"ray: {one_line(error.cause)}") from None
            except self.ray.exceptions.RayError as error:
                with ledger.claim(run) as got:
                    if got and ledger.record(run) is None:
                        ledger.failed(run, f"its worker ended again and again ({type(error).__name__})")
                continue
            if why:
                raise Refusal(why)
        under_way = {run.name for run in self.tasks.values()}
        for run in [run for run in state["left"] if run.name not in under_way][: self.workers - len(self.tasks)]:
            self.tasks[self.begin.remote(vars(self.job), [(run.name, run.config)])] = run

    def at_work(self) -> list[Any]:
        tasks = list(self.tasks)
        return self.ray.wait(tasks, num_returns=len(tasks), timeout=0)[1] if tasks else []

    def alive(self) -> bool:
        return len(self.at_work()) > 0

    def stop(self, whole: bool) -> None:
        if self.ours:
            self.ray.shutdown()  # its tasks end with it
            return
        for task in self.at_work():  # Ray 2.60 ends this process if it is told to cancel what has just come in
            self.ray.cancel(task, force=True)


class Slurm(Pool):
    """Jobs by submitit, each of which takes runs until there are none."""

    def __init__(self, job: Job, workers: int, cluster: str, **options: Any) -> None:
        submitit = needed("submitit", "slurm")
        self.job, self.workers, self.cluster, self.jobs, logs = job, workers, cluster, [], Path(job.folder) / ".jobs"
        self.look = f"see the logs in {logs}"
        given = {key: value for key, value in options.items() if value is not None}
        try:
            self.executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
            self.executor.update_parameters(name="sweep", **given)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise Refusal(f"slurm: {one_line(error)}") from None

    def tend(self, ledger: Ledger, state: State) -> None:
        alive = []
        for job in self.jobs:
            if not job.done():
                alive.append(job)
            elif self.cluster != "debug" and not job.paths.result_pickle.exists():  # submitit would wait for it
                self.deaths += 1
            elif job.exception() is not None:
                self.deaths += 1
            elif why := job.result():
                raise Refusal(why)
        self.jobs = alive
        more = wanted(self.job, ledger, state, self.workers, len(alive))
        if more:
            runs = [(run.name, run.config) for run in state["left"]]
            self.jobs += self.executor.map_array(by_value(), [vars(self.job)] * more, [runs] * more)

    def alive(self) -> bool:
        return not all(job.done() for job in self.jobs)

    def stop(self, whole: bool) -> None:
        if self.cluster == "slurm" and self.jobs and not whole:
            ids = " ".join(str(job.job_id) for job in self.jobs)
            print(f"jobs that go on: {ids}; the same command waits for them, scancel ends them", file=sys.stderr)
            return
        for job in self.jobs:
            if self.cluster == "debug" or not job.done():  # done() of a debug job would begin it
                job.cancel(check=False)
