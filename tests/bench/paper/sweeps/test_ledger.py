"""The ledger of a sweep: results whole or not at all, claims, interruptions, failures."""

import gc
import math
import os
import platform
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from bench.harness import command
from bench.harness.command import Refusal
from bench.paper.sweeps import ledger as ledgers
from bench.paper.sweeps.ledger import BUSY, DONE, FAILED, PACKAGES, Ledger, Run, execute
from bench.paper.sweeps.testing import Place
from tests.support import ROOT


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delitem(sys.modules, "sweep_work", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return Place(tmp_path)


def test_a_run_is_its_json_config() -> None:
    assert Run("a/b", {"x": (1, 2)}).config == {"x": [1, 2]}


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/../b", "a//b", ".claims/a", "a b", "a.failed"])
def test_names_that_are_no_path_inside(name: str) -> None:
    with pytest.raises(Refusal, match="expected parts of letters"):
        Run(name, {})


@pytest.mark.parametrize("value", [math.nan, {1, 2}])
def test_configs_that_json_cannot_hold(value: Any) -> None:
    with pytest.raises(Refusal, match="run a: its config cannot be written as JSON"):
        Run("a", {"x": value})


def test_a_result_appears_whole_and_stays(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("t/g/a", {"lr": 1.0})
    assert place.ledger.result(run) is None

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="not written"):
        patch.setattr(os, "fsync", full)
        place.ledger.write(run, {"x": 1})
    assert place.ledger.result(run) is None and list((place.ledger.folder / "t/g").iterdir()) == []
    (place.ledger.scratch(run) / "state").touch()
    place.ledger.failed(run, "once")
    place.ledger.write(run, {"x": 1}, 2.5, 3.0)
    assert place.ledger.result(run) == {"x": 1}
    assert place.ledger.failure(run) is None and list((place.ledger.folder / ".scratch").iterdir()) == []
    with pytest.raises(Refusal, match=r"t/g/a\.json: already finished"):
        place.ledger.write(run, {"x": 2})
    assert Ledger(place.ledger.folder).record(run)["result"] == {"x": 1}


def test_a_result_of_another_config_names_the_keys(place: Place) -> None:
    place.ledger.write(Run("a", {"lr": 1.0, "wd": 0.0, "old": 1, "same": [1]}), {})
    with pytest.raises(Refusal, match=r"a\.json: result of another config \(differs in lr, new, old\)") as caught:
        place.ledger.result(Run("a", {"lr": 2.0, "wd": 0.0, "new": 1, "same": [1]}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": {}}', '{"config": {}, "result": 1, "seconds": 0}'])
def test_a_damaged_result_is_refused(place: Place, text: str) -> None:
    run = Run("a", {})
    place.ledger.write(run, {})
    assert place.ledger.result(run) == {}
    place.ledger.path(run).write_text(text)  # seen though it was read before
    with pytest.raises(Refusal, match=r"a\.json: not (readable as JSON|a result of a sweep)") as caught:
        place.ledger.result(run)
    assert "\n" not in str(caught.value)
    with pytest.raises(Refusal, match=r"a\.json"):
        place.launch([run])


def test_a_claim_keeps_others_out(place: Place) -> None:
    run, other = place.runs({}, {})
    with place.ledger.claim(run) as got:
        assert got
        with Ledger(place.ledger.folder).claim(run) as again, place.ledger.claim(other) as free:
            assert (again, free) == (False, True)
        assert execute(Ledger(place.ledger.folder), run, lambda config, scratch: {}) == BUSY
        assert [len(found) for found in place.ledger.state([run, other]).values()] == [0, 1, 0, 1]
    assert not place.ledger.running(run)
    assert execute(place.ledger, run, lambda config, scratch: {}) == DONE


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), command.Stopped(signal.SIGTERM)])
def test_an_interruption_gives_the_claim_back_and_is_no_failure(place: Place, stop: BaseException) -> None:
    (run,) = place.runs({})

    def interrupted(config: dict[str, Any], scratch: Path) -> dict[str, Any]:
        (scratch / "checkpoint").touch()
        raise stop

    with pytest.raises(type(stop)):
        execute(place.ledger, run, interrupted)
    assert [name for name, found in place.ledger.state([run]).items() if found] == ["left"]
    assert execute(place.ledger, run, lambda config, scratch: {"kept": (scratch / "checkpoint").exists()}) == DONE
    assert place.ledger.result(run) == {"kept": True}


@pytest.mark.parametrize(("checkpoint", "least"), [(True, 1000.0), (False, 0.0)])
def test_seconds_add_up_over_interruptions_if_there_is_a_checkpoint(
    place: Place, checkpoint: bool, least: float
) -> None:
    (run,) = place.runs({})
    (place.ledger.scratch(run) / "elapsed.json").write_text('{"seconds": 1000.0}')
    if checkpoint:
        (place.ledger.scratch(run) / "state.pt").touch()
    execute(place.ledger, run, lambda config, scratch: {})
    assert least <= place.ledger.record(run)["seconds"] < least + 500


def test_a_full_disk_is_nobodys_failure(place: Place) -> None:
    def full(config: dict[str, Any], scratch: Path) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    (run,) = place.runs({})
    with pytest.raises(OSError, match="No space"):
        execute(place.ledger, run, full)
    assert place.ledger.failure(run) is None and not place.ledger.running(run)


@pytest.mark.parametrize("result", [None, [1], {"x": object()}])
def test_results_that_cannot_be_kept_are_failures(place: Place, result: Any) -> None:
    (run,) = place.runs({})
    assert execute(place.ledger, run, lambda config, scratch: result) == FAILED
    assert place.ledger.failure(run).startswith("TypeError: ")


@pytest.mark.parametrize(
    ("told", "has", "device"),
    [(None, True, "cuda"), (None, False, "cpu"), ("cpu", True, "cpu"), ("cuda", False, "cuda")],
)
def test_the_worker_decides_the_device(
    place: Place, monkeypatch: pytest.MonkeyPatch, told: str | None, has: bool, device: str
) -> None:
    steps: list[str] = []

    class Meter:
        def __init__(self, device: str) -> None:
            steps.append(device)

        def mib(self) -> float:
            return 7.0

    monkeypatch.setattr("torch.cuda.is_available", lambda: has)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: steps.append("emptied"))
    monkeypatch.setattr(ledgers, "PeakMemory", Meter)
    monkeypatch.setattr(ledgers, "provenance", lambda packages: {})
    (run,) = place.runs({})
    assert execute(place.ledger, run, lambda config, scratch: {}, device=told) == DONE
    assert steps == (["emptied", "cuda"] if device == "cuda" else ["cpu"])
    assert place.ledger.record(run)["peak_mib"] == 7.0


@pytest.mark.parametrize("when", ["__init__", "mib"])
def test_a_meter_that_breaks_is_a_failure_of_the_run(place: Place, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no CUDA here")

    monkeypatch.setattr(ledgers.PeakMemory, when, broken)
    (run,) = place.runs({})
    assert execute(place.ledger, run, lambda config, scratch: {}, device="cpu") == FAILED
    assert place.ledger.failure(run).startswith("RuntimeError: no CUDA here")


def test_what_the_last_run_left_is_gone_before_the_next(place: Place) -> None:
    class Heap:
        pass

    left: list[weakref.ref[Heap]] = []

    def leaves_a_cycle(config: dict[str, Any], scratch: Path) -> dict[str, Any]:
        heap = Heap()
        heap.itself = heap  # type: ignore[attr-defined]
        left.append(weakref.ref(heap))
        return {"before": [ref() is not None for ref in left[:-1]]}

    runs = place.runs({}, {})
    gc.disable()
    try:
        for run in runs:
            execute(place.ledger, run, leaves_a_cycle, device="cpu")
    finally:
        gc.enable()
    assert place.ledger.result(runs[1]) == {"before": [False]}


def test_the_ledger_records_the_versions_of_what_decides_a_result(place: Place) -> None:
    run, other = place.runs({}, {})
    execute(place.ledger, run, lambda config, scratch: {}, device="cpu")
    place.ledger.write(other, {})
    for found in (run, other):
        versions = place.ledger.record(found)["provenance"]["versions"]
        assert tuple(versions) == PACKAGES and {"timm", "torchvision", "pillow", "triton"} <= set(versions)
        assert versions["torch"][0].isdigit()


KEPT = """
import resource, sys
sys.path[:0] = {paths!r}
import torch
from bench.harness.peak_rss import PeakMemory, keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(3 << 20)  # 12 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = faults()
keep_memory()
faults()
kept = faults()
meter = PeakMemory("cpu")
held = torch.ones(4 << 20)  # of what was kept, and counted all the same
print(plain, kept, meter.mib())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is kept is glibc's")
def test_memory_that_is_kept_costs_no_faults_and_is_counted() -> None:
    ran = subprocess.run(
        (sys.executable, "-W", "ignore", "-c", KEPT.format(paths=[str(ROOT)])),
        capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"},
    )  # fmt: skip
    plain, kept, mib = map(float, ran.stdout.split())
    assert plain >= 8 * 6 and kept <= plain / 10  # each page anew, of 4 KiB or, where pages are huge, 2 MiB
    assert 15 < mib < 40
