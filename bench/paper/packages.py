"""Packages that one of the scores wants: imported when it is asked for, refused in words where they are missing."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from bench.paper.runs import Refusal


def named(package: str) -> str:
    """The package's name and version."""
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # a copy beside the code has no version
        return package


def needed(module: str, package: str) -> ModuleType:
    """The module, which `package` on the index holds."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refusal(f"{error}; pip install {package}") from None
