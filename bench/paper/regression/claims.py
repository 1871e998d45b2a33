"""What the theorems say of each measure of each setting, and what they leave open.

4.1 bounds the worst case of one loss from below. 4.2 and 4.3 bound other losses of their own estimators from above.
So no two of them are about the same loss, and none says that one estimator is better than another.
"""

from dataclasses import dataclass
from typing import Any

from bench.paper.regression.families import ACTIVATIONS

HALF, QUARTER = 0.5, 0.25


@dataclass(frozen=True)
class Claim:
    """kind: as in `slopes.verdict`; `stated`: by the paper, of this setting. `source` says where, or why not."""

    kind: str
    power: float
    log: bool
    stated: bool
    source: str


def of(setting: dict[str, Any], measure: str) -> Claim | None:
    """None for what is shown without a claim."""
    name, spare = setting["family"], setting["atoms"] > 2
    if measure == "l2":
        where = {"separate": "not stated for separate prompts", "simple": "Proposition B.1"}
        return Claim("upper", HALF, True, name != "separate", where.get(name, "Proposition B.2"))
    if name == "separate":
        if measure in ("d1_1", "d1_2"):
            return Claim("lower", HALF, False, spare, "Theorem 4.1" if spare else "4.1 is of more atoms than the truth")
        if measure.endswith("_crowd"):
            return Claim("slower", QUARTER, False, False, "the authors' reading of 4.1, not 4.1")
        if measure.endswith("_alone"):
            return Claim("upper", HALF, True, False, "4.1 does not tell cells apart")
        if measure == "d3":
            return Claim("upper", HALF, True, False, "the loss of 4.3, for comparison")
        return None
    if measure == "imbalance":
        return None
    stated = name != "linear"
    source = "Theorem 4.2" if name == "simple" else "Theorem 4.3" if stated else "4.3 needs A.2, which linear breaks"
    assert name == "simple" or name in ACTIVATIONS
    return Claim("upper", QUARTER if measure.endswith("_crowd") else HALF, True, stated, source)
