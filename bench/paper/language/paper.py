"""What the paper (arXiv 2410.02200, Tables 2 and 8) reports of E2E, WebNLG and XSUM, and what a score is called there.

E2E and WebNLG are of GPT-2 medium, XSUM is of BART-large; one seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

from bench.paper.sweeps.cells import Cell
from bench.paper.sweeps.tables import span


class Column(NamedTuple):
    """A score: where a run's result has it, and how a table shows it."""

    title: str
    path: tuple[str, ...]
    times: float = 1.0  # shown over stored
    form: str = ".2f"


PARTS = ("seen", "unseen", "all")
COLUMNS: dict[str, tuple[Column, ...]] = {
    "e2e": (
        Column("BLEU", ("BLEU",), 100, ".1f"), Column("NIST", ("NIST",)), Column("METEOR", ("METEOR",), 100, ".1f"),
        Column("ROUGE-L", ("ROUGE_L",), 100, ".1f"), Column("CIDEr", ("CIDEr",)),
    ),
    "webnlg": (
        *(Column(f"BLEU {part}", ("BLEU", part), form=".1f") for part in PARTS),
        *(Column(f"METEOR {part}", ("METEOR", part)) for part in PARTS),
        *(Column(f"TER {part}", ("TER", part)) for part in PARTS),
    ),
    "xsum": tuple(Column(name, (name, "documents")) for name in ("ROUGE-1", "ROUGE-2", "ROUGE-L")),
}  # fmt: skip
COMPARED = {"e2e": ("BLEU",), "webnlg": tuple(f"BLEU {part}" for part in PARTS), "xsum": ("ROUGE-L",)}
BACKBONES = {"e2e": "GPT-2 medium", "webnlg": "GPT-2 medium", "xsum": "BART-large"}

# in the order of the columns; Table 8 has partial (its last two layers) and adapter, Table 2 the others
REPORTED: dict[str, dict[str, tuple[float, ...]]] = {
    "e2e": {
        "finetune": (68.2, 8.62, 46.2, 71.0, 2.47), "deep": (69.9, 8.78, 46.3, 71.5, 2.45),
        "none": (68.0, 8.61, 45.8, 71.0, 2.41), "partial": (68.1, 8.59, 46.0, 70.8, 2.41),
        "adapter": (66.3, 8.41, 45.0, 69.8, 2.40),
    },
    "webnlg": {
        "finetune": (64.2, 27.7, 46.5, 0.45, 0.30, 0.38, 0.33, 0.76, 0.53),
        "deep": (63.9, 44.3, 54.5, 0.45, 0.36, 0.41, 0.34, 0.52, 0.42),
        "none": (61.1, 42.8, 53.5, 0.43, 0.35, 0.40, 0.36, 0.49, 0.42),
        "partial": (53.6, 18.9, 36.0, 0.38, 0.23, 0.31, 0.49, 0.99, 0.72),
        "adapter": (54.5, 45.1, 50.2, 0.39, 0.36, 0.38, 0.40, 0.46, 0.43),
    },
    "xsum": {"finetune": (45.14, 22.27, 37.25), "deep": (42.62, 19.66, 34.36), "none": (36.86, 15.16, 29.89)},
}  # fmt: skip
SAME_ROW = {"original": "deep", "none-word": "none"}  # methods that one row of the paper is about
NO_SHARE = (
    "The paper has one No-share. Its commands train the keys and values of one word's tokens from what the word gives; "
    "the paper describes rows that are free."
)
NAMES = {
    "frozen": "No prefix", "deep": "Deep-share", "simple": "Simple-share", "none": "No-share",
    "none-word": "No-share from a word", "original": "Deep-share as published", "peft": "PEFT's prefix",
    "prompt": "Prompt tuning", "plus": "Prefix-Tuning+", "lora": "LoRA", "adapter": "Adapter", "finetune": "Finetune",
}  # fmt: skip
WITH_LENGTH = ("deep", "simple", "none", "original", "peft", "prompt")  # methods that P tells something


def named(cells: Sequence[Cell]) -> str | None:
    """The name of a method, of which these are cells."""
    method = cells[0]["method"]
    return f"Partial-{span(cell['last'] for cell in cells)}" if method == "partial" else NAMES.get(method)


def reported(cell: Cell) -> tuple[float, ...]:
    """The paper's numbers of a cell, in the order of the columns; () where it has none."""
    method = cell["method"]
    if method == "partial" and cell["last"] != 2:
        return ()
    return REPORTED[cell["task"]].get(SAME_ROW.get(method, method), ())
