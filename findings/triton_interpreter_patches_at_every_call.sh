#!/usr/bin/env bash
# Triton 3.9.0: in its interpreter each call of a @triton.jit function within a kernel replaces the whole language again.
#
# A launch replaces the functions of triton.language by the interpreter's and puts them back at its end. Each function
# that the kernel calls does so once more, though all are replaced already: it walks through the members of two modules
# and two classes, and changes nothing.
# Seen: a kernel that calls a function 100 times looks through members 404 times, one with the same text inline 4 times;
# it took 9 times as long. It was two fifths of the time of kernels that call some dozens of functions for each tile.
# Expected: 4 times, as what is replaced stays so until the launch ends.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/calls.py" <<'PYTHON'
import inspect
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl

CALLS = 100


@triton.jit
def doubled(x):
    return x + x


@triton.jit
def by_calls(at, N: tl.constexpr):
    x = tl.load(at)
    for _ in range(N):
        x = doubled(x) * 0.5
    tl.store(at, x)


@triton.jit
def inline(at, N: tl.constexpr):
    x = tl.load(at)
    for _ in range(N):
        x = (x + x) * 0.5
    tl.store(at, x)


def looks(kernel):
    """How often a launch asks for all members of something."""
    asked, getmembers = [], inspect.getmembers

    def counted(*given):
        asked.append(given)
        return getmembers(*given)

    number = torch.ones(1)
    inspect.getmembers = counted
    try:
        kernel[(1,)](number, CALLS)
    finally:
        inspect.getmembers = getmembers
    assert number.item() == 1.0
    return len(asked)


found = looks(inline), looks(by_calls)
print(f"triton {triton.__version__}: inline {found[0]}, by {CALLS} calls {found[1]}")
sys.exit(0 if found == (4, 4 + 4 * CALLS) else 1)
PYTHON
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.15.0 triton==3.9.0 numpy
"$folder/venv/bin/python" -W ignore "$folder/calls.py"
