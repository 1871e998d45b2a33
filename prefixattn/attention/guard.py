"""What "auto" takes on a GPU: the Triton kernels, once a tiny case has agreed with the reference there.

Each kind of kernel is tried at its first use for a device, a type and a head size. Where it disagrees, or where a
call's own features do not compile, the reference takes over for the rest of the process, with a warning.
"""

from typing import Any

import torch

from prefixattn.attention import reference, triton, widths
from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants
from prefixattn.trials import Pairs, Trials, device_name

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
TRIALS |= {kind + triton.WINDOW: sizes for kind, sizes in TRIALS.items()}
# packed sequences have the kernels of long samples; the numbers are the longest one's
TRIALS |= {
    kind + triton.PACKED: (1, 37, 140, 20) for kind in TRIALS if not any(of in kind for of in ("_short", "_fold"))
}
_HEADS = 2

Case = tuple[str, torch.device, torch.dtype, int]  # kind, device, type, head size


def unsupported(call: Call, needs: Needs) -> list[str]:
    reasons = triton.unsupported(call, needs)
    if call.q.device.type != "cuda" and not reasons:
        reasons.append("Triton's interpreter is for tests")
    return reasons


@widths.around_fwd
def fwd(call: Call, wants: Wants) -> Results:
    case = _case(triton.kind_of_forward(call), call)
    if trials.trusted(case):
        try:
            return triton.fwd(call, wants)
        except Exception as error:  # raised again, but for a compiler's
            _give_up(case, error)
    return reference.fwd(call, wants)


@widths.around_bwd
def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
    case = _case(triton.kind_of_backward(call, needs), call)
    if trials.trusted(case):
        try:
            return triton.bwd(call, given, needs, into)
        except Exception as error:  # raised again, but for a compiler's
            _give_up(case, error)
    return reference.bwd(call, given, needs, into)


def _case(kind: str, call: Call) -> Case:
    return kind, call.q.device, call.q.dtype, call.q.shape[3]


def _give_up(case: Case, error: Exception) -> None:
    """Raises what is no fault of the compiler; otherwise the case is lost, with all its features."""
    if not type(error).__module__.startswith("triton") and "PassManager" not in str(error):
        raise error
    trials.decide(case, f"{type(error).__name__}: {error}")


def _lost(kind: str, device: torch.device, dtype: torch.dtype, D: int) -> str:
    return f"the triton kernels fail ({kind}) for {dtype}, head size {D} on {device_name(device)}"


def _run(kind: str, device: torch.device, dtype: torch.dtype, D: int) -> Pairs:
    B, L, S, P = TRIALS[kind]
    with_memory, softcap = triton.MEMORY in kind, 1.0 if triton.SOFTCAP in kind else 0.0
    wants = Wants(mass=True, attended=with_memory)
    needs = Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True, memory=with_memory)
    B = B or triton.least_batch(device, _HEADS)
    window_left = -1
    if triton.WINDOW in kind:  # some queries see all their keys and some of the prefix, others neither
        window_left = S + P // 2 if "fold" in kind else S // 2
    packing: dict[str, Any] = {}
    if triton.PACKED in kind:
        each = [(0, 0), (L, S), (0, S // 2), (L // 2, L // 4)]  # no query, then more queries than keys
        queries, keys = torch.tensor(each, device=device).cumsum(0).T.contiguous()
        packing = {"cu_seqlens_q": queries, "cu_seqlens_k": keys, "max_seqlen_q": L, "max_seqlen_k": S}
        B, L, S = 1, *map(sum, zip(*each, strict=True))
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = [(B, _HEADS, L, D), (B, _HEADS, S, D), (B, _HEADS, S, D), (1, _HEADS, P, D), (1, _HEADS, P, D)]
    q, k, v, prefix_k, prefix_v, dout = (
        torch.randn(size, generator=generator, device="cpu").to(device, dtype) for size in (*sizes, sizes[0])
    )
    memory = None
    if with_memory:
        memory = torch.randn((1, _HEADS, D, D), generator=generator, device="cpu").to(device, dtype)
    call = Call(
        q, k, v, prefix_k, prefix_v, memory=memory, is_causal=True, scale=D**-0.5, softcap=softcap,
        window_left=window_left, prefix_in_window=window_left >= 0, **packing,
    )  # fmt: skip
    right = reference.fwd(call, wants)
    if kind.startswith("fwd"):
        found, expected = triton.fwd(call, wants)._asdict(), right._asdict()
    else:
        given = Given(dout, None, right.attended if with_memory else right.out, right.lse)
        both = (backend.bwd(call, given, needs)._asdict() for backend in (triton, reference))
        found, expected = ({f"d{name}": t for name, t in grads.items()} for grads in both)
    return [(name, found[name], t) for name, t in expected.items() if t.numel()]


trials = Trials(lambda *case: _run(*case), _lost)
