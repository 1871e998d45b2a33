"""The backends, fastest first. Each is a module with `unsupported`, `fwd` and `bwd`, the signatures of reference.py."""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    name: str
    module: str
    missing: str  # the objection when the module, or something compiled that it needs, is not there
    auto: bool = True  # for "auto"
    named: bool = True  # for backend="name"


# "auto" takes the first row without an objection; a row stands ahead of the reference where a measurement put it
TABLE = (
    Row("cpu", "prefixattn.cpu", "prefixattn._C is not built"),
    Row("guarded triton", "prefixattn.guard", "prefixattn.guard is missing", named=False),
    Row("triton", "prefixattn.triton", "prefixattn.triton is missing", auto=False),
    Row("reference", "prefixattn.reference", "prefixattn.reference is missing"),
)
NAMES = tuple(row.name for row in TABLE if row.named)

_modules: dict[str, ModuleType] = {}
_not_loaded: dict[str, str] = {}


def module(name: str) -> ModuleType:
    """The backend's module, by a name that `choose` returned."""
    if name not in _modules:  # a program exported where it was there
        why = _not_loaded.get(name, "no such backend")
        raise NotImplementedError(f'backend "{name}" was chosen when this program was made: {why}')
    return _modules[name]


def choose(backend: str, q: Tensor, *args: object) -> str:
    """The name of the backend to run: the first of the table, or the one named, that has no objection.

    `args` are the rest of `unsupported`'s arguments. Raises NotImplementedError with every objection in words.
    """
    if backend != "auto" and backend not in NAMES:
        *most, last = (f'"{name}"' for name in ("auto", *NAMES))
        raise ValueError(f'backend is "{backend}"; expected {", ".join(most)} or {last}')
    rejected = []
    for row in TABLE:
        if row.auto if backend == "auto" else row.name == backend:
            reasons = objections(row, q, *args)
            if not reasons:
                return row.name
            rejected.append(f"\n  {row.name.removeprefix('guarded ')}: " + "; ".join(reasons))
    raise NotImplementedError(f"no backend for q {list(q.shape)} {q.dtype} on {q.device.type}:" + "".join(rejected))


def objections(row: Row, q: Tensor, *args: object) -> list[str]:
    if row.name in _not_loaded:
        return [_not_loaded[row.name]]
    reasons: list[str] = _modules[row.name].unsupported(q, *args)
    return reasons


def here() -> dict[str, list[str]]:
    """What each backend objects to on this machine, asked with a small ordinary call on each kind of device."""
    found: dict[str, list[str]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        q, prefix = torch.zeros(1, 1, 8, 64, device=device), torch.zeros(1, 1, 8, 64, device=device)
        needs = (True, True, True, True, True, False)
        call = (q, q, q, prefix, prefix, None, None, None, 0.0, 0.0, False, needs)
        for row in TABLE:
            if row.named and found.get(row.name, [""]):
                found[row.name] = objections(row, *call)
    return found


def _build_failure() -> str:
    """What setup.py wrote down when it could not compile."""
    record = Path(__file__).with_name("_C_build.json")
    reason = json.loads(record.read_text())["reason"] if record.is_file() else ""
    return f": {reason}" if reason else ""


def _load(row: Row) -> None:
    try:
        _modules[row.name] = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        ours = str(error.name).startswith("prefixattn")
        _not_loaded[row.name] = row.missing + _build_failure() if ours else str(error)
    except ImportError as error:  # there, but the loader refuses it: an undefined symbol, a missing library
        _not_loaded[row.name] = f"{row.module} does not load: {error}"


for _row in TABLE:
    _load(_row)
