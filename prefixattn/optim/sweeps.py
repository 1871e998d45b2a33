"""Which backend sweeps."""

from types import ModuleType

from torch import Tensor

from prefixattn import backends
from prefixattn.reparam import sweep as reference
from prefixattn.reparam.call import Form
from prefixattn.reparam.moments8 import Moment8


def check_name(backend: str) -> None:
    """ValueError if there is no such backend."""
    names = ["auto", *(row.name for row in backends.REPARAM if row.named)]
    if backend not in names:
        *most, last = (f'"{name}"' for name in names)
        raise ValueError(f'backend is "{backend}"; expected {", ".join(most)} or {last}')


def choose(
    backend: str, w: Tensor, first: object, second: object, h: Tensor, dy: Tensor, form: Form | None = None
) -> ModuleType:
    """The module whose sweeps take these: the first of the table without an objection, or the one named.

    `first` and `second` are moments of AdamW; of SGD the buffer and None. NotImplementedError has every objection.
    """
    moments = [m.code if isinstance(m, Moment8) else m for m in (first, second)]
    rejected = []
    for row in backends.REPARAM:
        if not (row.auto if backend == "auto" else row.name == backend):
            continue
        try:
            module = reference if row.name == "reference" else backends.module(row.name, "reparam")
        except NotImplementedError as error:
            rejected.append(f"\n  {row.name.removeprefix('guarded ')}: {error}")
            continue
        if not hasattr(module, "sweep_unsupported"):
            rejected.append(f"\n  {row.name}: it has no sweep")
            continue
        reasons = module.sweep_unsupported(w, *moments, h, dy, form)
        if not reasons:
            return module
        rejected.append(f"\n  {row.name}: " + "; ".join(reasons))
    raise NotImplementedError(f"no backend for w {list(w.shape)} {w.dtype} on {w.device.type}:" + "".join(rejected))
