"""Where the tests find files that are not in the repository."""

import os
from pathlib import Path

import pytest


def data_path(*parts: str) -> Path:
    """A place in the data folder (PREFIXATTN_DATA, or shared/data beside the checkout); skips where it is absent."""
    roots = [Path(__file__).parents[2] / "shared" / "data"]
    if given := os.environ.get("PREFIXATTN_DATA"):
        roots = [Path(given), Path(given).parent]  # the variable may name the E2E folder within
    for root in roots:
        if (path := root.joinpath(*parts)).exists():
            return path
    pytest.skip(f"{'/'.join(parts)} is neither under PREFIXATTN_DATA nor in ../shared/data")
