"""The CUDA kernels of csrc/cuda as a backend: torch tensors to addresses and strides, on torch's stream.

With PREFIXATTN_CUDA_HOST=FILE, the library that `setup.py build_cuda_host` makes, the same kernels run on a CPU, slowly
and with every access checked: it is for tests, and it takes tensors on the CPU instead.
"""

import importlib.util
import json
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixattn.attention import sinks, widths
from prefixattn.attention.call import Call, Given, Grads, Into, Needs, Results, Wants, allocated, refused, unknown
from prefixattn.attention.invariance import batch_invariant
from prefixattn.attention.layout import empty_like_order
from prefixattn.attention.native import address, attn_fields, strided

DTYPES = torch.bfloat16, torch.float16
HEAD_DIMS = 64, 128
LEAST_CAPABILITY = 8, 0  # mma.sync of bfloat16 and cp.async came with it
ALIGNMENT = 16  # bytes that move at once: of addresses and of all strides but the last
# every option of Call that the kernels have; phi says nothing without a memory
KNOWN = "attn_mask", "sinks", "prefix_ids", "prefix_lengths", "seed", "prefix_dropout_p", "is_causal", "scale", "phi"
UNKNOWN = unknown(KNOWN)
LARGEST_ROW_STRIDE, LAST = 2**30, 2**31 - 1
LARGEST_GRID = 65535  # samples; with more, short ones take the kernel for long ones
_TENSORS = "q", "k", "v", "prefix_k", "prefix_v", "attn_mask", "prefix_ids", "prefix_lengths", "seed"


def load(path: str | None) -> tuple[Any, str]:
    """The compiled kernels, those of the host machine if a library is named, or None and why."""
    try:
        if path:
            spec = importlib.util.spec_from_file_location("_cuda_host", path)
            if spec is None or spec.loader is None:
                return None, f"PREFIXATTN_CUDA_HOST={path} is no library of Python's"
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module, ""
        import prefixattn._cuda as _cuda  # not there where it was not built

        return _cuda, ""
    except ModuleNotFoundError:
        return None, "prefixattn._cuda is not built" + _build_failure()
    except (ImportError, OSError) as error:  # there, but the loader refuses it
        return None, f"{path or 'prefixattn._cuda'} does not load: {error}"


def _build_failure() -> str:
    """What setup.py wrote down when it did not compile."""
    record = Path(__file__).parents[1] / "_cuda_build.json"
    reason = json.loads(record.read_text())["reason"] if record.is_file() else ""
    return f": {reason}" if reason else ""


_native, _missing = load(os.environ.get("PREFIXATTN_CUDA_HOST"))


def unsupported(call: Call, needs: Needs) -> list[str]:
    q, mask = call.q, call.attn_mask
    reasons = [f"{words} (triton has)" for words in refused(call, UNKNOWN)]
    if _native is None:
        reasons.append(_missing)
    if q.device.type != ("cpu" if _on_host() else "cuda"):
        reasons.append(
            f"q is on {q.device.type}; needs {'cpu, as PREFIXATTN_CUDA_HOST is set' if _on_host() else 'cuda'}"
        )
    elif q.device.type == "cuda" and capability(q.device) < LEAST_CAPABILITY:
        major, minor = capability(q.device)
        reasons.append(f"q is on a GPU of sm_{major}{minor}; needs sm_80 or later")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype={q.dtype}; needs bfloat16 or float16 (triton has float32)")
    D = widths.wider(call)
    if D not in HEAD_DIMS:
        reasons.append(f"head_dim={D}; needs 64 or 128 (triton has all up to 256)")
    if mask is not None and mask.shape[2] != 1:
        reasons.append(f"attn_mask {list(mask.shape)}; needs one of keys, [B, H, 1, S] (triton has all masks)")
    if needs.attn_mask:
        reasons.append("attn_mask needs a gradient (triton has it)")
    reasons += _by_batch(call, needs)
    # within a head the kernels count elements in 32 bits
    operands = {"q": q, "k": call.k, "v": call.v, "prefix_k": call.prefix_k, "prefix_v": call.prefix_v}
    for name, t in operands.items():
        if max(t.stride(2), 3 * t.shape[1] * D) >= LARGEST_ROW_STRIDE or t.shape[2] > LAST:
            reasons.append(f"{name} {list(t.shape)} has rows 2**30 elements apart, or 2**31 of them (triton has them)")
    return reasons


def _by_batch(call: Call, needs: Needs) -> list[str]:
    """What they compute in an order that the size of the batch decides, where that may not be."""
    words, B = [], call.q.shape[0]
    if batch_invariant() and B > LARGEST_GRID:
        words.append(f"B={B} under use_batch_invariant_kernels; needs {LARGEST_GRID} or fewer (triton has more)")
    per_sample = call.prefix_ids is None and call.prefix_k.shape[0] > 1
    if batch_invariant() and per_sample and (needs.prefix_k or needs.prefix_v):
        words.append("gradients of prefixes per sample under use_batch_invariant_kernels (triton has them)")
    return words


@widths.around_fwd
@sinks.around_fwd
def fwd(call: Call, wants: Wants) -> Results:
    q = call.q
    out = empty_like_order(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    mass = q.new_empty(q.shape[:3] if wants.mass else (0,), dtype=torch.float32)
    results = Results(out, lse, mass, q.new_empty(0))
    if _sees_nothing(call):
        return results._replace(out=out.zero_(), lse=lse.fill_(-torch.inf), mass=mass.zero_())
    call = _readable_call(call)
    _run("prefix_attn_fwd", q, {
        **_fields(call),
        "out": strided(out),
        "attended": None,
        "lse": lse.data_ptr(),
        "mass": mass.data_ptr() if wants.mass else None,
    })  # fmt: skip
    return results


@widths.around_bwd
@sinks.around_bwd
def bwd(call: Call, given: Given, needs: Needs, into: Into | None = None) -> Grads:
    q, grads = call.q, allocated(call, needs, into)
    if words := _by_batch(call, needs):  # the switch may be later than the choice of the backend
        raise NotImplementedError("the cuda kernels: " + "; ".join(words))
    if _sees_nothing(call):
        for grad, need in zip(grads, needs, strict=True):
            if need:
                grad.zero_()
        return grads
    call = _readable_call(call, dout=given.dout, out=given.out)
    dout, out = _readable(given.dout), _readable(given.out)
    lse, dlse = given.lse.contiguous(), None if given.dlse is None else given.dlse.float().contiguous()
    _run("prefix_attn_bwd", q, {
        **_fields(call),
        "dout": strided(dout),
        "out": strided(out),
        "lse": lse.data_ptr(),
        "dlse": address(dlse),
        "dq": strided(grads.q) if needs.q else None,
        "dk": strided(grads.k) if needs.k else None,
        "dv": strided(grads.v) if needs.v else None,
        "dprefix_k": strided(grads.prefix_k) if needs.prefix_k else None,
        "dprefix_v": strided(grads.prefix_v) if needs.prefix_v else None,
        "dmemory": None,
    })  # fmt: skip
    return grads


def _sees_nothing(call: Call) -> bool:
    """Whether no query attends to anything, or there is none: nothing to launch."""
    return call.q.numel() == 0 or call.k.shape[2] + call.prefix_k.shape[2] == 0


def _run(name: str, q: Tensor, fields: dict[str, Any]) -> None:
    scratch = []  # torch gives it back to this stream's kernels only

    def allocate(size: int) -> int:
        scratch.append(torch.empty(size + _SCRATCH_ALIGNMENT, dtype=torch.uint8, device=q.device))
        at: int = scratch[-1].data_ptr()
        return at + -at % _SCRATCH_ALIGNMENT

    if _on_host():
        getattr(_native, name)(fields, allocate, 0, 0)
        return
    with _current(q.device):
        stream = torch.cuda.current_stream(q.device).cuda_stream
        getattr(_native, name)(fields, allocate, q.device.index, stream)


_SCRATCH_ALIGNMENT = 256


def _on_host() -> bool:
    return _native is not None and _native.HOST_MACHINE


def _current(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _fields(call: Call) -> dict[str, Any]:
    return {**attn_fields(_native, _native.DTYPES[str(call.q.dtype).removeprefix("torch.")], call)}


def _readable_call(call: Call, **others: Tensor) -> Call:
    """The call as the kernels can read it; a refusal if a tensor of it or of `others` has another type or device."""
    q = call.q
    named = {name: getattr(call, name) for name in _TENSORS} | others
    names = "q", "k", "v", "prefix_k", "prefix_v", *others
    types: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(names, (q.dtype,))
    types["attn_mask"] = torch.bool, torch.float32, q.dtype
    # an exported program, or parts of it, can be moved or cast after its backend was chosen
    for name, t in named.items():
        if t is None:
            continue
        if t.device != q.device or t.dtype not in types.get(name, (t.dtype,)) or q.dtype not in DTYPES:
            expected = "bool, float32 or q's type" if name == "attn_mask" else "bfloat16 or float16 as q"
            raise NotImplementedError(
                f"the cuda kernels were called with {name} {t.dtype} on {t.device}; expected {expected}, on {q.device}"
            )
    ids, lengths = call.prefix_ids, call.prefix_lengths
    return call._replace(
        q=_readable(q), k=_readable(call.k), v=_readable(call.v),
        prefix_k=_readable(call.prefix_k), prefix_v=_readable(call.prefix_v),
        prefix_ids=None if ids is None else ids.contiguous(),
        prefix_lengths=None if lengths is None else lengths.contiguous(),
    )  # fmt: skip


def _readable(t: Tensor) -> Tensor:
    """`t` with rows that 16 bytes at a time can read: itself, as projections of models are, or else a copy."""
    step = ALIGNMENT // t.element_size()
    aligned = t.data_ptr() % ALIGNMENT == 0 and (t.stride(3) == 1 or t.shape[3] == 1)
    if aligned and all([t.stride(i) % step == 0 or t.shape[i] == 1 for i in range(3)]):
        return t
    return t.clone(memory_format=torch.contiguous_format)
