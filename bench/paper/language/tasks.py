"""Tasks by name, from the folder that PREFIXATTN_DATA names; what a method's texts are scored by."""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from language import e2e, webnlg, xsum
from language.data import Task
from runs import Refusal

NAMES = ("e2e", "webnlg", "xsum")


@lru_cache
def load(name: str, entry_zero_quirk: bool = False) -> Task:
    """E2E is downloaded where no folder is named, and made up where it cannot be. Refusal for other tasks then."""
    folder = os.environ.get("PREFIXATTN_DATA")
    if name == "e2e":
        return e2e.load(folder)
    if name not in NAMES:
        raise Refusal(f"no task {name!r}; there are {', '.join(NAMES)}")
    if folder is None:
        raise Refusal(f"{name}: no data folder; give --data or set PREFIXATTN_DATA")
    return webnlg.load(folder, entry_zero_quirk) if name == "webnlg" else xsum.load(folder)


def scores(
    name: str, references: Sequence[Sequence[str]], texts: Sequence[str], seen: Sequence[bool]
) -> dict[str, Any]:
    """The task's metrics by name, with notes on what computed each."""
    if name == "webnlg":
        import webnlg_metrics

        return webnlg_metrics.score(references, texts, seen)
    if name == "xsum":
        import xsum_metrics

        return xsum_metrics.score(references, texts)
    import e2e_metrics

    return dict(e2e_metrics.score(references, texts))
