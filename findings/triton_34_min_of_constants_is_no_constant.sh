#!/usr/bin/env bash
# Triton 3.4.0: `min` of two constants is no constant, whatever the annotation says; in 3.9.0 it is one.
#
# `width: tl.constexpr = min(WIDTH, N)` in a kernel, WIDTH a global tl.constexpr and N an argument of that kind, followed
# by `range(0, N, width)`. `WIDTH if WIDTH < N else N` says the same and compiles with both.
# Compiled for sm_90 without a GPU.
# Seen with 3.4.0: CompilationError at the loop, not at `min`: "Did you forget to add @triton.jit ?".
# Expected: what a local annotated tl.constexpr is assigned is a constant, or the message names `min`.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernels.py" <<'PYTHON'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTH = tl.constexpr(32)


@triton.jit
def by_min(out, N: tl.constexpr):
    width: tl.constexpr = min(WIDTH, N)
    for first in range(0, N, width):
        tl.store(out + first, 1.0)


@triton.jit
def by_choice(out, N: tl.constexpr):
    width: tl.constexpr = WIDTH if WIDTH < N else N
    for first in range(0, N, width):
        tl.store(out + first, 1.0)


def result(kernel):
    source = ASTSource(kernel, {"out": "*fp32", "N": "constexpr"}, {(1,): 64})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "compiles"


found = {kernel.__name__: result(kernel) for kernel in (by_min, by_choice)}
for name, words in found.items():
    print(f"triton {triton.__version__}: {name} {words}")
old = triton.__version__ == "3.4.0"
seen = found["by_choice"] == "compiles" and ("forget to add @triton.jit" in found["by_min"]) == old
sys.exit(0 if seen and (found["by_min"] == "compiles") != old else 1)
PYTHON
for version in 3.4.0 3.9.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version" setuptools
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" -W ignore "$folder/kernels.py"
done
