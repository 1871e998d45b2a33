"""Tables and a figure from one results JSON of bench_models.py, and from nothing else.

python -m bench.models.plot bench/results/models-<device>.json
"""

import sys
from pathlib import Path

from bench.harness.publish import Row, by_case, publish

# ours, as a share of what the other way adds to the frozen model; of the frozen model's step, for attach alone
TIME, PEAK, ATTACH = 0.3, 0.15, 0.03
OTHERS = ("peft", "original")
NAMES = {"peft": "PEFT", "original": "published way"}


def share(ours: float, other: float, goal: float) -> str:
    if other <= 0:
        return "-"
    return f"{ours / other:.2f}" + ("" if ours / other <= goal else " **missed**")


def steps(result: Row) -> list[str]:
    """Extra over frozen; the shares are of what PEFT or the published way adds there."""
    lines = [
        f"| model | frozen ms | way | extra ms (p20-p80) | of the other's (goal {TIME}) | trained + moments MiB "
        f"| extra MiB of a step | of the other's (goal {PEAK}) | extra MiB in all | of the other's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case, rows in by_case(result).items():
        if rows["frozen"]["P"] == 0:
            continue
        for baseline, row in rows.items():
            if baseline == "frozen":
                continue
            p20, p50, p80 = row["extra_ms"]
            others = {NAMES[o]: rows[o] for o in OTHERS if o in rows} if baseline.startswith("ours") else {}
            shares = {
                key: ", ".join(f"{name}: {share(value(row), value(o), goal)}" for name, o in others.items())
                for key, value, goal in (
                    ("time", lambda r: r["extra_ms"][1], TIME),
                    ("step", lambda r: r["extra_step_mib"], PEAK),
                    ("all", lambda r: r["extra_mib"], float("inf")),
                )
            }
            cells = [
                case,
                f"{rows['frozen']['ms'][1]:.0f}",
                NAMES.get(baseline, baseline) + (" (note)" if "note" in row else ""),
            ]
            cells += [f"{p50:.1f} ({p20:.1f} to {p80:.1f})", shares["time"]]
            cells += [f"{row['trained_mib'] + row['moments_mib']:.1f}", f"{row['extra_step_mib']:.1f}", shares["step"]]
            cells += [f"{row['extra_mib']:.1f}", shares["all"]]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def notes(result: Row) -> list[str]:
    found = {row["note"]: None for row in result["rows"] if "note" in row}
    return [f"(note) {note}." for note in found]


def attached(result: Row) -> list[str]:
    lines = [
        f"| model | frozen ms | attached, no prefix: extra ms (p20 to p80), of the step (goal {ATTACH:.0%}) "
        "| extra MiB | P 1 on the first layer: extra ms, of the step | extra MiB |",
        "|---|---|---|---|---|---|",
    ]
    for rows in by_case(result).values():
        frozen = rows["frozen"]
        if frozen["P"]:
            continue
        cells = [frozen["model"], f"{frozen['ms'][1]:.0f}"]
        for baseline in ("no prefix", "P 1, first layer"):
            p20, p50, p80 = rows[baseline]["extra_ms"]
            share = p50 / frozen["ms"][1]
            said = f"{share:+.1%}" + ("" if share <= ATTACH else " **missed**")
            cells += [f"{p50:.1f} ({p20:.1f} to {p80:.1f}), {said}", f"{rows[baseline]['extra_mib']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def tables(result: Row) -> str:
    return "\n".join(
        [
            f"{result['device']}, {result['threads']} threads, float32, torch {result['torch']}, transformers "
            f"{result['transformers']}, peft {result['peft']}, commit {result['commit'][:12]} ({result['tree']}), "
            f"{result['date']}.",
            "",
            "A training step beyond the frozen model's with SDPA (medians of the differences within a round); "
            "negative: faster or smaller than without a prefix.",
            "",
            *steps(result),
            "",
            *notes(result),
            "",
            "What attach costs without a prefix:",
            "",
            *attached(result),
            "",
        ]
    )


def figure(result: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    bars = [
        (f"{case}, {NAMES.get(baseline, baseline)}", row)
        for case, rows in by_case(result).items()
        for baseline, row in rows.items()
        if baseline != "frozen"
    ]
    fig, (times, sizes) = plt.subplots(1, 2, figsize=(12, 1.5 + 0.28 * len(bars)), sharey=True, layout="constrained")
    at = range(len(bars))
    colors = ["tab:blue" if "ours" in name else "tab:green" if " P0" in name else "tab:gray" for name, _ in bars]
    times.barh(at, [row["extra_ms"][1] for _, row in bars], color=colors)
    for y, (_, row) in zip(at, bars, strict=True):
        times.plot([row["extra_ms"][0], row["extra_ms"][2]], [y, y], color="black", linewidth=1)
    sizes.barh(at, [row["extra_step_mib"] for _, row in bars], color=colors)
    times.set_yticks(at, [name for name, _ in bars])
    times.invert_yaxis()
    times.set_xlabel("extra ms a step, p20 to p80")
    sizes.set_xlabel("extra MiB of a step (activations and gradients)")
    for axis in (times, sizes):
        axis.axvline(0.0, color="black", linewidth=0.8)
    fig.suptitle(f"training steps beyond the frozen model's, {result['device']}, {result['threads']} threads")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(arguments: list[str]) -> None:
    publish(Path(arguments[0]) if arguments else None, "python -m bench.models.bench_models", tables, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
