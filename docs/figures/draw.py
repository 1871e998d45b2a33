"""The pictures of the pages in docs/.

python docs/figures/draw.py            writes them beside this file
python docs/figures/draw.py FOLDER     writes them there
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

PREFIX, OWN, QUERY, HIDDEN, STATE = "#f4a259", "#5b8e7d", "#4f6d9a", "#e6e6e6", "#bc4b51"
FIGURES: dict[str, Callable[[Any], None]] = {}


def figure(width: float, height: float) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """A drawing of so many units, saved under its function's name."""

    def register(draw: Callable[[Any], None]) -> Callable[[Any], None]:
        def on_page(path: Any) -> None:
            fig, ax = plt.subplots(figsize=(width / 2, height / 2))
            ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
            ax.axis("off")
            draw(ax)
            fig.savefig(path, dpi=90, bbox_inches="tight", format="png", metadata={"Software": None})
            plt.close(fig)

        FIGURES[draw.__name__] = on_page
        return draw

    return register


def box(ax: Any, x: float, y: float, w: float, h: float, color: str, words: str = "", size: float = 9) -> None:
    ax.add_patch(Rectangle((x, y), w, h, facecolor=color, edgecolor="white", linewidth=1))
    if words:
        dark = color in (OWN, QUERY, STATE)
        ax.text(x + w / 2, y + h / 2, words, ha="center", va="center", size=size, color="white" if dark else "black")


def cells(ax: Any, x: float, y: float, rows: int, columns: int, color: Callable[[int, int], str]) -> None:
    for i in range(rows):
        for j in range(columns):
            box(ax, x + j / 2, y + i / 2, 0.5, 0.5, color(i, j))


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], both: bool = False) -> None:
    style = "<|-|>" if both else "-|>"
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle=style, mutation_scale=10, color="black", linewidth=1))


def note(ax: Any, x: float, y: float, words: str, **how: Any) -> None:
    ax.text(x, y, words, **{"ha": "left", "va": "center", "size": 9, **how})


@figure(24, 9)
def op(ax: Any) -> None:
    """Scores of each sample: prefix columns are of the same keys, and every query sees them."""
    P, S = 4, 7
    for b in range(3):
        x, y = 5 + 5.8 * b, 3.4
        cells(ax, x, y, S, P + S, lambda i, j: PREFIX if j < P else OWN if j - P <= i else HIDDEN)
        note(ax, x + (P + S) / 4, y + S / 2 + 0.5, f"scores of sample {b}", ha="center")
        arrow(ax, (9.5 + 2.5 * b, 1.4), (x + P / 4, y - 0.1))
    box(ax, 8, 0.4, 9, 1, PREFIX, "prefix_k, prefix_v: P rows, in memory once")
    note(ax, 4.7, 3.65, "query 0", ha="right")
    note(ax, 4.7, 6.65, "query L - 1", ha="right")
    note(ax, 5, 8.3, "orange: the prefix, seen by every query", color=PREFIX, weight="bold", size=8)
    note(ax, 12.4, 8.3, "green: own keys, here causal", color=OWN, weight="bold", size=8)
    note(ax, 18.3, 8.3, "a row has one softmax", weight="bold", size=8)


@figure(22, 11)
def cpu(ax: Any) -> None:
    """A block of scores: a key to a row, a query to a lane."""
    x, y, P, S, lanes = 8, 3, 3, 9, 14
    cells(ax, x, y, P + S, lanes, lambda i, j: PREFIX if i < P else OWN if i - P <= j - 4 else HIDDEN)
    cells(ax, x, 1.3, 2, lanes, lambda i, j: QUERY)
    note(ax, x + lanes / 4, 0.8, "64 queries, transposed once: vectors along the lanes", ha="center")
    for i in range(P + S):
        box(ax, 5.3, y + i / 2, 1.6, 0.5, PREFIX if i < P else OWN)
    note(ax, 5, y + P / 4, "prefix rows,\nread where they lie", ha="right", size=8)
    note(ax, 5, y + P / 2 + S / 4, "own keys,\nread where they lie", ha="right", size=8)
    box(ax, 5.8, y + 2.5, 0.3, 0.5, "white")
    arrow(ax, (6.1, y + 2.75), (x - 0.05, y + 2.75))
    note(ax, 6.1, 10.0, "one scalar of a key is broadcast\nagainst a vector of queries", ha="center", size=8)
    arrow(ax, (6.1, 9.5), (5.98, y + 3.1))
    arrow(ax, (x + lanes / 2 + 0.5, y), (x + lanes / 2 + 0.5, y + (P + S) / 2))
    note(ax, x + lanes / 2 + 0.8, y + 2.2, "softmax runs down\neach lane:\nno shuffles")
    note(ax, x + lanes / 2 + 0.8, y + 5.2, "grey: hidden by causality;\nwhole vectors of it\nare left out")
    note(ax, x + lanes / 4, 9.7, "a block of 128 keys may begin in the prefix\nand end in the sequence", ha="center")


@figure(24, 8)
def triton(ax: Any) -> None:
    """Tiles of the key axis for N = 197 and P = 10, and without a prefix."""
    unit = 20 / 208
    for y, words, columns in ((1.4, "P = 10", 10), (4.8, "no prefix", 0)):
        note(ax, 2.6, y + 0.5, words, ha="right", weight="bold")
        for t in range(3):
            box(ax, 3 + 64 * t * unit, y, 64 * unit, 1, OWN, f"own keys {64 * t} to {64 * t + 63}")
        at = 3 + 192 * unit
        box(ax, at, y, 5 * unit, 1, OWN)
        box(ax, at + 5 * unit, y, columns * unit, 1, PREFIX)
        box(ax, at + (5 + columns) * unit, y, (11 - columns) * unit, 1, HIDDEN)
        for edge in (0, 64, 128, 192, 208):
            ax.plot([3 + edge * unit] * 2, [y - 0.3, y + 1.3], color="black", linewidth=1)
    note(ax, 3, 0.7, "three tiles of 64 read one tensor, and lie where they would without a prefix")
    note(
        ax,
        22.9,
        3.3,
        "the tail tile of 16: 5 own keys and 10 prefix rows;\nonly here an address is chosen for each row",
        ha="right",
    )
    arrow(ax, (21.6, 2.95), (22.2, 2.45))
    note(ax, 22.9, 6.7, "the same tail tile of 16, with 5 own keys", ha="right")
    arrow(ax, (21.6, 6.4), (22.1, 5.85))
    note(ax, 3, 7.5, "own keys", color=OWN, weight="bold")
    note(ax, 6, 7.5, "prefix", color=PREFIX, weight="bold")
    note(ax, 8.2, 7.5, "past the end", color="#888888", weight="bold")


@figure(24, 11)
def optimizer(ax: Any) -> None:
    """One pass over the large matrix: a tile of it, of its moments, and of its gradient, which is never whole."""
    x, y, w, h = 5, 3.2, 5, 5.6
    for k, words in enumerate(("matrix w2 [O, M]", "first moment", "second moment")):
        at = x + k * (w + 1)
        box(ax, at, y, w, h, HIDDEN)
        box(ax, at + 1.6, y + 2, 1.2, 1.2, QUERY if k == 0 else OWN)
        note(ax, at + w / 2, y + h + 0.5, words, ha="center")
    box(ax, x, 2.0, w, 0.8, PREFIX)
    box(ax, x + 1.6, 2.0, 1.2, 0.8, STATE)
    note(ax, x + w / 2, 1.5, "h [P, M]", ha="center")
    box(ax, 3.8, y, 0.8, h, PREFIX)
    box(ax, 3.8, y + 2, 0.8, 1.2, STATE)
    note(ax, 3.6, y + h / 2, "dy$^T$\n[O, P]", ha="right")
    arrow(ax, (x + 2.2, 2.85), (x + 2.2, y + 1.95))
    arrow(ax, (4.65, y + 2.6), (x + 1.55, y + 2.6))
    note(ax, 10.5, 1.9, "gradient of the tile = dy$^T$ h of the two red parts, in registers", size=10)
    note(ax, 10.5, 2.6, "AdamW updates the tile and its moments in the same visit", size=10)
    note(
        ax,
        5,
        10.2,
        "In the same visit dh = dy w2 is taken from the old tile: the small gradients are made of it.",
        size=10,
    )
    note(ax, 5, 10.8, "The whole gradient [O, M] is never in memory.", size=10, weight="bold")
    arrow(ax, (x + 2.9, y + 2.6), (x + 7.5, y + 2.6), both=True)
    arrow(ax, (x + 8.9, y + 2.6), (x + 13.5, y + 2.6), both=True)


def main(folder: Path) -> None:
    for name, draw in FIGURES.items():
        draw(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
