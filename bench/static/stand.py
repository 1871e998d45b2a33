"""`Stand`: in the place of a Triton kernel, where its launches are looked at and not made."""

import inspect
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

# kernel's name, grid, arguments and features by name, and what would make the launch
Take = Callable[[str, tuple[int, ...], SimpleNamespace, Callable[[], Any]], None]


class Stand:
    def __init__(self, kernel: Any, take: Take) -> None:
        self.kernel, self.take, self.signature = kernel, take, inspect.signature(kernel.fn)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            own = {name: value for name, value in kwargs.items() if name in self.signature.parameters}
            bound = dict(self.signature.bind(*args, **own).arguments)
            if "FEATURES" in bound:
                bound |= bound.pop("FEATURES")._asdict()
            launch = partial(self.kernel[grid], *args, **kwargs)
            self.take(self.kernel.fn.__name__, grid, SimpleNamespace(**bound), launch)

        return launch
