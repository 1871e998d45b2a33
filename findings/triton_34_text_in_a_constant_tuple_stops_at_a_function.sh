#!/usr/bin/env bash
# Triton 3.4.0: text in a named tuple that is a constant reaches no function that the kernel calls; in 3.9.0 it does.
#
# A kernel takes `F: tl.constexpr`, a NamedTuple of a number and a text, and hands `F.ADD` and `F.HOW` to functions of
# its own kind whose parameters are tl.constexpr. The number arrives. The text does not, though it does as soon as it
# has a name: `HOW: tl.constexpr = F.HOW`. The precision of tl.dot is such a text, so that a tuple of what a kernel has
# compiled in works for every field but that one.
# Compiled for sm_90 without a GPU.
# Seen with 3.4.0: CompilationError: AttributeError("'str' object has no attribute 'type'").
# Expected: a field of a constant is a constant, whatever its type.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernels.py" <<'PYTHON'
import sys
from typing import NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Features(NamedTuple):
    ADD: int
    HOW: str


@triton.jit
def plus(x, ADD: tl.constexpr):
    return x + ADD


@triton.jit
def one_more(x, HOW: tl.constexpr):
    if HOW == "one":
        x += 1.0
    return x


@triton.jit
def number(out, F: tl.constexpr):
    tl.store(out, plus(tl.load(out), F.ADD))


@triton.jit
def text(out, F: tl.constexpr):
    tl.store(out, one_more(tl.load(out), F.HOW))


@triton.jit
def named_text(out, F: tl.constexpr):
    HOW: tl.constexpr = F.HOW
    tl.store(out, one_more(tl.load(out), HOW))


def result(kernel):
    source = ASTSource(kernel, {"out": "*fp32", "F": "constexpr"}, {(1,): Features(2, "one")})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "compiles"


found = {kernel.__name__: result(kernel) for kernel in (number, text, named_text)}
for name, words in found.items():
    print(f"triton {triton.__version__}: {name} {words}")
old = triton.__version__ == "3.4.0"
others = found["number"] == found["named_text"] == "compiles"
seen = "'str' object has no attribute 'type'" in found["text"] if old else found["text"] == "compiles"
sys.exit(0 if seen and others else 1)
PYTHON
for version in 3.4.0 3.9.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version" setuptools
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" -W ignore "$folder/kernels.py"
done
