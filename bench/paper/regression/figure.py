"""The figure of a result of `report.collect`: errors against n, the proofs' splits, the attention head."""

from pathlib import Path
from typing import Any

from bench.harness.files import replacing
from bench.paper.regression.names import MEASURES, ROUNDING
from bench.paper.regression.names import title as name_of


def draw(result: dict[str, Any], path: Path) -> None:
    """A PNG; the old file stays until the new one is whole."""
    with replacing(path) as temporary:
        drawing(result).savefig(temporary, dpi=90, format="png")


def drawing(result: dict[str, Any]) -> Any:
    """A matplotlib Figure of eight panels."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(20, 10), layout="constrained")
    axes = drawn.subplots(2, 4).flatten()
    regression = [one for one in result["settings"] if one["config"]["kind"] == "regression"]
    spare = [one for one in regression if one["config"]["atoms"] > 2 and one["config"]["d"] == 2]
    spare = [one for one in spare if one["config"]["design"] == "support"]
    _curves(axes[0], spare, ("l2",), "an atom to spare: regression error", 0.5)
    _curves(axes[1], spare, ("d1_1", "d2", "d3"), "an atom to spare: D_1,1 or D_2, and D_3", 0.5)
    _curves(axes[2], spare, ("value_alone", "key_alone"), "an atom to spare: alone in its cell", 0.5)
    _curves(axes[3], spare, ("value_crowd", "key_crowd"), "an atom to spare: atoms that share a cell", 0.25)
    exact = [one for one in regression if one["config"]["atoms"] == 2 and one["config"]["d"] == 2]
    _curves(axes[4], exact, ("d1_1", "d2", "d3"), "as many atoms as the truth: losses", 0.5)
    for name in dict.fromkeys(row["sequence"] for row in result["splits"]):
        rows = [row for row in result["splits"] if row["sequence"] == name and row["error"] > ROUNDING]
        axes[5].loglog(
            [row["n"] for row in rows], [row["ratio"] for row in rows], marker=".", label=name if rows else f"{name}: 0"
        )
    axes[5].set(title="error over loss along the proofs' splits", xlabel="n")
    attention = [one for one in result["settings"] if one["config"]["kind"] == "attention"]
    _curves(axes[6], attention, ("l2",), "attention head: error of the output", 0.5)
    twice = [one for one in attention if one["config"]["planted"] == "twice"]
    _curves(axes[7], twice, ("key_crowd", "value_crowd", "value_alone"), "attention head, two rows alike: prefix", 0.25)
    for each in axes:
        each.grid(alpha=0.3)
        if each.get_legend_handles_labels()[0]:
            each.legend(fontsize=6)
    return drawn


def _curves(axes: Any, settings: list[dict[str, Any]], measures: tuple[str, ...], title: str, power: float) -> None:
    """Means against n, and a dashed line of n**-power through the middle of the first curve's start."""
    guide: list[tuple[int, float]] = []
    for at, setting in enumerate(settings):
        for style, measure in zip(("-", ":", "-."), measures, strict=False):
            curve = setting["measures"].get(measure, {"curve": []})["curve"]
            shown = [(point["n"], point["mean"]) for point in curve if point["mean"]]
            if not shown:
                continue
            guide = guide or shown
            label = f"{name_of(setting)}: {MEASURES[measure]}"
            axes.loglog(*zip(*shown, strict=True), style, marker=".", color=f"C{at}", label=label)
    if guide:
        sizes = [n for n, _ in guide]
        axes.loglog(sizes, [guide[0][1] * (n / sizes[0]) ** -power for n in sizes], "--", color="black", linewidth=1,
                    label=f"n^-{power:g}")  # fmt: skip
    axes.set(title=title, xlabel="n")
