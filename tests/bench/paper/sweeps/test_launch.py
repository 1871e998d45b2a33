"""Launchers: workers that are killed, two launches at once, Ray, submitit, refusals, progress."""

import os
import signal
import sys
import warnings
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from bench.harness.command import Refusal
from bench.paper.sweeps import launch as launchers
from bench.paper.sweeps import progress
from bench.paper.sweeps.launch import launch, load_work, status
from bench.paper.sweeps.ledger import TAKEN_UP_AGAIN, Ledger, Run
from bench.paper.sweeps.testing import Place, of_group, until


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "sweep_work", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Place(tmp_path)


TOLD = "PREFIXATTN_OF_A_TEST"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_get_the_environment_and_the_threads(place: Place, workers: int) -> None:
    import torch

    before = (torch.get_num_threads(), dict(os.environ))
    runs = place.runs(*[{"environment": [TOLD, "OMP_NUM_THREADS"], "threads": True}] * 2)
    place.launch(runs, workers=workers, environment={TOLD: "so"}, threads=3)
    for run in runs:
        result = place.ledger.result(run)
        assert (result[TOLD], result["OMP_NUM_THREADS"], result["threads"]) == ("so", "3", 3)
        assert workers == 1 or result["born"]  # not only set later
    assert (torch.get_num_threads(), dict(os.environ)) == before


def test_work_is_imported_with_the_environment(place: Place) -> None:
    (place.folder / "code" / "reads.py").write_text(
        f"import os\nfound = os.environ.get('{TOLD}')\ndef work(config, scratch):\n    return {{'found': found}}\n"
    )
    runs = place.runs({})
    job = launchers.Job(str(place.ledger.folder), "reads:work", tuple(place.paths), "cpu", "a launch", {TOLD: "so"})
    assert launchers.from_afar(vars(job), [(run.name, run.config) for run in runs]) == ""
    assert place.ledger.result(runs[0]) == {"found": "so"} and TOLD not in os.environ


@pytest.mark.parametrize(
    ("gpus", "device", "visible", "seen"),
    [
        (None, None, None, ["0", "1", "0"]),
        (None, "cuda", "5,6", ["5", "6", "5"]),
        (None, "cpu", None, [None] * 3),
        (0, None, None, [None] * 3),
        (3, "cpu", None, ["0", "1", "2"]),
        (2, None, "5,6,7", ["5", "6", "5"]),
    ],
)
def test_local_workers_spread_over_the_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int | None, device: str | None, visible: str | None, seen: list[str | None]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = {TOLD: "so", **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    pool = launchers.Local(launchers.Job("", "", (), device, "", told), 3, gpus)
    jobs = [pool.of_slot(slot) for slot in range(3)]
    assert [job.environment.get("CUDA_VISIBLE_DEVICES") for job in jobs] == seen
    assert {job.environment[TOLD] for job in jobs} == {"so"}


def test_a_worker_decides_its_device(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # here, and not in the workers
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    runs = place.runs({}, {})
    place.launch(runs, workers=2, device=None)
    place.is_whole(runs)


def test_finished_runs_are_never_repeated_and_failed_ones_on_request(place: Place) -> None:
    runs = place.runs({}, {"fails": True}, {})
    state = place.launch(runs)
    assert {name: len(found) for name, found in state.items()} == {"done": 2, "running": 0, "failed": 1, "left": 0}
    assert place.ledger.failure(runs[1]).startswith("ValueError: loss is nan (sweep_work.py:")
    place.launch(runs)
    assert place.calls() == {0: 1, 1: 1, 2: 1}
    place.launch(runs, retry=True)
    assert place.calls() == {0: 1, 1: 2, 2: 1}
    assert "t/g/r1: failed: ValueError: loss is nan" in place.out.getvalue()
    lines = [line.split(":")[0] for line in place.out.getvalue().splitlines() if line.startswith("t/g")]
    assert lines == ["t/g/r0", "t/g/r1", "t/g/r2", "t/g/r1"]


def test_a_failure_of_another_config_does_not_count(place: Place) -> None:
    place.launch(place.runs({"fails": True}))
    runs = place.runs({})
    place.launch(runs)
    place.is_whole(runs)


def test_what_is_done_may_decide_what_is_to_do(place: Place) -> None:
    first, second = place.runs({}, {})

    def plan(ledger: Ledger) -> list[Run]:
        return [first] if ledger.result(first) is None else [first, second]

    launch("local", place.ledger, plan, "sweep_work:work", paths=place.paths, out=place.out)
    place.is_whole([first, second])


def test_local_takes_up_the_runs_of_killed_workers(place: Place) -> None:
    runs = place.runs({"kills": 1}, {}, {"kills": 2}, {})
    place.launch(runs, workers=2)
    place.is_whole(runs)
    assert place.calls() == {0: 2, 1: 1, 2: 3, 3: 1}
    assert place.ledger.result(runs[2])["tries"] == 2
    assert os.getpid() not in {place.ledger.result(run)["pid"] for run in runs}


def test_a_run_that_kills_its_workers_fails_in_the_end(place: Place) -> None:
    runs = place.runs({"kills": 100}, {})
    state = place.launch(runs, workers=2)
    assert (state["failed"], state["done"]) == (runs[:1], runs[1:])
    assert place.calls() == {0: 1 + TAKEN_UP_AGAIN, 1: 1}
    assert place.ledger.failure(runs[0]).startswith(f"its worker was killed {1 + TAKEN_UP_AGAIN} times")


def test_workers_that_end_before_they_take_a_run(place: Place) -> None:
    (place.folder / "code" / "dies.py").write_text(
        "import multiprocessing, os\nif multiprocessing.parent_process():\n    os._exit(3)\ndef work(c, s): ...\n"
    )
    with pytest.raises(Refusal, match="workers ended 11 times, and no run did"):
        launch("local", place.ledger, lambda ledger: place.runs({}), "dies:work", 2, paths=place.paths, out=place.out,
               poll=0.01, device="cpu")  # fmt: skip


def test_a_launch_waits_until_its_workers_have_cleared_up(place: Place) -> None:
    (place.folder / "code" / "slow_end.py").write_text(
        "import multiprocessing, time\nfrom sweep_work import work\nfrom bench.paper.sweeps.ledger import Ledger\n"
        "clear = Ledger.clear\n"
        "if multiprocessing.parent_process():\n"
        "    Ledger.clear = lambda ledger, run: (time.sleep(1), clear(ledger, run))\n"
    )
    runs = place.runs({}, {})
    launch("local", place.ledger, lambda ledger: runs, "slow_end:work", 2, paths=place.paths, out=place.out, poll=0.01,
           device="cpu")  # fmt: skip
    place.is_whole(runs)


def test_two_launches_at_once_do_each_run_once(place: Place) -> None:
    runs = place.runs(*[{"sleep": 0.02}] * 30)
    both = [place.start(runs, 1), place.start(runs, 1)]
    assert [process.communicate(timeout=60)[1] and process.returncode for process in both] == [0, 0]
    place.is_whole(runs)
    assert place.calls() == dict.fromkeys(range(30), 1)
    assert len({place.ledger.result(run)["pid"] for run in runs}) == 2


@pytest.mark.parametrize(
    ("how", "number"), [("local", signal.SIGTERM), ("local", signal.SIGKILL), ("ray", signal.SIGTERM)]
)
def test_a_launch_that_is_ended_takes_its_workers_along(place: Place, how: str, number: int) -> None:
    if how == "ray":
        pytest.importorskip("ray", reason="the launcher ray needs ray")
    gate = place.folder / "gate"
    runs = place.runs({"until": str(gate)}, {"until": str(gate)}, {})
    process = place.start(runs, 2, how)
    until(lambda: len(place.calls()) == 2)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    if number == signal.SIGTERM:
        assert process.returncode == 128 + number and "sweep: stopped by SIGTERM" in said
    until(lambda: not of_group(process.pid) and place.ledger.state(runs)["left"] == runs)
    gate.touch()
    place.launch(runs)
    place.is_whole(runs)
    assert place.calls() == {0: 2, 1: 2, 2: 1}


def test_ray_takes_up_the_run_of_a_killed_worker(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the launcher ray needs ray")
    runs = place.runs({"kills": 1}, {"environment": [TOLD]}, {}, {"fails": True})
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what ray will do, or it warns
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # ray leaves logs and sockets to the collector
        state = place.launch(runs, "ray", 2, environment={TOLD: "so"})
    assert place.ledger.result(runs[1])[TOLD] == "so"
    assert signal.getsignal(signal.SIGTERM) == before
    assert state["failed"] == runs[3:] and place.ledger.failure(runs[3]).startswith("ValueError: loss is nan")
    assert place.calls() == {0: 2, 1: 1, 2: 1, 3: 1}
    place.ledger.forgive(runs[3])
    place.ledger.clear(runs[3])
    place.is_whole(runs[:3])
    assert os.getpid() not in {place.ledger.result(run)["pid"] for run in runs[:3]}


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_ray_cancels_nothing_that_came_in(monkeypatch: pytest.MonkeyPatch, ours: bool, whole: bool) -> None:
    came_in, at_work, told = "came in", "at work", []
    ray = SimpleNamespace(
        is_initialized=lambda: not ours,
        init=lambda **options: told.append("init"),
        remote=lambda function: SimpleNamespace(options=lambda **options: None),
        wait=lambda tasks, num_returns, timeout: ([came_in], [at_work]),
        cancel=lambda task, force: told.append(task),
        shutdown=lambda: told.append("shutdown"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    pool = launchers.Ray(launchers.Job("", "", (), None, ""), 2, None, 1, 0)
    pool.tasks = {came_in: Run("a", {}), at_work: Run("b", {})}
    assert pool.alive()
    pool.stop(whole)
    assert told == (["init", "shutdown"] if ours else [at_work])


def test_submitit_in_this_process(place: Place) -> None:
    pytest.importorskip("submitit", reason="the launcher slurm needs submitit")
    runs = place.runs({}, {"fails": True}, {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "unclosed file", ResourceWarning)  # submitit's logs
        state = place.launch(runs, "slurm", 2, cluster="debug", timeout_min=5, cpus_per_task=1)
    assert state["failed"] == runs[1:2] and len(state["done"]) == 2
    assert place.calls() == {0: 1, 1: 1, 2: 1}


def test_submitit_takes_up_the_run_of_a_killed_job(place: Place) -> None:
    pytest.importorskip("submitit", reason="the launcher slurm needs submitit")
    runs = place.runs({"kills": 1}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # submitit leaves its processes to the collector
        place.launch(runs, "slurm", 1, cluster="local", timeout_min=5)
    place.is_whole(runs)
    assert place.calls() == {0: 2, 1: 1}


def signal_once_begun(place: Place, number: int) -> None:
    """Sends this process a signal when a run of `place` is at work, and never later: nobody might take it then."""
    until(lambda: bool(place.calls()))
    os.kill(os.getpid(), number)


def test_a_job_whose_time_is_up_leaves_its_run_to_the_next(place: Place) -> None:
    run, other = place.runs({"until": "never"}, {})
    job = launchers.Job(str(place.ledger.folder), "sweep_work:work", tuple(place.paths), "cpu", "a launch")

    def of_submitit(number: int, _: Any) -> None:  # what it does in a job: an error that any `except Exception` meets
        raise RuntimeError("Job not requeued because: timed-out")

    of_submitit.__module__ = "submitit.core.job_environment"
    numbers = (signal.SIGUSR2, signal.SIGTERM)
    before = [signal.signal(number, of_submitit) for number in numbers]
    try:
        Thread(target=signal_once_begun, args=(place, signal.SIGUSR2), daemon=True).start()
        assert launchers.from_afar(vars(job), [(run.name, run.config), (other.name, other.config)]) == ""
        assert signal.getsignal(signal.SIGTERM) is not of_submitit
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert place.ledger.state([run, other])["left"] == [run, other]
    assert place.ledger.holder(run) == {}


@pytest.mark.parametrize(("how", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_a_library_that_is_missing(place: Place, monkeypatch: pytest.MonkeyPatch, how: str, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Refusal, match=rf"launcher {how} needs {library} .*: pip install '{library}>=") as caught:
        place.launch(place.runs({}), how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "work", "workers", "said"),
    [
        ("cloud", "sweep_work:work", 1, "launcher 'cloud': expected one of local, ray, slurm"),
        ("local", "sweep_work:work", 0, "workers is 0, expected 1 or more"),
        ("local", "no_such_module:work", 1, "work 'no_such_module:work': expected module:function"),
        ("local", "sweep_work:absent", 1, "work 'sweep_work:absent': expected module:function"),
        ("local", "sweep_work", 1, "work 'sweep_work': expected module:function"),
        ("local", "sweep_work:__name__", 1, "not a function"),
    ],
)
def test_launches_that_are_refused(place: Place, how: str, work: str, workers: int, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        launch(how, place.ledger, lambda ledger: place.runs({}), work, workers, paths=place.paths, out=place.out)
    assert not place.ledger.folder.exists()


def test_slurm_without_a_cluster(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="the launcher slurm needs submitit")
    monkeypatch.setenv("PATH", str(place.folder))
    with pytest.raises(Refusal, match="slurm: "):
        place.launch(place.runs({}), "slurm", cluster="slurm")


def test_no_threads(place: Place) -> None:
    with pytest.raises(Refusal, match="threads is 0, expected 1 or more"):
        place.launch(place.runs({}), threads=0)


def test_two_runs_of_one_name(place: Place) -> None:
    (run,) = place.runs({})
    with pytest.raises(Refusal, match="run t/g/r0: twice in the plan"):
        place.launch([run, run])


def test_status_shows_groups_and_failures_and_runs_nothing(place: Place) -> None:
    load_work("sweep_work:work", place.paths)
    runs = [Run("t/b/x", {"n": 0}), Run("t/a/x/y", {"n": 1}), Run("t/a/z", {"n": 2}), Run("t/b/z", {"n": 3})]
    place.ledger.write(runs[0], {}, 3.0)
    place.ledger.failed(runs[1], "no\n luck")
    with place.ledger.claim(runs[2]):
        rows = [line.split() for line in status(place.ledger, lambda ledger: runs).splitlines()]
        assert progress.remaining(place.ledger, place.ledger.state(runs), 1) == ", about 0:00:06 left"
    assert rows == [
        ["group", "done", "running", "failed", "left"],
        ["t/a", "0", "1", "1", "0"],
        ["t/b", "1", "0", "0", "1"],
        ["all", "1", "1", "1", "1"],
        ["t/a/x/y:", "no", "luck"],
    ]
    assert not place.calls()


def test_a_terminal_gets_a_table_drawn_over_itself(place: Place) -> None:
    place.out.isatty = lambda: True  # type: ignore[method-assign]
    place.launch(place.runs({}, {}))
    text = place.out.getvalue()
    assert "\x1b[3F" in text and "elapsed 0:00:0" in text
    last = [line.removeprefix("\x1b[2K").split() for line in text.rpartition("\x1b[3F")[2].splitlines()]
    assert last[:2] == [["group", "done", "running", "failed", "left"], ["t/g", "2", "0", "0", "0"]]
