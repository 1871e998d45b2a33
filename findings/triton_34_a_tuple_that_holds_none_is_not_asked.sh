#!/usr/bin/env bash
# Triton 3.4.0: `window is not None` does not compile if `window` is a tuple that holds None; in 3.9.0 it does.
#
# A kernel may take a named tuple whose fields are numbers or None, which are constants then. Asked whether it is None,
# the tuple is first unwrapped, and None, which has no type, with it. A field can be asked: `window.left is not None`.
# Compiled for sm_90 without a GPU; the interpreter takes both.
# Seen with 3.4.0: CompilationError, AttributeError("'NoneType' object has no attribute 'type'") at the comparison.
# Expected: True, a constant, as in 3.9.0 and as of a tuple without None in 3.4.0.
#
# Ends with 0 if that is seen, 1 if it is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/kernels.py" <<'PYTHON'
import sys
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Window(NamedTuple):
    left: Any
    right: Any


@triton.jit
def whole(out, window):
    if window is not None:
        tl.store(out, window.left)


@triton.jit
def field(out, window):
    if window.left is not None:
        tl.store(out, window.left)


def result(kernel, window):
    types = {"out": "*i32", "window": Window(*("constexpr" if bound is None else "i32" for bound in window))}
    constants = {(1, at): None for at, bound in enumerate(window) if bound is None}
    try:
        triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "compiles"


ONE, BOTH = Window(9, None), Window(9, 9)
found = {
    "whole, one bound": result(whole, ONE),
    "whole, both": result(whole, BOTH),
    "field, one bound": result(field, ONE),
}
for name, words in found.items():
    print(f"triton {triton.__version__}: {name}: {words}")
old = triton.__version__ == "3.4.0"
one, *others = found.values()
raised = "'NoneType' object has no attribute 'type'" in one
sys.exit(0 if others == ["compiles"] * 2 and (raised if old else one == "compiles") else 1)
PYTHON
for version in 3.4.0 3.9.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "triton==$version" setuptools
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" -W ignore "$folder/kernels.py"
done
