"""Random bad calls, each of which must be refused in words: python -m tests.fuzz.bad 0 200, in a process of its own."""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prefixattn import prefix_attention, prefix_attention_qkvpacked, prefix_attention_varlen
from tests.fuzz.cases import Case, make

REFUSALS = ValueError, NotImplementedError, TypeError
Arguments = dict[str, Any]


def spoiled(number: int) -> tuple[str, Callable[..., Any], Arguments, bool]:
    """A case with something wrong in it, in words; the call; and whether it is wrong whatever the rest of it is."""
    case = make(number)
    arguments: Arguments = {**case.tensors, **case.options, "return_lse": True}
    function: Callable[..., Any] = prefix_attention if case.sequences is None else prefix_attention_varlen
    if case.packed:
        qkv = torch.stack([arguments.pop(n).transpose(1, 2) for n in "qkv"], 2)
        arguments, function = {"qkv": qkv, **arguments}, prefix_attention_qkvpacked
    draw = random.Random(f"bad {number}")
    words = []
    if draw.random() < 0.05:  # nothing wrong with the rest, which may be answered
        words.append("head size 0")
        for name in arguments.keys() & {"qkv", "q", "k", "v", "prefix_k", "prefix_v", "memory"}:
            arguments[name] = arguments[name].detach()[..., :0]
        if "memory" in arguments:
            arguments["memory"] = arguments["memory"][..., :0, :]
        return f"{case}; {words[0]}", function, arguments, False
    own = random.Random(f"bad for certain {number}")  # a stream of its own: the other calls stay what they were
    if own.random() < (0.1 if case.sequences is None else 0.7):
        kinds = (
            (_window, _sinks, _widths) if case.sequences is None else (_offsets, _offsets, _longest, _window, _sinks)
        )
        changed = own.choice(kinds)(own, arguments, case)
        arguments |= changed
        return f"{case}; {', '.join(f'{n}={_shown(x)}' for n, x in changed.items())}", function, arguments, True
    for _ in range(draw.choice((1, 1, 1, 2))):
        name, value = draw.choice((_tensor, _tensor, _number, _index, _flag, _mask))(draw, arguments, case)
        arguments[name] = value
        words.append(f"{name}={_shown(value)}")
    return f"{case}; {', '.join(words)}", function, arguments, False


def _offsets(draw: Any, arguments: Arguments, case: Case) -> Arguments:
    name = draw.choice(("cu_seqlens_q", "cu_seqlens_k"))
    t = arguments[name]
    end, n = t[-1:], len(t)
    values = (
        t + 1,  # of two ends: both are elsewhere
        t - 1,
        torch.cat([t, end + 1]),
        torch.cat([t, end + 1, end]),  # a step back
        torch.cat([t[:1] - 1, t]),
        torch.cat([t, end]),  # a sequence more than the other has
        t.flip(0) if end else t - 1,
        t * 2 + 1,
        t[:0],
        t[-1],
        t[None],
        torch.stack([t, t], 1),
        t.float(),
        t.short(),
        t.bool(),
        t.to("meta"),
        t.to_sparse(),
        t.tolist(),
        t.numpy(),
        n,
        None,
        "0",
    )
    return {name: draw.choice(values)}


def _longest(draw: Any, arguments: Arguments, case: Case) -> Arguments:
    assert case.sequences is not None
    i = draw.randrange(2)
    longest = max(case.sequences[i], default=0)
    values = (longest - 1, longest - 1, -1, -(2**40), float(longest), None, "9", True, [longest], torch.tensor(longest))
    return {f"max_seqlen_{'qk'[i]}": draw.choice(values)}


def _window(draw: Any, arguments: Arguments, case: Case) -> Arguments:
    values = (
        (-2, -1),
        (-1, -2),
        (-(2**40), 0),
        (3,),
        (),
        (1, 2, 3),
        (1.0, 2),
        (None, None),
        (True, False),
        ("1", "2"),
        4,
        None,
        "window",
        torch.tensor([1, 2]),
    )
    if draw.random() < 0.2:
        return {"prefix_in_window": draw.choice((None, 1, "yes", [], torch.tensor(True)))}
    return {"window_size": draw.choice(values)}


def _sinks(draw: Any, arguments: Arguments, case: Case) -> Arguments:
    H, dtype = case.sizes["H"], case.dtype
    other = torch.float16 if dtype != torch.float16 else torch.bfloat16
    values = (
        torch.zeros(H + 1, dtype=dtype),
        torch.zeros(1, H, dtype=dtype),
        torch.zeros((), dtype=dtype),
        torch.zeros(H, dtype=other),
        torch.zeros(H, dtype=torch.int64),
        torch.zeros(H, dtype=torch.bool),
        torch.zeros(H, dtype=dtype, device="meta"),
        torch.zeros(H, dtype=dtype).to_sparse(),
        [0.0] * H,
        0.0,
        "sinks",
    )
    return {"sinks": draw.choice(values)}


def _widths(draw: Any, arguments: Arguments, case: Case) -> Arguments:
    """Values and the prefix's values of two widths, or keys and the prefix's keys."""
    given = ("v", "prefix_v") if "v" in arguments else ("prefix_v",)
    name = draw.choice((*given, "prefix_k") if "v" in arguments else given)
    t = arguments[name].detach()
    wider = torch.cat([t, t[..., :1]], -1)
    return {name: draw.choice((wider, t[..., :-1], t[..., :0]))}


def _tensor(draw: Any, arguments: Arguments, case: Case) -> tuple[str, Any]:
    name = draw.choice([n for n, t in arguments.items() if isinstance(t, Tensor) and t.is_floating_point()])
    t = arguments[name].detach()
    other = torch.float16 if t.dtype != torch.float16 else torch.float32
    axis = draw.randrange(t.dim())
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: "tensor",
        lambda: 1.5,
        lambda: t[:0].tolist(),
        lambda: t[:0].numpy() if t.dtype != torch.bfloat16 else [t],
        lambda: t.to(other),
        lambda: t.long() if t.numel() < 1e5 else t.to(other),
        lambda: t.to(torch.complex64),
        lambda: t.bool(),
        lambda: t.to("meta"),
        lambda: t[:1].to_sparse(),
        lambda: t.unsqueeze(axis),
        lambda: t.unsqueeze(0).unsqueeze(0),
        lambda: t.sum(axis),
        lambda: t.sum(),
        lambda: torch.cat([t, t], axis),
        lambda: t.narrow(axis, 0, t.shape[axis] // 2),
        lambda: t.narrow(axis, 0, 0),
        lambda: t.transpose(0, axis),
        lambda: t.flatten(),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8) if t.numel() else None,
    ]
    return name, draw.choice(changes)()


def _number(draw: Any, arguments: Arguments, case: Case) -> tuple[str, Any]:
    name = draw.choice(("scale", "softcap", "dropout_p", "prefix_dropout_p"))
    nan, inf = float("nan"), float("inf")
    values = (
        nan,
        inf,
        -inf,
        -1.0,
        1.5,
        -1e-30,
        1e300,
        1e-320,
        "0.5",
        [0.5],
        1j,
        torch.tensor(0.5),
        True,
        10**400,
        b"1",
    )
    return name, draw.choice(values)


def _index(draw: Any, arguments: Arguments, case: Case) -> tuple[str, Any]:
    B, P = case.sizes["B"], case.sizes["P"]
    name = draw.choice(("prefix_ids", "prefix_lengths"))
    values = (
        torch.full((B,), -1),
        torch.full((B,), 2**62),
        torch.full((B,), -(2**63)),
        torch.full((B,), P + 1),
        torch.zeros(B, dtype=torch.int32),
        torch.zeros(B),
        torch.zeros(B, dtype=torch.bool),
        torch.zeros(B + 1, dtype=torch.int64),
        torch.zeros(B, 1, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        [0] * B,
        0,
        "0",
        torch.zeros(B, dtype=torch.int64, device="meta"),
    )
    return name, draw.choice(values)


def _flag(draw: Any, arguments: Arguments, case: Case) -> tuple[str, Any]:
    name = draw.choice(("is_causal", "phi", "backend", "return_lse", "return_prefix_mass", "memory"))
    H, D, Dv = (case.sizes[name] for name in ("H", "D", "Dv"))
    values: tuple[Any, ...] = ("", "cuda", None, 3, [], torch.ones(2), "Reference", "no\0such", "x" * 100)
    if name == "memory":
        values = (
            torch.zeros(H, D, Dv + 1),
            torch.zeros(H + 1, D, Dv),
            torch.zeros(D, Dv),
            torch.zeros(1, 1, H, D, Dv),
            "m",
        )
    return name, draw.choice(values)


def _mask(draw: Any, arguments: Arguments, case: Case) -> tuple[str, Any]:
    B, H, _, L, S, _, _, _ = case.sizes.values()
    values = (
        torch.ones(B, H, L, S + 1, dtype=torch.bool),
        torch.ones(B + 1, 1, L, S, dtype=torch.bool),
        torch.ones(1, B, H, L, S, dtype=torch.bool),
        torch.ones(L + 2, S + 2),
        torch.ones(L, S, dtype=torch.int64),
        torch.ones(L, S, dtype=torch.uint8),
        torch.ones(L, S, dtype=torch.float64) if case.dtype != torch.float64 else torch.ones(L, S, dtype=torch.float16),
        torch.ones(L, S, dtype=torch.bool).to_sparse(),
        torch.ones(L, S, dtype=torch.bool, device="meta"),
        True,
        "causal",
        [[True]],
    )
    return "attn_mask", draw.choice(values)


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return f"{value!r}"[:40]


def complaint(number: int) -> str:
    """What is wrong with how a bad call was met; empty if it was refused in words, or may have been none after all."""
    words, function, arguments, wrong = spoiled(number)
    try:
        out, *_ = function(**arguments)
    except REFUSALS as error:
        text = str(error)
        if text.strip() and len(text) < 2000:
            return ""
        return f"{words}: {type(error).__name__} of {len(text)} letters: {text[:200]!r}"
    except Exception as error:
        return f"{words}: {type(error).__name__}: {str(error)[:300]}"
    if wrong:
        return f"{words}: answered"
    if not isinstance(out, Tensor):
        return f"{words}: answered with {type(out).__name__}"
    if out.requires_grad and out.device.type != "meta":
        try:
            out.sum().backward()
        except Exception as error:
            return f"{words}: backward: {type(error).__name__}: {str(error)[:300]}"
    return ""


def main(start: int, count: int) -> None:
    """Prints the number ahead of each call, so that whoever reads knows which one ended the process."""
    for number in range(start, start + count):
        print(number, flush=True)
        if words := complaint(number):
            print(f"COMPLAINT {words}".replace("\n", " "), flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
