"""What several test files need."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from prefixattn.testing import reparam
from prefixattn.testing.attention import Inputs, suited

ROOT = Path(__file__).resolve().parents[1]  # of the repository


def accepted(backend: str, inputs: Inputs) -> Inputs:
    """The inputs, but for a gradient of the mask that the backend does not make; skips what it does not take at all."""
    inputs, words = suited(backend, inputs)
    if words:
        pytest.skip(words)
    return inputs


def accepted_network(backend: str, inputs: reparam.NetInputs) -> reparam.NetInputs:
    """Of the reparameterization; skips those that the backend does not take, in its words."""
    if words := reparam.objections(backend, inputs):
        pytest.skip(words)
    return inputs


@cache
def path_without_java() -> str:
    """A PATH of git alone: METEOR takes ten seconds of a processor to start, and is tested by itself."""
    folder = Path(tempfile.mkdtemp(prefix="prefixattn-path-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if git := shutil.which("git"):
        (folder / "git").symlink_to(git)
    return str(folder)


@contextmanager
def isa(name: str) -> Iterator[None]:
    """The CPU kernels of this instruction set."""
    from prefixattn import _C

    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
