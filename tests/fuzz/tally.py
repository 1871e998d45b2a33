"""Runs cases and keeps count of what lies outside the bar, in a form that JSON holds."""

from collections.abc import Iterable
from typing import Any

from tests.fuzz.cases import Case, make
from tests.fuzz.judge import Finding, Judge

SHARE = 0.001  # of all calls may lie outside the bar; where the batch is large none may
# Of kernels in 16 bits: their gradients start from out as it was rounded, see docs/design/numerics.md
HALF_SHARE = 0.04
KEPT = 40  # of the worst

Tally = dict[str, Any]


def empty() -> Tally:
    return {"next": 0, "calls": {}, "outside_by_tensor": {}, "refusals": {}, "faults": [], "worst": []}


def add(tally: Tally, number: int, backends: Iterable[str]) -> int:
    """Judges the backends in the case of this number; returns how many answered."""
    case = make(number)
    tally["next"] = number + 1
    try:
        judge = Judge(case)
    except Exception as error:  # the truth's or plain PyTorch's: a fault of the fuzz
        _fault(tally, case, "truth", error)
        return 0
    if number % 10 == 0:
        _agreement(tally, judge)
    answered = 0
    for backend in backends:
        if backend == "triton" and not for_interpreter(case):
            continue
        count = tally["calls"].setdefault(backend, {}).setdefault(_type(case), _count())
        try:
            answer = judge.answer(backend)
        except Exception as error:
            _fault(tally, case, backend, error)
            continue
        if isinstance(answer, str):
            count["refused"] += 1
            tally["refusals"][answer] = tally["refusals"].get(answer, 0) + 1
            continue
        answered += 1
        outside = [f for f in judge.findings(answer) if not f.ratio <= 1]
        for key in ("", "large_batch_") if case.large_batch else ("",):
            count[key + "calls"] += 1
            count[key + "outside"] += bool(outside)
        for finding in outside:
            key = f"{backend} {_type(case)} {finding.name}"
            tally["outside_by_tensor"][key] = tally["outside_by_tensor"].get(key, 0) + 1
        if outside:
            _remember(tally, case, backend, outside)
    return answered


def verdict(tally: Tally) -> list[str]:
    """Why the run fails, in words; empty if it does not."""
    reasons = [f"{fault['backend']}, {fault['case']}: {fault['error']}" for fault in tally["faults"]]
    for backend, types in tally["calls"].items():
        for dtype, count in types.items():
            most = allowed_share(backend, dtype)
            large = 0 if most == SHARE else int(most * count["large_batch_calls"])
            if count["large_batch_outside"] > large:
                reasons.append(
                    f"{backend} {dtype}: {count['large_batch_outside']} large batches outside the bar, expected {large}"
                )
            if count["outside"] > most * count["calls"]:
                reasons.append(f"{backend} {dtype}: {share(count)} outside the bar, expected at most {most:.1%}")
    return reasons


def allowed_share(backend: str, dtype: str) -> float:
    return SHARE if backend == "reference" or dtype in ("float32", "float64") else HALF_SHARE


def share(count: dict[str, int]) -> str:
    outside, calls = count["outside"], count["calls"]
    return f"{outside} of {calls} calls ({outside / max(calls, 1):.2%})"


def for_interpreter(case: Case) -> bool:
    """Whether Triton's interpreter answers in a second or so; its bfloat16 is float32 inside."""
    B, H, _, L, S, P, _, _ = case.sizes.values()
    return B * H * L * (P + S) <= 20_000 and B * H <= 16 and _type(case) != "bfloat16"


def _type(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _count() -> dict[str, int]:
    return dict.fromkeys(("calls", "outside", "large_batch_calls", "large_batch_outside", "refused"), 0)


def _fault(tally: Tally, case: Case, backend: str, error: Exception) -> None:
    tally["faults"].append({"case": str(case), "backend": backend, "error": f"{type(error).__name__}: {error}"[:500]})


def _agreement(tally: Tally, judge: Judge) -> None:
    for finding in judge.disagreement():
        if not finding.ratio <= 1:
            words = f"{finding.name}: the two float64 answers differ by {finding.error:.1e}"
            _fault(tally, judge.case, "truth", ArithmeticError(words))


def _remember(tally: Tally, case: Case, backend: str, outside: list[Finding]) -> None:
    tensors = {f.name: round(f.ratio, 2) for f in sorted(outside, key=lambda f: -f.ratio)}
    worst = {"number": case.number, "ratio": max(tensors.values()), "backend": backend, "case": str(case)}
    tally["worst"].append({**worst, "times_the_bar": tensors})
    tally["worst"].sort(key=lambda w: -w["ratio"])
    del tally["worst"][KEPT:]
