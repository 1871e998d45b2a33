"""Packed sequences for batch invariance: the longest of them says nothing about what is compiled in."""

from prefixattn.kernels.arguments import Window
from prefixattn.kernels.call import Call


class AnyLength(Call):
    __slots__ = ()

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int, int]:
        """As if one sequence at least had several queries: where all have one, tiles are others."""
        B, H, KV, L, S, T, P, D = super().sizes
        return B, H, KV, max(L, 2), S, T, P, D

    @property
    def window(self) -> Window:
        """Each bound, whether it hides something or not."""
        left, right = (None if bound < 0 else bound for bound in (self.window_left, self.window_right))
        return Window() if left is None and right is None else Window(left, right, 0)
