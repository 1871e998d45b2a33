"""The backends of each op, fastest first. Each is a module with `unsupported`, `fwd` and `bwd`.

They take the records of call.py, and for the reparameterization those of reparam/call.py.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from prefixattn.attention.call import Call, Needs
from prefixattn.reparam.call import Call as ReparamCall
from prefixattn.reparam.call import Needs as ReparamNeeds


class Row(NamedTuple):
    name: str
    module: str
    missing: str  # the objection when the module, or something compiled that it needs, is not there
    auto: bool = True  # for "auto"
    named: bool = True  # for backend="name"
    op: str = ""

    @property
    def key(self) -> str:
        """What no other row has: the name alone where the op is attention."""
        return f"{self.op} {self.name}" if self.op else self.name


# "auto" takes the first row without an objection; a row stands ahead of the reference where a measurement put it
TABLE = (
    Row("cpu", "prefixattn.attention.cpu", "prefixattn._C is not built"),
    # by name alone: no GPU has run these kernels yet, and only a run may put them ahead of others
    Row("cuda", "prefixattn.attention.cuda", "prefixattn.attention.cuda is missing", auto=False),
    Row("guarded triton", "prefixattn.attention.guard", "prefixattn.attention.guard is missing", named=False),
    Row("triton", "prefixattn.attention.triton", "prefixattn.attention.triton is missing", auto=False),
    Row("reference", "prefixattn.attention.reference", "prefixattn.attention.reference is missing"),
)
NAMES = tuple(row.name for row in TABLE if row.named)
REPARAM = (
    Row("cpu", "prefixattn.reparam.cpu", "prefixattn._C is not built", op="reparam"),
    Row("guarded triton", "prefixattn.reparam.guard", "prefixattn.reparam.guard is missing", named=False, op="reparam"),
    Row("triton", "prefixattn.reparam.triton", "prefixattn.reparam.triton is missing", auto=False, op="reparam"),
    Row("reference", "prefixattn.reparam.reference", "prefixattn.reparam.reference is missing", op="reparam"),
)

_modules: dict[str, ModuleType] = {}
_not_loaded: dict[str, str] = {}


def module(name: str, op: str = "") -> ModuleType:
    """The backend's module, by a name that `choose` returned."""
    key = f"{op} {name}" if op else name
    if key not in _modules:  # a program exported where it was there
        why = _not_loaded.get(key, "no such backend")
        raise NotImplementedError(f'backend "{name}" was chosen when this program was made: {why}')
    return _modules[key]


def choose(backend: str, call: Call, needs: Needs) -> str:
    """The name of the backend to run: the first of the table, or the one named, that has no objection.

    Raises NotImplementedError with every objection in words.
    """
    return pick(TABLE, backend, objections, _of_attention, call, needs).name


def choose_reparam(backend: str, call: ReparamCall, needs: ReparamNeeds) -> str:
    """The same for the reparameterization."""
    return pick(REPARAM, backend, objections, _of_reparam, call, needs).name


def _of_attention(call: Call, needs: Needs) -> str:
    return sizes_of("q", call.q)


def _of_reparam(call: ReparamCall, needs: ReparamNeeds) -> str:
    return sizes_of("x", call.x)


def sizes_of(name: str, t: Tensor) -> str:
    return f"{name} {list(t.shape)} {t.dtype} on {t.device.type}"


def pick(
    table: tuple[Row, ...], backend: str, ask: Callable[..., list[str]], words: Callable[..., str], *args: object
) -> Row:
    """The first row, or the one named, to which `ask(row, *args)` has no objection.

    Raises NotImplementedError with every objection; `words(*args)` says what it is for.
    """
    check_name(table, backend)
    rejected = []
    for row in table:
        if row.auto if backend == "auto" else row.name == backend:
            reasons = ask(row, *args)
            if not reasons:
                return row
            rejected.append(f"\n  {row.name.removeprefix('guarded ')}: " + "; ".join(reasons))
    raise NotImplementedError(f"no backend for {words(*args)}:" + "".join(rejected))


def check_name(table: tuple[Row, ...], backend: str) -> None:
    """ValueError if no row has the name."""
    names = [row.name for row in table if row.named]
    if backend != "auto" and backend not in names:
        *most, last = (f'"{name}"' for name in ("auto", *names))
        raise ValueError(f'backend is "{backend}"; expected {", ".join(most)} or {last}')


def objections(row: Row, call: object, needs: object) -> list[str]:
    if row.key in _not_loaded:
        return [_not_loaded[row.key]]
    reasons: list[str] = _modules[row.key].unsupported(call, needs)
    return reasons


def here() -> dict[str, list[str]]:
    """What each backend objects to on this machine, asked with a small call on each kind of device.

    It is one that all of them take: bfloat16, heads of 64.
    """

    def call(device: str) -> tuple[object, object]:
        q, prefix = (torch.zeros(1, 1, 8, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
        return Call(q, q, q, prefix, prefix), Needs(q=True, k=True, v=True, prefix_k=True, prefix_v=True)

    return here_of(TABLE, call)


def here_of(table: tuple[Row, ...], call: Callable[[str], tuple[object, object]]) -> dict[str, list[str]]:
    """The same for another op's table, asked with what `call` makes for a device."""
    found: dict[str, list[str]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for row in table:
            if row.named and found.get(row.name, [""]):
                found[row.name] = objections(row, *call(device))
    return found


def _build_failure() -> str:
    """What setup.py wrote down when it could not compile."""
    record = Path(__file__).with_name("_C_build.json")
    reason = json.loads(record.read_text())["reason"] if record.is_file() else ""
    return f": {reason}" if reason else ""


def _load(row: Row) -> None:
    try:
        _modules[row.key] = importlib.import_module(row.module)
    except ModuleNotFoundError as error:
        ours = str(error.name).startswith("prefixattn")
        _not_loaded[row.key] = row.missing + _build_failure() if ours else str(error)
    except ImportError as error:  # there, but the loader refuses it: an undefined symbol, a missing library
        _not_loaded[row.key] = f"{row.module} does not load: {error}"


for _row in TABLE + REPARAM:
    _load(_row)
