"""Triton's interpreter as the tests want it; nothing is done where kernels are compiled."""

from importlib.util import find_spec
from typing import Any

from prefixattn.kernels.table import INTERPRETED


def prepare() -> None:
    """For every kernel that is interpreted from here on."""
    if INTERPRETED and find_spec("triton") is not None:
        _round_products_once()
        _patch_once()


def _round_products_once() -> None:
    """Tiles are multiplied in float64.

    Else float32 products are numpy's, whose sums err up to three times as much as those of torch's BLAS: neither what a
    GPU does nor what plain PyTorch is measured by here. The tests ask what the kernels do with the products.
    """
    import numpy as np
    from triton.runtime import interpreter

    def create_dot(_: Any, a: Any, b: Any, d: Any, *__: Any, **___: Any) -> Any:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _patch_once() -> None:
    """The functions of Triton's language are replaced once for a launch.

    Triton 3.4 to 3.9 replace them again in each function that a kernel calls, in two fifths of the time. 3.9 puts them
    back at the end of a launch; 3.4 leaves them.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_lang, set[int]()

    class Nothing:
        def restore(self) -> None:
            """The launch does."""

    def once(fn: Any) -> Any:
        langs = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if langs and langs <= patched:
            return Nothing()
        scope = patch(fn)
        patched.update(langs)
        if scope is not None:
            restore = scope.restore

            def restore_and_forget() -> None:
                restore()
                patched.clear()

            scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = once
