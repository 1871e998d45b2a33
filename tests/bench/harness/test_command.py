"""How the runners and the benchmarks end: in one line that says how to go on, after a signal and on a full disk."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.attention import plot
from bench.harness import command
from bench.harness.command import Refusal
from bench.models import plot as plot_models
from bench.paper.runs import replace_file, save_state, write_text
from bench.paper.sweeps.testing import of_group
from bench.reparam import plot as plot_reparam
from tests.support import ROOT

PAPER = ROOT / "bench" / "paper"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def lines(text: str) -> list[str]:
    """Of a runner; not progress, nor what torchao logs, where it is installed, of what it cannot load."""
    found = [line.rpartition("\r")[2] for line in text.splitlines()]
    return [line for line in found if line.startswith(("nlg.py", "moments.py", "backbone.py", "Traceback", "slow.py"))]


def stopped(arguments: list[str], number: int, ready: Callable[[], bool], **variables: str) -> tuple[int, list[str]]:
    """Status and lines of a command that gets a signal once it is `ready`."""
    process = subprocess.Popen([sys.executable, *arguments], env={**ENVIRONMENT, **variables}, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "it was not ready within five minutes"
        time.sleep(0.01)
    process.send_signal(number)
    stderr = process.communicate(timeout=300)[1]
    while left := of_group(process.pid):  # they were told, and may be at their last words
        assert time.monotonic() < deadline, f"processes {left} were left behind"
        time.sleep(0.1)
    return process.returncode, lines(stderr)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked for in Linux's /proc")
def test_a_study_stopped_says_so_once_and_leaves_no_process(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the runs need transformers")
    out = tmp_path / "study"
    script = [str(PAPER / "nlg.py"), "--suite", "demo", "--model", "small", "--workers", "2", "--out", str(out)]

    def ready() -> bool:
        return len(list(out.glob(".claims/*"))) == 2

    status, told = stopped(script, signal.SIGTERM, ready, PREFIXATTN_DATA="generated")
    assert told == ["nlg.py: stopped by SIGTERM; finished runs are kept, and the same command goes on with the others"]
    assert status == 143
    assert not list(out.glob("*/**/*.json"))


@pytest.mark.parametrize("name", ["moments.py", "backbone.py"])
def test_the_other_runners_stopped_say_so_once(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the runs need transformers")
    code = (
        f"import sys, time; sys.path.insert(0, {str(PAPER)!r}); import {name[:-3]} as m\n"
        "def run(*_): open(sys.argv[-1] + '.ready', 'w').close(); time.sleep(300)\n"
        "m.run = run\n"
    )
    code += {
        "moments.py": "sys.exit(m.command('moments.py', m.main, m.AGAIN))",
        "backbone.py": "sys.exit(m.main())",
    }[name]
    out = tmp_path / "out.json"
    arguments = ["-c", code, "--data", "generated", "--out", str(out)]
    status, told = stopped(arguments, signal.SIGTERM, Path(f"{out}.ready").exists)
    again = {"moments.py": "with the first way that is not finished", "backbone.py": f"from {out / 'checkpoint.pt'}"}
    assert told == [f"{name}: stopped by SIGTERM; the same command goes on {again[name]}"]
    assert status == 143


def ends(work: Callable[[], int | None], capsys: pytest.CaptureFixture[str], **options: str) -> tuple[int, str]:
    status = command.command("slow.py", work, **options)
    return status, capsys.readouterr().err


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as it is without nohup, under which these tests may run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
def test_every_end_has_its_status_and_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    assert ends(lambda: None, capsys) == (0, "") and ends(lambda: 3, capsys) == (3, "")
    assert ends(fails(Refusal("bad")), capsys) == (1, "slow.py: bad\n")
    assert ends(fails(OSError(errno.ENOENT, "no such file")), capsys) == (1, "slow.py: [Errno 2] no such file\n")
    status, told = ends(fails(OSError(errno.ENOSPC, "no space")), capsys, again="go on")
    assert (status, told) == (1, "slow.py: [Errno 28] no space; go on\n")
    assert ends(fails(KeyboardInterrupt()), capsys, again="go on") == (130, "\nslow.py: stopped; go on\n")
    status, told = ends(lambda: signal.raise_signal(signal.SIGHUP), capsys)
    assert (status, told) == (129, f"\nslow.py: stopped by SIGHUP; {command.AGAIN}\n")
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        command.command("slow.py", lambda: 1 // 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL == signal.getsignal(signal.SIGHUP)


def test_a_signal_that_is_ignored_stays_so(capsys: pytest.CaptureFixture[str]) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ends(lambda: signal.raise_signal(signal.SIGHUP), capsys) == (0, "")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# a disk that takes no more


@pytest.fixture
def small_files() -> Any:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_the_disk_does_not_take_is_an_os_error_that_names_it(tmp_path: Path, small_files: Any) -> None:
    import torch

    ways: list[Callable[[Path, int], None]] = [
        lambda path, n: save_state(path, "f", {"a": torch.zeros(n)}),
        lambda path, n: write_text(path, "x" * n),
        lambda path, n: replace_file(path, bytes(n)),
    ]
    for i, way in enumerate(ways):
        way(path := tmp_path / str(i), 10)
        before = path.read_bytes()
        with pytest.raises(OSError, match=f"{path}: not written, and what was there is as it was") as caught:
            way(path, 100_000)
        assert caught.value.errno in command.FULL and "\n" not in str(caught.value)
        assert "enforce" not in str(caught.value)
        assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_a_run_on_a_full_disk_ends_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the runs need transformers")
    code = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))\n"
        f"sys.path.insert(0, {str(PAPER)!r}); sys.argv[0] = {str(PAPER / 'moments.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = ["--data", "generated", "--steps", "1", "--dev", "1", "--out", str(tmp_path / "r.json")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    told = lines(done.stderr)
    assert done.returncode == 1 and len(told) == 1, done.stderr[-3000:]
    assert told[0].startswith("moments.py: ") and ".pt: not written, and what was there is as it was" in told[0]
    assert told[0].endswith("; the same command goes on with the first way that is not finished")
    assert not list(tmp_path.rglob("*.tmp"))


# the benchmarks under pytest write one record at their end


def test_a_benchmark_that_is_stopped_leaves_the_record_as_it_was(tmp_path: Path) -> None:
    (out := tmp_path / "r.json").write_text("{}")
    marker = tmp_path / "began"
    plugin = (
        "import pathlib, time, pytest\n@pytest.hookimpl(wrapper=True)\ndef pytest_runtest_call(item):\n"
        f"    pathlib.Path({str(marker)!r}).touch()\n    result = yield\n    time.sleep(1)\n    return result\n"
    )
    (tmp_path / "slowly.py").write_text(plugin)
    # under xdist, pytest-benchmark refuses to measure
    alone = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("PYTEST_")}
    environment = {**alone, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "slowly",
         "bench/attention/bench_prefix_attn.py", "--quick", "--out", str(out)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    while not marker.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 2 and f"stopped by SIGTERM; {command.NOTHING}" in told, told[-3000:]
    assert json.loads(out.read_text()) == {}


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", "3", "{}", '{"rows": 3}', '{"rows": [{}]}'])
def test_what_is_no_record_is_refused_in_one_line(content: str, tmp_path: Path) -> None:
    for module in (plot, plot_models, plot_reparam):
        (path := tmp_path / "r.json").write_text(content)
        with pytest.raises(SystemExit) as ended:
            module.main([str(path)])
        assert str(ended.value.code).startswith(f"{path}: not results (") and "\n" not in str(ended.value.code)
        assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]
