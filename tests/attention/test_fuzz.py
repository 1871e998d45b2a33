"""A few hundred random calls, right and wrong ones; `make fuzz` runs thousands, `python -m tests.fuzz --case N` one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prefixattn import backends
from prefixattn.testing.attention import rms, same_dtype
from tests.fuzz import tally
from tests.fuzz.cases import make
from tests.fuzz.judge import Judge
from tests.support import ROOT

CASES = 240
LUCK = 2  # of so few calls this many may lie outside before the share says anything


def counted(backend: str, numbers: range) -> dict[str, dict[str, int]]:
    """Counts of calls by type, when nothing but bad luck lies outside the bar."""
    record = tally.empty()
    for number in numbers:
        tally.add(record, number, [backend])
    assert not record["faults"], record["faults"]
    counts: dict[str, dict[str, int]] = record["calls"][backend]
    assert not any(count["large_batch_outside"] for count in counts.values()), record["worst"]
    for count in counts.values():
        assert count["outside"] <= LUCK + tally.SHARE * count["calls"], record["worst"]
    return counts


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_random_calls_are_as_accurate_as_plain_pytorch(name: str, part: int) -> None:
    if reasons := backends.here()[name]:
        pytest.skip(f"{name}: " + "; ".join(reasons))
    counts = counted(name, range(part * CASES // 4, (part + 1) * CASES // 4))
    assert sum(count["calls"] for count in counts.values()) >= CASES // 4 * (0.5 if name == "cpu" else 0.95)


def test_a_few_random_calls_of_triton() -> None:
    if reasons := backends.here()["triton"]:
        pytest.skip("triton: " + "; ".join(reasons))
    assert sum(count["calls"] for count in counted("triton", range(24)).values()) >= 4


def test_a_case_is_the_same_each_time_and_every_kind_is_there() -> None:
    words, large = set(), 0
    for number in range(CASES):
        case, again = make(number), make(number)
        assert str(case) == str(again)
        for name, t in case.tensors.items():
            assert torch.equal(t, again.tensors[name]) and t.stride() == again.tensors[name].stride()
        large += case.large_batch
        words |= {word.partition("[")[0].partition("(")[0].partition("~")[0] for word in case.words}
        words |= {f"{letter}0" for letter, n in case.sizes.items() if n == 0}
    kinds = (
        "causal packed two-widths scores memory softcap scale dropout prefix-dropout bank per_sample lengths of-rows "
        "dlse hides sinks window sequences-training sequences-cached sequences-decoding sequences-ragged "
        "cu_seqlens_q-sliced cu_seqlens_k-sliced"
    )
    layouts = "q-transposed k-expanded v-sliced bool-mask float-mask float32-mask dout-biased dout-ones some-gradients"
    assert not {*kinds.split(), *layouts.split(), "B0", "L0", "S0", "P0"} - words
    assert large >= 5


@pytest.mark.parametrize("times, outside", [(3.0, True), (1.0, False)])
def test_the_fuzz_sees_an_error_of_three_times_plain_pytorchs(times: float, outside: bool) -> None:
    generator, seen = torch.Generator("cpu").manual_seed(1), []
    for number in range(40):
        judge = Judge(make(number))
        if judge.case.dtype != torch.float32:
            continue
        same = same_dtype(judge.inputs, judge.seed)
        for name, right in judge.right.items():
            if right.numel() < 1000 or not right.isfinite().all():
                continue
            plain = max(*(rms(answer - right) for answer in same[name]), torch.finfo(torch.float32).eps * rms(right))
            noise = torch.randn(right.shape, generator=generator, dtype=torch.float64, device="cpu")
            [finding] = judge.findings({name: (right + times * plain * noise).float()})
            assert (finding.ratio > 1) == (outside and plain > 0), (str(judge.case), finding)
            seen.append(plain > 0)
    assert sum(seen) > 20


def test_bad_calls_are_refused_in_words() -> None:
    """In a process of its own, because what must not happen is that it ends."""
    start, count = 0, 500
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz.bad", str(start), str(count)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    *lines, last = ran.stdout.splitlines() or [""]
    complaints = [line for line in lines if line.startswith("COMPLAINT")]
    assert not complaints, "\n".join(complaints)
    assert ran.returncode == 0 and last == "done", f"ended at call {last} with {ran.returncode}: {ran.stderr[-2000:]}"


def test_a_run_can_be_interrupted_and_writes_what_it_counted(tmp_path: Path) -> None:
    record = tmp_path / "fuzz.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for calls in ("6", "12"):
        options = ["--calls", calls, "--backends", "reference", "--record", str(record)]
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *options]
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert ("going on at case" in ran.stdout) == (calls == "12")
        assert json.loads(record.read_text())["answers"] == int(calls)


@pytest.mark.parametrize("wrong", [["--backends", "bogus"], ["--calls", "0"]])
def test_what_could_never_end_does_not_begin(wrong: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--record", str(tmp_path / "fuzz.json"), *wrong]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 2 and wrong[1] in ran.stderr.splitlines()[-1]
