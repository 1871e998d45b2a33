"""Tables and a figure from one GPU's results JSON, and from nothing else.

    python -m bench.attention.plot_gpu bench/results/<device>.json

Prints the tables as markdown and writes them, and the figure, beside the JSON. Rows where a peer wins stay.
"""

import sys
from dataclasses import replace
from pathlib import Path

from bench.attention.baselines import BenchShape
from bench.attention.baselines_gpu import TARGETS
from bench.attention.plot import pair, short
from bench.harness.publish import Row, publish

NAMES = {"fwd": "forward", "fwd+bwd": "+ backward", "prefix grads": "prefix gradients only"}


def shape_of(row: Row) -> BenchShape:
    return BenchShape(**row["shape"])


def us(row: Row | None) -> str:
    return f"{row['ms'][1] * 1e3:.1f}" if row and "ms" in row else ""


def without_prefix(result: Row, row: Row) -> Row | None:
    """Our own kernel's row for the same call with no prefix."""
    plain = replace(shape_of(row), P=0)
    wanted = (plain, row["pass"], row["dtype"], row["impl"])
    found = [r for r in result["rows"] if "ms" in r and (shape_of(r), r["pass"], r["dtype"], r["impl"]) == wanted]
    return found[0] if found and shape_of(row).P else None


def pairs(result: Row) -> list[Row]:
    """As plot.pair, by the shape itself; cases that no peer could run have none."""
    cases: dict[tuple[BenchShape, str, str], list[Row]] = {}
    for row in result["rows"]:
        cases.setdefault((shape_of(row), row["dtype"], row["pass"]), []).append(row)
    found = []
    for rows in cases.values():
        ours = next((r for r in rows if r["role"] == "ours" and "ms" in r), None)
        if ours is None:
            continue
        if any(r["role"] == "peer" and "ms" in r for r in rows):
            [entry] = pair(rows)
        else:
            entry = {"ours": ours, "peer": None, "ratio": None, "others": {}}
        found.append(entry | {"shape": shape_of(ours), "rows": rows})
    return found


def met(value: float | None, target: float, least: bool) -> str:
    if value is None:
        return ""
    return "" if (value >= target if least else value <= target) else " **missed**"


def targets(result: Row) -> list[str]:
    """The shapes that targets were set for."""
    lines = [
        "| shape | forward us (target) | best peer us | ratio (target) | + backward us | best peer us "
        "| ratio (target) | no prefix us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by = {(p["shape"], p["ours"]["pass"]): p for p in pairs(result)}
    for shape, (goal_us, goal, goal_backward) in TARGETS.items():
        fwd, bwd = by.get((shape, "fwd")), by.get((shape, "fwd+bwd"))
        if fwd is None:
            lines.append(f"| {shape} | not measured | | | | | | |")
            continue
        time = fwd["ours"]["ms"][1] * 1e3
        cells = [f"{time:.1f} ({goal_us}){met(time, goal_us, False)}", *_against(fwd, goal)]
        cells += [us(bwd["ours"]), *_against(bwd, goal_backward)] if bwd else ["not measured", "", ""]
        lines.append(f"| {shape} | {' | '.join(cells)} | {us(without_prefix(result, fwd['ours']))} |")
    return lines


def _against(entry: Row, goal: float) -> list[str]:
    if entry["peer"] is None:
        return ["none ran", ""]
    peer, ratio = entry["peer"], entry["ratio"]
    return [f"{us(peer)} {peer['impl']}", f"{ratio:.2f} ({goal}){met(ratio, goal, True)}"]


def details(result: Row) -> list[str]:
    lines = [
        "| shape | type | pass | ours us (p20-p80) | floor us | share | issue us | clock "
        "| MiB peak / saved / necessary | no prefix us | peers us |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in pairs(result):
        ours = entry["ours"]
        p20, p50, p80 = (t * 1e3 for t in ours["ms"])
        peaks = " / ".join(f"{ours[k]:.1f}" for k in ("peak_mib", "saved_mib", "necessary_mib") if k in ours)
        others = sorted((r for r in entry["rows"] if r is not ours and "ms" in r), key=lambda r: r["ms"][1])
        listed = ", ".join(f"{r['impl']} {us(r)}" for r in others)
        floor, share = ours.get("floor_ms"), ours.get("floor_share")
        bound = ("", "") if floor is None else (f"{floor * 1e3:.1f}", f"{share:.0%}")
        cells = [str(entry["shape"]), short(ours["dtype"]), NAMES[ours["pass"]], f"{p50:.1f} ({p20:.1f}-{p80:.1f})"]
        cells += [*bound, str(ours.get("issue_us", "")), ours.get("clock", ""), peaks]
        cells += [us(without_prefix(result, ours)), listed]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tables(result: Row) -> str:
    if "copy_gbytes" not in result:
        sys.exit("this was measured on a CPU; bench/attention/plot.py draws it")
    gemm = ", ".join(f"{short(d)} {rate / 1e3:.0f}" for d, rate in result["gemm_gflops"].items())
    versions = ", ".join(
        f"{name} {result[name]}" for name in ("torch", "triton", "cuda", "cudnn", "driver") if result.get(name)
    )
    absent = sorted({f"{r['impl']}: {r['absent']}" for r in result["rows"] if "absent" in r})
    return "\n".join(
        [
            f"{result['device']}, {versions}, commit {result['commit'][:12]} ({result['tree']}), {result['date']}. "
            f"Ceilings measured in this run: {gemm} TFLOP/s, {result['copy_gbytes']:.0f} GB/s.",
            "",
            "Microseconds, medians; the best peer is the fastest that ran.",
            "",
            *targets(result),
            "",
            *details(result),
            "",
            *(f"- absent: {line}" for line in absent),
            "",
        ]
    )


def figure(result: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [p for p in pairs(result) if p["ratio"] is not None]
    names = list(dict.fromkeys(str(p["shape"]) for p in found))
    fig, axes = plt.subplots(
        1, len(NAMES), figsize=(15, 1.5 + 0.25 * len(names)), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, passes in zip(axes[0], NAMES, strict=True):
        of = {str(p["shape"]): p for p in found if p["ours"]["pass"] == passes}
        shown = [name for name in names if name in of]
        colours = ["tab:orange" if of[name]["shape"].causal else "tab:blue" for name in shown]
        axis.barh([names.index(name) for name in shown], [of[name]["ratio"] for name in shown], color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(NAMES[passes])
        axis.set_xlabel("fastest peer's time / ours")
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0, 0].invert_yaxis()
    fig.suptitle(f"prefix_attention, {result['device']} (blue bidirectional, orange causal)")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(arguments: list[str]) -> None:
    publish(Path(arguments[0]) if arguments else None, "bench/on_gpu.sh micro", tables, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
