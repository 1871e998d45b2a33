"""Tasks by name, from the folder that PREFIXATTN_DATA names; what a method's texts are scored by."""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from bench.paper.language import e2e, webnlg, xsum
from bench.paper.language.data import Task
from bench.paper.runs import Refusal

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
    """The task's metrics by name, and "notes" on what computed each; of WebNLG by seen, unseen and all."""
    if name == "webnlg":
        return _webnlg(references, texts, seen)
    if name == "xsum":
        from bench.paper import xsum_metrics

        values, notes = xsum_metrics.score([refs[0] for refs in references], texts)
        return {**values, "notes": notes}
    from bench.paper import e2e_metrics

    return dict(e2e_metrics.score(references, texts))


def _webnlg(references: Sequence[Sequence[str]], texts: Sequence[str], seen: Sequence[bool]) -> dict[str, Any]:
    """References are spelt as in the challenge's files, and the seen entries go first, as there."""
    from bench.paper import webnlg_metrics

    if len(set(seen)) < 2:
        return {"notes": {"all": "not computed: of the seen or of the unseen categories no entry was decoded"}}
    parts: dict[str, list[tuple[str, ...]]] = {"seen": [], "unseen": []}
    outputs: dict[str, list[str]] = {"seen": [], "unseen": []}
    for refs, text, known in zip(references, texts, seen, strict=True):
        spelt = [" ".join(webnlg_metrics.tokens(ref)) for ref in refs[: webnlg_metrics.COUNTED]]
        part = "seen" if known else "unseen"
        parts[part].append((*spelt, *[""] * (webnlg_metrics.COUNTED - len(spelt))))
        outputs[part].append(text)
    values, notes = webnlg_metrics.score(parts, [*outputs["seen"], *outputs["unseen"]])
    return {**values, "notes": notes}
