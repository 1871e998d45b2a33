"""Why what cuda.py could not see is no mistake: file, function, text and which of the same."""

from typing import Any

REASONS = {
    ("fwd_long.h", "Rows", "hw::sync_warp();", 0): (
        "no mistake: the ring's first unit has a barrier of the block between these stores and the first load"
    ),
    ("fwd_short.h", "weights", "for (int i = 0; i < 4; ++i)", 0): (
        "no mistake: hw::opaque changes no number, it keeps a compiler from moving the rounding"
    ),
    ("tiles.h", "load_a_transposed", "hw::ldmatrix_trans(a, along(tile, row, column));", 0): "no kernel calls it",
}


def reason_of(row: dict[str, Any]) -> str:
    return REASONS.get((row["file"], row["function"], row["text"], row["nth"]), "")
