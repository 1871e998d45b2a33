"""Finds bench by its place, for scripts of this folder that are run as files: `python bench/paper/nlg.py`.

It is not found on sys.path, where our folder kernels/ would be taken for Hugging Face's package of that name.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "__init__.py"

if "bench" not in sys.modules:
    spec = spec_from_file_location("bench", PACKAGE)
    assert spec is not None and spec.loader is not None
    sys.modules["bench"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["bench"])
