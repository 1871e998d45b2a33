"""Options of the benchmarks and the record that they fill."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from command import NOTHING, SIGNALS, interrupted
from platforms import Platform
from record import RESULTS, Record, device_slug


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


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    quick, out = request.config.getoption("--quick"), request.config.getoption("--out")
    cases = [item.callspec.params for item in request.session.items if isinstance(item, pytest.Function)]
    side = Platform.chosen(request.config)
    record = Record(side, cases, quick, 0.05 if quick else request.config.getoption("--minutes"))
    yield record
    if interrupted:
        print(f"\n{interrupted[0]}; {NOTHING}")
        return
    if out is None and not quick:
        if request.config.getoption("keyword") or any("::" in argument for argument in request.config.args):
            print("\nonly some of the cases were asked for: nothing is written without --out")
            return
        out = RESULTS / f"{device_slug(side.device)}.json"
    if out is None:
        return
    if request.session.testsfailed:
        print(f"\n{request.session.testsfailed} cases failed: {out} is left as it was")
        return
    record.write(out)
    print(f"\nwrote {out}")
