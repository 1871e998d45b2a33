"""Tables and a figure from one results JSON, and from nothing else.

    python -m bench.attention.plot [bench/results/<device>.json]

Prints the tables as markdown and writes them, and the figure, beside the JSON.
"""

import sys
from math import exp, log
from pathlib import Path
from statistics import fmean

from bench.harness.publish import Row, publish
from bench.harness.record import RESULTS

COLUMNS = (
    ("torch.float32", "fwd"),
    ("torch.float32", "fwd+bwd"),
    ("torch.bfloat16", "fwd"),
    ("torch.bfloat16", "fwd+bwd"),
)
# what the CPU kernels are built to reach: geometric mean of peer's time over ours, and the least for any one shape
GOALS = {False: (1.6, 1.4, 3.0, 2.7), True: (2.6, 2.4, 4.5, 3.3)}
GOALS_OF_AMX = {False: (1.35, 1.3, 3.2, 4.0), True: (1.75, 1.7, 4.2, 4.5)}  # there torch has the tiles, too
LEAST = 1.2


def shape_name(row: Row) -> str:
    s = row["shape"]
    return f"{s['model']} B{s['B']} N{s['L']} P{s['P']} D{s['D']}"


def short(dtype: str) -> str:
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16"}.get(dtype, dtype)


def pair(rows: list[Row]) -> list[Row]:
    """One entry a case: ours, the fastest peer, the rest by name, and how many times longer the peer takes."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((shape_name(row), row["dtype"], row["pass"]), []).append(row)
    pairs = []
    for (name, dtype, passes), found in cases.items():
        timed = [row for row in found if "ms" in row]
        [ours] = [row for row in timed if row["role"] == "ours"]
        peer = min((row for row in timed if row["role"] == "peer"), key=lambda row: row["ms"][1])
        pairs.append(
            {
                "name": name,
                "dtype": dtype,
                "pass": passes,
                "causal": ours["shape"]["model"] == "gpt",
                "ours": ours,
                "peer": peer,
                "others": {row["impl"]: row for row in timed if row["role"] in ("trick", "floor")},
                "ratio": peer["ms"][1] / ours["ms"][1],
                "ratio_min": min(row["min_ms"] for row in timed if row["role"] == "peer") / ours["min_ms"],
            }
        )
    return pairs


def geometric_mean(values: list[float]) -> float:
    return exp(fmean(map(log, values)))


def goals(result: Row) -> dict[bool, tuple[float, ...]]:
    """Of the class of CPU that a record is of."""
    return GOALS_OF_AMX if result.get("instructions", "").startswith("amx") else GOALS


def summary(pairs: list[Row], measure: str, goals: dict[bool, tuple[float, ...]] = GOALS) -> list[str]:
    lines = ["| | " + " | ".join(f"{short(d)} {p}" for d, p in COLUMNS) + " |", "|---|" + "---|" * len(COLUMNS)]
    for causal in (False, True):
        cells = []
        for (dtype, passes), goal in zip(COLUMNS, goals[causal], strict=True):
            of = [p for p in pairs if p["causal"] == causal and (p["dtype"], p["pass"]) == (dtype, passes)]
            if not of:
                cells.append("not measured")
                continue
            worst = min(of, key=lambda p: p[measure])
            mean = geometric_mean([p[measure] for p in of])
            met = "" if mean >= goal and worst[measure] >= LEAST else " **missed**"
            cells.append(f"{mean:.2f} (goal {goal}; least {worst[measure]:.2f}, {worst['name']}){met}")
        lines.append(f"| {'causal' if causal else 'bidirectional'} | " + " | ".join(cells) + " |")
    return lines


def details(pairs: list[Row]) -> list[str]:
    lines = [
        "| shape | type | pass | ours ms (p20-p80) | fastest peer ms | ratio | by minima | GFLOP/s | of GEMM "
        "| peak MiB ours / peer / necessary | no prefix ms | padded-q ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in pairs:
        ours, peer = p["ours"], p["peer"]
        p20, p50, p80 = ours["ms"]
        peaks = " / ".join(
            f"{mib:.1f}"
            for mib in (ours.get("peak_mib"), peer.get("peak_mib"), ours.get("necessary_mib"))
            if mib is not None
        )
        floor, trick = (
            f"{p['others'][name]['ms'][1]:.2f}" if name in p["others"] else ""
            for name in ("sdpa_no_prefix", "sdpa_padded_q")
        )
        lines.append(
            f"| {p['name']} | {short(p['dtype'])} | {p['pass']} | {p50:.2f} ({p20:.2f}-{p80:.2f}) "
            f"| {peer['ms'][1]:.2f} {peer['impl']} | {p['ratio']:.2f} | {p['ratio_min']:.2f} | {ours['gflops']:.0f} "
            f"| {ours['gemm_share']:.0%} | {peaks} | {floor} | {trick} |"
        )
    return lines


def tables(result: Row) -> str:
    pairs = pair(result["rows"])
    rate = ", ".join(f"{short(dtype)} {gflops:.0f}" for dtype, gflops in result["gemm_gflops"].items())
    kernels = f", kernels for {result['instructions']}" if "instructions" in result else ""
    tricked = [p for p in pairs if "sdpa_padded_q" in p["others"]]
    behind = [p for p in tricked if p["others"]["sdpa_padded_q"]["ms"][1] < p["ours"]["ms"][1]]
    absent = sorted({f"{r['impl']} ({r['pass']}): {r['absent']}" for r in result["rows"] if "absent" in r})
    return "\n".join(
        [
            f"{result['device']}, {result['threads']} threads, torch {result['torch']}, commit {result['commit'][:12]} "
            f"({result['tree']}), {result['date']}{kernels}. GEMM GFLOP/s: {rate}.",
            "",
            "Time of the fastest peer over ours, geometric mean, by medians:",
            "",
            *summary(pairs, "ratio", goals(result)),
            "",
            "The same by minima, which other load on the machine disturbs least:",
            "",
            *summary(pairs, "ratio_min", goals(result)),
            "",
            f"sdpa_padded_q (a trick, no peer) is ahead of ours in {len(behind)} of {len(tricked)} causal cases.",
            *(f"Absent: {line}" for line in absent),
            "",
            *details(pairs),
            "",
        ]
    )


def figure(result: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = pair(result["rows"])
    names = list(dict.fromkeys(p["name"] for p in pairs))
    fig, axes = plt.subplots(1, len(COLUMNS), figsize=(16, 1 + 0.25 * len(names)), sharey=True, layout="constrained")
    for axis, (dtype, passes) in zip(axes, COLUMNS, strict=True):
        of = {p["name"]: p for p in pairs if (p["dtype"], p["pass"]) == (dtype, passes)}
        shown = [name for name in names if name in of]
        colours = ["tab:orange" if of[name]["causal"] else "tab:blue" for name in shown]
        axis.barh([names.index(name) for name in shown], [of[name]["ratio"] for name in shown], color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.axvline(LEAST, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(f"{short(dtype)} {passes}")
        axis.set_xlabel("fastest peer's time / ours")
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].invert_yaxis()
    fig.suptitle(
        f"prefix_attention, {result['device']}, {result['threads']} threads (blue bidirectional, orange causal)"
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(arguments: list[str]) -> None:
    # no name given: the run made last; other benchmarks' results lie there too
    last = max(RESULTS.glob("cpu-*.json"), key=lambda p: p.stat().st_mtime, default=None)
    publish(Path(arguments[0]) if arguments else last, "make bench", tables, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
