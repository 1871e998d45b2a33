"""Sliding windows: what `window_size` of a call may be, and the bounds that backends read."""

from typing import Any

import torch

UNBOUNDED = -1


def check(window_size: Any, prefix_in_window: object) -> None:
    """ValueError for anything but two integers from -1 up, and for a flag that is none."""
    two = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not two or not all(isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool) for n in window_size):
        raise ValueError(f"window_size is {window_size!r:.60}, expected two integers (left, right)")
    if any(n < UNBOUNDED for n in window_size):
        raise ValueError(f"window_size is {tuple(window_size)}, expected numbers of keys, or -1 for all there are")
    if not isinstance(prefix_in_window, bool):
        raise ValueError(f"prefix_in_window is {prefix_in_window!r:.40}, expected True or False")


def bounds(
    window_size: tuple[int, int], prefix_in_window: bool, is_causal: bool, L: int, S: int, P: int
) -> tuple[bool, int, int, bool]:
    """is_causal, window_left, window_right and prefix_in_window of `Call`: what hides nothing is left out.

    A window that ends at the query itself is causality.
    """
    left, right = window_size
    if is_causal or right == 0:
        is_causal, right = True, UNBOUNDED
    if not torch.compiler.is_compiling():  # a graph for each side of these bounds would gain little
        if left >= S - 1 + (P if prefix_in_window else 0):
            left = UNBOUNDED
        if right >= L - 1:
            right = UNBOUNDED
    return is_causal, left, right, prefix_in_window and left != UNBOUNDED
