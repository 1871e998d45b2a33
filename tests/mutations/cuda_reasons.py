"""Why what cuda.py could not see is no mistake: file, function, text and which of the same."""

from typing import Any

REASONS = {
    ("fwd_short.h", "weights", "for (int i = 0; i < 4; ++i)", 0): (
        "no mistake: hw::opaque changes no number, it keeps a compiler from moving the rounding"
    ),
}


def reason_of(row: dict[str, Any]) -> str:
    return REASONS.get((row["file"], row["function"], row["text"], row["nth"]), "")
