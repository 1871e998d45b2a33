"""Why what cuda.py could not see is no mistake, or one that no program can see: file, function, text and its number."""

from typing import Any

REASONS = {
    ("fwd_long.h", "Rows", "for (int n = 0; n < D / kColumns; ++n)", 0): (
        "before the first sum what these registers hold is multiplied by exp2(-inf) = 0, which only inf and nan "
        "survive; the machine knows no registers, and the compiler's pattern for what nobody set is finite"
    ),
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
