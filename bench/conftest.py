"""Options of the benchmarks under pytest, and how a signal ends them."""

import signal
from pathlib import Path

import pytest

from bench.harness.command import SIGNALS, interrupted


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("prefixattn benchmarks")
    group.addoption("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: where there is none, on the CPU")
    group.addoption("--quick", action="store_true", help="two small shapes, a few rounds; for trying the benchmark")
    group.addoption("--out", type=Path, help="JSON to write; default bench/results/<device>.json, nothing with --quick")
    group.addoption("--minutes", type=float, default=7.0, help="time to spread over the cases, about")
    group.addoption("--ours", help='backend to measure: "cpu" or "reference"; on a GPU "triton" or "reference"')


def pytest_configure(config: pytest.Config) -> None:
    # of a case that a signal ends: as an error it would hide what ended the run
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")

    def stop(number: int, _: object) -> None:
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")  # pytest.exit's is an Exception

    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, stop)


def pytest_keyboard_interrupt(excinfo: pytest.ExceptionInfo[BaseException]) -> None:
    interrupted.append(str(excinfo.value) or "stopped")
