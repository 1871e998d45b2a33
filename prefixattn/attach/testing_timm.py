"""timm without torchvision, for tests and benchmarks; the package itself never needs this module.

timm imports torchvision when it is imported, for data loading and one kind of batch norm, of which no vision transformer
makes use. For builds of torch for CPUs there is no torchvision on the package index, and another build's breaks torch's
operators. Transformers looks for an installed torchvision too and would use what it finds: so the stand-in is in
sys.modules while timm is imported, and no longer.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn


class _Names(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"  # members of an enumeration


class _StandIn(ModuleType):
    """A module of torchvision that has every name, each a class without content."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Names(name, (nn.Module,), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        ours = fullname.split(".")[0] == "torchvision"
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def _torchvision() -> Iterator[None]:
    """A stand-in for torchvision inside, if it is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_timm() -> Any:
    """timm; ImportError if it is not installed."""
    with _torchvision():
        return importlib.import_module("timm")
