"""What "auto" takes on a GPU: the Triton kernels, once a tiny case has agreed with the reference there.

A compiler that is new to a GPU can be wrong in silence. Each kind of kernel is therefore tried at its first use for a
device, a type and a head size. Where it disagrees, or where a call's own features do not compile, the reference takes
over for the rest of the process, with a warning.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from prefixattn import reference, triton
from prefixattn.reference import Needs, Results

# by rms, of the reference's rms: far above rounding, far below any mistake
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
_TF32_TOLERANCE = 4e-3
# kind of kernel: B (for a GPU of any size the short backward wants a head for each processor), L, S, P
TRIALS = {
    "fwd_short": (1, 37, 37, 5),
    "fwd_fold": (3, 2, 37, 300),
    "fwd": (1, 321, 321, 20),
    "bwd_short": (0, 37, 37, 5),
    "bwd": (1, 321, 321, 20),
}
TRIALS |= {kind + triton.MEMORY: sizes for kind, sizes in TRIALS.items()}
TRIALS |= {kind + triton.SOFTCAP: sizes for kind, sizes in TRIALS.items()}
_HEADS = 2

Case = tuple[str, torch.device, torch.dtype, int]  # kind, device, type, head size
verdicts: dict[Case, str] = {}  # what was wrong, or ""


def unsupported(q: Tensor, *args: Any) -> list[str]:
    reasons = triton.unsupported(q, *args)
    if q.device.type != "cuda" and not reasons:
        reasons.append("Triton's interpreter is for tests")
    return reasons


def fwd(*inputs: Any) -> Results:
    q = inputs[0]
    case = (triton.kind_of_forward(*inputs), q.device, q.dtype, q.shape[3])
    if _trusted(case):
        try:
            return triton.fwd(*inputs)
        except Exception as error:  # raised again, but for a compiler's
            _give_up(case, error)
    return reference.fwd(*inputs)


def bwd(*inputs: Any, into: tuple[Tensor, Tensor, Tensor] | None = None) -> tuple[Tensor, ...]:
    q = inputs[2]
    case = (triton.kind_of_backward(*inputs), q.device, q.dtype, q.shape[3])
    if _trusted(case):
        try:
            return triton.bwd(*inputs, into=into)  # type: ignore[misc]
        except Exception as error:  # raised again, but for a compiler's
            _give_up(case, error)
    return reference.bwd(*inputs, into=into)  # type: ignore[misc]


def verdict(case: Case) -> str:
    """What is wrong with the kernels in this case, found out at the first question; "" if nothing is."""
    if case not in verdicts:
        _decide(case, _try(case))
    return verdicts[case]


def _trusted(case: Case) -> bool:
    if case not in verdicts and case[1].type == "cuda" and torch.cuda.is_current_stream_capturing():
        return True  # nothing can be compared while a graph is recorded; the question stays open
    return not verdict(case)


def _decide(case: Case, words: str) -> None:
    verdicts[case] = words
    if words:
        kind, device, dtype, D = case
        warnings.warn(
            f"prefixattn: the triton kernels fail ({kind}) for {dtype}, head size {D} on {name(device)}: {words}. "
            "This process uses the much slower reference for them instead; please report it. "
            'backend="triton" runs them all the same.',
            RuntimeWarning,
            stacklevel=2,
        )


def _give_up(case: Case, error: Exception) -> None:
    """Raises what is no fault of the compiler; otherwise the case is lost, with all its features."""
    if not type(error).__module__.startswith("triton") and "PassManager" not in str(error):
        raise error
    _decide(case, f"{type(error).__name__}: {error}")


def _try(case: Case) -> str:
    kind, device, dtype, D = case
    B, L, S, P = TRIALS[kind]
    with_memory, softcap = triton.MEMORY in kind, 1.0 if triton.SOFTCAP in kind else 0.0
    numbers = (0.0, 0.0, True, D**-0.5, "elu", softcap)
    needs: Needs = (True, True, True, True, True, False, with_memory)
    try:
        B = B or triton.least_batch(device, _HEADS)
        generator = torch.Generator("cpu").manual_seed(0)
        sizes = [(B, _HEADS, L, D), (B, _HEADS, S, D), (B, _HEADS, S, D), (1, _HEADS, P, D), (1, _HEADS, P, D)]
        q, k, v, prefix_k, prefix_v, dout = (
            torch.randn(size, generator=generator, device="cpu").to(device, dtype) for size in (*sizes, sizes[0])
        )
        memory = None
        if with_memory:
            memory = torch.randn((1, _HEADS, D, D), generator=generator, device="cpu").to(device, dtype)
        inputs: Any = (q, k, v, prefix_k, prefix_v, None, memory, None, None, None)
        asked: Any = (*inputs, *numbers, True, with_memory)
        with torch.no_grad():
            expected: tuple[Tensor, ...] = reference.fwd(*asked)
            if kind.startswith("fwd"):
                names = "out lse mass attended"
                found: tuple[Tensor, ...] = triton.fwd(*asked)
            else:
                names = "dq dk dv dprefix_k dprefix_v dmask dmemory"
                out, lse, _, attended = expected
                inputs = (dout, None, *inputs, attended if with_memory else out, lse, *numbers, needs)
                found, expected = triton.bwd(*inputs), reference.bwd(*inputs)
        compared = zip(names.split(), found, expected, strict=True)
        wrong = [name for name, a, b in compared if b.numel() and not close(a, b, dtype)]
    except Exception as error:  # whatever a compiler or a driver raises
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong)} differ from the reference" if wrong else ""


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """By rms, of the reference's rms; in float32 as torch's own switch for TF32 stands."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tolerance = _TF32_TOLERANCE if tf32 else _TOLERANCE[dtype]
    error = (actual.double() - expected.double()).square().mean()
    return bool(error <= tolerance**2 * expected.double().square().mean())  # False for a nan


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
