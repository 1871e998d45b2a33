"""Prints which backends work on this machine and, for the others, why not."""

import argparse
import platform
from collections.abc import Sequence

import torch

from prefixattn import __version__, backends
from prefixattn.attention import guard, triton
from prefixattn.reparam import functional as reparam
from prefixattn.reparam import guard as reparam_guard
from prefixattn.trials import device_name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m prefixattn", description=__doc__)
    parser.add_argument("--no-verdicts", action="store_true", help="on a GPU: do not compile and try its kernels")
    options = parser.parse_args(arguments)
    print(f"prefixattn {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    width = max(map(len, backends.NAMES))
    for name, reasons in backends.here().items():
        print(f"  {name:{width}}  " + ("no: " + "; ".join(reasons) if reasons else "works"))
    for name, reasons in reparam.here().items():
        print(f"  reparameterize, {name:{width}}  " + ("no: " + "; ".join(reasons) if reasons else "works"))
    if not backends.here()["cpu"]:
        print_instruction_sets()
    if not options.no_verdicts and torch.cuda.is_available() and not backends.here()["triton"]:
        print_verdicts(torch.device("cuda", torch.cuda.current_device()))


def print_instruction_sets() -> None:
    """Which of the CPU kernels runs, and why what is better, or was compiled for another CPU, does not."""
    from prefixattn import _C  # not there where it was not built

    objections = _C.isa_objections()
    width = max(map(len, [*objections, ""]))
    print(f"  cpu kernels: {_C.isa()} in use; others here: {', '.join(x for x in _C.isas() if x != _C.isa())}")
    for name, words in objections.items():
        print(f"    {name:{width}}  no: {words}")


def print_verdicts(device: torch.device) -> None:
    """Compiles and tries the Triton kernels as their first use by backend="auto" would."""
    print(
        f"  triton on {device_name(device)}, against the reference (compiling takes minutes at the first time):",
        flush=True,
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for D in (64, 128):
            wrong = {}
            for kind in guard.TRIALS:
                if triton.MEMORY in kind or triton.SOFTCAP in kind:  # tried at their first use; here it would take long
                    continue
                if words := guard.trials.verdict((kind, device, dtype, D)):
                    wrong[kind] = words
            said = "; ".join(f"{name}: {words}" for name, words in wrong.items()) or "agrees"
            print(f"    {str(dtype).removeprefix('torch.'):8}  head size {D:3}  {said}", flush=True)
        kinds = [kind for kind, dtypes in reparam_guard.KINDS.items() if dtype in dtypes]
        wrong = {kind: words for kind in kinds if (words := reparam_guard.trials.verdict((kind, device, dtype)))}
        said = "; ".join(f"{name}: {words}" for name, words in wrong.items()) or "agrees"
        print(f"    {str(dtype).removeprefix('torch.'):8}  reparameterization  {said}", flush=True)


if __name__ == "__main__":
    main()
