"""Tables and a figure from one results JSON of bench_reparam.py, and from nothing else.

python -m bench.reparam.plot bench/results/reparam-<device>.json
"""

import sys
from pathlib import Path

from bench.harness.publish import Row, by_case, publish
from bench.reparam.cases import CASES, ROWS, Network

# how many times as long as ours the others should take
GOALS = {"gpt2-medium P10": {"eager": 3.0}, "gpt2-medium P200": {"eager": 1.3, "original": 9.0}}
# too large for most machines: PEFT's default width of the bottleneck, the model's own
COMPUTED = {"llama-7b P30, hidden 4096": Network(1, 32, 32, 128, 4096, 4096, 30)}


def times(result: Row) -> list[str]:
    lines = [
        "| network | ours ms (p20-p80) | floor ms | eager + fused AdamW | eager + foreach AdamW "
        "| original, 8 samples' rows | ours with torch's AdamW |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, rows in by_case(result).items():
        p20, p50, p80 = rows["ours"]["ms"]
        cells = [f"{p50:.1f} ({p20:.1f}-{p80:.1f})", f"{rows['ours']['floor_ms']:.1f}"]
        for baseline in ("eager", "eager, foreach", "original", "ours, any optimizer"):
            ratio = rows[baseline]["ms"][1] / p50
            goal = GOALS.get(case, {}).get(baseline)
            said = "" if goal is None else f" (goal {goal})" + ("" if ratio >= goal else " **missed**")
            cells.append(f"{rows[baseline]['ms'][1]:.1f}: {ratio:.2f}x{said}")
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def activations(size: Network, rows: int) -> int:
    """Input rows, the bottleneck before and after tanh, and kv, of as many samples as go through the network."""
    small = size.networks * size.length * (size.width + 2 * size.hidden) * 4
    return rows * (small + size.kv_bytes)


def peak_table(result: Row) -> list[str]:
    """Parameters, gradients, moments and activations; computed from the sizes, and the step's peak as measured."""
    lines = [
        "| network | parameters | moments | gradients: original | ours | activations: original | ours "
        "| step's peak, measured: original | eager | ours | ours / matrix |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    measured = by_case(result)
    for case, size in (CASES | COMPUTED).items():
        small = size.parameter_bytes - size.matrix_bytes
        factors = size.kv_bytes + 4 * size.networks * size.length * size.hidden
        cells = [mib(size.parameter_bytes), mib(2 * size.parameter_bytes), mib(size.parameter_bytes)]
        cells += [mib(small + factors), mib(activations(size, ROWS)), mib(activations(size, 1))]
        rows = measured.get(case, {})
        if "step_mib" in rows.get("ours", {}):
            cells += [f"{rows[baseline]['step_mib']:,.1f}" for baseline in ("original", "eager", "ours")]
            cells.append(f"{rows['ours']['step_mib'] * 2**20 / size.matrix_bytes:.0%}")
        else:
            cells += ["not measured"] * 3 + [""]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return lines


def tables(result: Row) -> str:
    return "\n".join(
        [
            f"{result['device']}, {result['threads']} threads, torch {result['torch']}, commit {result['commit'][:12]} "
            f"({result['tree']}), {result['date']}. A copy moves {result['copy_gbytes_per_s']:.0f} GB/s.",
            "",
            "One training step of the network, milliseconds (medians), and how many times as long as ours:",
            "",
            *times(result),
            "",
            "MiB, float32; computed from the sizes but for the last columns:",
            "",
            *peak_table(result),
            "",
        ]
    )


def figure(result: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = by_case(result)
    baselines = ("eager", "eager, foreach", "original", "ours, any optimizer")
    fig, axis = plt.subplots(figsize=(9, 1.5 + 0.7 * len(cases)), layout="constrained")
    for i, baseline in enumerate(baselines):
        ratios = [found[baseline]["ms"][1] / found["ours"]["ms"][1] for found in cases.values()]
        axis.barh([y + 0.2 * (i - 1.5) for y in range(len(cases))], ratios, height=0.2, label=baseline)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axis.set_yticks(range(len(cases)), list(cases))
    axis.invert_yaxis()
    axis.set_xlabel("time of a step / ours")
    fig.legend(loc="outside lower center", ncols=len(baselines))
    axis.set_title(f"reparameterization step, {result['device']}, {result['threads']} threads")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(arguments: list[str]) -> None:
    publish(
        Path(arguments[0]) if arguments else None, "python -m pytest bench/reparam/bench_reparam.py", tables, figure
    )


if __name__ == "__main__":
    main(sys.argv[1:])
